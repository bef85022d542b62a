//! Which endpoints are left alone for a while, because they fail what they are sent, and when they are tried again.
//!
//! Each node judges by what its own pods met. An endpoint that fails everything fails it fast, so whatever goes by load or
//! latency alone would send it more and more.

use std::time::{Duration, Instant};

use crate::model::{Ejection, Endpoint, EndpointLoad, Health, Outliers, ServicePort, Standing};

/// By how much an ejection is longer at most, so that not all endpoints come back at the same moment.
const JITTER: f64 = 0.1;

/// Who has behaved for so long after an ejection starts anew.
const FORGIVEN_AFTER: Duration = Duration::from_secs(300);

/// How long an endpoint is left alone at which nobody listens: servers that start anew are there again soon.
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// A probe that brought no verdict by now will bring none.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What became of a connection or a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was answered, and not with an error of the server.
    Good,
    /// A connection was made; what travels on it is not known.
    Connected,
    /// An error of the server itself: 500 and the like.
    ServerError,
    /// 502, 503 or 504, no connection, none that lasted, or no answer in time.
    GatewayFailure,
    /// As that, for nobody listens there: the next connection would meet the same.
    Refused,
}

/// What follows from a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing goes there for so long.
    Ejected {
        /// Why.
        reason: EjectionReason,
        /// How long.
        lasts: Duration,
    },
    /// It is as good as any again.
    Returned,
}

/// Why an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EjectionReason {
    /// Answers of the kind 5xx, one after the other.
    ConsecutiveServerErrors,
    /// Gateway errors or failures of the connection, one after the other.
    ConsecutiveGatewayFailures,
    /// Nobody listened.
    Refused,
    /// It was tried again after its time, and failed.
    FailedProbe,
    /// It answered well less often than the others.
    LowSuccessRate,
}

/// Takes in what became of something that was sent to an endpoint of the port. `random` is fresh, from 0 to 1.
pub fn judge(
    port: &ServicePort,
    endpoint: &Endpoint,
    verdict: Verdict,
    now: Instant,
    random: f64,
) -> Option<Change> {
    let (load, outliers) = (&endpoint.load, &port.traffic.outliers);
    let is_good = matches!(verdict, Verdict::Good | Verdict::Connected);
    if outliers.success_rate.is_some() {
        load.count_outcome(is_good);
    }
    if is_good && load.standing() == Standing::Good {
        return None;
    }
    let change = load.change_health(|health| {
        let eject = |health: &mut Health, reason| Some(eject(health, outliers, reason, now, random));
        match (verdict, health.ejection) {
            // Of before the ejection, or sent there because there was nobody else.
            (_, Some(ejection)) if now < ejection.until => None,
            (Verdict::Good | Verdict::Connected, Some(_)) => {
                *health = Health { times: health.times, returned: Some(now), ..Health::default() };
                Some(Change::Returned)
            }
            (_, Some(_)) if is_off(outliers) => {
                *health = Health::default();
                Some(Change::Returned)
            }
            (_, Some(_)) => eject(health, EjectionReason::FailedProbe),
            (Verdict::Good, None) => {
                (health.server_errors, health.gateway_failures) = (0, 0);
                None
            }
            (Verdict::Connected, None) => {
                // It says nothing of errors that came as answers.
                health.server_errors = health.server_errors.saturating_sub(health.gateway_failures);
                health.gateway_failures = 0;
                None
            }
            (Verdict::ServerError | Verdict::GatewayFailure | Verdict::Refused, None) => {
                health.server_errors = health.server_errors.saturating_add(1);
                health.gateway_failures = match verdict {
                    Verdict::ServerError => 0,
                    _ => health.gateway_failures.saturating_add(1),
                };
                let has_reached = |count: u32, limit: u32| limit > 0 && count >= limit;
                let reason = if verdict == Verdict::Refused && outliers.consecutive_gateway_failures > 0 {
                    EjectionReason::Refused
                } else if has_reached(health.gateway_failures, outliers.consecutive_gateway_failures) {
                    EjectionReason::ConsecutiveGatewayFailures
                } else if has_reached(health.server_errors, outliers.consecutive_errors) {
                    EjectionReason::ConsecutiveServerErrors
                } else {
                    return None;
                };
                if may_be_spared(port, endpoint) { eject(health, reason) } else { None }
            }
        }
    });
    if let Some(Change::Ejected { .. }) = change {
        port.load.set_wary(true);
    }
    change
}

/// Nothing is to go there from now on.
pub(super) fn eject(
    health: &mut Health,
    outliers: &Outliers,
    reason: EjectionReason,
    now: Instant,
    random: f64,
) -> Change {
    let lasts = match reason {
        EjectionReason::Refused => REFUSED_FOR,
        _ => {
            if health.returned.is_some_and(|at| now.saturating_duration_since(at) >= FORGIVEN_AFTER) {
                health.times = 0;
            }
            health.times = health.times.saturating_add(1);
            outliers.base_ejection.saturating_mul(health.times).min(outliers.longest_ejection)
        }
    };
    let lasts = lasts.mul_f64(1.0 + JITTER * random);
    health.ejection = Some(Ejection { until: now + lasts, probed: None });
    (health.server_errors, health.gateway_failures) = (0, 0);
    Change::Ejected { reason, lasts }
}

/// Whether endpoints are not judged at all; they were before, if one is ejected.
fn is_off(outliers: &Outliers) -> bool {
    let Outliers { consecutive_errors, consecutive_gateway_failures, success_rate, .. } = outliers;
    (*consecutive_errors, *consecutive_gateway_failures) == (0, 0) && success_rate.is_none()
}

/// Whether it is for the caller to try an endpoint whose time is over: then it is, and for nobody else until there is a verdict.
pub(super) fn is_to_probe(load: &EndpointLoad, now: Instant) -> bool {
    load.change_health(|health| {
        let Some(ejection) = &mut health.ejection else { return false };
        let is_probed =
            ejection.probed.is_some_and(|since| now.saturating_duration_since(since) < PROBE_LIMIT);
        if now < ejection.until || is_probed {
            return false;
        }
        ejection.probed = Some(now);
        true
    })
}

/// Whether so many are ejected that it is not the endpoints that are to blame, or that those left could not bear it. Then all
/// count.
pub(super) fn is_panic(outliers: &Outliers, ejected: usize, of: usize) -> bool {
    ejected * 100 > of * usize::from(outliers.panic_above)
}

/// Whether enough of the port's endpoints of this family are left without this one. The only one never may be.
pub(super) fn may_be_spared(port: &ServicePort, endpoint: &Endpoint) -> bool {
    let candidates = port.candidates.like(endpoint.address.ip()).all();
    let is_ejected = |index: &&u32| port.endpoints[**index as usize].load.standing() == Standing::Ejected;
    let without = candidates.iter().filter(is_ejected).count() + 1;
    candidates.len() > 1
        && without * 100 <= candidates.len() * usize::from(port.traffic.outliers.most_ejected)
}

#[cfg(test)]
mod tests;

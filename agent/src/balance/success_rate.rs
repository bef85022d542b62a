//! Which endpoints answer well less often than the others of their port do, each interval anew.
//!
//! What counts failures in a row misses an endpoint that fails every second request. How often is too often depends on what is asked,
//! so that it is told by the others.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use super::outlier::{self, Change, EjectionReason};
use crate::model::{Endpoint, Looked, Outcomes, ServicePort, Standing, SuccessRate};

/// Who is that little worse than the mean is no outlier, however close together the others are: with all of them at 100 %, a single
/// failure would be enough.
const LEAST_GAP: f64 = 0.05;

/// Compares the endpoints of the port, if it is time to, and ejects those that stand out; what followed. To be called when one of
/// them was judged. `random` is fresh, from 0 to 1.
pub fn compare(port: &ServicePort, now: Instant, random: impl Fn() -> f64) -> Vec<(SocketAddr, Change)> {
    let Some(setting) = port.traffic.outliers.success_rate else { return Vec::new() };
    let interval = |looked: &mut Option<Looked>| {
        let is_early = |looked: &Looked| now.saturating_duration_since(looked.at) < setting.interval;
        if looked.as_ref().is_some_and(is_early) {
            return None;
        }
        let outcomes = port.endpoints.iter().map(|it| (it.address, it.load.outcomes())).collect();
        Some((looked.replace(Looked { at: now, outcomes })?, looked.as_ref()?.outcomes.clone()))
    };
    let Some((before, after)) = port.load.look(interval).flatten() else { return Vec::new() };
    let came = |endpoint: &Endpoint| came(endpoint, &before.outcomes, &after);
    let mut changes = Vec::new();
    for candidates in [&port.candidates.v4, &port.candidates.v6] {
        let rates: Vec<(&Endpoint, f64)> = candidates
            .all()
            .iter()
            .map(|&index| &port.endpoints[index as usize])
            .filter_map(|endpoint| Some((endpoint, rate(came(endpoint)?, &setting)?)))
            .collect();
        let Some(least) = least(rates.iter().map(|(_, rate)| *rate), &setting) else { continue };
        for (endpoint, _) in rates.into_iter().filter(|(_, rate)| *rate < least) {
            if endpoint.load.standing() == Standing::Ejected || !outlier::may_be_spared(port, endpoint) {
                continue;
            }
            let (outliers, reason) = (&port.traffic.outliers, EjectionReason::LowSuccessRate);
            let change =
                endpoint.load.change_health(|health| outlier::eject(health, outliers, reason, now, random()));
            port.load.set_wary(true);
            changes.push((endpoint.address, change));
        }
    }
    changes
}

/// What the endpoint answered between two looks; None where it was not there at the first.
fn came(
    endpoint: &Endpoint,
    before: &HashMap<SocketAddr, Outcomes>,
    after: &HashMap<SocketAddr, Outcomes>,
) -> Option<Outcomes> {
    Some(after.get(&endpoint.address)?.since(*before.get(&endpoint.address)?))
}

/// The share of good answers, if there are enough to say.
fn rate(outcomes: Outcomes, setting: &SuccessRate) -> Option<f64> {
    let is_enough = outcomes.all >= setting.least_requests.max(1);
    is_enough.then(|| f64::from(outcomes.good) / f64::from(outcomes.all))
}

/// The rate below which an endpoint stands out from these; None where there are too few to tell.
fn least(rates: impl Iterator<Item = f64> + Clone, setting: &SuccessRate) -> Option<f64> {
    let count = rates.clone().count();
    if count < (setting.least_endpoints.max(2)) as usize {
        return None;
    }
    let mean = rates.clone().sum::<f64>() / count as f64;
    let variance = rates.map(|rate| (rate - mean).powi(2)).sum::<f64>() / count as f64;
    let gap = f64::from(setting.deviations) / 1_000.0 * variance.sqrt();
    Some(mean - gap.max(LEAST_GAP))
}

//! What a TrafficPolicy says.

use std::ops::RangeInclusive;
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use serde_json::Value;

use super::super::place::Place;
use super::{Key, PolicySpec, Says, targets, wire};
use crate::model::{
    Algorithm, Balancing, Caps, Fault, HashKey, Limited, Name, Outliers, RateLimit, RetryBudget,
    RetrySettings, SharedBy, SuccessRate, TrafficSettings, TrafficTimeouts,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// More of anything is a slip of the keyboard.
const MOST: i64 = 1_000_000;

/// What it says; nothing, and why, if that cannot be read.
pub(super) fn read(key: &Key, spec: &Value, place: &Place<'_>) -> Option<PolicySpec> {
    let spec: wire::Spec = place.typed(spec)?;
    let targets = targets(key, &spec.target_refs, place, |target, place| {
        let wire::TargetRef { group, kind, .. } = target;
        place.refuse(format!(
            "expected a Service (group \"\"), found the kind {kind:?} of the group {group:?}"
        ));
    });
    let mut settings = TrafficSettings::default();
    if let Some(wire) = &spec.load_balancing {
        settings.balancing = balancing(wire, &place.key("loadBalancing"));
    }
    if let Some(wire) = &spec.outlier_detection {
        settings.outliers = outliers(wire, &place.key("outlierDetection"));
    }
    if let Some(wire) = &spec.limits {
        settings.caps = caps(wire, &place.key("limits"));
    }
    if let Some(wire) = &spec.retry {
        settings.retries = retries(wire, &place.key("retry"));
    }
    if let Some(wire) = &spec.timeouts {
        settings.timeouts = timeouts(wire, &place.key("timeouts"));
    }
    let limit = |(place, wire): (Place<'_>, &wire::RateLimit)| rate_limit(wire, &place);
    settings.rate_limits = place.few("rateLimits", &spec.rate_limits, 16).filter_map(limit).collect();
    let fault = |(place, wire): (Place<'_>, &wire::Fault)| fault(wire, &place);
    settings.faults = place.few("faults", &spec.faults, 16).filter_map(fault).collect();
    let has_budget = spec.retry.is_some_and(|retry| retry.budget.is_some());
    Some(PolicySpec { targets, says: Says::Traffic { settings: Box::new(settings), has_budget } })
}

fn balancing(wire: &wire::LoadBalancing, place: &Place<'_>) -> Balancing {
    let default = Balancing::default();
    let name = wire.algorithm.as_deref().unwrap_or("PeakEWMA");
    let algorithm = match name {
        "PeakEWMA" => Algorithm::PeakEwma,
        "LeastRequest" => Algorithm::LeastRequest,
        "RoundRobin" => Algorithm::RoundRobin,
        "Random" => Algorithm::Random,
        "ConsistentHash" => {
            let key = |(place, wire): (Place<'_>, &wire::HashOn)| hash_key(wire, &place);
            Algorithm::ConsistentHash(place.few("hashOn", &wire.hash_on, 8).filter_map(key).collect())
        }
        other => {
            let all = "PeakEWMA, LeastRequest, RoundRobin, Random or ConsistentHash";
            place.key("algorithm").expected(all, other);
            default.algorithm
        }
    };
    let (is_hash, has_keys) =
        (name == "ConsistentHash", wire.hash_on.as_ref().is_some_and(|on| !on.is_empty()));
    match (is_hash, has_keys) {
        (true, false) => place.key("hashOn").refuse("expected what is hashed, which ConsistentHash needs"),
        (false, _) if wire.hash_on.is_some() => {
            place
                .key("hashOn")
                .refuse(format!("expected nothing to hash, which only ConsistentHash does and not {name}"));
        }
        _ => {}
    }
    Balancing {
        algorithm,
        slow_start: within(place, "slowStart", &wire.slow_start, Duration::ZERO..=HOUR)
            .unwrap_or(default.slow_start),
        spill_over_below: number(place, "spillOverBelow", wire.spill_over_below, 0..=100)
            .unwrap_or(default.spill_over_below),
    }
}

fn hash_key(wire: &wire::HashOn, place: &Place<'_>) -> Option<HashKey> {
    let wire::HashOn { header, cookie, query, source_address } = wire;
    match (header, cookie, query, source_address) {
        (Some(header), None, None, None) => place.key("header").header_name(header).map(HashKey::Header),
        (None, Some(cookie), None, None) => Some(HashKey::Cookie(name(cookie, &place.key("cookie"))?)),
        (None, None, Some(query), None) => Some(HashKey::Query(name(query, &place.key("query"))?)),
        (None, None, None, Some(wire::SourceAddress {})) => Some(HashKey::SourceAddress),
        _ => {
            place.refuse("expected one of header, cookie, query and sourceAddress");
            None
        }
    }
}

fn outliers(wire: &wire::OutlierDetection, place: &Place<'_>) -> Outliers {
    let default = Outliers::default();
    let (errors, gateway) = (wire.consecutive_errors, wire.consecutive_gateway_failures);
    let base_ejection =
        within(place, "baseEjection", &wire.base_ejection, SECOND..=DAY).unwrap_or(default.base_ejection);
    let longest = within(place, "maxEjection", &wire.max_ejection, SECOND..=DAY);
    if longest.is_some_and(|longest| longest < base_ejection) {
        place.key("maxEjection").refuse("expected no less than baseEjection, which is 10s unless given");
    }
    Outliers {
        consecutive_errors: number(place, "consecutiveErrors", errors, 0..=MOST)
            .unwrap_or(default.consecutive_errors),
        consecutive_gateway_failures: number(place, "consecutiveGatewayFailures", gateway, 0..=MOST)
            .unwrap_or(default.consecutive_gateway_failures),
        success_rate: wire.success_rate.as_ref().map(|it| success_rate(it, &place.key("successRate"))),
        base_ejection,
        // A first ejection that is longer than this is what its author wants.
        longest_ejection: longest.unwrap_or(default.longest_ejection.max(base_ejection)),
        most_ejected: number(place, "maxEjectedPercent", wire.max_ejected_percent, 0..=100)
            .unwrap_or(default.most_ejected),
        panic_above: number(place, "panicPercent", wire.panic_percent, 0..=100)
            .unwrap_or(default.panic_above),
    }
}

fn success_rate(wire: &wire::SuccessRate, place: &Place<'_>) -> SuccessRate {
    let default = SuccessRate::default();
    let deviations = wire.deviations.as_deref().and_then(|text| {
        let read = thousandths(text).filter(|deviations| (1..=10_000).contains(deviations));
        if read.is_none() {
            place.key("deviations").expected("a decimal number above 0 and up to 10, such as \"1.9\"", text);
        }
        read
    });
    SuccessRate {
        interval: within(place, "interval", &wire.interval, SECOND..=HOUR).unwrap_or(default.interval),
        least_requests: number(place, "minRequests", wire.min_requests, 1..=MOST)
            .unwrap_or(default.least_requests),
        // Of one alone the mean is its own.
        least_endpoints: number(place, "minEndpoints", wire.min_endpoints, 2..=MOST)
            .unwrap_or(default.least_endpoints),
        deviations: deviations.unwrap_or(default.deviations),
    }
}

/// `^[0-9]{1,2}([.][0-9]{1,3})?$`.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str, most: usize| {
        ((1..=most).contains(&text.len()) && text.bytes().all(|it| it.is_ascii_digit())).then_some(())
    };
    digits(whole, 2).and(digits(part, 3))?;
    Some(whole.parse::<u32>().ok()? * 1_000 + format!("{part:0<3}").parse::<u32>().ok()?)
}

fn caps(wire: &wire::Limits, place: &Place<'_>) -> Caps {
    let default = Caps::default();
    Caps {
        connections: number(place, "maxConnections", wire.max_connections, 1..=MOST).or(default.connections),
        requests: number(place, "maxRequests", wire.max_requests, 1..=MOST).or(default.requests),
        pending: number(place, "maxPendingRequests", wire.max_pending_requests, 1..=MOST).or(default.pending),
        retries: number(place, "maxRetries", wire.max_retries, 1..=MOST).or(default.retries),
    }
}

fn retries(wire: &wire::Retry, place: &Place<'_>) -> RetrySettings {
    if wire.attempts.is_none()
        && (wire.codes.is_some() || wire.any_method.is_some() || wire.backoff.is_some())
    {
        let message = "expected how often, without which nothing is sent again";
        place.key("attempts").refuse(message);
    }
    let code = |(place, code): (Place<'_>, &i64)| StatusCode::from_u16(place.number(*code, 400..=599)?).ok();
    let default = RetryBudget::default();
    let (budget, at) = (wire.budget.as_ref(), place.key("budget"));
    RetrySettings {
        attempts: number(place, "attempts", wire.attempts, 0..=100).unwrap_or_default(),
        codes: place.few("codes", &wire.codes, 32).filter_map(code).collect(),
        any_method: wire.any_method.unwrap_or_default(),
        backoff: within(place, "backoff", &wire.backoff, MILLISECOND..=HOUR),
        budget: RetryBudget {
            percent: number(&at, "percent", budget.and_then(|it| it.percent), 0..=100)
                .unwrap_or(default.percent),
            per_second: number(&at, "perSecond", budget.and_then(|it| it.per_second), 0..=MOST)
                .map_or(default.per_second, |number: u32| number.into()),
            interval: default.interval,
        },
    }
}

fn timeouts(wire: &wire::Timeouts, place: &Place<'_>) -> TrafficTimeouts {
    let read = |key: &str, text: &Option<String>| place.duration_of(key, text);
    let (request, per_try) = (read("request", &wire.request), read("perTry", &wire.per_try));
    if request.is_some_and(|request| per_try > Some(request)) {
        place.key("perTry").refuse("expected no longer than the timeout of the whole request");
    }
    TrafficTimeouts {
        request,
        per_try,
        idle: read("idle", &wire.idle),
        // For ever is no time to make a connection.
        connect: within(place, "connect", &wire.connect, MILLISECOND..=HOUR),
    }
}

fn rate_limit(wire: &wire::RateLimit, place: &Place<'_>) -> Option<RateLimit> {
    let (of, key, count) = match (wire.requests, wire.connections) {
        (Some(count), None) => (Limited::Requests, "requests", count),
        (None, Some(count)) => (Limited::Connections, "connections", count),
        _ => {
            place.refuse("expected either requests or connections");
            return None;
        }
    };
    let count = place.key(key).number(count, 1..=MOST);
    let per = place.key("per").duration_within(&wire.per, SECOND..=DAY);
    let burst = number(place, "burst", wire.burst, 1..=MOST);
    let by = match wire.by.as_deref() {
        None | Some("Everyone") => SharedBy::Everyone,
        Some("Source") => SharedBy::Source,
        Some(other) => {
            place.key("by").expected("Everyone or Source", other);
            return None;
        }
    };
    let count = count?;
    Some(RateLimit { of, count, per: per?, burst: burst.unwrap_or(count), by })
}

fn fault(wire: &wire::Fault, place: &Place<'_>) -> Option<Fault> {
    let percent = wire.percent.unwrap_or(100.0);
    if !(0.0..=100.0).contains(&percent) {
        place.key("percent").refuse(format!("expected 0 to 100, found {percent}"));
    }
    if wire.delay.is_none() && wire.abort.is_none() {
        place.refuse("expected a delay, an abort or both");
    }
    let headers = wire.matching.as_ref().map_or(&None, |matching| &matching.headers);
    let header = |(place, wire): (Place<'_>, &wire::Header)| {
        let name = place.key("name").header_name(&wire.name);
        let value = HeaderValue::try_from(&wire.value);
        let value = place.key("value").take(value.map_err(|_| "expected a value that a header may have"));
        Some((name?, value?))
    };
    let abort = wire.abort.as_ref().and_then(|abort| {
        let status = place.key("abort").key("status").number(abort.status, 400..=599)?;
        StatusCode::from_u16(status).ok()
    });
    Some(Fault {
        headers: place.key("match").few("headers", headers, 16).filter_map(header).collect(),
        percent,
        delay: within(place, "delay", &wire.delay, MILLISECOND..=HOUR),
        abort,
    })
}

fn number<T: TryFrom<i64>>(
    place: &Place<'_>,
    key: &str,
    number: Option<i64>,
    bounds: RangeInclusive<i64>,
) -> Option<T> {
    number.and_then(|number| place.key(key).number(number, bounds))
}

fn within(
    place: &Place<'_>,
    key: &str,
    text: &Option<String>,
    bounds: RangeInclusive<Duration>,
) -> Option<Duration> {
    text.as_ref().and_then(|text| place.key(key).duration_within(text, bounds))
}

fn name(text: &str, place: &Place<'_>) -> Option<Name> {
    if text.is_empty() {
        place.refuse("expected a name, found none");
    }
    Some(text.into())
}

//! What an XBackendTrafficPolicy says (GEP-1619, GEP-3388).

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::super::place::Place;
use super::super::session;
use super::{Key, PolicySpec, Says, is_for_others, targets, wire};
use crate::model::RetryBudget;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    target_refs: Vec<wire::TargetRef>,
    retry_constraint: Option<RetryConstraint>,
    session_persistence: Option<session::Wire>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RetryConstraint {
    budget: Option<Budget>,
    min_retry_rate: Option<Rate>,
}

#[derive(Debug, Deserialize)]
struct Budget {
    percent: Option<i64>,
    interval: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Rate {
    count: Option<i64>,
    interval: Option<String>,
}

const HOUR: Duration = Duration::from_secs(3600);

/// What it says; nothing, and why, if that cannot be read.
pub(super) fn read(key: &Key, spec: &Value, place: &Place<'_>) -> Option<PolicySpec> {
    if is_for_others(spec) {
        return Some(PolicySpec { targets: Vec::new(), says: Says::Backend { budget: None, session: None } });
    }
    let spec: Spec = place.typed(spec)?;
    for (index, target) in spec.target_refs.iter().enumerate() {
        if target.section_name.is_some() {
            let place = place.key("targetRefs").index(index).key("sectionName");
            place.refuse("XBackendTrafficPolicies have no such field");
        }
    }
    let budget = spec.retry_constraint.as_ref().map(|it| budget(it, &place.key("retryConstraint")));
    // The same on every node, and another for each policy.
    let name = || format!("undermesh-{}-{}", key.namespace, key.name).into();
    let session = spec.session_persistence.as_ref();
    let session = session.and_then(|it| it.read(name, &place.key("sessionPersistence")));
    // What is no Service is for those who know it.
    let targets = targets(key, &spec.target_refs, place, |_, _| {});
    Some(PolicySpec { targets, says: Says::Backend { budget, session } })
}

/// The defaults are those that the API server fills in.
fn budget(wire: &RetryConstraint, place: &Place<'_>) -> RetryBudget {
    let (of, at) = (wire.budget.as_ref(), place.key("budget"));
    let percent = of.and_then(|of| of.percent);
    let percent = percent.and_then(|it| at.key("percent").number(it, 0..=100)).unwrap_or(20);
    let saved = of.and_then(|of| of.interval.as_deref());
    let saved = saved.and_then(|it| at.key("interval").duration_within(it, Duration::from_secs(1)..=HOUR));
    let (of, at) = (wire.min_retry_rate.as_ref(), place.key("minRetryRate"));
    let count = of.and_then(|of| of.count);
    let count: u32 = count.and_then(|it| at.key("count").number(it, 1..=1_000_000)).unwrap_or(10);
    let interval = of.and_then(|of| of.interval.as_deref());
    let interval =
        interval.and_then(|it| at.key("interval").duration_within(it, Duration::from_millis(1)..=HOUR));
    let interval = interval.unwrap_or(Duration::from_secs(1));
    RetryBudget {
        percent,
        per_second: f64::from(count) / interval.as_secs_f64(),
        interval: saved.unwrap_or(Duration::from_secs(10)),
    }
}

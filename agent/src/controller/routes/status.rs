//! What a route's status should say, and what has to be written for that. Facts in, a list out: no API server, no clock.
//!
//! `status.parents` belongs to several controllers, each with entries of its own, and a list is written as a whole: what is not
//! ours, entries and conditions alike, goes back as it was found.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::Problem;
use crate::config::resolve::{ParentStatus, Reason, Refusal};

/// What our entries are known by.
pub(super) const CONTROLLER: &str = "undermesh.io/mesh";

/// The most that is said of what is wrong with a route: its author mends one thing after the other anyway.
const MOST_PROBLEMS: usize = 3;

/// A route as the API server has it, as far as its status is concerned.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Written {
    pub(super) generation: i64,
    /// Of the references to parents, those to Services, as they are written, with their places.
    pub(super) parents: Vec<(usize, Value)>,
    /// What is wrong with how it is written; nothing of it is taken then.
    pub(super) problems: Vec<Problem>,
    /// `status.parents`.
    pub(super) status: Vec<Value>,
}

/// What is to become of `status.parents`; nothing if it says already what it should. `standing` is how the route stands with its
/// parents, of the last version that could be used.
pub(super) fn next(route: &Written, standing: &[ParentStatus], now: Timestamp) -> Option<Vec<Value>> {
    let conditions = |index: usize| -> Option<Conditions> {
        if !route.problems.is_empty() {
            let message = refused(route, !standing.is_empty() || had_usable_version(&route.status));
            let refusal = Refusal { reason: Reason::UnsupportedValue, message };
            // Of what it refers to nothing has been looked up.
            return Some(vec![condition(ACCEPTED, Err(refusal))]);
        }
        let status = standing.iter().find(|status| status.parent.index == index)?;
        let ParentStatus { parent: _, accepted, resolved_refs } = status.clone();
        Some(vec![condition(ACCEPTED, accepted), condition(RESOLVED_REFS, resolved_refs)])
    };
    let mut wanted: Vec<(&Value, Conditions)> =
        route.parents.iter().filter_map(|(index, parent)| Some((parent, conditions(*index)?))).collect();
    let mut parents = Vec::new();
    for entry in &route.status {
        if entry["controllerName"] != CONTROLLER {
            parents.push(entry.clone());
        } else if let Some(place) = wanted.iter().position(|(parent, _)| **parent == entry["parentRef"]) {
            let (parent, conditions) = wanted.remove(place);
            parents.push(entry_of(parent, conditions, &entry["conditions"], route.generation, now));
        }
    }
    let new = |(parent, conditions)| entry_of(parent, conditions, &Value::Null, route.generation, now);
    parents.extend(wanted.into_iter().map(new));
    (parents != route.status).then_some(parents)
}

const ACCEPTED: &str = "Accepted";
const RESOLVED_REFS: &str = "ResolvedRefs";
/// Of us none ever has the last one: a route is taken as a whole or not at all.
const OURS: [&str; 3] = [ACCEPTED, RESOLVED_REFS, "PartiallyInvalid"];

/// Type, status, reason and message.
type Conditions = Vec<(&'static str, &'static str, &'static str, String)>;

fn condition(
    kind: &'static str,
    outcome: Result<(), Refusal>,
) -> (&'static str, &'static str, &'static str, String) {
    match outcome {
        // The reason of a condition that holds is its name.
        Ok(()) if kind == ACCEPTED => (kind, "True", kind, "the route is in force".into()),
        Ok(()) => (kind, "True", kind, "all that the route refers to is there".into()),
        Err(Refusal { reason, message }) => (kind, "False", reason.as_str(), message),
    }
}

fn entry_of(parent: &Value, mut wanted: Conditions, found: &Value, generation: i64, now: Timestamp) -> Value {
    let mut conditions = Vec::new();
    for old in found.as_array().into_iter().flatten() {
        let is_ours = OURS.iter().any(|ours| old["type"] == *ours);
        let place = wanted.iter().position(|(kind, ..)| old["type"] == *kind);
        // Whoever has seen a later version of the route knows better.
        let is_newer = old["observedGeneration"].as_i64() > Some(generation);
        let new = place.map(|place| wanted.remove(place));
        match new {
            _ if !is_ours || is_newer => conditions.push(old.clone()),
            Some(new) => conditions.push(condition_of(new, Some(old), generation, now)),
            None => {}
        }
    }
    conditions.extend(wanted.into_iter().map(|new| condition_of(new, None, generation, now)));
    json!({ "parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions })
}

fn condition_of(
    (kind, status, reason, message): (&str, &str, &str, String),
    old: Option<&Value>,
    generation: i64,
    now: Timestamp,
) -> Value {
    let since = match old {
        Some(old) if old["status"] == status => old["lastTransitionTime"].clone(),
        _ => now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into(),
    };
    json!({
        "type": kind, "status": status, "reason": reason, "message": message,
        "observedGeneration": generation, "lastTransitionTime": since,
    })
}

/// An agent that has been restarted since has seen no other version.
const KEPT: &str =
    "until then the last version that could be used stays in force, on nodes whose agent has seen it";
const NOT_IN_FORCE: &str = "until then the route is not in force";

fn refused(route: &Written, had_usable_version: bool) -> String {
    let said = route.problems.iter().take(MOST_PROBLEMS).map(Problem::to_string);
    let mut message = said.collect::<Vec<_>>().join("; ");
    let more = route.problems.len().saturating_sub(MOST_PROBLEMS);
    if more > 0 {
        message += &format!("; and {more} more problems");
    }
    format!("{message}; {}", if had_usable_version { KEPT } else { NOT_IN_FORCE })
}

/// By what we have written before: whoever has begun to lead just now has seen no other version, agents have.
fn had_usable_version(status: &[Value]) -> bool {
    let ours = status.iter().filter(|entry| entry["controllerName"] == CONTROLLER);
    let conditions = ours.flat_map(|entry| entry["conditions"].as_array().into_iter().flatten());
    let mut accepted = conditions.filter(|condition| condition["type"] == ACCEPTED);
    accepted.any(|condition| {
        let kept = condition["message"].as_str().is_some_and(|message| message.ends_with(KEPT));
        condition["reason"] != Reason::UnsupportedValue.as_str() || kept
    })
}

#[cfg(test)]
mod tests;

//! What a status should say, and what has to be written for that. Facts in, a list out: no API server, no clock.
//!
//! `status.parents` of routes and `status.ancestors` of policies belong to several controllers, each with entries of its own, and a
//! list is written as a whole: what is not ours, entries and conditions alike, goes back as it was found.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::resolve::{ParentStatus, Reason, Refusal, TargetStatus};
use crate::config::{Kind, Problem};

/// What our entries are known by.
pub(super) const CONTROLLER: &str = "undermesh.io/mesh";

/// The most that is said of what is wrong with an object: its author mends one thing after the other anyway.
const MOST_PROBLEMS: usize = 3;

/// What differs between the statuses of routes (GEP-1364) and of policies (GEP-713).
#[derive(Debug, PartialEq)]
pub(super) struct Form {
    /// Where the references stand in the spec.
    pub(super) references: &'static str,
    /// Where the entries stand in the status.
    pub(super) list: &'static str,
    /// What an entry has its reference in.
    reference: &'static str,
    /// The API server takes no more entries.
    most: usize,
    what: &'static str,
    /// Of what is badly written.
    refused_for: Reason,
}

const OF_ROUTES: Form = Form {
    references: "parentRefs",
    list: "parents",
    reference: "parentRef",
    most: 32,
    what: "route",
    refused_for: Reason::UnsupportedValue,
};

const OF_POLICIES: Form = Form {
    references: "targetRefs",
    list: "ancestors",
    reference: "ancestorRef",
    most: 16,
    what: "policy",
    refused_for: Reason::Invalid,
};

impl Form {
    pub(super) fn of(kind: Kind) -> &'static Self {
        if kind.route().is_some() { &OF_ROUTES } else { &OF_POLICIES }
    }
}

/// An object as the API server has it, as far as its status is concerned.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Written {
    pub(super) form: &'static Form,
    pub(super) generation: i64,
    /// Of the references to parents or targets, those to Services, as they are written, with their places.
    pub(super) references: Vec<(usize, Value)>,
    /// What is wrong with how it is written; nothing of it is taken then.
    pub(super) problems: Vec<Problem>,
    /// The entries of the status.
    pub(super) status: Vec<Value>,
}

/// How an object stands with what it is for, by the place of the reference.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Standing {
    pub(super) index: usize,
    pub(super) accepted: Result<(), Refusal>,
    /// Nothing of what refers to nothing more.
    pub(super) resolved_refs: Option<Result<(), Refusal>>,
}

impl From<ParentStatus> for Standing {
    fn from(status: ParentStatus) -> Self {
        let ParentStatus { parent, accepted, resolved_refs } = status;
        Self { index: parent.index, accepted, resolved_refs: Some(resolved_refs) }
    }
}

impl From<TargetStatus> for Standing {
    fn from(TargetStatus { index, accepted }: TargetStatus) -> Self {
        Self { index, accepted, resolved_refs: None }
    }
}

/// What is to become of the entries; nothing if they say already what they should. `standing` is of the last version that could be
/// used.
pub(super) fn next(object: &Written, standing: &[Standing], now: Timestamp) -> Option<Vec<Value>> {
    let form = object.form;
    let conditions = |index: usize| -> Option<Conditions> {
        if !object.problems.is_empty() {
            let message = refused(object, !standing.is_empty() || had_usable_version(object));
            let refusal = Refusal { reason: form.refused_for, message };
            // Of what it refers to nothing has been looked up.
            return Some(vec![condition(form, ACCEPTED, Err(refusal))]);
        }
        let Standing { index: _, accepted, resolved_refs } =
            standing.iter().find(|standing| standing.index == index)?.clone();
        let resolved_refs = resolved_refs.map(|outcome| condition(form, RESOLVED_REFS, outcome));
        Some(std::iter::once(condition(form, ACCEPTED, accepted)).chain(resolved_refs).collect())
    };
    let wanted = object.references.iter();
    let mut wanted: Vec<(&Value, Conditions)> =
        wanted.filter_map(|(index, reference)| Some((reference, conditions(*index)?))).collect();
    let mut entries = Vec::new();
    for entry in &object.status {
        if entry["controllerName"] != CONTROLLER {
            entries.push(entry.clone());
        } else if let Some(place) = wanted.iter().position(|(it, _)| **it == entry[form.reference]) {
            let (reference, conditions) = wanted.remove(place);
            entries.push(entry_of(object, reference, conditions, &entry["conditions"], now));
        }
    }
    // What others say goes first, and what there is no room for is not said.
    let room = form.most.saturating_sub(entries.len());
    let new = |(reference, conditions)| entry_of(object, reference, conditions, &Value::Null, now);
    entries.extend(wanted.into_iter().take(room).map(new));
    (entries != object.status).then_some(entries)
}

const ACCEPTED: &str = "Accepted";
const RESOLVED_REFS: &str = "ResolvedRefs";
/// Of us none ever has the last one: a route is taken as a whole or not at all.
const OURS: [&str; 3] = [ACCEPTED, RESOLVED_REFS, "PartiallyInvalid"];

/// Type, status, reason and message.
type Conditions = Vec<(&'static str, &'static str, &'static str, String)>;

fn condition(
    form: &Form,
    kind: &'static str,
    outcome: Result<(), Refusal>,
) -> (&'static str, &'static str, &'static str, String) {
    match outcome {
        // The reason of a condition that holds is its name.
        Ok(()) if kind == ACCEPTED => (kind, "True", kind, format!("the {} is in force", form.what)),
        Ok(()) => (kind, "True", kind, format!("all that the {} refers to is there", form.what)),
        Err(Refusal { reason, message }) => (kind, "False", reason.as_str(), message),
    }
}

fn entry_of(
    object: &Written,
    reference: &Value,
    mut wanted: Conditions,
    found: &Value,
    now: Timestamp,
) -> Value {
    let generation = object.generation;
    let mut conditions = Vec::new();
    for old in found.as_array().into_iter().flatten() {
        let is_ours = OURS.iter().any(|ours| old["type"] == *ours);
        let place = wanted.iter().position(|(kind, ..)| old["type"] == *kind);
        // Whoever has seen a later version of the object knows better.
        let is_newer = old["observedGeneration"].as_i64() > Some(generation);
        let new = place.map(|place| wanted.remove(place));
        match new {
            _ if !is_ours || is_newer => conditions.push(old.clone()),
            Some(new) => conditions.push(condition_of(new, Some(old), generation, now)),
            None => {}
        }
    }
    conditions.extend(wanted.into_iter().map(|new| condition_of(new, None, generation, now)));
    json!({ object.form.reference: reference, "controllerName": CONTROLLER, "conditions": conditions })
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

fn refused(object: &Written, had_usable_version: bool) -> String {
    let said = object.problems.iter().take(MOST_PROBLEMS).map(Problem::to_string);
    let mut message = said.collect::<Vec<_>>().join("; ");
    let more = object.problems.len().saturating_sub(MOST_PROBLEMS);
    if more > 0 {
        message += &format!("; and {more} more problems");
    }
    match had_usable_version {
        true => format!("{message}; {KEPT}"),
        false => format!("{message}; until then the {} is not in force", object.form.what),
    }
}

/// By what we have written before: whoever has begun to lead just now has seen no other version, agents have.
fn had_usable_version(object: &Written) -> bool {
    let ours = object.status.iter().filter(|entry| entry["controllerName"] == CONTROLLER);
    let conditions = ours.flat_map(|entry| entry["conditions"].as_array().into_iter().flatten());
    let mut accepted = conditions.filter(|condition| condition["type"] == ACCEPTED);
    accepted.any(|condition| {
        let kept = condition["message"].as_str().is_some_and(|message| message.ends_with(KEPT));
        condition["reason"] != object.form.refused_for.as_str() || kept
    })
}

#[cfg(test)]
mod tests;

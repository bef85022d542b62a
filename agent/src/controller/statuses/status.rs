//! What a status should say, and what has to be written for that. Facts in, a list out: no API server, no clock.
//!
//! `status.parents` of routes and `status.ancestors` of TrafficPolicies belong to several controllers, each with entries of its own, and
//! a list is written as a whole: what is not ours, entries and conditions alike, goes back as it was found. Of AuthorizationPolicies and
//! MeshPolicies `status.conditions` says it of the policy as a whole.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::resolve::{ParentStatus, Reason, Refusal, Stated, TargetStatus};
use crate::config::{Kind, Problem};

/// What our entries are known by.
pub(super) const CONTROLLER: &str = "undermesh.io/mesh";

/// The most that is said of what is wrong with an object: its author mends one thing after the other anyway.
const MOST_PROBLEMS: usize = 3;

/// What differs between the statuses of routes (GEP-1364), of policies (GEP-713), and of policies that are for pods.
#[derive(Debug, PartialEq)]
pub(super) struct Form {
    /// Where the references stand in the spec.
    pub(super) references: &'static str,
    /// Where the entries stand in the status.
    pub(super) list: &'static str,
    /// What an entry has its reference in; None where the entries are the conditions themselves.
    reference: Option<&'static str>,
    /// The API server takes no more entries.
    most: usize,
    what: &'static str,
    /// Of what is badly written.
    refused_for: Reason,
    /// What becomes of it where no other version is in force.
    else_what: &'static str,
}

const OF_ROUTES: Form = Form {
    references: "parentRefs",
    list: "parents",
    reference: Some("parentRef"),
    most: 32,
    what: "route",
    refused_for: Reason::UnsupportedValue,
    else_what: "until then the route is not in force",
};

const OF_POLICIES: Form = Form {
    references: "targetRefs",
    list: "ancestors",
    reference: Some("ancestorRef"),
    most: 16,
    what: "policy",
    refused_for: Reason::Invalid,
    else_what: "until then the policy is not in force",
};

const OF_PODS: Form = Form {
    references: "",
    list: "conditions",
    reference: None,
    most: 16,
    what: "policy",
    refused_for: Reason::Invalid,
    else_what: "until then plaintext is refused at the pods that it is for",
};

impl Form {
    pub(super) fn of(kind: Kind) -> &'static Self {
        match kind {
            Kind::AuthorizationPolicy | Kind::MeshPolicy => &OF_PODS,
            _ if kind.route().is_some() => &OF_ROUTES,
            _ => &OF_POLICIES,
        }
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
    /// What it does where something is wrong with it, of the kind that fails closed at once.
    pub(super) denies: Option<String>,
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
    /// What there is to be known of it where it is accepted, if more than that it is in force.
    pub(super) note: Option<String>,
    /// Why not all of it can be done, where that is so.
    pub(super) not_enforced: Option<Refusal>,
}

impl From<ParentStatus> for Standing {
    fn from(status: ParentStatus) -> Self {
        let ParentStatus { parent, accepted, resolved_refs } = status;
        Self {
            index: parent.index,
            accepted,
            resolved_refs: Some(resolved_refs),
            note: None,
            not_enforced: None,
        }
    }
}

impl From<TargetStatus> for Standing {
    fn from(TargetStatus { index, accepted, resolved_refs }: TargetStatus) -> Self {
        Self { index, accepted, resolved_refs, note: None, not_enforced: None }
    }
}

impl From<Stated> for Standing {
    fn from(Stated { accepted, not_enforced }: Stated) -> Self {
        let (note, accepted) = match accepted {
            Ok(note) => (Some(note), Ok(())),
            Err(refusal) => (None, Err(refusal)),
        };
        Self { index: 0, accepted, resolved_refs: None, note, not_enforced }
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
        let Standing { index: _, accepted, resolved_refs, note, not_enforced } =
            standing.iter().find(|standing| standing.index == index)?.clone();
        let mut accepted = condition(form, ACCEPTED, accepted);
        if let Some(note) = note {
            accepted.3 = note;
        }
        let resolved_refs = resolved_refs.map(|outcome| condition(form, RESOLVED_REFS, outcome));
        let enforced = not_enforced.map(|refusal| condition(form, ENFORCED, Err(refusal)));
        Some(std::iter::once(accepted).chain(resolved_refs).chain(enforced).collect())
    };
    let Some(reference_key) = form.reference else {
        let entries = merged(&object.status, conditions(0)?, object.generation, now);
        return (entries != object.status).then_some(entries);
    };
    let entry_of = |reference: &Value, conditions: Vec<Value>| json!({ reference_key: reference, "controllerName": CONTROLLER, "conditions": conditions });
    let wanted = object.references.iter();
    let mut wanted: Vec<(&Value, Conditions)> =
        wanted.filter_map(|(index, reference)| Some((reference, conditions(*index)?))).collect();
    let mut entries = Vec::new();
    for entry in &object.status {
        if entry["controllerName"] != CONTROLLER {
            entries.push(entry.clone());
        } else if let Some(place) = wanted.iter().position(|(it, _)| **it == entry[reference_key]) {
            let (reference, conditions) = wanted.remove(place);
            let found = entry["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
            entries.push(entry_of(reference, merged(found, conditions, object.generation, now)));
        }
    }
    // What others say goes first, and what there is no room for is not said.
    let room = form.most.saturating_sub(entries.len());
    let new = |(reference, conditions): (&Value, Conditions)| {
        entry_of(reference, merged(&[], conditions, object.generation, now))
    };
    entries.extend(wanted.into_iter().take(room).map(new));
    (entries != object.status).then_some(entries)
}

const ACCEPTED: &str = "Accepted";
const RESOLVED_REFS: &str = "ResolvedRefs";
/// Said only where it does not hold.
const ENFORCED: &str = "Enforced";
/// Of us none ever has the last one: a route is taken as a whole or not at all.
const OURS: [&str; 4] = [ACCEPTED, RESOLVED_REFS, ENFORCED, "PartiallyInvalid"];

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

/// The conditions that are wanted and those that are not ours, in the places of those that were found.
fn merged(found: &[Value], mut wanted: Conditions, generation: i64, now: Timestamp) -> Vec<Value> {
    let mut conditions = Vec::new();
    for old in found {
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
    conditions
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
    let until_then = match &object.denies {
        Some(denies) => denies.as_str(),
        None if had_usable_version => KEPT,
        None => object.form.else_what,
    };
    format!("{message}; {until_then}")
}

/// By what we have written before: whoever has begun to lead just now has seen no other version, agents have.
fn had_usable_version(object: &Written) -> bool {
    let ours = object.status.iter().filter(|entry| entry["controllerName"] == CONTROLLER);
    let of_entries = ours.flat_map(|entry| entry["conditions"].as_array().into_iter().flatten());
    let of_object = object.status.iter().filter(|_| object.form.reference.is_none());
    let mut accepted = of_entries.chain(of_object).filter(|condition| condition["type"] == ACCEPTED);
    accepted.any(|condition| {
        let kept = condition["message"].as_str().is_some_and(|message| message.ends_with(KEPT));
        condition["reason"] != object.form.refused_for.as_str() || kept
    })
}

#[cfg(test)]
mod tests;

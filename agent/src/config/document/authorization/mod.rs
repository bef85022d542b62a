//! AuthorizationPolicies. What they say is read into the terms of `policy`; which pods and Services there are is not known here.
//!
//! Unlike a route, one that says anything badly is in force at once, and not the version before it: it denies everything at its
//! target, or at all pods of its namespace where not even that can be read. Whoever has let the wrong one in wants to hear of it.

#[cfg(test)]
mod crd;
mod rules;
#[cfg(test)]
mod tests;
mod text;
mod wire;

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::super::Problem;
use super::place::Place;
use super::selector::{self, Selector};
use super::{Key, Kind, Target, object_id, route};
use crate::model::ObjectRef;
use crate::policy::authorization::{Action, Policy};

/// The most that is told of what is wrong: its author mends one thing after the other anyway.
const MOST_PROBLEMS: usize = 3;

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationPolicy {
    /// Kind, namespace and name.
    pub key: Key,
    /// What it is for.
    pub attached: Attachment,
    /// What it says, or what is wrong with it.
    pub policy: Arc<Policy>,
}

/// What a policy is for.
#[derive(Clone, Debug, PartialEq)]
pub enum Attachment {
    /// All pods of its namespace, or of the mesh if that is the mesh's own.
    All,
    /// Pods of its namespace, also of the mesh's own.
    Pods(Selector),
    /// The endpoints of these Services.
    Services(Vec<Target>),
}

/// What of a spec tells for what the policy is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attached {
    selector: Option<selector::Wire>,
    target_refs: Option<Vec<wire::TargetRef>>,
}

impl AuthorizationPolicy {
    pub(super) fn read(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let key = Key::of(Kind::AuthorizationPolicy, &object_id(&route::metadata(object)?)?);
        let found = RefCell::new(Vec::new());
        let root = Place::root(&found);
        route::refuse_unknown(object, &root);
        let (spec, place) = (object.get("spec").unwrap_or(&Value::Null), root.key("spec"));
        let (attached, mut policy) = match place.typed::<wire::Spec>(spec) {
            Some(wire::Spec { selector, target_refs, action, dry_run, rules }) => {
                let attached = attachment(&key, &Attached { selector, target_refs }, &place);
                let policy = Policy {
                    name: key.to_string().into(),
                    action: self::action(action.as_deref(), &place),
                    dry_run: dry_run.unwrap_or_default(),
                    rules: rules::read(&key.namespace, &rules, &place),
                    invalid: None,
                };
                (attached, policy)
            }
            // What is wrong elsewhere does not make it one for other pods, nor one that is in force.
            None => (salvaged(&key, spec), unusable(&key, spec["dryRun"] == true)),
        };
        let found = found.into_inner();
        if !found.is_empty() {
            let said: Vec<String> = found.iter().take(MOST_PROBLEMS).map(Problem::to_string).collect();
            policy.invalid = Some(said.join("; ").into());
        }
        problems.extend(found);
        Ok(Self { key, attached, policy: Arc::new(policy) })
    }

    /// The policy of which nothing is known but which one it is.
    pub(super) fn unreadable(key: &Key, why: &str) -> Self {
        let policy = Policy { invalid: Some(why.into()), ..unusable(key, false) };
        Self { key: key.clone(), attached: everywhere(), policy: Arc::new(policy) }
    }
}

fn unusable(key: &Key, dry_run: bool) -> Policy {
    let name = key.to_string().into();
    Policy { name, action: Action::Deny, dry_run, rules: Vec::new(), invalid: None }
}

/// All pods of its namespace, and not of the whole mesh: what cannot be read is not to stop everybody.
fn everywhere() -> Attachment {
    Attachment::Pods(Selector::default())
}

fn action(text: Option<&str>, place: &Place<'_>) -> Action {
    match text {
        None | Some("Allow") => Action::Allow,
        Some("Deny") => Action::Deny,
        Some("Audit") => Action::Audit,
        Some(other) => {
            place.key("action").expected("Allow, Deny or Audit", other);
            Action::Deny
        }
    }
}

/// What the policy is for, of a spec that cannot be read as a whole: what is wrong with it has been said.
fn salvaged(key: &Key, spec: &Value) -> Attachment {
    let Ok(attached) = Attached::deserialize(spec) else { return everywhere() };
    attachment(key, &attached, &Place::root(&RefCell::default()))
}

fn attachment(key: &Key, attached: &Attached, place: &Place<'_>) -> Attachment {
    let found = RefCell::new(Vec::new());
    let apart = place.apart(&found);
    let read = match (&attached.selector, &attached.target_refs) {
        (None, None) => Attachment::All,
        (Some(selector), None) => Attachment::Pods(selector.read(&apart.key("selector"))),
        (None, Some(refs)) => Attachment::Services(targets(key, refs, &apart)),
        (Some(_), Some(_)) => {
            apart.refuse("expected either a selector or targetRefs");
            everywhere()
        }
    };
    let found = found.into_inner();
    let is_known = found.is_empty();
    found.into_iter().for_each(|problem| place.add(problem));
    if is_known { read } else { everywhere() }
}

fn targets(key: &Key, refs: &[wire::TargetRef], place: &Place<'_>) -> Vec<Target> {
    let place = place.key("targetRefs");
    if refs.is_empty() || refs.len() > 16 {
        place.refuse(format!("expected 1 to 16 Services, found {}", refs.len()));
    }
    let mut seen = HashSet::new();
    let target = |(index, target): (usize, &wire::TargetRef)| {
        let wire::TargetRef { group, kind, name } = target;
        let place = place.index(index);
        if !group.is_empty() || kind != "Service" {
            place.refuse(format!(
                "expected a Service (group \"\"), found the kind {kind:?} of the group {group:?}"
            ));
        }
        if !seen.insert(name.clone()) {
            place.refuse("expected each target once");
        }
        let service = ObjectRef::new(key.namespace.clone(), name.as_str());
        Target { index, service, section: None }
    };
    refs.iter().enumerate().map(target).collect()
}

//! Policies of Service ports: TrafficPolicy, which is ours, and the Gateway API's XBackendTrafficPolicy and BackendTLSPolicy. What they
//! say is read into the terms of `model`; which Services there are, and which of several policies a port goes by, is not known here.
//!
//! As with routes, of one that says anything badly nothing is taken; but of a BackendTLSPolicy it is known whom it is for.

mod backend;
#[cfg(test)]
mod crd;
#[cfg(test)]
mod tests;
mod tls;
mod traffic;
mod wire;

use std::cell::RefCell;
use std::collections::HashSet;

use jiff::Timestamp;
use serde_json::Value;

use super::super::Problem;
use super::place::Place;
use super::{Key, Kind, non_empty, object_id, route};
use crate::model::{Name, ObjectRef, RetryBudget, SessionPersistence, TrafficSettings};
pub use tls::{AuthorityRefs, TlsValidation};

/// The API group of our own kinds.
pub(super) const GROUP: &str = "undermesh.io";

/// The API group of the Gateway API's experiments.
pub(super) const EXPERIMENTS: &str = "gateway.networking.x-k8s.io";

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Kind, namespace and name.
    pub key: Key,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
    /// What it says; None where it says something badly.
    pub spec: Option<PolicySpec>,
}

/// What a policy says.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicySpec {
    /// What it is for.
    pub targets: Vec<Target>,
    /// What it has them do.
    pub says: Says,
}

/// A Service that a policy is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Its place in `targetRefs`.
    pub index: usize,
    /// The Service, in the policy's own namespace.
    pub service: ObjectRef,
    /// The name of the port; None for all ports.
    pub section: Option<Name>,
}

/// What the ports of a policy are to do. Where two kinds speak of one thing, TrafficPolicy has the word.
#[derive(Clone, Debug, PartialEq)]
pub enum Says {
    /// A TrafficPolicy.
    Traffic {
        /// All that it says, with the defaults of what it does not.
        settings: Box<TrafficSettings>,
        /// Whether the budget of retries is among what it says.
        has_budget: bool,
    },
    /// An XBackendTrafficPolicy.
    Backend {
        /// `retryConstraint`.
        budget: Option<RetryBudget>,
        /// `sessionPersistence`.
        session: Option<SessionPersistence>,
    },
    /// A BackendTLSPolicy; None where it says something badly, and nothing can be sent to its ports.
    Tls(Option<TlsValidation>),
}

impl Policy {
    pub(super) fn read(kind: Kind, object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let meta = route::metadata(object)?;
        let created = meta.creation_timestamp.as_ref().map(|time| time.0);
        let key = Key::of(kind, &object_id(&meta)?);
        let found = RefCell::new(Vec::new());
        let root = Place::root(&found);
        route::refuse_unknown(object, &root);
        let (spec, place) = (object.get("spec").unwrap_or(&Value::Null), root.key("spec"));
        let spec = match kind {
            Kind::BackendTrafficPolicy => backend::read(&key, spec, &place),
            Kind::BackendTlsPolicy => tls::read(&key, spec, &place),
            _ => traffic::read(&key, spec, &place),
        };
        let found = found.into_inner();
        let spec = match (spec, kind) {
            (spec, _) if found.is_empty() => spec,
            // In plaintext, or to whomever, is not what its author wants.
            (Some(spec), Kind::BackendTlsPolicy) => Some(PolicySpec { says: Says::Tls(None), ..spec }),
            _ => None,
        };
        problems.extend(found);
        Ok(Self { key, created, spec })
    }
}

/// The Services that are named. `else_what` is done with what is no Service.
fn targets(
    key: &Key,
    refs: &[wire::TargetRef],
    place: &Place<'_>,
    else_what: fn(&wire::TargetRef, &Place<'_>),
) -> Vec<Target> {
    let place = place.key("targetRefs");
    if refs.is_empty() || refs.len() > 16 {
        place.refuse(format!("expected 1 to 16 Services, found {}", refs.len()));
    }
    let mut seen = HashSet::new();
    let mut targets = Vec::new();
    for (index, target) in refs.iter().enumerate() {
        let place = place.index(index);
        if !is_service(target) {
            else_what(target, &place);
            continue;
        }
        if !seen.insert((&target.name, &target.section_name)) {
            place.refuse("expected each target once");
        }
        let service = ObjectRef::new(key.namespace.clone(), target.name.as_str());
        targets.push(Target { index, service, section: non_empty(&target.section_name) });
    }
    targets
}

/// Whether it has targets and none of them is a Service: of these nothing is said, however they are written.
fn is_for_others(spec: &Value) -> bool {
    let is_service = |target: &Value| {
        let text = |key: &str| target.get(key).and_then(Value::as_str);
        !target.is_object() || (text("group") == Some("") && text("kind") == Some("Service"))
    };
    let targets = spec.get("targetRefs").and_then(Value::as_array);
    targets.is_some_and(|targets| !targets.is_empty() && !targets.iter().any(is_service))
}

fn is_service(target: &wire::TargetRef) -> bool {
    target.group.is_empty() && target.kind == "Service"
}

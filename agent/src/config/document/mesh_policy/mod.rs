//! MeshPolicies: what pods ask of their callers. Which pods there are, and which of several policies has the word, is not known here.
//!
//! Of one that says anything badly nothing is taken.

#[cfg(test)]
mod crd;
mod jwt;
#[cfg(test)]
mod tests;
mod wire;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use serde_json::Value;

use super::super::Problem;
use super::place::Place;
use super::selector::{self, Selector};
use super::{Key, Kind, object_id, route};
use crate::model::MtlsMode;
use crate::policy::jwt::Rules;

/// The most ports that one policy may name: the kernel looks through them for each connection.
const MOST_PORTS: usize = 16;

/// A MeshPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct MeshPolicy {
    /// Kind, namespace and name.
    pub key: Key,
    /// Pods of its namespace; None: all of them, or of the mesh if that is the mesh's own. Where it cannot be read, all of them, as
    /// if each were selected.
    pub selector: Option<Selector>,
    /// What it says; None where it says something badly.
    pub mtls: Option<Mtls>,
    /// What it says of tokens, if it does. Where it says something badly and may have said something of them, that they cannot be
    /// checked.
    pub jwt: Option<Arc<Rules>>,
}

/// What a policy says of plaintext.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mtls {
    /// Of ports that are not named; None leaves it to others.
    pub mode: Option<MtlsMode>,
    /// Of those that are.
    pub ports: BTreeMap<u16, MtlsMode>,
}

impl Mtls {
    /// What it says of a port, or of all that nobody names; None if nothing.
    pub fn of(&self, port: Option<u16>) -> Option<MtlsMode> {
        port.and_then(|port| self.ports.get(&port).copied()).or(self.mode)
    }
}

impl MeshPolicy {
    pub(super) fn read(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let key = Key::of(Kind::MeshPolicy, &object_id(&route::metadata(object)?)?);
        let found = RefCell::new(Vec::new());
        let root = Place::root(&found);
        route::refuse_unknown(object, &root);
        let (spec, place) = (object.get("spec").unwrap_or(&Value::Null), root.key("spec"));
        let (selector, mtls, jwt) = match place.typed::<wire::Spec>(spec) {
            Some(wire::Spec { selector, mtls, jwt }) => {
                let selector = selector.map(|selector| read_selector(&selector, &place.key("selector")));
                let mtls = mtls.map(|mtls| read_mtls(&mtls, &place.key("mtls")));
                (selector, mtls, jwt.map(|jwt| jwt::read(&key, &jwt, &place.key("jwt"))))
            }
            None => (salvaged(spec), None, None),
        };
        let found = found.into_inner();
        let (mtls, jwt) = match found.first() {
            None => (Some(mtls.unwrap_or_default()), jwt),
            Some(problem) => {
                let is_of_tokens = spec.get("jwt").is_some_and(|jwt| !jwt.is_null()) || !spec.is_object();
                (None, is_of_tokens.then(|| unusable(&key, problem)))
            }
        };
        problems.extend(found);
        Ok(Self { key, selector, mtls, jwt: jwt.map(Arc::new) })
    }

    /// The policy of which nothing is known but which one it is.
    pub(super) fn unreadable(key: &Key, why: &str) -> Self {
        let jwt = Some(Arc::new(unusable(key, &why)));
        Self { key: key.clone(), selector: Some(Selector::default()), mtls: None, jwt }
    }
}

fn unusable(key: &Key, problem: &dyn Display) -> Rules {
    let invalid = Some(problem.to_string().into());
    Rules { policy: key.to_string().into(), issuers: Vec::new(), leeway: 0, invalid }
}

fn read_selector(wire: &selector::Wire, place: &Place<'_>) -> Selector {
    let found = RefCell::new(Vec::new());
    let selector = wire.read(&place.apart(&found));
    let found = found.into_inner();
    let is_known = found.is_empty();
    found.into_iter().for_each(|problem| place.add(problem));
    if is_known { selector } else { Selector::default() }
}

/// The selector of a spec that cannot be read as a whole: what is wrong with it has been said.
fn salvaged(spec: &Value) -> Option<Selector> {
    let everything = Some(Selector::default());
    let Some(spec) = spec.as_object() else { return everything };
    let selector = spec.get("selector").filter(|selector| !selector.is_null())?;
    match serde_json::from_value::<selector::Wire>(selector.clone()) {
        Ok(wire) => Some(read_selector(&wire, &Place::root(&RefCell::default()))),
        Err(_) => everything,
    }
}

fn read_mtls(wire: &wire::Mtls, place: &Place<'_>) -> Mtls {
    if wire.mode.is_none() && wire.ports.is_none() {
        place.refuse("expected a mode, ports or both");
    }
    let mode = wire.mode.as_deref().and_then(|text| read_mode(text, &place.key("mode")));
    let mut ports = BTreeMap::new();
    for (place, wire::Port { port, mode }) in place.some("ports", &wire.ports, MOST_PORTS) {
        let mode = read_mode(mode, &place.key("mode"));
        if let (Some(port), Some(mode)) = (place.key("port").port(*port), mode)
            && ports.insert(port, mode).is_some()
        {
            place.key("port").refuse("expected each port once");
        }
    }
    Mtls { mode, ports }
}

fn read_mode(text: &str, place: &Place<'_>) -> Option<MtlsMode> {
    match text {
        "Strict" => Some(MtlsMode::Strict),
        "Permissive" => Some(MtlsMode::Permissive),
        other => {
            place.expected("Strict or Permissive", other);
            None
        }
    }
}

//! Routes: what they say, read into the terms of `route`. Whether what they refer to is there is not known
//! here.
//!
//! Of a route that says anything badly, nothing is taken: half a route would send requests where its author has not sent
//! them. Parents other than Services are gateways' business, and so are all routes that have no other: nothing is said of those.

mod filters;
mod matches;
#[cfg(test)]
mod tests;
mod wire;

pub use filters::RuleFilters;

use std::cell::RefCell;
use std::collections::HashSet;

use http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use super::super::{FieldPath, Problem};
use super::place::Place;
use super::{non_empty as given, object_id};
use crate::model::{Name, ObjectRef, SessionPersistence};
use crate::route::{Hostname, Match, Retry, RouteKind, RouteRef, TimeLimit, Timeouts};

/// The API group of routes and of ReferenceGrants.
pub(super) const GROUP: &str = "gateway.networking.k8s.io";

/// A route.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Kind, namespace and name.
    pub id: RouteRef,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
    /// What it says; None where it says something badly.
    pub spec: Option<RouteSpec>,
}

/// What a route says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteSpec {
    /// The Services that it is for.
    pub parents: Vec<Parent>,
    /// The hosts that it is for; empty for all.
    pub hostnames: Vec<Hostname>,
    /// Its rules.
    pub rules: Vec<RouteRule>,
}

/// A Service that a route is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Parent {
    /// Its place in `parentRefs`.
    pub index: usize,
    /// The Service.
    pub service: ObjectRef,
    /// The port that the route is for; None for all, as far as `section` does not say.
    pub port: Option<u16>,
    /// The name of the port that the route is for.
    pub section: Option<Name>,
}

/// A rule of a route.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteRule {
    /// `name`.
    pub name: Option<Name>,
    /// The ways that lead to it.
    pub matches: Vec<Match>,
    /// Its filters.
    pub filters: RuleFilters,
    /// Its backends.
    pub backends: Vec<BackendRef>,
    /// Its time limits.
    pub timeouts: Timeouts,
    /// Whether what failed is tried again.
    pub retry: Option<Retry>,
    /// Whether it keeps sessions.
    pub session: Option<SessionPersistence>,
}

/// A backend of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendRef {
    /// `weight`, 1 unless given.
    pub weight: u32,
    /// What it refers to.
    pub to: Reference,
    /// Its filters.
    pub filters: RuleFilters,
}

/// What a backend or a mirror refers to.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// Where it stands.
    pub field: FieldPath,
    /// API group; empty for the core one.
    pub group: Name,
    /// Kind.
    pub kind: Name,
    /// Namespace and name.
    pub id: ObjectRef,
    /// `port`.
    pub port: Option<u16>,
}

impl Route {
    pub(super) fn read(
        kind: RouteKind,
        object: &Value,
        problems: &mut Vec<Problem>,
    ) -> Result<Self, Problem> {
        let meta = metadata(object)?;
        let created = meta.creation_timestamp.as_ref().map(|time| time.0);
        let id = RouteRef { kind, id: object_id(&meta)? };
        let found = RefCell::new(Vec::new());
        let root = Place::root(&found);
        let spec = match object.get("spec") {
            Some(spec) if is_for_gateways(spec) => Some(RouteSpec::default()),
            spec => {
                refuse_unknown(object, &root);
                let spec = spec.unwrap_or(&Value::Null);
                let place = root.key("spec");
                match kind {
                    RouteKind::Http => {
                        place.typed(spec).map(|it| route_spec(&id, it, &place, matches::of_http))
                    }
                    RouteKind::Grpc => {
                        place.typed(spec).map(|it| route_spec(&id, it, &place, matches::of_grpc))
                    }
                    RouteKind::Tls | RouteKind::Tcp => {
                        place.typed(spec).map(|it| plain_spec(&id, it, &place))
                    }
                }
            }
        };
        let found = found.into_inner();
        let spec = spec.filter(|_| found.is_empty());
        problems.extend(found);
        Ok(Self { id, created, spec })
    }
}

/// `metadata` of an object.
pub(super) fn metadata(object: &Value) -> Result<ObjectMeta, Problem> {
    let metadata = object.get("metadata").unwrap_or(&Value::Null);
    serde_path_to_error::deserialize(metadata).map_err(|error| {
        let mut field = FieldPath::new(["metadata"]);
        field.0.extend(FieldPath::from(error.path()).0);
        Problem::of_type(&field, error.inner())
    })
}

/// Whether the route has parents and none of them is a Service, or leaves it to gateways to take it. One without parents may
/// have them in a field that is misspelt.
fn is_for_gateways(spec: &Value) -> bool {
    let is_service = |parent: &Value| {
        let text = |key: &str| parent.get(key).and_then(Value::as_str);
        !parent.is_object() || (text("group") == Some("") && text("kind") == Some("Service"))
    };
    match spec.get("parentRefs") {
        None | Some(Value::Null) => spec.get("useDefaultGateways").is_some(),
        Some(parents) => parents.as_array().is_some_and(|parents| !parents.iter().any(is_service)),
    }
}

/// Refuses what stands beside the spec and is not known.
pub(super) fn refuse_unknown(object: &Value, root: &Place<'_>) {
    let known = ["apiVersion", "kind", "metadata", "spec", "status"];
    for key in object.as_object().into_iter().flat_map(|object| object.keys()) {
        if !known.contains(&key.as_str()) {
            root.key(key).refuse("there is no such field");
        }
    }
}

fn route_spec<M>(
    id: &RouteRef,
    spec: wire::Spec<M>,
    place: &Place<'_>,
    read_match: fn(&M, &Place<'_>) -> Option<Match>,
) -> RouteSpec {
    let hostnames = hostnames(&spec.hostnames, place);
    let mut rules = Vec::new();
    let mut names = HashSet::new();
    for (index, (place, rule)) in place.each("rules", &spec.rules).enumerate() {
        if let Some(name) = &rule.name
            && !names.insert(name)
        {
            place.key("name").refuse(format!("expected each name once, found {name:?} again"));
        }
        rules.push(route_rule(id, index, rule, &place, read_match));
    }
    match &spec.rules {
        // What the API server fills in; of GRPCRoutes too, where no rule means no request.
        None if id.kind == RouteKind::Http => rules.push(RouteRule::of_all()),
        Some(rules) if rules.is_empty() && id.kind == RouteKind::Http => {
            place.key("rules").refuse("expected at least one rule");
        }
        _ => {}
    }
    RouteSpec { parents: parents(&id.id.namespace, &spec.parent_refs, place), hostnames, rules }
}

/// Of a route that knows no requests: it has one rule, which is everybody's.
fn plain_spec(id: &RouteRef, spec: wire::PlainSpec, place: &Place<'_>) -> RouteSpec {
    if id.kind == RouteKind::Tcp && spec.hostnames.is_some() {
        place.key("hostnames").refuse("TCPRoutes have no such field");
    }
    let reader = filters::Reader { kind: id.kind, namespace: &id.id.namespace };
    let rule = |(place, rule): (Place<'_>, &wire::PlainRule)| {
        let wire::PlainRule { name, backend_refs } = rule;
        if backend_refs.as_ref().is_none_or(Vec::is_empty) {
            place.key("backendRefs").refuse("expected at least one backend");
        }
        let backend = |(place, it): (Place<'_>, &wire::BackendRef)| reader.backend(it, &[], &place);
        let backends = place.each("backendRefs", backend_refs).map(backend).collect();
        RouteRule { name: given(name), backends, ..RouteRule::of_all() }
    };
    let rules: Vec<RouteRule> = place.each("rules", &spec.rules).map(rule).collect();
    if rules.len() != 1 {
        let found = rules.len();
        place
            .key("rules")
            .refuse(format!("expected one rule, for nothing chooses among several, found {found}"));
    }
    RouteSpec {
        parents: parents(&id.id.namespace, &spec.parent_refs, place),
        hostnames: hostnames(&spec.hostnames, place),
        rules,
    }
}

fn hostnames(texts: &Option<Vec<String>>, place: &Place<'_>) -> Vec<Hostname> {
    let hostname = |(place, text): (Place<'_>, &String)| {
        place.take(Hostname::parse(text).map_err(|error| format!("{error}, found {text:?}")))
    };
    place.each("hostnames", texts).filter_map(hostname).collect()
}

fn parents(namespace: &Name, refs: &Option<Vec<wire::ParentRef>>, place: &Place<'_>) -> Vec<Parent> {
    let parent = |(index, (place, parent)): (usize, (Place<'_>, &wire::ParentRef))| {
        let is_service = parent.group.as_deref() == Some("") && parent.kind.as_deref() == Some("Service");
        is_service.then(|| Parent {
            index,
            service: ObjectRef {
                namespace: given(&parent.namespace).unwrap_or_else(|| namespace.clone()),
                name: parent.name.as_str().into(),
            },
            port: parent.port.and_then(|port| place.key("port").port(port)),
            section: given(&parent.section_name),
        })
    };
    place.each("parentRefs", refs).enumerate().filter_map(parent).collect()
}

fn route_rule<M>(
    id: &RouteRef,
    index: usize,
    rule: &wire::Rule<M>,
    place: &Place<'_>,
    read_match: fn(&M, &Place<'_>) -> Option<Match>,
) -> RouteRule {
    let reader = filters::Reader { kind: id.kind, namespace: &id.id.namespace };
    let mut matches: Vec<Match> =
        place.each("matches", &rule.matches).filter_map(|(place, it)| read_match(it, &place)).collect();
    if rule.matches.as_ref().is_none_or(Vec::is_empty) {
        matches.push(Match::default());
    }
    let filters = reader.read(filters::Of::Rule, &rule.filters, &matches, place);
    if filters.plain.redirect.is_some() && rule.backend_refs.as_ref().is_some_and(|refs| !refs.is_empty()) {
        place
            .key("backendRefs")
            .refuse("expected no backends beside a RequestRedirect filter, which answers by itself");
    }
    let backend = |(place, it): (Place<'_>, &wire::BackendRef)| reader.backend(it, &matches, &place);
    let backends = place.each("backendRefs", &rule.backend_refs).map(backend).collect();
    if id.kind == RouteKind::Grpc {
        for (key, is_there) in [("timeouts", rule.timeouts.is_some()), ("retry", rule.retry.is_some())] {
            if is_there {
                place.key(key).refuse("GRPCRoutes have no such field");
            }
        }
    }
    RouteRule {
        name: given(&rule.name),
        filters,
        backends,
        timeouts: rule.timeouts.as_ref().map(|it| timeouts(it, &place.key("timeouts"))).unwrap_or_default(),
        retry: rule.retry.as_ref().map(|it| retry(it, &place.key("retry"))),
        session: rule
            .session_persistence
            .as_ref()
            .and_then(|it| it.read(|| default_session(&id.id, index), &place.key("sessionPersistence"))),
        matches,
    }
}

impl RouteRule {
    /// The rule of a route that has none.
    fn of_all() -> Self {
        Self {
            name: None,
            matches: vec![Match::default()],
            filters: RuleFilters::default(),
            backends: Vec::new(),
            timeouts: Timeouts::default(),
            retry: None,
            session: None,
        }
    }
}

/// The same on every node, and another for each rule. What names of objects are made of is good for a name here too.
fn default_session(route: &ObjectRef, index: usize) -> Name {
    format!("undermesh-{}-{}-{index}", route.namespace, route.name).into()
}

fn timeouts(wire: &wire::Timeouts, place: &Place<'_>) -> Timeouts {
    let read = |key: &str, text: &Option<String>| match text {
        None => TimeLimit::Unsaid,
        Some(text) => place.key(key).duration(text).map_or(TimeLimit::Never, TimeLimit::After),
    };
    let request = read("request", &wire.request);
    let backend_request = read("backendRequest", &wire.backend_request);
    if let (TimeLimit::After(whole), TimeLimit::After(part)) = (request, backend_request)
        && part > whole
    {
        place.key("backendRequest").refuse("expected no longer than the timeout of the whole request");
    }
    Timeouts { request, backend_request }
}

fn retry(wire: &wire::Retry, place: &Place<'_>) -> Retry {
    let code = |(place, code): (Place<'_>, &i64)| {
        let code: u16 = place.number(*code, 400..=599)?;
        StatusCode::from_u16(code).ok()
    };
    Retry {
        codes: place.each("codes", &wire.codes).filter_map(code).collect(),
        // The Gateway API leaves open how many there are unless given; one that fails after that fails for a reason.
        attempts: wire
            .attempts
            .map_or(Some(1), |it| place.key("attempts").number(it, 1..=i64::from(i32::MAX)))
            .unwrap_or(1),
        backoff: wire.backoff.as_ref().and_then(|text| place.key("backoff").duration(text)),
    }
}

//! What a route comes to among the Services and grants that there are: which of its parents take it, and what of what it refers
//! to is there. And what policies do.
//!
//! Pure functions of documents, so that whoever tells an author (by the status) says what an agent does.

mod access;
mod mtls;
mod policies;
mod tls;

pub use access::{Stated, what_is_denied};
pub(super) use access::{asks_for_requests, authorization, mesh_policy, missing_targets, not_enforced};
pub(super) use mtls::{Level, Verdict, conflict, mtls, tokens};
pub use policies::TargetStatus;
pub(super) use policies::{Remark, Settled, settle};
pub(super) use tls::{Encryption, encryption};

use std::collections::BTreeMap;
use std::sync::Arc;

use super::document::{self, BackendRef, Parent, Reference, Route, RouteRule, RuleFilters};
use super::{FieldPath, Problem};
use crate::model::{Name, ObjectRef};
use crate::route::{
    Audience, Backend, Filters, HttpTable, InvalidBackend, Match, Mirror, PortRoutes, RouteKind, RouteRef,
    RouteRules, Rule, ServiceRoutes, Table, Target, TlsTable,
};

/// What there is around a route.
pub struct Surroundings<'a> {
    /// The Service of this name.
    pub service: &'a dyn Fn(&ObjectRef) -> Option<&'a document::Service>,
    /// Whether a grant in the Service's namespace lets routes of this kind and namespace refer to it.
    pub is_granted: &'a dyn Fn(RouteKind, &Name, &ObjectRef) -> bool,
}

/// What a route comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolution {
    /// Its parents, and the ports of each that take it.
    pub parents: Vec<(Parent, Result<Vec<u16>, Refusal>)>,
    /// Whether all that it refers to is there and may be referred to; else the first that is not.
    pub resolved_refs: Result<(), Refusal>,
    /// Its rules for the tables.
    pub rules: RouteRules,
    /// What is wrong, for the route's author.
    pub problems: Vec<Problem>,
}

/// How a route stands with one of its parents: what its status says.
#[derive(Clone, Debug, PartialEq)]
pub struct ParentStatus {
    /// The parent.
    pub parent: Parent,
    /// The condition `Accepted`.
    pub accepted: Result<(), Refusal>,
    /// The condition `ResolvedRefs`.
    pub resolved_refs: Result<(), Refusal>,
}

/// Why a condition of a route or policy does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// As a program reads it.
    pub reason: Reason,
    /// As a user does.
    pub message: String,
}

/// The reasons of the Gateway API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The parent is not there, or has no such port.
    NoMatchingParent,
    /// A route of another kind has the port, or another policy of this kind has the word.
    Conflicted,
    /// What the policy is for is not there, or has no such port.
    TargetNotFound,
    /// The policy says something that cannot be used, and nothing of it is taken.
    Invalid,
    /// The route says something that cannot be used, and nothing of it is taken.
    UnsupportedValue,
    /// A reference to something that is not a Service.
    InvalidKind,
    /// A reference to what is not there.
    BackendNotFound,
    /// A reference that no grant allows.
    RefNotPermitted,
    /// The policy asks for requests where there are none.
    NotHttp,
    /// A reference to certificates of authorities of which there are none.
    InvalidCaCertificateRef,
    /// None of the references to certificates of authorities leads to one.
    NoValidCaCertificate,
}

/// Routes that cannot be in force together on one port: this one is not in force there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The route that is not in force.
    pub route: RouteRef,
    /// The port.
    pub port: u16,
    /// One that is in force instead.
    pub winner: RouteRef,
}

/// What the route comes to. None of one that says something badly.
pub fn resolve(route: &Route, surroundings: &Surroundings<'_>) -> Option<Resolution> {
    let spec = route.spec.as_ref()?;
    let mut problems = Vec::new();
    let parents: Vec<_> = spec
        .parents
        .iter()
        .map(|parent| {
            let ports = surroundings.ports(parent).map_err(|(key, message)| {
                let field = FieldPath::new(["spec", "parentRefs"]).index(parent.index);
                let field = key.iter().fold(field, |field, key| field.key(key));
                problems.push(Problem::new(field, message.clone()));
                Refusal { reason: Reason::NoMatchingParent, message }
            });
            (parent.clone(), ports)
        })
        .collect();
    let accepted = spec.parents.iter().zip(&parents).filter(|(_, (_, ports))| ports.is_ok());
    let own = accepted.map(|(parent, _)| &parent.service).collect();
    let mut resolver = Resolver { route: &route.id, own, surroundings, problems, refusal: None };
    let rules = spec.rules.iter().enumerate().map(|(index, rule)| resolver.rule(index, rule)).collect();
    let Resolver { problems, refusal, .. } = resolver;
    let rules = RouteRules { hostnames: spec.hostnames.clone(), created: route.created, rules };
    Some(Resolution { parents, resolved_refs: refusal.map_or(Ok(()), Err), rules, problems })
}

/// The routes of a Service as its clients see them, from all that have it as a parent. Where routes of two kinds want one port
/// of one audience, those of the first kind have it (GEP-1294). Of TCPRoutes, between which nothing chooses, the oldest has it.
pub fn attach<'a>(
    service: &ObjectRef,
    routes: impl IntoIterator<Item = (&'a RouteRef, &'a Resolution)>,
) -> (ServiceRoutes, Vec<Conflict>) {
    type Wanting<'a> = BTreeMap<&'a RouteRef, &'a Resolution>;
    let mut wanted: BTreeMap<(u16, Audience), Wanting<'a>> = BTreeMap::new();
    for (route, resolution) in routes {
        let audience = match route.id.namespace == service.namespace {
            true => Audience::Everybody,
            false => Audience::Namespace(route.id.namespace.clone()),
        };
        for port in resolution.ports_of(service) {
            wanted.entry((port, audience.clone())).or_default().insert(route, resolution);
        }
    }
    let mut conflicts = Vec::new();
    // Ports with the same routes share a table.
    let mut tables: Vec<(Vec<&RouteRef>, Table)> = Vec::new();
    let mut ports = BTreeMap::new();
    for ((port, audience), wanting) in wanted {
        let mut wanting: Vec<_> = wanting.into_iter().collect();
        wanting.sort_by_cached_key(|(route, resolution)| {
            let created = resolution.rules.created;
            (route.kind, (created.is_none(), created), route.id.to_string())
        });
        // It is of the kind that has the port.
        let Some(&(winner, _)) = wanting.first() else { continue };
        let fitting = match winner.kind {
            RouteKind::Tcp => 1,
            kind => wanting.iter().filter(|(route, _)| route.kind == kind).count(),
        };
        let (having, losing) = wanting.split_at(fitting);
        conflicts.extend(losing.iter().map(|(route, _)| Conflict {
            route: (*route).clone(),
            port,
            winner: winner.clone(),
        }));
        let names: Vec<&RouteRef> = having.iter().map(|(route, _)| *route).collect();
        let table = match tables.iter().find(|(of, _)| *of == names) {
            Some((_, table)) => table.clone(),
            None => {
                let rules = having.iter().map(|(_, resolution)| resolution.rules.clone());
                let Some(table) = table(winner.kind, rules) else { continue };
                tables.push((names, table.clone()));
                table
            }
        };
        ports.insert((port, audience), PortRoutes { kind: winner.kind, table });
    }
    (ServiceRoutes { ports }, conflicts)
}

/// None where there is no rule and there must be one.
fn table(kind: RouteKind, mut routes: impl Iterator<Item = RouteRules>) -> Option<Table> {
    Some(match kind {
        RouteKind::Grpc | RouteKind::Http => Table::Http(Arc::new(HttpTable::new(routes))),
        RouteKind::Tls => Table::Tls(Arc::new(TlsTable::new(routes))),
        RouteKind::Tcp => Table::Tcp(routes.next()?.rules.into_iter().next()?.1),
    })
}

impl Resolution {
    /// How the route stands with its parents; `conflicts` are those of a Service's port.
    pub fn statuses(&self, conflicts: impl Fn(&ObjectRef, u16) -> Option<Conflict>) -> Vec<ParentStatus> {
        let status = |(parent, ports): &(Parent, Result<Vec<u16>, Refusal>)| ParentStatus {
            parent: parent.clone(),
            accepted: ports.clone().and_then(|ports| {
                let lost = |port: &u16| conflicts(&parent.service, *port);
                // It is attached as long as one port takes it.
                let all_lost: Option<Vec<Conflict>> = ports.iter().map(lost).collect();
                match all_lost.and_then(|lost| lost.into_iter().next()) {
                    Some(conflict) => {
                        Err(Refusal { reason: Reason::Conflicted, message: conflict.to_string() })
                    }
                    None => Ok(()),
                }
            }),
            resolved_refs: self.resolved_refs.clone(),
        };
        self.parents.iter().map(status).collect()
    }

    /// The Services that take it.
    pub(super) fn services(&self) -> impl Iterator<Item = &ObjectRef> {
        self.parents.iter().filter(|(_, ports)| ports.is_ok()).map(|(parent, _)| &parent.service)
    }

    /// Where in the route the Service is a parent by this port.
    pub(super) fn parent_field(&self, service: &ObjectRef, port: u16) -> FieldPath {
        let field = FieldPath::new(["spec", "parentRefs"]);
        let of_it = |(parent, ports): &&(Parent, Result<Vec<u16>, Refusal>)| {
            parent.service == *service && ports.as_ref().is_ok_and(|ports| ports.contains(&port))
        };
        match self.parents.iter().find(of_it) {
            Some((parent, _)) => field.index(parent.index),
            None => field,
        }
    }

    fn ports_of(&self, service: &ObjectRef) -> impl Iterator<Item = u16> {
        let of_it = self.parents.iter().filter(move |(parent, _)| parent.service == *service);
        of_it.flat_map(|(_, ports)| ports.iter().flatten().copied())
    }
}

impl Reason {
    /// As a condition of a status has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoMatchingParent => "NoMatchingParent",
            Self::Conflicted => "Conflicted",
            Self::TargetNotFound => "TargetNotFound",
            Self::Invalid => "Invalid",
            Self::UnsupportedValue => "UnsupportedValue",
            Self::InvalidKind => "InvalidKind",
            Self::BackendNotFound => "BackendNotFound",
            Self::RefNotPermitted => "RefNotPermitted",
            Self::NotHttp => "NotHttp",
            Self::InvalidCaCertificateRef => "InvalidCACertificateRef",
            Self::NoValidCaCertificate => "NoValidCACertificate",
        }
    }
}

impl From<&InvalidBackend> for Reason {
    fn from(why: &InvalidBackend) -> Self {
        match why {
            InvalidBackend::Kind { .. } => Self::InvalidKind,
            InvalidBackend::NotGranted { .. } => Self::RefNotPermitted,
            InvalidBackend::NoSuchService(_)
            | InvalidBackend::NoAddress(_)
            | InvalidBackend::PortNotGiven(_)
            | InvalidBackend::NoSuchPort { .. } => Self::BackendNotFound,
        }
    }
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { route, port, winner } = self;
        let other = if route.kind == winner.kind { "other " } else { "" };
        let kind = route.kind.as_str();
        write!(f, "the port {port} is {winner}'s, beside which no {other}{kind} is in force on it")
    }
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").finish_non_exhaustive()
    }
}

impl Surroundings<'_> {
    /// The ports of the parent that the route is for, or why it has none, and in which field that is.
    fn ports(&self, parent: &Parent) -> Result<Vec<u16>, (Option<&'static str>, String)> {
        let Parent { service: id, port, section, .. } = parent;
        ports_of((self.service)(id), id, section.as_ref(), *port, "route")
    }
}

/// The ports of a Service that are meant by a name, a number, both or neither, or why there are none, and in which field that is. It
/// is a `what` that means them.
fn ports_of(
    service: Option<&document::Service>,
    id: &ObjectRef,
    section: Option<&Name>,
    port: Option<u16>,
    what: &str,
) -> Result<Vec<u16>, (Option<&'static str>, String)> {
    let Some(service) = service else {
        return Err((Some("name"), format!("there is no Service {id}")));
    };
    if service.addresses.is_empty() {
        let message = format!(
            "the Service {id} is headless or external: who dials it dials a pod, for which no {what} is asked"
        );
        return Err((None, message));
    }
    if service.is_api_server() {
        return Err((None, format!("the Service {id} is the API server's own, which stays out of the mesh")));
    }
    let named = |it: &&document::ServicePort| section.is_none_or(|section| it.name == *section);
    let numbered = |it: &&document::ServicePort| port.is_none_or(|port| it.port == port);
    let ports: Vec<u16> = service.ports.iter().filter(named).filter(numbered).map(|it| it.port).collect();
    if !ports.is_empty() {
        return Ok(ports);
    }
    let name = section.map(|section| format!(" named {section:?}")).unwrap_or_default();
    let number = port.map(|port| format!(" {port}")).unwrap_or_default();
    let key = section.map_or("port", |_| "sectionName");
    let key = (port.is_some() || section.is_some()).then_some(key);
    Err((key, format!("the Service {id} has no TCP port{number}{name}")))
}

/// A route whose references are being looked up.
struct Resolver<'r, 's, 'w> {
    route: &'r RouteRef,
    /// The Services that take the route.
    own: Vec<&'r ObjectRef>,
    surroundings: &'s Surroundings<'w>,
    problems: Vec<Problem>,
    refusal: Option<Refusal>,
}

impl Resolver<'_, '_, '_> {
    fn rule(&mut self, index: usize, rule: &RouteRule) -> (Vec<Match>, Arc<Rule>) {
        let RouteRule { name, matches, filters, backends, timeouts, retry, session } = rule;
        let filters = self.filters(filters);
        let else_what = match self.route.kind {
            RouteKind::Http | RouteKind::Grpc => "its share of the requests is answered with an error",
            RouteKind::Tls | RouteKind::Tcp => "its share of the connections is closed",
        };
        let backend = |backend: &BackendRef| Backend {
            weight: backend.weight,
            target: self.target(&backend.to, else_what),
            filters: self.filters(&backend.filters),
        };
        let backends = backends.iter().map(backend).collect();
        let rule = Rule {
            route: self.route.clone(),
            name: name.clone(),
            index,
            filters,
            backends,
            timeouts: *timeouts,
            retry: retry.clone(),
            session: session.clone(),
        };
        (matches.clone(), Arc::new(rule))
    }

    fn filters(&mut self, filters: &RuleFilters) -> Filters {
        let mirror = |(to, fraction): &(Reference, (u32, u32))| Mirror {
            target: self.target(to, "no copies are made"),
            fraction: *fraction,
        };
        let mirrors = filters.mirrors.iter().map(mirror).collect();
        Filters { mirrors, ..filters.plain.clone() }
    }

    /// `else_what` is what becomes of the requests if there is nothing.
    fn target(&mut self, to: &Reference, else_what: &str) -> Target {
        match self.service(to) {
            Ok(port) => Target::Service { id: to.id.clone(), port },
            Err(why) => {
                let message = why.to_string();
                self.problems.push(Problem::new(to.field.clone(), format!("{message}; {else_what}")));
                self.refusal.get_or_insert(Refusal { reason: Reason::from(&why), message });
                Target::Invalid(why)
            }
        }
    }

    /// The port of the Service that is referred to. Whether it may be comes before whether it is there: nobody learns what
    /// another namespace has.
    fn service(&self, to: &Reference) -> Result<u16, InvalidBackend> {
        let Reference { field: _, group, kind, id, port } = to;
        if !group.is_empty() || **kind != *"Service" {
            return Err(InvalidBackend::Kind { group: group.clone(), kind: kind.clone(), name: id.clone() });
        }
        let RouteRef { kind, id: ObjectRef { namespace: from, .. } } = self.route;
        // Back to its own parent a route sends what would have gone there without it.
        let needs_grant = id.namespace != *from && !self.own.contains(&id);
        if needs_grant && !(self.surroundings.is_granted)(*kind, from, id) {
            return Err(InvalidBackend::NotGranted { kind: *kind, from: from.clone(), service: id.clone() });
        }
        let service =
            (self.surroundings.service)(id).ok_or_else(|| InvalidBackend::NoSuchService(id.clone()))?;
        if service.addresses.is_empty() {
            return Err(InvalidBackend::NoAddress(id.clone()));
        }
        let port = port.ok_or_else(|| InvalidBackend::PortNotGiven(id.clone()))?;
        let has_port = service.ports.iter().any(|it| it.port == port);
        has_port.then_some(port).ok_or_else(|| InvalidBackend::NoSuchPort { service: id.clone(), port })
    }
}

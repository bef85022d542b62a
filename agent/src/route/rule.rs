//! A rule of a route: where its requests go and how they are treated on the way.

use std::fmt;
use std::time::Duration;

use http::StatusCode;

use super::Filters;
use crate::model::{Name, ObjectRef, SessionPersistence};

/// One rule of a route, without its matches: those are in the table that leads to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// The route that it is of.
    pub route: RouteRef,
    /// `name`, if the rule has one.
    pub name: Option<Name>,
    /// Its place in the route, counted from 0.
    pub index: usize,
    /// What is done to its requests, whichever backend they go to.
    pub filters: Filters,
    /// Where its requests go, by weight.
    pub backends: Vec<Backend>,
    /// How long a request may take.
    pub timeouts: Timeouts,
    /// Whether a request that failed is tried again; None where the route does not say.
    pub retry: Option<Retry>,
    /// Whether the requests of one session go to one endpoint.
    pub session: Option<SessionPersistence>,
}

/// Which route. Printed as `HTTPRoute shop/web`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteRef {
    /// The kind of the route.
    pub kind: RouteKind,
    /// Its namespace and name.
    pub id: ObjectRef,
}

/// The kinds of routes. The first of two on one Service port is the one in force (GEP-1294).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// GRPCRoute.
    Grpc,
    /// HTTPRoute.
    Http,
    /// TLSRoute.
    Tls,
    /// TCPRoute.
    Tcp,
}

/// One backend of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Its share of the requests, relative to those of the other backends. Nothing goes to a backend of weight 0.
    pub weight: u32,
    /// Where its requests go.
    pub target: Target,
    /// What is done to the requests that go here, after the rule's own filters.
    pub filters: Filters,
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the endpoints of this Service, which the snapshot has.
    Service {
        /// The Service.
        id: ObjectRef,
        /// Its port.
        port: u16,
    },
    /// Nowhere: each is answered with 500 (gRPC: UNAVAILABLE), or its connection closed where the route knows no requests. That
    /// never silently becomes somebody else's share.
    Invalid(InvalidBackend),
}

/// Why there is nowhere to send the requests of a backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBackend {
    /// Not a Service.
    #[error("the backend {name} is a {kind}, and Services alone are supported", kind = shown_kind(group, kind))]
    Kind {
        /// API group; empty for the core one.
        group: Name,
        /// Kind.
        kind: Name,
        /// Namespace and name.
        name: ObjectRef,
    },
    /// The Service is in another namespace, which has not allowed it.
    #[error(
        "the Service {service} is in another namespace, and no ReferenceGrant there lets the {kind}s of {from} refer to it",
        kind = kind.as_str()
    )]
    NotGranted {
        /// What refers to it.
        kind: RouteKind,
        /// The namespace of what refers to it.
        from: Name,
        /// What it refers to.
        service: ObjectRef,
    },
    /// The Service is not there.
    #[error("there is no Service {0}")]
    NoSuchService(ObjectRef),
    /// The Service has no address of its own.
    #[error("the Service {0} is headless or external, and has no cluster IP to balance behind")]
    NoAddress(ObjectRef),
    /// A Service needs a port.
    #[error("the backend names no port of the Service {0}")]
    PortNotGiven(ObjectRef),
    /// The Service has no such port.
    #[error("the Service {service} has no TCP port {port}")]
    NoSuchPort {
        /// The Service.
        service: ObjectRef,
        /// The port that it lacks.
        port: u16,
    },
}

/// How long a request may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the request to the end of its answer, all attempts together; of gRPC to the answer's beginning, for streams last.
    pub request: TimeLimit,
    /// One attempt.
    pub backend_request: TimeLimit,
}

/// A limit, as far as the rule says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeLimit {
    /// The rule says nothing: what others say counts.
    #[default]
    Unsaid,
    /// For ever, whatever others say.
    Never,
    /// So long.
    After(Duration),
}

impl TimeLimit {
    /// The limit, where others say this. None is for ever.
    pub fn or(self, others: Option<Duration>) -> Option<Duration> {
        match self {
            Self::Unsaid => others,
            Self::Never => None,
            Self::After(limit) => Some(limit),
        }
    }
}

/// When and how often a request that failed is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The answers that count as failures, beside failures of the connection, which always do.
    pub codes: Vec<StatusCode>,
    /// At most so many attempts after the first.
    pub attempts: u32,
    /// At least so long between two attempts.
    pub backoff: Option<Duration>,
}

impl Rule {
    /// The backend of one request, chosen by weight: of 64 fresh random bits each backend gets its exact share. None when
    /// all weights are 0 or there are no backends; such requests are answered with 500.
    pub fn backend(&self, random: u64) -> Option<&Backend> {
        let total: u128 = self.backends.iter().map(|backend| u128::from(backend.weight)).sum();
        let mut left = (u128::from(random) * total) >> 64;
        self.backends.iter().find(|backend| {
            let weight = u128::from(backend.weight);
            let is_it = left < weight;
            left = left.saturating_sub(weight);
            is_it
        })
    }
}

impl RouteKind {
    /// All kinds, the first of two on one port first.
    pub const ALL: [Self; 4] = [Self::Grpc, Self::Http, Self::Tls, Self::Tcp];

    /// The `kind` of a manifest.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }
}

impl fmt::Display for RouteRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.id)
    }
}

fn shown_kind(group: &str, kind: &str) -> String {
    if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") }
}

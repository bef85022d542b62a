//! What an AuthorizationPolicy says: values alone.

use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;

use super::expression::Expression;
use crate::model::Name;

/// A policy, for whichever workloads it is attached to.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// As people know it: `AuthorizationPolicy shop/only-web`.
    pub name: Name,
    /// What becomes of what its rules match.
    pub action: Action,
    /// It is evaluated and reported, and changes nothing.
    pub dry_run: bool,
    /// What it matches: whatever one of these does. Without rules it matches nothing, and hence allows nothing.
    pub rules: Vec<Rule>,
    /// What is wrong with it, if it cannot be used: then everything is denied, whatever else it says.
    pub invalid: Option<Name>,
}

/// A policy, as a workload has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The policy.
    pub policy: Arc<Policy>,
    /// The ports of the application that it is for, ascending; None: all that there are.
    pub ports: Option<Arc<[u16]>>,
}

/// What becomes of what a policy's rules match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// It is let in, unless another policy denies it; what no policy of this kind matches is not, once there is one.
    Allow,
    /// It is refused, whatever else allows it.
    Deny,
    /// It is written to the audit log, and let in or not by others.
    Audit,
}

/// Matches what comes from one of the sources, is one of the operations, and meets all of the conditions. Without sources it may come
/// from anywhere, without operations it may be anything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// Where it comes from.
    pub from: Vec<Source>,
    /// What is asked for.
    pub to: Vec<Operation>,
    /// What must hold beside it.
    pub when: Vec<Condition>,
}

/// Where something comes from: all of this must hold. Whoever proves no identity is in none of the lists of identities; a list of those
/// that are left out holds for it where the policy denies or audits, and not where it allows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Source {
    /// SPIFFE ids.
    pub identities: Matcher<Pattern>,
    /// Service accounts of any trust domain.
    pub service_accounts: Matcher<ServiceAccount>,
    /// Namespaces of service accounts.
    pub namespaces: Matcher<Pattern>,
    /// Trust domains.
    pub trust_domains: Matcher<Pattern>,
    /// The address that the connection came from.
    pub ip_blocks: Matcher<IpNet>,
}

/// A service account of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

/// What is asked for: all of this must hold. All but the ports is of requests, and holds for nothing else.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Operation {
    /// The port of the application.
    pub ports: Matcher<u16>,
    /// Methods of HTTP; they are told apart by case.
    pub methods: Matcher<Pattern>,
    /// Paths, normalised and without the query; whether case tells them apart, the request says.
    pub paths: Matcher<PathPattern>,
    /// Hosts, without regard to case; the port is only looked at where the pattern has one.
    pub hosts: Matcher<Pattern>,
    /// Methods of gRPC services: one of these, if there are any.
    pub grpc: Vec<GrpcMethod>,
}

/// A method of a gRPC service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GrpcMethod {
    /// With its package: `shop.v1.Orders`.
    pub service: Name,
    /// None: each.
    pub method: Option<Name>,
}

/// Something else that must hold of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// A header has such a value; of several headers of the name, one. Without it only a list of what is left out holds.
    Header {
        /// Its name.
        name: HeaderName,
        /// Its values.
        values: Matcher<Pattern>,
    },
    /// A claim of the caller's token has such a value; of a list, one element. Who has shown no token has no claims, as who proves no
    /// identity is in no list.
    Claim {
        /// Its name, and the names in it where it is an object.
        path: Vec<Name>,
        /// Its values.
        values: Matcher<Pattern>,
    },
    /// The expression is true. One that fails does not hold where the policy allows, and holds where it denies or audits.
    Cel(Expression),
}

/// Values that are meant, and values that are left out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Matcher<T> {
    /// One of these; if there are none, any.
    pub any_of: Vec<T>,
    /// None of these.
    pub none_of: Vec<T>,
}

/// A text with at most one `*`, at one end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// `*`: whatever is there.
    Present,
    /// Just this.
    Exact(Name),
    /// `a*`: what begins with it.
    Prefix(Name),
    /// `*a`: what ends with it.
    Suffix(Name),
}

/// Paths that are meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// `/a/b`: just this.
    Exact(Name),
    /// `/a/*`: what begins with it, the `*` left out.
    Prefix(Name),
    /// `*.php`: what ends with it.
    Suffix(Name),
    /// `/a/{*}/b/{**}`: segment by segment.
    Template(Vec<Segment>),
}

/// A segment of a path's template.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// Just this.
    Literal(Name),
    /// `{*}`: any one segment that is not empty.
    One,
    /// `{**}`: any number of segments, none among them.
    Any,
}

impl<T> Default for Matcher<T> {
    fn default() -> Self {
        Self { any_of: Vec::new(), none_of: Vec::new() }
    }
}

impl<T> Matcher<T> {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

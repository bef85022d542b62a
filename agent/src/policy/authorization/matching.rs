//! Whether a rule matches.
//!
//! Before a request is known, what rules say of requests is open: they match perhaps.

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::facts::{Facts, Request, host_and_port};
use super::rule::{
    Condition, GrpcMethod, Matcher, Operation, PathPattern, Pattern, Rule, Segment, ServiceAccount, Source,
};
use crate::model::{Name, SpiffeId};

/// Whether something matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Match {
    /// Not, whatever is asked for.
    No,
    /// That depends on the request.
    Perhaps,
    /// Whatever is asked for, or this request.
    Yes,
}

/// Whether case tells texts apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Matters,
    /// Of ASCII's letters.
    Ignored,
}

/// What a [`Source`] says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceField {
    Identities,
    ServiceAccounts,
    Namespaces,
    TrustDomains,
    IpBlocks,
}

/// What an [`Operation`] says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OperationField {
    Ports,
    Methods,
    Paths,
    Hosts,
    Grpc,
}

impl Rule {
    /// Whether it matches what is known.
    pub(super) fn matches(&self, facts: &Facts<'_>) -> Match {
        if !self.from.is_empty() && !self.from.iter().any(|source| source.matches(facts)) {
            return Match::No;
        }
        let mut found = if self.to.is_empty() { Match::Yes } else { Match::No };
        for operation in &self.to {
            found = found.max(operation.matches(facts));
            if found == Match::Yes {
                break;
            }
        }
        for condition in &self.when {
            if found == Match::No {
                break;
            }
            found = found.min(condition.holds(facts));
        }
        found
    }

    /// Whether it can match before a request is known.
    pub(super) fn can_be_certain(&self) -> bool {
        self.when.is_empty() && (self.to.is_empty() || self.to.iter().any(|to| !to.is_of_requests()))
    }

    /// Whether it says anything of requests.
    pub(crate) fn is_of_requests(&self) -> bool {
        !self.when.is_empty() || self.to.iter().any(Operation::is_of_requests)
    }
}

impl SourceField {
    pub(super) const ALL: [Self; 5] =
        [Self::Identities, Self::ServiceAccounts, Self::Namespaces, Self::TrustDomains, Self::IpBlocks];
}

impl OperationField {
    pub(super) const ALL: [Self; 5] = [Self::Ports, Self::Methods, Self::Paths, Self::Hosts, Self::Grpc];
}

impl Source {
    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        SourceField::ALL.into_iter().all(|field| self.holds(field, facts))
    }

    /// Whether what it says of one thing holds.
    pub(super) fn holds(&self, field: SourceField, facts: &Facts<'_>) -> bool {
        match field {
            SourceField::Identities => {
                proven(&self.identities, facts, |pattern, id| pattern.matches(id.as_str()))
            }
            SourceField::ServiceAccounts => proven(&self.service_accounts, facts, ServiceAccount::is_of),
            SourceField::Namespaces => {
                proven(&self.namespaces, facts, |pattern, id| pattern.matches(id.namespace()))
            }
            SourceField::TrustDomains => {
                proven(&self.trust_domains, facts, |pattern, id| pattern.matches(id.trust_domain()))
            }
            SourceField::IpBlocks => {
                let address = facts.connection.address.to_canonical();
                self.ip_blocks.holds(|block: &IpNet| block.contains(&address))
            }
        }
    }
}

/// Who proves nothing is none of those that are meant, and may be one of those that are left out.
fn proven<T>(matcher: &Matcher<T>, facts: &Facts<'_>, is: impl Fn(&T, &SpiffeId) -> bool) -> bool {
    if matcher.is_empty() {
        return true;
    }
    match facts.connection.identity {
        Some(identity) => matcher.holds(|value| is(value, identity)),
        None => matcher.any_of.is_empty() && facts.in_doubt,
    }
}

impl ServiceAccount {
    fn is_of(&self, identity: &SpiffeId) -> bool {
        *self.name == *identity.service_account() && *self.namespace == *identity.namespace()
    }
}

impl Operation {
    /// Whether it says anything of requests.
    pub(crate) fn is_of_requests(&self) -> bool {
        let Self { ports: _, methods, paths, hosts, grpc } = self;
        !(methods.is_empty() && paths.is_empty() && hosts.is_empty() && grpc.is_empty())
    }

    pub(super) fn matches(&self, facts: &Facts<'_>) -> Match {
        let mut found = Match::Yes;
        for field in OperationField::ALL {
            found = found.min(self.holds(field, facts));
            if found == Match::No {
                break;
            }
        }
        found
    }

    /// Whether what it says of one thing holds.
    pub(super) fn holds(&self, field: OperationField, facts: &Facts<'_>) -> Match {
        let says_nothing = match field {
            OperationField::Ports => return self.ports.holds(|port| *port == facts.connection.port).into(),
            OperationField::Methods => self.methods.is_empty(),
            OperationField::Paths => self.paths.is_empty(),
            OperationField::Hosts => self.hosts.is_empty(),
            OperationField::Grpc => self.grpc.is_empty(),
        };
        if says_nothing {
            return Match::Yes;
        }
        let Some(request) = &facts.request else { return Match::Perhaps };
        let case = Case::of_path(request);
        let holds = match field {
            OperationField::Ports => true,
            OperationField::Methods => self.methods.holds(|method| method.matches(request.method.as_str())),
            OperationField::Paths => self.paths.holds(|pattern| pattern.matches(request.path, case)),
            OperationField::Hosts => match request.host {
                Some(host) => self.hosts.holds(|pattern| pattern.matches_host(host)),
                None => self.hosts.any_of.is_empty(),
            },
            OperationField::Grpc => facts
                .grpc_method()
                .is_some_and(|(service, method)| self.grpc.iter().any(|it| it.is(service, method, case))),
        };
        holds.into()
    }
}

impl GrpcMethod {
    fn is(&self, service: &str, method: &str, case: Case) -> bool {
        case.equal(&self.service, service) && self.method.as_ref().is_none_or(|own| case.equal(own, method))
    }
}

impl Condition {
    /// Whether it holds.
    pub(super) fn holds(&self, facts: &Facts<'_>) -> Match {
        let Some(request) = &facts.request else { return Match::Perhaps };
        let holds = match self {
            Self::Header { name, values } => {
                let lines = || request.headers.get_all(name).iter();
                let has = |patterns: &[Pattern]| {
                    lines().any(|line| patterns.iter().any(|pattern| pattern.matches_bytes(line.as_bytes())))
                };
                (values.any_of.is_empty() || has(&values.any_of)) && !has(&values.none_of)
            }
            Self::Claim { path, values } => match request.claims {
                Some(claims) => {
                    let claim = claim(claims, path);
                    let has = |patterns: &[Pattern]| claim.is_some_and(|claim| has(claim, patterns));
                    (values.any_of.is_empty() || has(&values.any_of)) && !has(&values.none_of)
                }
                None => values.any_of.is_empty() && facts.in_doubt,
            },
            Self::Cel(expression) => expression.evaluate(facts).unwrap_or(facts.in_doubt),
        };
        holds.into()
    }
}

/// The claim of this path. What is null is as if it were not there.
fn claim<'c>(claims: &'c Map<String, Value>, path: &[Name]) -> Option<&'c Value> {
    let (first, rest) = path.split_first()?;
    let mut value = claims.get(&**first)?;
    for name in rest {
        value = value.as_object()?.get(&**name)?;
    }
    (!value.is_null()).then_some(value)
}

/// Whether a claim has one of these values: of a list, one of its elements.
fn has(claim: &Value, patterns: &[Pattern]) -> bool {
    let any = |text: &str| patterns.iter().any(|pattern| pattern.matches(text));
    match claim {
        Value::String(text) => any(text),
        Value::Bool(is) => any(if *is { "true" } else { "false" }),
        Value::Number(number) => any(&number.to_string()),
        Value::Array(elements) => {
            elements.iter().any(|element| !element.is_array() && has(element, patterns))
        }
        Value::Object(_) => patterns.contains(&Pattern::Present),
        Value::Null => false,
    }
}

impl<T> Matcher<T> {
    fn holds(&self, is: impl Fn(&T) -> bool) -> bool {
        (self.any_of.is_empty() || self.any_of.iter().any(&is)) && !self.none_of.iter().any(&is)
    }
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        self.matches_bytes(text.as_bytes())
    }

    fn matches_bytes(&self, text: &[u8]) -> bool {
        match self {
            Self::Present => true,
            Self::Exact(exact) => exact.as_bytes() == text,
            Self::Prefix(prefix) => text.starts_with(prefix.as_bytes()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_bytes()),
        }
    }

    /// Hosts are compared without regard to case, and with their port only where the pattern has one.
    fn matches_host(&self, host: &str) -> bool {
        let (name, port) = host_and_port(host);
        let same = |a: Option<&str>, b: &str| a.is_some_and(|a| a.eq_ignore_ascii_case(b));
        match self {
            Self::Present => true,
            Self::Exact(exact) => {
                let (own, own_port) = host_and_port(exact);
                (own_port.is_none() || own_port == port) && same(Some(name), own)
            }
            Self::Suffix(suffix) => {
                let (own, own_port) = host_and_port(suffix);
                let end = name.len().checked_sub(own.len()).and_then(|start| name.get(start..));
                (own_port.is_none() || own_port == port) && same(end, own)
            }
            // It may end within the port.
            Self::Prefix(prefix) if host_and_port(prefix).1.is_some() => {
                same(host.get(..prefix.len()), prefix)
            }
            Self::Prefix(prefix) => same(name.get(..prefix.len()), prefix),
        }
    }
}

impl Case {
    fn of_path(request: &Request<'_>) -> Self {
        if request.ignores_path_case { Self::Ignored } else { Self::Matters }
    }

    fn equal(self, a: &str, b: &str) -> bool {
        self.equal_bytes(a.as_bytes(), b.as_bytes())
    }

    fn equal_bytes(self, a: &[u8], b: &[u8]) -> bool {
        match self {
            Self::Matters => a == b,
            Self::Ignored => a.eq_ignore_ascii_case(b),
        }
    }
}

impl PathPattern {
    fn matches(&self, path: &str, case: Case) -> bool {
        match self {
            Self::Exact(exact) => case.equal(exact, path),
            Self::Prefix(prefix) => {
                let start = path.as_bytes().get(..prefix.len());
                start.is_some_and(|start| case.equal_bytes(start, prefix.as_bytes()))
            }
            Self::Suffix(suffix) => {
                let start = path.len().checked_sub(suffix.len());
                start.is_some_and(|start| case.equal_bytes(&path.as_bytes()[start..], suffix.as_bytes()))
            }
            Self::Template(segments) => matches_template(segments, path, case),
        }
    }
}

fn matches_template(template: &[Segment], path: &str, case: Case) -> bool {
    let mut rest = path.strip_prefix('/');
    for segment in template {
        if *segment == Segment::Any {
            return path.starts_with('/');
        }
        let Some(text) = rest else { return false };
        let (head, tail) = match text.split_once('/') {
            Some((head, tail)) => (head, Some(tail)),
            None => (text, None),
        };
        let fits = match segment {
            Segment::Literal(literal) => case.equal(literal, head),
            Segment::One => !head.is_empty(),
            Segment::Any => true,
        };
        if !fits {
            return false;
        }
        rest = tail;
    }
    rest.is_none() && path.starts_with('/')
}

impl From<bool> for Match {
    fn from(matches: bool) -> Self {
        if matches { Self::Yes } else { Self::No }
    }
}

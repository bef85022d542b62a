//! Policies and questions as the tables of `cases` write them, a line each.
//!
//!     allow only-web: from namespaces=shop to methods=GET,HEAD paths=/a/* | from ipBlocks=10.0.0.0/8
//!     dry deny no-admin @8080: to paths=/admin/* when header:x-role!=admin
//!       shop/web GET /a/b host=shop h:x-role=user => allowed by only-web, rule 1
//!
//! Rules are parted by ` | `; an expression, `when cel:...`, takes the rest of its rule. each `from` and each `to` begins another source or operation. `!=` is what is left out. What follows the
//! name after `@` are the ports that it is attached to, what follows it in brackets is what is wrong with it. A question begins with a
//! service account of `cluster.local`, or `-` for nobody, perhaps `@PORT` (80) and `from=ADDRESS` (10.0.0.1); then `connects`,
//! `speaks` for bytes, or a request; `caseless` is one whose path is read without regard to case.

use std::fmt::Write as _;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::super::*;
use crate::model::{Name, SpiffeId};

/// A policy with the ports that it is attached to.
pub fn policy(line: &str) -> Applied {
    let (head, rules) = line.split_once(':').expect("a policy has a colon");
    let (head, invalid) = match head.split_once('(') {
        Some((head, problem)) => (head, Some(problem.trim_end_matches(')').into())),
        None => (head, None),
    };
    let mut words = head.split_whitespace();
    let mut action = words.next().unwrap();
    let dry_run = action == "dry";
    if dry_run {
        action = words.next().unwrap();
    }
    let action = match action {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        "audit" => Action::Audit,
        other => panic!("{other} is no action"),
    };
    let name = words.next().expect("a policy has a name").into();
    let ports = words.next().map(|ports| {
        let ports = ports.strip_prefix('@').expect("ports follow the name");
        ports.split(',').map(|port| port.parse().unwrap()).collect()
    });
    // Without a rule it is one that has none; `any` is one that says nothing.
    let rules = rules.split(" | ").filter(|rule| !rule.trim().is_empty()).map(rule).collect();
    Applied { policy: Arc::new(Policy { name, action, dry_run, rules, invalid }), ports }
}

fn rule(text: &str) -> Rule {
    let mut rule = Rule::default();
    let mut section = "";
    let (text, expression) = text.split_once(" cel:").map_or((text, None), |(text, cel)| (text, Some(cel)));
    rule.when.extend(expression.map(|text| Condition::Cel(Expression::parse(text.trim()).unwrap())));
    for word in text.split_whitespace() {
        match word {
            "any" => {}
            "from" => rule.from.push(Source::default()),
            "to" => rule.to.push(Operation::default()),
            "when" => {}
            word => {
                let (field, values) = word.split_once('=').expect("a field has values");
                let (field, is_left_out) =
                    field.strip_suffix('!').map_or((field, false), |field| (field, true));
                let add = Add { values, is_left_out };
                match section {
                    "from" => add.to_source(field, rule.from.last_mut().unwrap()),
                    "to" => add.to_operation(field, rule.to.last_mut().unwrap()),
                    _ => rule.when.push(add.condition(field)),
                }
                continue;
            }
        }
        section = word;
    }
    rule
}

struct Add<'v> {
    values: &'v str,
    is_left_out: bool,
}

impl Add<'_> {
    fn to_source(&self, field: &str, source: &mut Source) {
        match field {
            "identities" => self.to(&mut source.identities, pattern),
            "serviceAccounts" => self.to(&mut source.service_accounts, |text| {
                let (namespace, name) = text.split_once('/').unwrap();
                ServiceAccount { namespace: namespace.into(), name: name.into() }
            }),
            "namespaces" => self.to(&mut source.namespaces, pattern),
            "trustDomains" => self.to(&mut source.trust_domains, pattern),
            "ipBlocks" => self.to(&mut source.ip_blocks, |text| text.parse().unwrap()),
            other => panic!("{other} is no field of from"),
        }
    }

    fn to_operation(&self, field: &str, operation: &mut Operation) {
        match field {
            "ports" => self.to(&mut operation.ports, |text| text.parse().unwrap()),
            "methods" => self.to(&mut operation.methods, pattern),
            "paths" => self.to(&mut operation.paths, path_pattern),
            "hosts" => self.to(&mut operation.hosts, pattern),
            "grpc" => operation.grpc.extend(self.values.split(',').map(|text| match text.split_once('/') {
                Some((service, method)) => {
                    GrpcMethod { service: service.into(), method: Some(method.into()) }
                }
                None => GrpcMethod { service: text.into(), method: None },
            })),
            other => panic!("{other} is no field of to"),
        }
    }

    fn condition(&self, field: &str) -> Condition {
        let mut values = Matcher::default();
        self.to(&mut values, pattern);
        match field.split_once(':').expect("header:NAME or claim:PATH") {
            ("header", name) => Condition::Header { name: HeaderName::try_from(name).unwrap(), values },
            ("claim", path) => Condition::Claim { path: path.split('.').map(Name::from).collect(), values },
            (other, _) => panic!("{other} is no condition"),
        }
    }

    fn to<T>(&self, matcher: &mut Matcher<T>, parse: impl Fn(&str) -> T) {
        let list = if self.is_left_out { &mut matcher.none_of } else { &mut matcher.any_of };
        list.extend(self.values.split(',').map(parse));
    }
}

pub fn pattern(text: &str) -> Pattern {
    match (text, text.strip_suffix('*'), text.strip_prefix('*')) {
        ("*", ..) => Pattern::Present,
        (_, Some(prefix), _) => Pattern::Prefix(prefix.into()),
        (_, _, Some(suffix)) => Pattern::Suffix(suffix.into()),
        _ => Pattern::Exact(text.into()),
    }
}

pub fn path_pattern(text: &str) -> PathPattern {
    if text.contains('{') {
        let segments = text.split('/').skip(1).map(|segment| match segment {
            "{*}" => Segment::One,
            "{**}" => Segment::Any,
            literal => Segment::Literal(literal.into()),
        });
        return PathPattern::Template(segments.collect());
    }
    match pattern(text) {
        Pattern::Present => PathPattern::Prefix("".into()),
        Pattern::Exact(text) => PathPattern::Exact(text),
        Pattern::Prefix(text) => PathPattern::Prefix(text),
        Pattern::Suffix(text) => PathPattern::Suffix(text),
    }
}

/// What is asked about, and owned.
#[derive(Clone, Debug)]
pub struct Question {
    pub identity: Option<SpiffeId>,
    pub address: std::net::IpAddr,
    pub port: u16,
    pub asked: Asked,
    pub method: Method,
    pub path: String,
    pub host: Option<String>,
    pub headers: HeaderMap,
    pub claims: Option<serde_json::Map<String, serde_json::Value>>,
    pub is_grpc: bool,
    pub is_caseless: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Asked {
    Connection,
    Bytes,
    Request,
}

impl Question {
    pub fn parse(line: &str) -> Self {
        let mut question = Self {
            identity: None,
            address: [10, 0, 0, 1].into(),
            port: 80,
            asked: Asked::Request,
            method: Method::GET,
            path: "/".to_owned(),
            host: None,
            headers: HeaderMap::new(),
            claims: None,
            is_grpc: false,
            is_caseless: false,
        };
        let mut words = line.split_whitespace();
        let who = words.next().unwrap();
        if let Some((namespace, name)) = who.split_once('/') {
            let (domain, namespace) = namespace.split_once(':').unwrap_or(("cluster.local", namespace));
            question.identity = Some(SpiffeId::new(&domain.parse().unwrap(), namespace, name).unwrap());
        }
        for word in words {
            question.add(word);
        }
        if question.is_caseless {
            let settings = PathNormalisation { case_insensitive: true, ..PathNormalisation::default() };
            question.path = normalise(&question.path, &settings).unwrap().into_owned();
        }
        question
    }

    fn add(&mut self, word: &str) {
        if let Some(port) = word.strip_prefix('@') {
            self.port = port.parse().unwrap();
        } else if word.starts_with('/') {
            word.clone_into(&mut self.path);
        } else if let Some(header) = word.strip_prefix("h:") {
            let (name, value) = header.split_once('=').unwrap();
            self.headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_str(value).unwrap());
        } else if let Some((name, value)) = word.split_once('=') {
            match name {
                "from" => self.address = value.parse().unwrap(),
                "host" => self.host = Some(value.to_owned()),
                "claims" => self.claims = Some(serde_json::from_str(value).unwrap()),
                other => panic!("{other} is nothing of a question"),
            }
        } else {
            match word {
                "connects" => self.asked = Asked::Connection,
                "speaks" => self.asked = Asked::Bytes,
                "grpc" => self.is_grpc = true,
                "caseless" => self.is_caseless = true,
                method => self.method = method.parse().unwrap(),
            }
        }
    }

    pub fn connection(&self) -> Connection<'_> {
        Connection { identity: self.identity.as_ref(), address: self.address, port: self.port }
    }

    pub fn request(&self) -> Request<'_> {
        Request {
            method: &self.method,
            path: &self.path,
            ignores_path_case: self.is_caseless,
            host: self.host.as_deref(),
            headers: &self.headers,
            claims: self.claims.as_ref(),
            is_grpc: self.is_grpc,
        }
    }

    /// The answer in a line.
    pub fn answer(&self, set: &Set) -> String {
        let decision = match self.asked {
            Asked::Connection => match set.connection(&self.connection()) {
                OnConnection::Decided(decision) => decision,
                OnConnection::ByRequest => return "by request".to_owned(),
            },
            Asked::Bytes => set.bytes(&self.connection()),
            Asked::Request => set.request(&self.connection(), &self.request()),
        };
        let mut answer = decision.outcome.to_string();
        for rule in &decision.audited {
            write!(answer, " [audited by {rule}]").unwrap();
        }
        if let Some(dry) = &decision.dry {
            write!(answer, " [would be: {dry}]").unwrap();
        }
        answer
    }
}

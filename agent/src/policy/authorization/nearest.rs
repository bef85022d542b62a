//! Which rule was closest to allowing what was denied, and what of it does not hold.
//!
//! For people who wonder. It says nothing of what headers and claims have in them: those are not theirs to read.

use super::decision::NearMiss;
use super::facts::Facts;
use super::matching::{Match, OperationField, SourceField};
use super::rule::{Condition, Matcher, Operation, Rule, Source};
use super::set::Group;
use crate::model::SpiffeId;

/// So many rules that resemble the request are looked at, and so many of all: who is denied often must not cost much.
const MOST: usize = 64;

/// The longest text that is shown of a request.
const LONGEST: usize = 128;

const NEEDS_REQUEST: &str = "needs a request, and there is none";

/// Of rules that do not match, the one of which the least does not hold.
pub(super) fn nearest(group: &Group, facts: &Facts<'_>) -> Option<NearMiss> {
    let members = &group.members;
    let mut looked_at = Vec::new();
    group.by_request.visit(facts, &mut |place| {
        let goes_on = looked_at.len() < MOST;
        if goes_on {
            looked_at.extend(members.get(place).map(|rule| (place, rule)));
        }
        goes_on
    });
    looked_at.extend(members.all().take(MOST));
    let here = looked_at.into_iter().filter(|(_, rule)| rule.is_at(facts.connection.port));
    let (_, rule) =
        here.min_by_key(|(place, rule)| (failures(rule.rule(), facts).len(), members.order(*place)))?;
    Some(NearMiss { rule: rule.named()?, failed: failed(rule.rule(), facts)? })
}

/// What of the rule does not hold, or not for sure; of several things the first.
pub(super) fn failed(rule: &Rule, facts: &Facts<'_>) -> Option<String> {
    Some(failures(rule, facts).first()?.show(facts))
}

/// Something of a rule that does not hold, or not for sure.
enum Failure<'r> {
    Source(&'r Source, SourceField),
    Operation(&'r Operation, OperationField),
    Condition(&'r Condition),
}

/// What of a rule does not hold. Of several sources or operations, those of the one of which the least does not.
fn failures<'r>(rule: &'r Rule, facts: &Facts<'_>) -> Vec<Failure<'r>> {
    let of_source = |source: &'r Source| {
        let failing = SourceField::ALL.into_iter().filter(|field| !source.holds(*field, facts));
        failing.map(|field| Failure::Source(source, field)).collect::<Vec<_>>()
    };
    let of_operation = |operation: &'r Operation| {
        let failing = OperationField::ALL.into_iter().filter(|it| operation.holds(*it, facts) != Match::Yes);
        failing.map(|field| Failure::Operation(operation, field)).collect::<Vec<_>>()
    };
    let mut all = rule.from.iter().map(of_source).min_by_key(Vec::len).unwrap_or_default();
    all.extend(rule.to.iter().map(of_operation).min_by_key(Vec::len).unwrap_or_default());
    all.extend(rule.when.iter().filter(|it| it.holds(facts) != Match::Yes).map(Failure::Condition));
    all
}

impl Failure<'_> {
    fn show(&self, facts: &Facts<'_>) -> String {
        match self {
            Self::Source(source, field) => format!("from: {}", show_source(source, *field, facts)),
            Self::Operation(operation, field) => format!("to: {}", show_operation(operation, *field, facts)),
            Self::Condition(condition) => format!("when: {}", show_condition(condition, facts)),
        }
    }
}

fn show_source(source: &Source, field: SourceField, facts: &Facts<'_>) -> String {
    let Source { identities, service_accounts, namespaces, trust_domains, ip_blocks } = source;
    let identity = facts.connection.identity;
    let proven = |lists: [Option<&str>; 2], value: fn(&SpiffeId) -> String| match identity {
        Some(identity) => leaves_out(lists, &value(identity)),
        None => {
            let list = lists.into_iter().flatten().next().unwrap_or_default();
            format!("{list} needs an identity, and none is proven")
        }
    };
    match field {
        SourceField::Identities => {
            proven(lists(identities, "identities", "notIdentities"), |id| id.to_string())
        }
        SourceField::ServiceAccounts => {
            let lists = lists(service_accounts, "serviceAccounts", "notServiceAccounts");
            proven(lists, |id| format!("{}/{}", id.namespace(), id.service_account()))
        }
        SourceField::Namespaces => {
            proven(lists(namespaces, "namespaces", "notNamespaces"), |id| id.namespace().to_owned())
        }
        SourceField::TrustDomains => {
            let lists = lists(trust_domains, "trustDomains", "notTrustDomains");
            proven(lists, |id| id.trust_domain().to_owned())
        }
        SourceField::IpBlocks => {
            let address = facts.connection.address.to_canonical().to_string();
            leaves_out(lists(ip_blocks, "ipBlocks", "notIpBlocks"), &address)
        }
    }
}

fn show_operation(operation: &Operation, field: OperationField, facts: &Facts<'_>) -> String {
    let Operation { ports, methods, paths, hosts, grpc } = operation;
    let port = facts.connection.port.to_string();
    let (lists, value) = match field {
        OperationField::Ports => (lists(ports, "ports", "notPorts"), Some(port)),
        OperationField::Methods => {
            let method = facts.request.map(|request| shown(request.method.as_str()));
            (lists(methods, "methods", "notMethods"), method)
        }
        OperationField::Paths => {
            (lists(paths, "paths", "notPaths"), facts.request.map(|request| shown(request.path)))
        }
        OperationField::Hosts => match facts.request.map(|request| request.host) {
            Some(None) => return "hosts needs a host, and none is asked for".to_owned(),
            host => (lists(hosts, "hosts", "notHosts"), host.flatten().map(shown)),
        },
        OperationField::Grpc => match facts.request {
            Some(request) if !request.is_grpc => return "grpc needs gRPC, and this is not".to_owned(),
            request => ([(!grpc.is_empty()).then_some("grpc"), None], request.map(|it| shown(it.path))),
        },
    };
    match value {
        Some(value) => leaves_out(lists, &value),
        None => format!("{} {NEEDS_REQUEST}", lists.into_iter().flatten().next().unwrap_or_default()),
    }
}

fn show_condition(condition: &Condition, facts: &Facts<'_>) -> String {
    let (what, has_any) = match condition {
        Condition::Header { name, .. } => (format!("the header {name}"), true),
        Condition::Claim { path, .. } => {
            let has_token = facts.request.is_none_or(|request| request.claims.is_some());
            (format!("the claim {}", path.join(".")), has_token)
        }
        Condition::Cel(expression) if facts.request.is_some() => {
            return format!("the expression {} is not true", shown(expression.as_str()));
        }
        Condition::Cel(_) => ("an expression".to_owned(), true),
    };
    match (facts.request, has_any) {
        (None, _) => format!("{what} {NEEDS_REQUEST}"),
        (Some(_), true) => format!("{what} has none of the values"),
        (Some(_), false) => format!("{what} needs a token, and there is none"),
    }
}

/// The names of the lists that say anything.
fn lists<'n, T>(matcher: &Matcher<T>, meant: &'n str, left_out: &'n str) -> [Option<&'n str>; 2] {
    let list = |values: &[T], name| (!values.is_empty()).then_some(name);
    [list(&matcher.any_of, meant), list(&matcher.none_of, left_out)]
}

fn leaves_out(lists: [Option<&str>; 2], value: &str) -> String {
    match lists {
        [Some(meant), Some(left_out)] => format!("{meant} and {left_out} leave out {value}"),
        [Some(meant), None] => format!("{meant} does not have {value}"),
        [None, left_out] => format!("{} has {value}", left_out.unwrap_or_default()),
    }
}

/// What came from outside: in quotes, without anything that does not print, and not for long.
fn shown(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

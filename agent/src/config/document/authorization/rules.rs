//! The rules of an AuthorizationPolicy, read into those of the decision.

use std::borrow::Borrow;

use super::super::place::Place;
use super::text;
use super::wire;
use crate::model::Name;
use crate::policy::authorization::{
    Condition, Expression, GrpcMethod, Matcher, Operation, Pattern, Rule, Source,
};

/// The longest lists: of rules, of what stands in one, and of values.
pub(super) const MOST_RULES: usize = 512;
pub(super) const MOST_ENTRIES: usize = 64;
pub(super) const MOST_VALUES: usize = 256;
pub(super) const LONGEST_PATH_OF_CLAIM: usize = 8;

/// What the rules say; what is wrong with them goes to the place.
pub(super) fn read(namespace: &Name, rules: &Option<Vec<wire::Rule>>, place: &Place<'_>) -> Vec<Rule> {
    let rule = |(place, wire): (Place<'_>, &wire::Rule)| Rule {
        from: place
            .some("from", &wire.from, MOST_ENTRIES)
            .map(|(place, it)| source(namespace, it, &place))
            .collect(),
        to: place.some("to", &wire.to, MOST_ENTRIES).map(|(place, it)| operation(it, &place)).collect(),
        when: place
            .some("when", &wire.when, MOST_ENTRIES)
            .filter_map(|(place, it)| condition(it, &place))
            .collect(),
    };
    place.few("rules", rules, MOST_RULES).map(rule).collect()
}

fn source(namespace: &Name, wire: &wire::Source, place: &Place<'_>) -> Source {
    let source = Source {
        identities: matcher(
            place,
            ["identities", "notIdentities"],
            [&wire.identities, &wire.not_identities],
            text::identity,
        ),
        service_accounts: matcher(
            place,
            ["serviceAccounts", "notServiceAccounts"],
            [&wire.service_accounts, &wire.not_service_accounts],
            |text: &str, place| text::service_account(namespace, text, place),
        ),
        namespaces: matcher(
            place,
            ["namespaces", "notNamespaces"],
            [&wire.namespaces, &wire.not_namespaces],
            text::namespace,
        ),
        trust_domains: matcher(
            place,
            ["trustDomains", "notTrustDomains"],
            [&wire.trust_domains, &wire.not_trust_domains],
            text::trust_domain,
        ),
        ip_blocks: matcher(
            place,
            ["ipBlocks", "notIpBlocks"],
            [&wire.ip_blocks, &wire.not_ip_blocks],
            text::ip_block,
        ),
    };
    let wire::Source {
        identities: a, not_identities: b, service_accounts: c, not_service_accounts: d, ..
    } = wire;
    let wire::Source { namespaces: e, not_namespaces: f, trust_domains: g, not_trust_domains: h, .. } = wire;
    let wire::Source { ip_blocks: i, not_ip_blocks: j, .. } = wire;
    if [a, b, c, d, e, f, g, h, i, j].iter().all(|list| list.is_none()) {
        place.refuse(NOTHING);
    }
    source
}

/// Of an entry that has lost what it said, for want of which it would match everything.
const NOTHING: &str = "expected at least one field; without any it would mean everything";

fn operation(wire: &wire::Operation, place: &Place<'_>) -> Operation {
    let grpc = place.some("grpc", &wire.grpc, MOST_VALUES);
    let operation = Operation {
        ports: matcher(place, ["ports", "notPorts"], [&wire.ports, &wire.not_ports], |port: &i64, place| {
            place.port(*port)
        }),
        methods: matcher(place, ["methods", "notMethods"], [&wire.methods, &wire.not_methods], text::method),
        paths: matcher(place, ["paths", "notPaths"], [&wire.paths, &wire.not_paths], text::path),
        hosts: matcher(place, ["hosts", "notHosts"], [&wire.hosts, &wire.not_hosts], text::host),
        grpc: grpc.filter_map(|(place, it)| grpc_method(it, &place)).collect(),
    };
    let wire::Operation {
        methods: a, not_methods: b, paths: c, not_paths: d, hosts: e, not_hosts: f, ..
    } = wire;
    let has_texts = [a, b, c, d, e, f].iter().any(|list| list.is_some());
    if !has_texts && wire.ports.is_none() && wire.not_ports.is_none() && wire.grpc.is_none() {
        place.refuse(NOTHING);
    }
    operation
}

fn grpc_method(wire: &wire::Grpc, place: &Place<'_>) -> Option<GrpcMethod> {
    let service = text::grpc_name(&wire.service, &place.key("service"), "a service such as shop.v1.Orders");
    let method = match &wire.method {
        Some(method) => Some(text::grpc_name(method, &place.key("method"), "the name of a method")?),
        None => None,
    };
    Some(GrpcMethod { service: service?, method })
}

fn condition(wire: &wire::Condition, place: &Place<'_>) -> Option<Condition> {
    match (&wire.header, &wire.claim, &wire.expression) {
        (Some(header), None, None) => header_condition(header, &place.key("header")),
        (None, Some(claim), None) => claim_condition(claim, &place.key("claim")),
        (None, None, Some(text)) => expression(text, &place.key("expression")),
        _ => {
            place.refuse("expected one of header, claim and expression");
            None
        }
    }
}

fn header_condition(wire: &wire::Header, place: &Place<'_>) -> Option<Condition> {
    let name = place.key("name").header_name(&wire.name);
    let values = values(place, [&wire.values, &wire.not_values]);
    Some(Condition::Header { name: name?, values })
}

fn claim_condition(wire: &wire::Claim, place: &Place<'_>) -> Option<Condition> {
    let found = wire.path.len();
    if !(1..=LONGEST_PATH_OF_CLAIM).contains(&found) || wire.path.iter().any(String::is_empty) {
        place
            .key("path")
            .refuse(format!("expected 1 to {LONGEST_PATH_OF_CLAIM} names, found {:?}", wire.path));
    }
    let values = values(place, [&wire.values, &wire.not_values]);
    Some(Condition::Claim { path: wire.path.iter().map(|name| name.as_str().into()).collect(), values })
}

fn expression(text: &str, place: &Place<'_>) -> Option<Condition> {
    match Expression::parse(text) {
        Ok(expression) => Some(Condition::Cel(expression)),
        Err(why) => {
            place.refuse(format!("the expression {why}"));
            None
        }
    }
}

fn values(place: &Place<'_>, lists: [&Option<Vec<String>>; 2]) -> Matcher<Pattern> {
    if lists.iter().all(|list| list.is_none()) {
        place.refuse("expected values, notValues or both");
    }
    matcher(place, ["values", "notValues"], lists, text::pattern)
}

/// The values that are meant and those that are left out, by the names of the two fields.
fn matcher<T, W: Borrow<B>, B: ?Sized>(
    place: &Place<'_>,
    keys: [&str; 2],
    lists: [&Option<Vec<W>>; 2],
    read: impl Fn(&B, &Place<'_>) -> Option<T>,
) -> Matcher<T> {
    let [any_of, none_of] = [0, 1].map(|which| {
        let values = place.some(keys[which], lists[which], MOST_VALUES);
        values.filter_map(|(place, value)| read(value.borrow(), &place)).collect()
    });
    Matcher { any_of, none_of }
}

//! The CustomResourceDefinition of AuthorizationPolicy: the types that it is read by, with what they do not tell.
//!
//! The API server keeps fields that it does not know, for the reader to refuse: a rule that has lost one would let more in.

use expect_test::expect_file;
use serde_json::{Value, json};

use super::super::crd::{
    Definition, HEADER, add, add_selector, keep_unknown, list, name, place_of, rule, spec_of,
    status_of_conditions,
};
use super::rules::{LONGEST_PATH_OF_CLAIM, MOST_ENTRIES, MOST_RULES, MOST_VALUES};
use super::text::LONGEST;
use super::*;

/// Lists of texts, in rules.
const TEXTS: [&str; 16] = [
    "from[].identities",
    "from[].notIdentities",
    "from[].serviceAccounts",
    "from[].notServiceAccounts",
    "from[].namespaces",
    "from[].notNamespaces",
    "from[].trustDomains",
    "from[].notTrustDomains",
    "from[].ipBlocks",
    "from[].notIpBlocks",
    "to[].methods",
    "to[].notMethods",
    "to[].paths",
    "to[].notPaths",
    "to[].hosts",
    "to[].notHosts",
];

/// The same where a text may be anything.
const VALUES: [&str; 4] =
    ["when[].header.values", "when[].header.notValues", "when[].claim.values", "when[].claim.notValues"];

fn others() -> Vec<(&'static str, Value)> {
    let either =
        rule("!(has(self.selector) && has(self.targetRefs))", "selector and targetRefs exclude each other");
    let once = rule("self.all(a, self.exists_one(b, a.name == b.name))", "each target may be named once");
    let port = json!({ "minimum": 1, "maximum": 65_535 });
    let some = json!({ "minProperties": 1 });
    let with_values = json!({ "minProperties": 2 });
    let method = json!({ "pattern": "^[A-Za-z0-9_.]+$", "minLength": 1, "maxLength": LONGEST });
    vec![
        ("", either),
        ("targetRefs", list(1, 16)),
        ("targetRefs", once),
        ("targetRefs[].group", json!({ "enum": [""] })),
        ("targetRefs[].kind", json!({ "enum": ["Service"] })),
        ("targetRefs[].name", name(63)),
        ("action", json!({ "enum": ["Allow", "Deny", "Audit"], "default": "Allow" })),
        ("dryRun", json!({ "default": false })),
        ("rules", list(0, MOST_RULES)),
        ("rules[].from", list(1, MOST_ENTRIES)),
        ("rules[].from[]", some.clone()),
        ("rules[].to", list(1, MOST_ENTRIES)),
        ("rules[].to[]", some),
        ("rules[].to[].ports", list(1, MOST_VALUES)),
        ("rules[].to[].ports[]", port.clone()),
        ("rules[].to[].notPorts", list(1, MOST_VALUES)),
        ("rules[].to[].notPorts[]", port),
        ("rules[].to[].grpc", list(1, MOST_VALUES)),
        ("rules[].to[].grpc[].service", method.clone()),
        ("rules[].to[].grpc[].method", method),
        ("rules[].when", list(1, MOST_ENTRIES)),
        ("rules[].when[]", json!({ "minProperties": 1, "maxProperties": 1 })),
        ("rules[].when[].header", with_values.clone()),
        ("rules[].when[].header.name", json!({ "minLength": 1, "maxLength": 256, "pattern": HEADER })),
        ("rules[].when[].claim", with_values),
        ("rules[].when[].claim.path", list(1, LONGEST_PATH_OF_CLAIM)),
        ("rules[].when[].claim.path[]", name(256)),
        ("rules[].when[].expression", name(4096)),
    ]
}

fn definition() -> Definition {
    let mut spec = spec_of::<wire::Spec>();
    add_selector(&mut spec, "selector");
    for (field, extra) in others() {
        add(&mut spec, field, extra);
    }
    for field in TEXTS.into_iter().chain(VALUES) {
        add(&mut spec, &format!("rules[].{field}"), list(1, MOST_VALUES));
        add(&mut spec, &format!("rules[].{field}[]"), name(LONGEST));
    }
    keep_unknown(&mut spec);
    Definition {
        kind: Kind::AuthorizationPolicy,
        plural: "authorizationpolicies",
        short: "azpol",
        policy: "Direct",
        spec,
        status: status_of_conditions(
            "Accepted says whether the policy is in force, and else why not: Invalid (then it denies everything) or \
             TargetNotFound. Enforced is there where not all that it says can be done, with the reason NotHttp.",
        ),
        columns: &[
            ("Action", "string", ".spec.action"),
            ("DryRun", "boolean", ".spec.dryRun"),
            ("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
            ("Reason", "string", ".status.conditions[?(@.type==\"Accepted\")].reason"),
        ],
    }
}

#[test]
fn the_file_is_what_the_types_say() {
    let file = expect_file!["../../../../../deploy/helm/undermesh/crds/authorizationpolicies.yaml"];
    definition().check_file("authorization", &file);
}

#[test]
fn every_field_says_what_it_is_and_has_its_bounds() {
    definition().check_fields(include_str!("../../../../../docs/security.md"));
}

/// A policy with one of everything.
const WHOLE: &str = "
metadata: {name: a, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  rules:
  - from:
    - identities: ['*']
      notIdentities: ['*']
      serviceAccounts: [a]
      notServiceAccounts: [a]
      namespaces: [a]
      notNamespaces: [a]
      trustDomains: [a]
      notTrustDomains: [a]
      ipBlocks: [10.0.0.1]
      notIpBlocks: [10.0.0.1]
    to:
    - ports: [1]
      notPorts: [1]
      methods: [A]
      notMethods: [A]
      paths: [/a]
      notPaths: [/a]
      hosts: [a]
      notHosts: [a]
      grpc: [{service: a, method: b}]
    when: [{header: {name: a, values: [a], notValues: [a]}}, {claim: {path: [a], values: [a], notValues: [a]}}]
";

#[test]
fn the_reader_has_the_same_bounds() {
    let is_read = |change: &dyn Fn(&mut Value)| {
        let mut object: Value = serde_saphyr::from_str(WHOLE).unwrap();
        change(&mut object["spec"]);
        let policy = AuthorizationPolicy::read(&object, &mut Vec::new()).unwrap();
        policy.policy.invalid.is_none()
    };
    assert!(is_read(&|_| ()));
    let lists = TEXTS.into_iter().chain(VALUES).chain(["to[].ports", "to[].notPorts", "to[].grpc"]);
    for field in lists {
        let with = |count: usize| {
            is_read(&|spec| {
                // The last segment is the list itself, and not its first element.
                let (parent, key) = field.rsplit_once('.').unwrap();
                let parent = place_of(spec, &format!("rules[].{}", parent.trim_end_matches("[]")));
                let list = &mut parent[key];
                *list = vec![list[0].clone(); count].into();
            })
        };
        assert_eq!([0, 1, MOST_VALUES, MOST_VALUES + 1].map(with), [false, true, true, false], "{field}");
    }
    for field in ["rules[].to[].ports[]", "rules[].to[].notPorts[]"] {
        let with = |port: i64| is_read(&|spec| *place_of(spec, field) = port.into());
        assert_eq!([0, 1, 65_535, 65_536].map(with), [false, true, true, false], "{field}");
    }
    let long = |length: usize| {
        is_read(&|spec| *place_of(spec, "rules[].from[].namespaces[]") = "a".repeat(length).into())
    };
    assert!(long(LONGEST) && !long(LONGEST + 1));
}

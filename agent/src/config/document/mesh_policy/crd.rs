//! The CustomResourceDefinition of MeshPolicy: the types that it is read by, with what they do not tell.
//!
//! The API server keeps fields that it does not know, for the reader to refuse: a selector that is lost would open all pods.

use expect_test::expect_file;
use serde_json::{Value, json};

use super::super::crd::{
    Definition, HEADER, add, add_selector, keep_unknown, list, name, place_of, rule, spec_of,
    status_of_conditions,
};
use super::*;
use crate::policy::jwt::KeySet;

fn definition() -> Definition {
    let mut spec = spec_of::<wire::Spec>();
    add_selector(&mut spec, "selector");
    let modes = json!({ "enum": ["Strict", "Permissive"] });
    let ports = json!({
        "minItems": 1, "maxItems": MOST_PORTS, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port"],
    });
    add(&mut spec, "mtls", json!({ "minProperties": 1 }));
    add(&mut spec, "mtls.mode", modes.clone());
    add(&mut spec, "mtls.ports", ports);
    add(&mut spec, "mtls.ports[].port", json!({ "minimum": 1, "maximum": 65_535 }));
    add(&mut spec, "mtls.ports[].mode", modes);
    for (field, extra) in tokens() {
        add(&mut spec, &format!("jwt.{field}"), extra);
    }
    keep_unknown(&mut spec);
    Definition {
        kind: Kind::MeshPolicy,
        plural: "meshpolicies",
        short: "mpol",
        policy: "Inherited",
        spec,
        status: status_of_conditions(
            "Accepted says whether the policy is in force, and else why not: Invalid, or Conflicted where another one that is as \
             specific is strict.",
        ),
        columns: &[
            ("Mode", "string", ".spec.mtls.mode"),
            ("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
            ("Reason", "string", ".status.conditions[?(@.type==\"Accepted\")].reason"),
        ],
    }
}

/// What is said of tokens.
fn tokens() -> Vec<(&'static str, Value)> {
    let text = || name(jwt::LONGEST);
    let header = || json!({ "minLength": 1, "maxLength": jwt::LONGEST_HEADER, "pattern": HEADER });
    let address = json!({ "maxLength": jwt::LONGEST, "pattern": "^https://[^/?#@]+([/?][^#]*)?$" });
    vec![
        ("issuers", list(1, jwt::MOST_ISSUERS)),
        ("leeway", json!({ "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$", "maxLength": 24 })),
        ("issuers[].issuer", text()),
        ("issuers[].audiences", list(1, jwt::MOST_AUDIENCES)),
        ("issuers[].audiences[]", text()),
        ("issuers[].jwks", rule("has(self.inline) != has(self.uri)", "either inline or uri")),
        ("issuers[].jwks.inline", json!({ "maxLength": KeySet::MOST_BYTES })),
        ("issuers[].jwks.uri", address),
        ("issuers[].from", json!({ "minProperties": 1 })),
        ("issuers[].from.headers", list(1, jwt::MOST_PLACES)),
        ("issuers[].from.headers[].name", header()),
        (
            "issuers[].from.headers[].prefix",
            json!({ "maxLength": jwt::LONGEST_PREFIX, "pattern": "^[ -~]*$" }),
        ),
        ("issuers[].from.params", list(1, jwt::MOST_PLACES)),
        ("issuers[].from.params[]", text()),
        ("issuers[].claimsToHeaders", list(1, jwt::MOST_HEADERS)),
        ("issuers[].claimsToHeaders[].claim", list(1, jwt::DEEPEST)),
        ("issuers[].claimsToHeaders[].claim[]", text()),
        ("issuers[].claimsToHeaders[].header", header()),
    ]
}

#[test]
fn the_file_is_what_the_types_say() {
    let file = expect_file!["../../../../../deploy/helm/undermesh/crds/meshpolicies.yaml"];
    definition().check_file("mesh_policy", &file);
}

#[test]
fn every_field_says_what_it_is_and_has_its_bounds() {
    definition().check_fields(include_str!("../../../../../docs/security.md"));
}

#[test]
fn the_reader_has_the_same_bounds() {
    let is_read = |change: &dyn Fn(&mut Value)| {
        let mut object = json!({ "metadata": { "name": "a" }, "spec": { "mtls": { "ports": [{ "port": 1, "mode": "Strict" }] } } });
        change(&mut object["spec"]);
        MeshPolicy::read(&object, &mut Vec::new()).unwrap().mtls.is_some()
    };
    let port = |number: i64| is_read(&|spec| *place_of(spec, "mtls.ports[].port") = number.into());
    assert_eq!([0, 1, 65_535, 65_536].map(port), [false, true, true, false]);
    let ports = |count: usize| {
        let ports: Vec<Value> = (1..=count).map(|port| json!({ "port": port, "mode": "Strict" })).collect();
        is_read(&|spec| spec["mtls"]["ports"] = ports.clone().into())
    };
    assert_eq!([0, 1, MOST_PORTS, MOST_PORTS + 1].map(ports), [false, true, true, false]);
}

#[test]
fn the_reader_has_the_same_bounds_for_what_is_said_of_tokens() {
    let is_read = |change: &dyn Fn(&mut Value)| {
        let issuer = json!({
            "issuer": "a", "audiences": ["a"], "jwks": { "uri": "https://a/" },
            "from": { "headers": [{ "name": "a", "prefix": "a" }], "params": ["a"] },
            "claimsToHeaders": [{ "claim": ["a"], "header": "x0" }],
        });
        let mut object = json!({ "metadata": { "name": "a" }, "spec": { "jwt": { "issuers": [issuer] } } });
        change(&mut object["spec"]["jwt"]);
        MeshPolicy::read(&object, &mut Vec::new()).unwrap().mtls.is_some()
    };
    for (field, extra) in tokens() {
        let list = |length: usize| {
            is_read(&|jwt| {
                let (parent, own) = field.rsplit_once('.').unwrap_or_default();
                let object =
                    if parent.is_empty() { jwt } else { place_of(jwt, parent.trim_end_matches("[]")) };
                let list = &mut object[if own.is_empty() { field } else { own }];
                let first = list[0].clone();
                let named = |i: usize| {
                    let mut one = first.clone();
                    // Some are there once.
                    for name in ["issuer", "header"] {
                        if one.get(name).is_some() {
                            one[name] = format!("x{i}").into();
                        }
                    }
                    one
                };
                *list = (0..length).map(named).collect::<Vec<_>>().into();
            })
        };
        let text = |length: usize| {
            is_read(&|jwt| {
                let text = match field {
                    "issuers[].jwks.uri" => format!("{:a<length$}", "https://"),
                    _ => "a".repeat(length),
                };
                *place_of(jwt, field.trim_end_matches("[]")) = text.into();
            })
        };
        let of_length = |length| if extra.get("maxItems").is_some() { list(length) } else { text(length) };
        let (least, most) = match &extra {
            // Where the reader knows more than how long it may be.
            _ if ["leeway", "issuers[].jwks.inline", "issuers[].from"].contains(&field) => continue,
            extra if extra.get("maxItems").is_some() => (extra["minItems"].as_u64(), &extra["maxItems"]),
            extra if extra.get("maxLength").is_some() => (extra["minLength"].as_u64(), &extra["maxLength"]),
            _ => continue,
        };
        let most = usize::try_from(most.as_u64().unwrap()).unwrap();
        assert!(of_length(most) && !of_length(most + 1), "{field}: {most}");
        if let Some(least) = least {
            assert!(!of_length(usize::try_from(least).unwrap() - 1), "{field}: {least}");
        }
    }
}

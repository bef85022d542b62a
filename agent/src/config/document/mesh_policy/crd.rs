//! The CustomResourceDefinition of MeshPolicy: the types that it is read by, with what they do not tell.
//!
//! The API server keeps fields that it does not know, for the reader to refuse: a selector that is lost would open all pods.

use expect_test::expect_file;
use serde_json::{Value, json};

use super::super::crd::{
    Definition, add, add_selector, keep_unknown, place_of, spec_of, status_of_conditions,
};
use super::*;

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

//! What MeshPolicies say, and what is wrong with how they say it.

use expect_test::{Expect, expect};

use super::*;

fn read(spec: &str) -> (MeshPolicy, String) {
    let yaml = format!("{{metadata: {{name: a, namespace: shop}}, spec: {spec}}}");
    let object: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let mut problems = Vec::new();
    let policy = MeshPolicy::read(&object, &mut problems).unwrap();
    assert_eq!(policy.mtls.is_some(), problems.is_empty(), "{yaml}: {problems:?}");
    (policy, problems.iter().map(|problem| format!("{problem}\n")).collect())
}

#[test]
fn all_that_can_be_said() {
    let (policy, _) = read(
        "{selector: {matchLabels: {app: web}, matchExpressions: [{key: tier, operator: In, values: [a, b]}, {key: canary, operator: DoesNotExist}]},
          mtls: {mode: Permissive, ports: [{port: 8080, mode: Strict}]}}",
    );
    let mtls = policy.mtls.unwrap();
    let of = [None, Some(80), Some(8080)].map(|port| mtls.of(port));
    assert_eq!(of, [Some(MtlsMode::Permissive), Some(MtlsMode::Permissive), Some(MtlsMode::Strict)]);
    let selector = policy.selector.unwrap();
    for (labels, is_meant) in [
        (&[("app", "web"), ("tier", "b")][..], true),
        (&[("app", "web"), ("tier", "c")], false),
        (&[("app", "web")], false),
        (&[("tier", "a")], false),
        (&[("app", "web"), ("tier", "a"), ("canary", "")], false),
    ] {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        assert_eq!(selector.matches(&labels), is_meant, "{labels:?}");
    }
    let without = [("app", "db")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let selects = |expression: &str| {
        let policy = read(&format!("{{selector: {{matchExpressions: [{expression}]}}}}")).0;
        policy.selector.unwrap().matches(&without)
    };
    assert!(selects("{key: tier, operator: NotIn, values: [a]}") && selects("{key: app, operator: Exists}"));
    assert!(
        !selects("{key: app, operator: NotIn, values: [db]}") && !selects("{key: tier, operator: Exists}")
    );
    // It leaves everything to others.
    assert_eq!(read("{}").0.mtls, Some(Mtls::default()));
    assert_eq!(read("{mtls: {ports: [{port: 1, mode: Strict}]}}").0.mtls.unwrap().of(Some(2)), None);
}

#[test]
fn what_is_wrong() {
    let check = |spec: &str, expected: Expect| expected.assert_eq(&read(spec).1);
    check(
        "null",
        expect![[r#"
        spec: expected a map, found null
    "#]],
    );
    check(
        "{mtls: {}}",
        expect![[r#"
        spec.mtls: expected a mode, ports or both
    "#]],
    );
    check(
        "{mtls: {mode: strict, ports: [{port: 0, mode: Off}, {port: 1}]}}",
        expect![[r#"
        spec.mtls.ports[0].mode: expected a string, found boolean `false`
    "#]],
    );
    check(
        "{mtls: {mode: strict, ports: [{port: 0, mode: 'Off'}, {port: 1, mode: Strict}, {port: 1, mode: Strict}]}}",
        expect![[r#"
            spec.mtls.mode: expected Strict or Permissive, found "strict"
            spec.mtls.ports[0].mode: expected Strict or Permissive, found "Off"
            spec.mtls.ports[0].port: expected a port from 1 to 65535, found 0
            spec.mtls.ports[2].port: expected each port once
        "#]],
    );
    check(
        "{mtls: {mode: Strict, ports: []}, tls: {}, selector: {}}",
        expect![[r#"
        spec.tls: there is no such field, or this version of Undermesh does not know it
        spec.selector: expected matchLabels or matchExpressions; without a selector all pods are meant
        spec.mtls.ports: expected at least one, or no such field
    "#]],
    );
    check(
        "{selector: {matchLabels: {}, matchExpressions: [{key: a, operator: in, values: [b]}, {key: a, operator: In}, {key: a, operator: Exists, values: [b]}]}}",
        expect![[r#"
            spec.selector.matchExpressions[0].operator: expected In, NotIn, Exists or DoesNotExist, found "in"
            spec.selector.matchExpressions[1].values: expected values, which In and NotIn are about
            spec.selector.matchExpressions[2].values: expected none but with In and NotIn
        "#]],
    );
    check(
        "{selector: {matchLabel: {a: b}}}",
        expect![[r#"
        spec.selector.matchLabel: there is no such field, or this version of Undermesh does not know it
        spec.selector: expected matchLabels or matchExpressions; without a selector all pods are meant
    "#]],
    );
}

#[test]
fn of_one_that_says_something_badly_it_is_known_for_whom_it_is_if_that_can_be_read() {
    let selector = |spec: &str| read(spec).0.selector;
    let web = selector("{selector: {matchLabels: {app: web}}}");
    let all = Some(Selector::default());
    for (spec, expected) in [
        ("{mtls: {mode: Off}}", &None),
        ("{mtls: 5}", &None),
        ("{mtls: 5, selector: null}", &None),
        ("{mtls: {mode: Off}, selector: {matchLabels: {app: web}}}", &web),
        ("{mtls: 5, selector: {matchLabels: {app: web}}}", &web),
        ("{selector: {}}", &all),
        ("{selector: 5}", &all),
        ("{mtls: 5, selector: {matchExpressions: [{key: a, operator: Is}]}}", &all),
        ("5", &all),
    ] {
        assert_eq!(selector(spec), *expected, "{spec}");
    }
}

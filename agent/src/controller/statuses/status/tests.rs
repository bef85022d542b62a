//! A status as it was found and how a route stands in, the status to be written out.

use expect_test::{Expect, expect};

use super::*;
use crate::config::FieldPath;

fn now() -> Timestamp {
    "2027-01-15T08:00:00.123Z".parse().unwrap()
}

fn service(name: &str) -> Value {
    json!({ "group": "", "kind": "Service", "name": name, "port": 80 })
}

/// Of the generation 2, with a Service as each of its parents.
fn route(parents: &[&str], status: Value) -> Written {
    Written {
        form: Form::of(Kind::HttpRoute),
        generation: 2,
        references: parents.iter().map(|name| service(name)).enumerate().collect(),
        problems: Vec::new(),
        denies: None,
        status: serde_json::from_value(status).unwrap(),
    }
}

fn standing(index: usize, accepted: Result<(), Refusal>) -> Standing {
    Standing { index, accepted, resolved_refs: Some(Ok(())), note: None, not_enforced: None }
}

fn conflict() -> Refusal {
    Refusal { reason: Reason::Conflicted, message: "somebody has it".into() }
}

/// One line for each entry, one for each of its conditions.
fn shown(parents: &[Value]) -> String {
    let mut text = String::new();
    for entry in parents {
        let reference = entry.get("parentRef").unwrap_or(&entry["ancestorRef"]);
        let name = reference["name"].as_str().unwrap();
        text += &format!("{name} by {}\n", entry["controllerName"].as_str().unwrap());
        for condition in entry["conditions"].as_array().unwrap() {
            let get = |key: &str| condition[key].as_str().unwrap_or("-").to_owned();
            let (since, generation) = (get("lastTransitionTime"), &condition["observedGeneration"]);
            text += &format!("  {}={} {}", get("type"), get("status"), get("reason"));
            text += &format!(" ({}), of {generation}, since {since}\n", get("message"));
        }
    }
    text
}

fn check(route: &Written, standing: &[Standing], expected: &Expect) -> Vec<Value> {
    let next = next(route, standing, now());
    expected.assert_eq(&next.as_deref().map_or("as it is".into(), shown));
    next.unwrap_or_default()
}

#[test]
fn every_parent_has_an_entry_and_what_is_right_is_not_written_again() {
    let both = [standing(0, Ok(())), standing(1, Err(conflict()))];
    let mut route = route(&["web", "api"], json!([]));
    route.status = check(
        &route,
        &both,
        &expect![[r#"
            web by undermesh.io/mesh
              Accepted=True Accepted (the route is in force), of 2, since 2027-01-15T08:00:00Z
              ResolvedRefs=True ResolvedRefs (all that the route refers to is there), of 2, since 2027-01-15T08:00:00Z
            api by undermesh.io/mesh
              Accepted=False Conflicted (somebody has it), of 2, since 2027-01-15T08:00:00Z
              ResolvedRefs=True ResolvedRefs (all that the route refers to is there), of 2, since 2027-01-15T08:00:00Z
        "#]],
    );
    assert_eq!(route.status[0]["parentRef"], service("web"), "as it was written");
    check(&route, &both, &expect!["as it is"]);
    // A route of gateways alone.
    check(&Written { references: Vec::new(), status: Vec::new(), ..route }, &[], &expect!["as it is"]);
}

#[test]
fn what_is_not_ours_stays_and_what_is_over_goes() {
    let condition = |kind: &str, status: &str, generation: i64| {
        json!({ "type": kind, "status": status, "reason": "Old", "message": "old", "observedGeneration": generation,
            "lastTransitionTime": "2026-01-01T00:00:00Z" })
    };
    let entry = |name: &str, controller: &str, conditions: Value| json!({ "parentRef": service(name), "controllerName": controller, "conditions": conditions });
    let found = json!([
        entry("gone", CONTROLLER, json!([condition("Accepted", "True", 1)])),
        entry("web", "example.com/gateway", json!([condition("Accepted", "False", 1)])),
        entry(
            "web",
            CONTROLLER,
            json!([
                condition("PartiallyInvalid", "True", 1),
                condition("example.com/Seen", "True", 1),
                condition("ResolvedRefs", "False", 1),
                condition("Accepted", "True", 1),
            ])
        ),
        // Written by somebody who has seen more.
        entry("api", CONTROLLER, json!([condition("Accepted", "False", 3)])),
        entry("api", CONTROLLER, json!([condition("Accepted", "False", 1)])),
    ]);
    let standing = [standing(0, Ok(())), standing(1, Ok(()))];
    let expected = expect![[r#"
        web by example.com/gateway
          Accepted=False Old (old), of 1, since 2026-01-01T00:00:00Z
        web by undermesh.io/mesh
          example.com/Seen=True Old (old), of 1, since 2026-01-01T00:00:00Z
          ResolvedRefs=True ResolvedRefs (all that the route refers to is there), of 2, since 2027-01-15T08:00:00Z
          Accepted=True Accepted (the route is in force), of 2, since 2026-01-01T00:00:00Z
        api by undermesh.io/mesh
          Accepted=False Old (old), of 3, since 2026-01-01T00:00:00Z
          ResolvedRefs=True ResolvedRefs (all that the route refers to is there), of 2, since 2027-01-15T08:00:00Z
    "#]];
    check(&route(&["web", "api"], found.clone()), &standing, &expected);
    // It has turned to gateways.
    check(
        &route(&[], found),
        &[],
        &expect![[r#"
        web by example.com/gateway
          Accepted=False Old (old), of 1, since 2026-01-01T00:00:00Z
    "#]],
    );
}

#[test]
fn a_version_that_cannot_be_used_says_whether_another_is_in_force() {
    let field = FieldPath::new(["spec", "rules"]).index(0).key("timeout");
    let problem = Problem::new(field, "there is no such field");
    let bad = |status: Value, count: usize| Written {
        problems: vec![problem.clone(); count],
        ..route(&["web"], status)
    };
    let not_in_force = expect![[r#"
        web by undermesh.io/mesh
          Accepted=False UnsupportedValue (spec.rules[0].timeout: there is no such field; until then the route is not in force), of 2, since 2027-01-15T08:00:00Z
    "#]];
    let first = check(&bad(json!([]), 1), &[], &not_in_force);
    check(&bad(json!(first), 1), &[], &expect!["as it is"]);
    // We have seen another.
    let kept = expect![[r#"
        web by undermesh.io/mesh
          Accepted=False UnsupportedValue (spec.rules[0].timeout: there is no such field; until then the last version that could be used stays in force, on nodes whose agent has seen it), of 2, since 2027-01-15T08:00:00Z
    "#]];
    check(&bad(json!([]), 1), &[standing(0, Ok(()))], &kept);
    // We have not, and somebody has who led before us.
    let good = next(&route(&["web"], json!([])), &[standing(0, Ok(()))], now()).unwrap();
    let next = check(&bad(json!(good), 1), &[], &kept);
    check(&bad(json!(next), 1), &[], &expect!["as it is"]);
    check(
        &bad(json!(next), 5),
        &[],
        &expect![[r#"
        web by undermesh.io/mesh
          Accepted=False UnsupportedValue (spec.rules[0].timeout: there is no such field; spec.rules[0].timeout: there is no such field; spec.rules[0].timeout: there is no such field; and 2 more problems; until then the last version that could be used stays in force, on nodes whose agent has seen it), of 2, since 2027-01-15T08:00:00Z
    "#]],
    );
}

#[test]
fn of_policies_there_is_less_to_say_and_less_room() {
    let others: Vec<Value> = (0..15)
        .map(|number| json!({ "ancestorRef": service(&number.to_string()), "controllerName": "example.com/other", "conditions": [] }))
        .collect();
    let policy = |status: &[Value]| Written {
        form: Form::of(Kind::TrafficPolicy),
        status: status.to_vec(),
        ..route(&["web", "api"], json!([]))
    };
    let both = [0, 1].map(|index| Standing { resolved_refs: None, ..standing(index, Ok(())) });
    check(
        &policy(&[]),
        &both,
        &expect![[r#"
            web by undermesh.io/mesh
              Accepted=True Accepted (the policy is in force), of 2, since 2027-01-15T08:00:00Z
            api by undermesh.io/mesh
              Accepted=True Accepted (the policy is in force), of 2, since 2027-01-15T08:00:00Z
        "#]],
    );
    let written = next(&policy(&others), &both, now()).unwrap();
    assert_eq!(written.len(), 16, "the API server takes no more");
    assert_eq!(written[..15], others);
    assert_eq!(next(&policy(&written), &both, now()), None);
}

#[test]
fn of_policies_of_pods_the_conditions_are_of_the_policy_itself() {
    let policy = |status: Value| Written {
        form: Form::of(Kind::AuthorizationPolicy),
        denies: Some("until then everything is denied".into()),
        ..route(&[], status)
    };
    let told = |conditions: Option<Vec<Value>>| match conditions {
        Some(conditions) => shown(&[
            json!({ "ancestorRef": service("it"), "controllerName": "us", "conditions": conditions }),
        ]),
        None => "as it is".into(),
    };
    let not_http = Refusal { reason: Reason::NotHttp, message: "there is no HTTP".into() };
    let both = Standing { not_enforced: Some(not_http), resolved_refs: None, ..standing(0, Ok(())) };
    let note =
        Standing { resolved_refs: None, note: Some("it selects no pod".into()), ..standing(0, Ok(())) };
    let others = json!([{ "type": "Ready", "status": "True", "reason": "A", "message": "a", "lastTransitionTime": "2026-01-01T00:00:00Z" }]);
    let first = next(&policy(others), std::slice::from_ref(&both), now()).unwrap();
    expect![[r#"
        it by us
          Ready=True A (a), of null, since 2026-01-01T00:00:00Z
          Accepted=True Accepted (the policy is in force), of 2, since 2027-01-15T08:00:00Z
          Enforced=False NotHttp (there is no HTTP), of 2, since 2027-01-15T08:00:00Z
    "#]]
    .assert_eq(&told(Some(first.clone())));
    let written = policy(first.into());
    expect!["as it is"].assert_eq(&told(next(&written, &[both], now())));
    expect![[r#"
        it by us
          Ready=True A (a), of null, since 2026-01-01T00:00:00Z
          Accepted=True Accepted (it selects no pod), of 2, since 2027-01-15T08:00:00Z
    "#]]
    .assert_eq(&told(next(&written, &[note], now())));
    let bad = Written { problems: vec![Problem::new(FieldPath::new(["spec"]), "expected a map")], ..written };
    expect![[r#"
        it by us
          Ready=True A (a), of null, since 2026-01-01T00:00:00Z
          Accepted=False Invalid (spec: expected a map; until then everything is denied), of 2, since 2027-01-15T08:00:00Z
    "#]].assert_eq(&told(next(&bad, &[], now())));
}

//! Policies and Services in; what each port goes by, and problems, out.

use std::fmt::Write;

use expect_test::{Expect, expect};
use k8s_openapi::api::core::v1 as core;
use serde_json::Value;

use super::super::{Change, Compiler};
use super::*;
use crate::config::{Document, Kind};
use crate::model::{NodeInfo, SessionKind};
use crate::snapshot::Destination;

struct World {
    compiler: Compiler,
}

impl World {
    fn of(yaml: &str) -> Self {
        let mut world = Self { compiler: Compiler::new(NodeInfo { name: "node-1".into(), zone: None }) };
        world.put(yaml);
        world
    }

    /// True if that changed the snapshot.
    fn put(&mut self, yaml: &str) -> bool {
        let objects: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("the test's YAML");
        let changes: Vec<Change> = objects.iter().map(|object| Change::Put(read(object))).collect();
        self.compiler.apply(changes)
    }

    fn remove(&mut self, kind: Kind, name: &str) -> bool {
        let key = Key { kind, namespace: "shop".into(), name: name.into() };
        self.compiler.apply([Change::Remove(key)])
    }

    /// What each port goes by, what is wrong, and what of it the status says.
    fn check(&self, expected: Expect) {
        let mut lines = String::new();
        for destination in self.compiler.snapshot().destinations.values() {
            let Destination::Service(service) = destination else { continue };
            for port in service.ports.iter().filter(|port| !port.traffic.policies.is_empty()) {
                let TrafficSettings { retries, session, policies, .. } = &*port.traffic;
                write!(lines, "{}:{} by {}:", service.id, port.port, policies.join(" and ")).unwrap();
                let (budget, session) = (retries.budget, session.as_ref().map(|it| it.name.as_ref()));
                writeln!(
                    lines,
                    " {} retries within {} % and {}/s, session {}",
                    retries.attempts,
                    budget.percent,
                    budget.per_second,
                    session.unwrap_or("none")
                )
                .unwrap();
            }
        }
        let problems = self.compiler.problems().iter();
        for (key, problem) in problems.flat_map(|(key, all)| all.iter().map(move |it| (key, it))) {
            writeln!(lines, "! {key}: {problem}").unwrap();
        }
        for key in self.compiler.policies.entries.keys().collect::<BTreeSet<_>>() {
            for status in self.compiler.policy_statuses(key) {
                if let Err(refusal) = status.accepted {
                    writeln!(lines, "{key} has no target {}: {}", status.index, refusal.reason.as_str())
                        .unwrap();
                }
            }
        }
        expected.assert_eq(&lines);
    }

    fn traffic(&self, service: &str, port: u16) -> Arc<TrafficSettings> {
        let id = ObjectRef::new("shop", service);
        let service = self.compiler.services.compiled(&id).expect("the test's Service");
        service.port(port).expect("the test's port").traffic.clone()
    }
}

fn read(object: &Value) -> Document {
    let mut problems = Vec::new();
    let document = match object["kind"].as_str() {
        Some("Service") => {
            let service: core::Service = serde_json::from_value(object.clone()).expect("the test's Service");
            Document::service(&service, &mut problems)
        }
        Some("TrafficPolicy") => Document::traffic_policy(object, &mut problems),
        _ => Document::backend_traffic_policy(object, &mut problems),
    };
    document.expect("the test's object")
}

const SERVICES: &str = "
{kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{name: http, port: 80}, {name: admin, port: 81}]}}
---
{kind: Service, metadata: {name: api, namespace: shop}, spec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: headless, namespace: shop}, spec: {clusterIP: None, ports: [{port: 80}]}}
";

/// A policy of the day of January; its targets are Services or Service/port, and the rest is YAML.
fn policy(kind: &str, name: &str, day: u32, targets: &[&str], rest: &str) -> String {
    let target = |target: &&str| match target.split_once('/') {
        Some((name, section)) => {
            format!("{{group: '', kind: Service, name: {name}, sectionName: {section}}}")
        }
        None => format!("{{group: '', kind: Service, name: {target}}}"),
    };
    let targets = targets.iter().map(target).collect::<Vec<_>>().join(", ");
    format!(
        "{{kind: {kind}, metadata: {{name: {name}, namespace: shop, creationTimestamp: '2026-01-{day:02}T00:00:00Z'}}, \
         spec: {{targetRefs: [{targets}], {rest}}}}}"
    )
}

fn traffic(name: &str, day: u32, targets: &[&str], attempts: i32) -> String {
    policy("TrafficPolicy", name, day, targets, &format!("retry: {{attempts: {attempts}}}"))
}

#[test]
fn a_port_goes_by_the_policy_that_names_it_then_by_the_oldest() {
    let mut world = World::of(SERVICES);
    assert!(world.put(&traffic("b", 2, &["web", "api"], 2)));
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        shop/web:81 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
    "#]]);
    assert!(!world.put(&traffic("c", 3, &["api"], 3)), "it is younger");
    assert!(world.put(&traffic("d", 4, &["web/admin"], 4)));
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        shop/web:81 by TrafficPolicy shop/d: 4 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/c: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/b, which is older
        TrafficPolicy shop/c has no target 0: Conflicted
    "#]]);
    assert!(world.put(&traffic("a", 1, &["web"], 1)), "it is older");
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/a: 1 retries within 20 % and 3/s, session none
        shop/web:81 by TrafficPolicy shop/d: 4 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/b: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/a, which is older; the port 81 goes by TrafficPolicy shop/d, which names the port
        ! TrafficPolicy shop/c: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/b, which is older
        TrafficPolicy shop/b has no target 0: Conflicted
        TrafficPolicy shop/c has no target 0: Conflicted
    "#]]);
    assert!(
        world.put(&traffic("aa", 4, &["web/admin", "web/http"], 5)),
        "of the same age, and first by name"
    );
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/aa: 5 retries within 20 % and 3/s, session none
        shop/web:81 by TrafficPolicy shop/aa: 5 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/b: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/a: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/aa, which names the port; the port 81 goes by TrafficPolicy shop/aa, which names the port
        ! TrafficPolicy shop/b: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/aa, which names the port; the port 81 goes by TrafficPolicy shop/aa, which names the port
        ! TrafficPolicy shop/c: spec.targetRefs[0]: the port 80 goes by TrafficPolicy shop/b, which is older
        ! TrafficPolicy shop/d: spec.targetRefs[0]: the port 81 goes by TrafficPolicy shop/aa, which comes first by its name
        TrafficPolicy shop/a has no target 0: Conflicted
        TrafficPolicy shop/b has no target 0: Conflicted
        TrafficPolicy shop/c has no target 0: Conflicted
        TrafficPolicy shop/d has no target 0: Conflicted
    "#]]);
    for name in ["a", "aa", "b", "c", "d"] {
        world.remove(Kind::TrafficPolicy, name);
    }
    assert!(!world.remove(Kind::TrafficPolicy, "d"));
    world.check(expect![[""]]);
    let Policies {
        entries,
        by_service,
        by_config_map,
        config_maps: _,
        encryptions,
        settled,
        unsaid,
        silence: _,
    } = &world.compiler.policies;
    assert!(by_config_map.is_empty() && encryptions.is_empty());
    assert!(entries.is_empty() && by_service.is_empty() && settled.is_empty() && unsaid.is_empty());
}

#[test]
fn two_kinds_are_put_together_and_ours_has_the_word() {
    let mut world = World::of(SERVICES);
    let rest = "retryConstraint: {budget: {percent: 50}, minRetryRate: {count: 5, interval: 10s}}, \
        sessionPersistence: {type: Header, sessionName: x-session}";
    assert!(world.put(&policy("XBackendTrafficPolicy", "x", 1, &["web", "api"], rest)));
    world.put(&traffic("a", 2, &["web/http"], 2));
    world.put(&policy("TrafficPolicy", "b", 2, &["web/admin"], "retry: {budget: {percent: 10}}"));
    world.check(expect![[r#"
        shop/web:80 by XBackendTrafficPolicy shop/x and TrafficPolicy shop/a: 2 retries within 50 % and 0.5/s, session x-session
        shop/web:81 by XBackendTrafficPolicy shop/x and TrafficPolicy shop/b: 0 retries within 10 % and 3/s, session x-session
        shop/api:80 by XBackendTrafficPolicy shop/x: 0 retries within 50 % and 0.5/s, session x-session
    "#]]);
    assert_eq!(world.traffic("web", 80).session.as_ref().unwrap().kind, SessionKind::Header);
}

#[test]
fn what_a_policy_is_for_may_come_and_go() {
    let mut world = World::of("");
    assert!(!world.put(&traffic("a", 1, &["web/http", "web/grpc", "headless", "api"], 2)));
    world.check(expect![[r#"
        ! TrafficPolicy shop/a: spec.targetRefs[0].name: there is no Service shop/web
        ! TrafficPolicy shop/a: spec.targetRefs[1].name: there is no Service shop/web
        ! TrafficPolicy shop/a: spec.targetRefs[2].name: there is no Service shop/headless
        ! TrafficPolicy shop/a: spec.targetRefs[3].name: there is no Service shop/api
        TrafficPolicy shop/a has no target 0: TargetNotFound
        TrafficPolicy shop/a has no target 1: TargetNotFound
        TrafficPolicy shop/a has no target 2: TargetNotFound
        TrafficPolicy shop/a has no target 3: TargetNotFound
    "#]]);
    assert!(world.put(SERVICES));
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/a: spec.targetRefs[1].sectionName: the Service shop/web has no TCP port named "grpc"
        ! TrafficPolicy shop/a: spec.targetRefs[2]: the Service shop/headless is headless or external: who dials it dials a pod, for which no policy is asked
        TrafficPolicy shop/a has no target 1: TargetNotFound
        TrafficPolicy shop/a has no target 2: TargetNotFound
    "#]]);
    let renamed = SERVICES.lines().nth(1).unwrap().replace("name: http", "name: grpc");
    assert!(world.put(&renamed));
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        shop/api:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/a: spec.targetRefs[0].sectionName: the Service shop/web has no TCP port named "http"
        ! TrafficPolicy shop/a: spec.targetRefs[2]: the Service shop/headless is headless or external: who dials it dials a pod, for which no policy is asked
        TrafficPolicy shop/a has no target 0: TargetNotFound
        TrafficPolicy shop/a has no target 2: TargetNotFound
    "#]]);
    assert!(world.remove(Kind::Service, "web"));
    world.check(expect![[r#"
        shop/api:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/a: spec.targetRefs[0].name: there is no Service shop/web
        ! TrafficPolicy shop/a: spec.targetRefs[1].name: there is no Service shop/web
        ! TrafficPolicy shop/a: spec.targetRefs[2]: the Service shop/headless is headless or external: who dials it dials a pod, for which no policy is asked
        TrafficPolicy shop/a has no target 0: TargetNotFound
        TrafficPolicy shop/a has no target 1: TargetNotFound
        TrafficPolicy shop/a has no target 2: TargetNotFound
    "#]]);
}

#[test]
fn a_version_that_cannot_be_used_leaves_the_last_one_in_force() {
    let mut world = World::of(SERVICES);
    world.put(&traffic("a", 1, &["web/http"], 2));
    let good = world.traffic("web", 80);
    assert!(!world.put(&traffic("a", 1, &["web/http"], -2)));
    assert!(!world.put(&traffic("new", 1, &["api"], -2)));
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/a: 2 retries within 20 % and 3/s, session none
        ! TrafficPolicy shop/a: this version cannot be used, and the last one that could stays in force
        ! TrafficPolicy shop/new: this version cannot be used, and there was none before it: the policy is not in force
    "#]]);
    assert!(Arc::ptr_eq(&good, &world.traffic("web", 80)));
    world.put(&traffic("a", 1, &["web/http"], 3));
    world.remove(Kind::TrafficPolicy, "new");
    world.check(expect![[r#"
        shop/web:80 by TrafficPolicy shop/a: 3 retries within 20 % and 3/s, session none
    "#]]);
}

#[test]
fn what_is_the_same_is_not_made_again() {
    let mut world = World::of(SERVICES);
    assert!(Arc::ptr_eq(&world.traffic("web", 80), &world.traffic("api", 80)), "no policy speaks of them");
    world.put(&traffic("a", 1, &["web/http"], 2));
    let (web, api) = (world.traffic("web", 80), world.traffic("api", 80));
    let of = |world: &World, name: &str| {
        world.compiler.services.compiled(&ObjectRef::new("shop", name)).unwrap().clone()
    };
    let api_service = of(&world, "api");
    assert!(!world.put(&traffic("a", 1, &["web/http"], 2)));
    // The Service is made again, and the policy for its other port.
    world.put(&SERVICES.lines().nth(1).unwrap().replace("10.0.0.1", "10.0.0.9"));
    world.put(&traffic("b", 1, &["web/admin"], 3));
    assert!(Arc::ptr_eq(&web, &world.traffic("web", 80)) && Arc::ptr_eq(&api, &world.traffic("api", 80)));
    assert!(Arc::ptr_eq(&api_service, &of(&world, "api")), "it is nothing to other Services");
}

//! Routes, Services and grants in; tables, captured addresses and problems out.

use std::fmt::Write;

use expect_test::{Expect, expect};
use k8s_openapi::api::core::v1 as core;
use serde_json::Value;

use super::super::{Change, Compiler};
use super::*;
use crate::config::{Document, Key, Kind};
use crate::model::NodeInfo;
use crate::route::{Audience, Rule, Target};

struct World {
    compiler: Compiler,
    written: Vec<String>,
}

impl World {
    fn of(yaml: &str) -> Self {
        let compiler = Compiler::new(NodeInfo { name: "node-1".into(), zone: None });
        let mut world = Self { compiler, written: Vec::new() };
        world.put(yaml);
        world
    }

    /// True if that changed the snapshot.
    fn put(&mut self, yaml: &str) -> bool {
        let objects: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("the test's YAML");
        let changes: Vec<Change> = objects.iter().map(|object| Change::Put(self.read(object))).collect();
        self.compiler.apply(changes)
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) -> bool {
        let key = Key { kind, namespace: namespace.into(), name: name.into() };
        self.compiler.apply([Change::Remove(key)])
    }

    fn read(&mut self, object: &Value) -> Document {
        let mut problems = Vec::new();
        let document = match object["kind"].as_str() {
            Some("Service") => {
                let service: core::Service =
                    serde_json::from_value(object.clone()).expect("the test's Service");
                Document::service(&service, &mut problems)
            }
            Some("HTTPRoute") => Document::http_route(object, &mut problems),
            Some("GRPCRoute") => Document::grpc_route(object, &mut problems),
            Some("TLSRoute") => Document::tls_route(object, &mut problems),
            Some("TCPRoute") => Document::tcp_route(object, &mut problems),
            _ => Document::reference_grant(object, &mut problems),
        };
        self.written.extend(problems.into_iter().map(|it| format!("{}: {}", it.field, it.message)));
        document.expect("the test's object")
    }

    /// What each port has, what is captured for it, what is wrong with how the objects are written (`?`) and with how they
    /// stand to each other (`!`).
    fn check(&mut self, expected: Expect) {
        let snapshot = self.compiler.snapshot();
        let mut lines = String::new();
        for (service, routes) in &snapshot.routes {
            for ((port, audience), of_port) in &routes.ports {
                let audience = match audience {
                    Audience::Everybody => "everybody",
                    Audience::Namespace(namespace) => namespace,
                };
                writeln!(lines, "{service}:{port} for {audience}").unwrap();
                for rule in of_port.table.rules() {
                    writeln!(lines, "  {}", shown(rule)).unwrap();
                }
            }
        }
        for address in &snapshot.captured {
            writeln!(lines, "captured {address}").unwrap();
        }
        for problem in self.written.drain(..) {
            writeln!(lines, "? {problem}").unwrap();
        }
        for (key, problems) in self.compiler.problems() {
            for problem in problems {
                let field =
                    if problem.field.0.is_empty() { String::new() } else { format!(" {}:", problem.field) };
                writeln!(lines, "! {key}:{field} {}", problem.message).unwrap();
            }
        }
        expected.assert_eq(&lines);
    }

    /// The conditions of a route for each of its parents.
    fn check_status(&self, kind: RouteKind, id: (&str, &str), expected: Expect) {
        let route = RouteRef { kind, id: ObjectRef::new(id.0, id.1) };
        let shown = |condition: &Result<(), resolve::Refusal>| match condition {
            Ok(()) => "yes".to_owned(),
            Err(refusal) => format!("{}, for {}", refusal.reason.as_str(), refusal.message),
        };
        let mut lines = String::new();
        for status in self.compiler.route_statuses(&route) {
            let (parent, accepted) = (status.parent.service, shown(&status.accepted));
            writeln!(lines, "{parent}: accepted: {accepted}; resolved: {}", shown(&status.resolved_refs))
                .unwrap();
        }
        expected.assert_eq(&lines);
    }
}

fn shown(rule: &Rule) -> String {
    let target = |target: &Target| match target {
        Target::Service { id, port } => format!("{id}:{port}"),
        Target::Invalid(why) => format!("error ({why})"),
    };
    let mut text = format!("{} {}", rule.route, rule.index);
    for backend in &rule.backends {
        write!(text, " -> {} {}", backend.weight, target(&backend.target)).unwrap();
    }
    for mirror in &rule.filters.mirrors {
        write!(text, " copy to {}", target(&mirror.target)).unwrap();
    }
    text
}

const SERVICES: &str = "
{kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{name: http, port: 80}, {name: admin, port: 81}]}}
---
{kind: Service, metadata: {name: web-v2, namespace: shop}, spec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: headless, namespace: shop}, spec: {clusterIP: None, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: far, namespace: bank}, spec: {clusterIP: 10.0.0.3, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: kubernetes, namespace: default}, spec: {clusterIP: 10.0.0.4, ports: [{port: 443}]}}
";

/// A route with one rule; its parents and backends as they stand in YAML.
fn route(kind: &str, id: &str, parents: &str, backends: &str) -> String {
    let (namespace, name) = id.split_once('/').unwrap();
    format!(
        "{{kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{parentRefs: [{parents}], rules: [{{backendRefs: [{backends}]}}]}}}}"
    )
}

const WEB: &str = "{group: '', kind: Service, name: web}";

#[test]
fn a_route_is_attached_to_the_ports_of_its_service() {
    let mut world = World::of(SERVICES);
    let split = "{name: web, port: 80, weight: 9}, {name: web-v2, port: 80}";
    assert!(world.put(&route("HTTPRoute", "shop/a", WEB, split)));
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/a 0 -> 9 shop/web:80 -> 1 shop/web-v2:80
        shop/web:81 for everybody
          HTTPRoute shop/a 0 -> 9 shop/web:80 -> 1 shop/web-v2:80
        captured 10.0.0.1
    "#]]);
    assert!(!world.put(&route("HTTPRoute", "shop/a", WEB, split)), "nothing is new");

    let by_name = "{group: '', kind: Service, name: web, sectionName: admin}";
    world.put(&route("HTTPRoute", "shop/a", by_name, "{name: web, port: 81}"));
    let by_port = "{group: '', kind: Service, name: web, port: 80}";
    world.put(&route("HTTPRoute", "shop/b", by_port, "{name: web, port: 80}"));
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/b 0 -> 1 shop/web:80
        shop/web:81 for everybody
          HTTPRoute shop/a 0 -> 1 shop/web:81
        captured 10.0.0.1
    "#]]);
    assert!(world.remove(Kind::HttpRoute, "shop", "a"));
    assert!(world.remove(Kind::HttpRoute, "shop", "b"));
    assert!(!world.remove(Kind::HttpRoute, "shop", "b"));
    world.check(expect![""]);
}

#[test]
fn consumers_have_routes_of_their_own() {
    let mut world = World::of(SERVICES);
    let web_of_shop = "{group: '', kind: Service, name: web, namespace: shop, port: 80}";
    world.put(&route("HTTPRoute", "shop/producer", web_of_shop, "{name: web-v2, port: 80}"));
    // Back to its own parent a consumer's route needs no grant; elsewhere it does.
    let backends = "{name: web, namespace: shop, port: 80}, {name: web-v2, namespace: shop, port: 80}";
    world.put(&route("HTTPRoute", "bank/consumer", web_of_shop, backends));
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/producer 0 -> 1 shop/web-v2:80
        shop/web:80 for bank
          HTTPRoute bank/consumer 0 -> 1 shop/web:80 -> 1 error (the Service shop/web-v2 is in another namespace, and no ReferenceGrant there lets the HTTPRoutes of bank refer to it)
        captured 10.0.0.1
        ! HTTPRoute bank/consumer: spec.rules[0].backendRefs[1]: the Service shop/web-v2 is in another namespace, and no ReferenceGrant there lets the HTTPRoutes of bank refer to it; its share of the requests is answered with an error
    "#]]);
    world.check_status(
        RouteKind::Http,
        ("bank", "consumer"),
        expect![[r#"
            shop/web: accepted: yes; resolved: RefNotPermitted, for the Service shop/web-v2 is in another namespace, and no ReferenceGrant there lets the HTTPRoutes of bank refer to it
        "#]],
    );
}

#[test]
fn grants_come_and_go() {
    let mut world = World::of(SERVICES);
    let mirror = "
kind: HTTPRoute
metadata: {name: a, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 80}]
  rules:
  - backendRefs: [{name: far, namespace: bank, port: 80}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: far, namespace: bank, port: 80}}}]
";
    let grant = |from: &str, to: &str| {
        format!(
            "{{kind: ReferenceGrant, metadata: {{name: g, namespace: bank}}, spec: {{from: [{{group: gateway.networking.k8s.io, {from}}}], to: [{{group: '', kind: {to}}}]}}}}"
        )
    };
    world.put(mirror);
    let is_granted = |world: &World| {
        let snapshot = world.compiler.snapshot();
        let routes = &snapshot.routes[&ObjectRef::new("shop", "web")];
        let rule = routes.http(80, "").unwrap().rules().next().unwrap();
        let targets = [&rule.backends[0].target, &rule.filters.mirrors[0].target];
        let granted = targets.map(|target| matches!(target, Target::Service { .. }));
        assert_eq!(granted[0], granted[1]);
        assert_eq!(world.compiler.problems().len(), usize::from(!granted[0]));
        granted[0]
    };
    assert!(!is_granted(&world));
    for (from, to, expected) in [
        ("kind: HTTPRoute, namespace: shop", "Service", true),
        ("kind: HTTPRoute, namespace: shop", "Service, name: far", true),
        ("kind: HTTPRoute, namespace: shop", "Service, name: other", false),
        ("kind: HTTPRoute, namespace: shop", "Secret", false),
        ("kind: HTTPRoute, namespace: other", "Service", false),
        ("kind: GRPCRoute, namespace: shop", "Service", false),
        ("kind: HTTPRoute, namespace: shop", "Service", true),
        // What is written badly grants nothing.
        ("kind: HTTPRoute, namespace: shop", "Service, nam: far", false),
    ] {
        world.put(&grant(from, to));
        assert_eq!(is_granted(&world), expected, "{from} {to}");
    }
    assert_eq!(
        world.written,
        [
            "spec.to[0].nam: there is no such field, or this version of Undermesh does not know it; the grant grants nothing until then"
        ]
    );
    world.put(&grant("kind: HTTPRoute, namespace: shop", "Service"));
    assert!(is_granted(&world));
    assert!(world.remove(Kind::ReferenceGrant, "bank", "g"));
    assert!(!is_granted(&world));
}

#[test]
fn backends_that_are_not_there_are_answered_for() {
    let mut world = World::of(SERVICES);
    let backends = "{name: absent, port: 80}, {name: web}, {name: web, port: 82}, {name: headless, port: 80}, \
                    {group: multicluster.x-k8s.io, kind: ServiceImport, name: web, port: 80}, {name: web, port: 80}";
    world.put(&route("HTTPRoute", "shop/a", "{group: '', kind: Service, name: web-v2}", backends));
    world.check(expect![[r#"
        shop/web-v2:80 for everybody
          HTTPRoute shop/a 0 -> 1 error (there is no Service shop/absent) -> 1 error (the backend names no port of the Service shop/web) -> 1 error (the Service shop/web has no TCP port 82) -> 1 error (the Service shop/headless is headless or external, and has no cluster IP to balance behind) -> 1 error (the backend shop/web is a ServiceImport.multicluster.x-k8s.io, and Services alone are supported) -> 1 shop/web:80
        captured 10.0.0.2
        ! HTTPRoute shop/a: spec.rules[0].backendRefs[0]: there is no Service shop/absent; its share of the requests is answered with an error
        ! HTTPRoute shop/a: spec.rules[0].backendRefs[1]: the backend names no port of the Service shop/web; its share of the requests is answered with an error
        ! HTTPRoute shop/a: spec.rules[0].backendRefs[2]: the Service shop/web has no TCP port 82; its share of the requests is answered with an error
        ! HTTPRoute shop/a: spec.rules[0].backendRefs[3]: the Service shop/headless is headless or external, and has no cluster IP to balance behind; its share of the requests is answered with an error
        ! HTTPRoute shop/a: spec.rules[0].backendRefs[4]: the backend shop/web is a ServiceImport.multicluster.x-k8s.io, and Services alone are supported; its share of the requests is answered with an error
    "#]]);
    // Services come, change and go.
    world.put(&route(
        "HTTPRoute",
        "shop/a",
        "{group: '', kind: Service, name: web-v2}",
        "{name: absent, port: 80}",
    ));
    let absent = |port: u16| {
        format!(
            "{{kind: Service, metadata: {{name: absent, namespace: shop}}, spec: {{clusterIP: 10.0.0.9, ports: [{{port: {port}}}]}}}}"
        )
    };
    let target = |world: &World| {
        let snapshot = world.compiler.snapshot();
        let routes = &snapshot.routes[&ObjectRef::new("shop", "web-v2")];
        shown(routes.http(80, "").unwrap().rules().next().unwrap())
    };
    assert!(world.put(&absent(80)));
    assert_eq!(target(&world), "HTTPRoute shop/a 0 -> 1 shop/absent:80");
    assert!(world.compiler.problems().is_empty());
    world.put(&absent(81));
    assert!(target(&world).contains("has no TCP port 80"));
    world.put(&absent(80));
    world.remove(Kind::Service, "shop", "absent");
    assert!(target(&world).contains("there is no Service"));
}

#[test]
fn parents_that_take_no_route() {
    let mut world = World::of(SERVICES);
    let service = |rest: &str| format!("{{group: '', kind: Service, {rest}}}");
    let parents = [
        "name: headless",
        "name: absent",
        "name: web, port: 82",
        "name: web, sectionName: grpc",
        "name: web, sectionName: http, port: 81",
        "name: kubernetes, namespace: default",
    ]
    .map(service);
    world.put(&route("HTTPRoute", "shop/a", &parents.join(", "), "{name: web, port: 80}"));
    world.check(expect![[r#"
        ! HTTPRoute shop/a: spec.parentRefs[0]: the Service shop/headless is headless or external: who dials it dials a pod, for which no route is asked
        ! HTTPRoute shop/a: spec.parentRefs[1].name: there is no Service shop/absent
        ! HTTPRoute shop/a: spec.parentRefs[2].port: the Service shop/web has no TCP port 82
        ! HTTPRoute shop/a: spec.parentRefs[3].sectionName: the Service shop/web has no TCP port named "grpc"
        ! HTTPRoute shop/a: spec.parentRefs[4].sectionName: the Service shop/web has no TCP port 81 named "http"
        ! HTTPRoute shop/a: spec.parentRefs[5]: the Service default/kubernetes is the API server's own, which stays out of the mesh
    "#]]);
    // The Service comes after its route, and goes before it.
    assert!(world.put("{kind: Service, metadata: {name: absent, namespace: shop}, spec: {clusterIP: 10.0.0.9, ports: [{port: 80}]}}"));
    let is_captured =
        |world: &World| world.compiler.snapshot().captured.contains(&std::net::IpAddr::from([10, 0, 0, 9]));
    assert!(is_captured(&world));
    world.check_status(
        RouteKind::Http,
        ("shop", "a"),
        expect![[r#"
            shop/headless: accepted: NoMatchingParent, for the Service shop/headless is headless or external: who dials it dials a pod, for which no route is asked; resolved: yes
            shop/absent: accepted: yes; resolved: yes
            shop/web: accepted: NoMatchingParent, for the Service shop/web has no TCP port 82; resolved: yes
            shop/web: accepted: NoMatchingParent, for the Service shop/web has no TCP port named "grpc"; resolved: yes
            shop/web: accepted: NoMatchingParent, for the Service shop/web has no TCP port 81 named "http"; resolved: yes
            default/kubernetes: accepted: NoMatchingParent, for the Service default/kubernetes is the API server's own, which stays out of the mesh; resolved: yes
        "#]],
    );
    world.remove(Kind::Service, "shop", "absent");
    assert!(!is_captured(&world));
    assert!(world.compiler.snapshot().routes.is_empty());
}

#[test]
fn grpc_routes_beat_http_routes_on_one_port() {
    let mut world = World::of(SERVICES);
    world.put(&route("HTTPRoute", "shop/http", WEB, "{name: web, port: 80}"));
    let port_80 = "{group: '', kind: Service, name: web, port: 80}";
    world.put(&route("GRPCRoute", "shop/grpc", port_80, "{name: web, port: 80}"));
    // Another audience is another matter.
    let of_bank = "{group: '', kind: Service, name: web, namespace: shop, port: 80}";
    world.put(&route("HTTPRoute", "bank/http", of_bank, "{name: web, namespace: shop, port: 80}"));
    world.check(expect![[r#"
        shop/web:80 for everybody
          GRPCRoute shop/grpc 0 -> 1 shop/web:80
        shop/web:80 for bank
          HTTPRoute bank/http 0 -> 1 shop/web:80
        shop/web:81 for everybody
          HTTPRoute shop/http 0 -> 1 shop/web:80
        captured 10.0.0.1
        ! HTTPRoute shop/http: spec.parentRefs[0]: of the Service shop/web, the port 80 is GRPCRoute shop/grpc's, beside which no HTTPRoute is in force on it
    "#]]);
    // One port is left to it.
    world.check_status(
        RouteKind::Http,
        ("shop", "http"),
        expect![[r#"
        shop/web: accepted: yes; resolved: yes
    "#]],
    );
    world.put(&route("GRPCRoute", "shop/grpc", WEB, "{name: web, port: 80}"));
    world.check_status(RouteKind::Http, ("shop", "http"), expect![[r#"
        shop/web: accepted: Conflicted, for the port 80 is GRPCRoute shop/grpc's, beside which no HTTPRoute is in force on it; resolved: yes
    "#]]);
    world.remove(Kind::GrpcRoute, "shop", "grpc");
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/http 0 -> 1 shop/web:80
        shop/web:80 for bank
          HTTPRoute bank/http 0 -> 1 shop/web:80
        shop/web:81 for everybody
          HTTPRoute shop/http 0 -> 1 shop/web:80
        captured 10.0.0.1
    "#]]);
}

#[test]
fn a_bad_version_leaves_the_last_good_one() {
    let mut world = World::of(SERVICES);
    let port_80 = "{group: '', kind: Service, name: web, port: 80}";
    let bad = route("HTTPRoute", "shop/a", port_80, "{name: web, port: 80, wait: 1}");
    assert!(!world.put(&bad));
    world.check(expect![[r#"
        ? spec.rules[0].backendRefs[0].wait: there is no such field, or this version of Undermesh does not know it
        ! HTTPRoute shop/a: this version cannot be used, and there was none before it: the route is not in force
    "#]]);
    assert!(world.put(&route("HTTPRoute", "shop/a", port_80, "{name: web-v2, port: 80}")));
    assert!(!world.put(&bad));
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/a 0 -> 1 shop/web-v2:80
        captured 10.0.0.1
        ? spec.rules[0].backendRefs[0].wait: there is no such field, or this version of Undermesh does not know it
        ! HTTPRoute shop/a: this version cannot be used, and the last one that could stays in force
    "#]]);
    // It is followed as any other meanwhile.
    world.remove(Kind::Service, "shop", "web-v2");
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/a 0 -> 1 error (there is no Service shop/web-v2)
        captured 10.0.0.1
        ! HTTPRoute shop/a: this version cannot be used, and the last one that could stays in force
        ! HTTPRoute shop/a: there is no Service shop/web-v2; its share of the requests is answered with an error
    "#]]);
    assert!(world.remove(Kind::HttpRoute, "shop", "a"));
    world.check(expect![""]);
    // What was removed is no last good one.
    world.put(&bad);
    world.check(expect![[r#"
        ? spec.rules[0].backendRefs[0].wait: there is no such field, or this version of Undermesh does not know it
        ! HTTPRoute shop/a: this version cannot be used, and there was none before it: the route is not in force
    "#]]);
    world.remove(Kind::HttpRoute, "shop", "a");
    world.check(expect![""]);
}

#[test]
fn routes_of_gateways_are_nobodys_business_here() {
    let mut world = World::of(SERVICES);
    world.put(
        "
kind: HTTPRoute
metadata: {name: a, namespace: shop}
spec: {parentRefs: [{name: gateway}], rules: [{filters: [{type: ExtensionRef, whatever: 1}]}]}
---
kind: HTTPRoute
metadata: {name: b, namespace: shop}
spec:
  parentRefs: [{name: gateway}, {group: '', kind: Service, name: web-v2}, {group: a.test, kind: Mesh, name: x}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
",
    );
    world.check(expect![[r#"
        shop/web-v2:80 for everybody
          HTTPRoute shop/b 0 -> 1 shop/web:80
        captured 10.0.0.2
    "#]]);
    // One that turns to a gateway is withdrawn.
    world.put(&route("HTTPRoute", "shop/b", "{name: gateway}", ""));
    world.check(expect![""]);
}

#[test]
fn what_does_not_change_is_shared() {
    let mut world = World::of(SERVICES);
    world.put(&route("HTTPRoute", "shop/a", WEB, "{name: web, port: 80}"));
    let other = "{group: '', kind: Service, name: web-v2}";
    world.put(&route("HTTPRoute", "shop/b", other, "{name: web-v2, port: 80}"));
    let before = world.compiler.snapshot();
    let of = |snapshot: &crate::snapshot::Snapshot, name: &str| {
        snapshot.routes[&ObjectRef::new("shop", name)].clone()
    };
    let web = of(&before, "web");
    assert!(
        Arc::ptr_eq(web.http(80, "").unwrap(), web.http(81, "").unwrap()),
        "ports with the same routes share"
    );
    world.put(&route("HTTPRoute", "shop/b", other, "{name: web, port: 80}"));
    let after = world.compiler.snapshot();
    assert!(Arc::ptr_eq(&of(&before, "web"), &of(&after, "web")));
    assert!(!Arc::ptr_eq(&of(&before, "web-v2"), &of(&after, "web-v2")));
    assert!(Arc::ptr_eq(
        &before.services[&ObjectRef::new("shop", "web")],
        &after.services[&ObjectRef::new("shop", "web")]
    ));
}

#[test]
fn routes_of_connections() {
    let mut world = World::of(SERVICES);
    world.put(&route(
        "TCPRoute",
        "shop/tcp",
        WEB,
        "{name: web, port: 80, weight: 3}, {name: absent, port: 80}",
    ));
    world.put(
        "
kind: TLSRoute
metadata: {name: tls, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 81}]
  hostnames: ['*.shop.test']
  rules: [{backendRefs: [{name: web-v2, port: 80}]}]
",
    );
    world.check(expect![[r#"
        shop/web:80 for everybody
          TCPRoute shop/tcp 0 -> 3 shop/web:80 -> 1 error (there is no Service shop/absent)
        shop/web:81 for everybody
          TLSRoute shop/tls 0 -> 1 shop/web-v2:80
        captured 10.0.0.1
        ! TCPRoute shop/tcp: spec.rules[0].backendRefs[1]: there is no Service shop/absent; its share of the connections is closed
        ! TCPRoute shop/tcp: spec.parentRefs[0]: of the Service shop/web, the port 81 is TLSRoute shop/tls's, beside which no TCPRoute is in force on it
    "#]]);
    let snapshot = world.compiler.snapshot();
    let routes = &snapshot.routes[&ObjectRef::new("shop", "web")];
    assert!(routes.tcp(80, "").is_some() && routes.http(80, "").is_none() && routes.tls(80, "").is_none());
    let tls = routes.tls(81, "").unwrap();
    assert!(tls.find(Some("a.shop.test")).is_some() && tls.find(Some("shop.test")).is_none());

    // Those of requests come before both.
    world.put(&route("HTTPRoute", "shop/http", WEB, "{name: web, port: 80}"));
    world.remove(Kind::TlsRoute, "shop", "tls");
    world.check(expect![[r#"
        shop/web:80 for everybody
          HTTPRoute shop/http 0 -> 1 shop/web:80
        shop/web:81 for everybody
          HTTPRoute shop/http 0 -> 1 shop/web:80
        captured 10.0.0.1
        ! TCPRoute shop/tcp: spec.rules[0].backendRefs[1]: there is no Service shop/absent; its share of the connections is closed
        ! TCPRoute shop/tcp: spec.parentRefs[0]: of the Service shop/web, the port 80 is HTTPRoute shop/http's, beside which no TCPRoute is in force on it
        ! TCPRoute shop/tcp: spec.parentRefs[0]: of the Service shop/web, the port 81 is HTTPRoute shop/http's, beside which no TCPRoute is in force on it
    "#]]);
}

#[test]
fn of_two_tcp_routes_the_older_has_the_port() {
    let mut world = World::of(SERVICES);
    let route = |name: &str, created: &str| {
        format!(
            "{{kind: TCPRoute, metadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}'}}, spec: \
             {{parentRefs: [{{group: '', kind: Service, name: web-v2}}], rules: [{{backendRefs: [{{name: web, port: 80}}]}}]}}}}"
        )
    };
    world.put(&route("a", "2026-01-02T00:00:00Z"));
    world.put(&route("b", "2026-01-01T00:00:00Z"));
    world.check(expect![[r#"
        shop/web-v2:80 for everybody
          TCPRoute shop/b 0 -> 1 shop/web:80
        captured 10.0.0.2
        ! TCPRoute shop/a: spec.parentRefs[0]: of the Service shop/web-v2, the port 80 is TCPRoute shop/b's, beside which no other TCPRoute is in force on it
    "#]]);
    world.remove(Kind::TcpRoute, "shop", "b");
    world.check(expect![[r#"
        shop/web-v2:80 for everybody
          TCPRoute shop/a 0 -> 1 shop/web:80
        captured 10.0.0.2
    "#]]);
}

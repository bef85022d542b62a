//! Routes and Services in, the statuses that are written out: first without an API server, then against one of ours.

mod access;
mod backend_tls;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use expect_test::{Expect, expect};
use kube::runtime::watcher::Event;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;
use crate::config::Kind;
use crate::kubernetes::testkit::{FakeApi, failure, no_such};

fn objects<K: DeserializeOwned>(yaml: &str, kind: &str) -> Vec<K> {
    let all: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("the test's YAML");
    let of_kind = all.into_iter().filter(|object| object["kind"] == kind);
    of_kind.map(|object| serde_json::from_value(object).expect("the test's object")).collect()
}

fn list<K: DeserializeOwned>(yaml: &str, kind: &str) -> Vec<Event<K>> {
    let all = objects(yaml, kind).into_iter().map(Event::InitApply);
    std::iter::once(Event::Init).chain(all).chain([Event::InitDone]).collect()
}

fn world_of(yaml: &str) -> World {
    let mut world = World::new("mesh");
    for custom in Custom::ALL {
        let events = list(yaml, custom.kind.as_str());
        events.into_iter().for_each(|event| world.take_object(&custom, event));
    }
    list(yaml, "Pod").into_iter().for_each(|event| world.take_pod(event));
    assert_eq!(writes(&mut world), [], "not before the Services are known");
    list(yaml, "Service").into_iter().for_each(|event| world.take_service(event));
    world
}

/// One event of the only object of the kind.
fn tell(world: &mut World, kind: Kind, yaml: &str, event: fn(DynamicObject) -> Event<DynamicObject>) {
    let object = objects(yaml, kind.as_str()).remove(0);
    let custom = Custom::ALL.into_iter().find(|custom| custom.kind == kind).expect("a kind that is followed");
    world.take_object(&custom, event(object));
}

fn writes(world: &mut World) -> Vec<Write> {
    world.writes(Timestamp::UNIX_EPOCH, |_| false)
}

fn check(world: &mut World, expected: &Expect) {
    let mut text = String::new();
    for Write { key, entries, .. } in writes(world) {
        if matches!(key.kind, Kind::AuthorizationPolicy | Kind::MeshPolicy) {
            text += &format!("{key}:");
            text += &entries.iter().map(|it| shown(it, it["message"].as_str())).collect::<String>();
            text += "\n";
            continue;
        }
        for entry in entries {
            let reference = if key.kind.route().is_some() { "parentRef" } else { "ancestorRef" };
            text += &format!("{key} at {}:", entry[reference]["name"].as_str().unwrap());
            let conditions = entry["conditions"].as_array().unwrap();
            text += &conditions.iter().map(|it| shown(it, None)).collect::<String>();
            text += "\n";
        }
    }
    expected.assert_eq(&text);
}

/// `note` is what is said beside a condition that holds.
fn shown(condition: &Value, note: Option<&str>) -> String {
    let get = |key: &str| condition[key].as_str().unwrap();
    match (get("status"), note) {
        ("True", None) => format!(" {}", get("type")),
        ("True", Some(note)) => format!(" {}: {note}", get("type")),
        _ => format!("\n  not {}: {}: {}", get("type"), get("reason"), get("message")),
    }
}

const WORLD: &str = "
{kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: far, namespace: bank}, spec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: good, namespace: shop, generation: 1, resourceVersion: '5'}
spec:
  parentRefs: [{name: gateway}, {group: '', kind: Service, name: web}, {group: '', kind: Service, name: none, port: 80}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: far, namespace: shop, generation: 1, resourceVersion: '5'}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules: [{backendRefs: [{name: far, namespace: bank, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bad, namespace: shop, generation: 1, resourceVersion: '5'}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules: [{filters: [{type: ExtensionRef}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: of-gateways, namespace: shop, generation: 1, resourceVersion: '5'}
spec: {parentRefs: [{name: gateway}]}
";

#[test]
fn a_status_follows_what_is_around_the_route() {
    let mut world = world_of(WORLD);
    check(
        &mut world,
        &expect![[r#"
            HTTPRoute shop/bad at web:
              not Accepted: UnsupportedValue: spec.rules[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS; found "ExtensionRef", which is not supported here; until then the route is not in force
            HTTPRoute shop/far at web: Accepted
              not ResolvedRefs: RefNotPermitted: the Service bank/far is in another namespace, and no ReferenceGrant there lets the HTTPRoutes of shop refer to it
            HTTPRoute shop/good at web: Accepted ResolvedRefs
            HTTPRoute shop/good at none:
              not Accepted: NoMatchingParent: there is no Service shop/none ResolvedRefs
        "#]],
    );
    check(&mut world, &expect![""]);
    let yaml = "
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: far, namespace: bank}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: '', kind: Service}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: calls, namespace: shop, generation: 1, resourceVersion: '6'}
spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: [{}]}
";
    tell(&mut world, Kind::ReferenceGrant, yaml, Event::Apply);
    check(
        &mut world,
        &expect![[r#"
        HTTPRoute shop/far at web: Accepted ResolvedRefs
    "#]],
    );
    // It takes the port from all HTTPRoutes.
    tell(&mut world, Kind::GrpcRoute, yaml, Event::Apply);
    check(
        &mut world,
        &expect![[r#"
            HTTPRoute shop/far at web:
              not Accepted: Conflicted: the port 80 is GRPCRoute shop/calls's, beside which no HTTPRoute is in force on it ResolvedRefs
            HTTPRoute shop/good at web:
              not Accepted: Conflicted: the port 80 is GRPCRoute shop/calls's, beside which no HTTPRoute is in force on it ResolvedRefs
            HTTPRoute shop/good at none:
              not Accepted: NoMatchingParent: there is no Service shop/none ResolvedRefs
            GRPCRoute shop/calls at web: Accepted ResolvedRefs
        "#]],
    );
    tell(&mut world, Kind::GrpcRoute, yaml, Event::Delete);
    check(
        &mut world,
        &expect![[r#"
            HTTPRoute shop/far at web: Accepted ResolvedRefs
            HTTPRoute shop/good at web: Accepted ResolvedRefs
            HTTPRoute shop/good at none:
              not Accepted: NoMatchingParent: there is no Service shop/none ResolvedRefs
        "#]],
    );
    // Listed anew, without the Services.
    [Event::Init, Event::InitDone].into_iter().for_each(|event| world.take_service(event));
    check(
        &mut world,
        &expect![[r#"
        HTTPRoute shop/far at web:
          not Accepted: NoMatchingParent: there is no Service shop/web
          not ResolvedRefs: BackendNotFound: there is no Service bank/far
        HTTPRoute shop/good at web:
          not Accepted: NoMatchingParent: there is no Service shop/web
          not ResolvedRefs: BackendNotFound: there is no Service shop/web
        HTTPRoute shop/good at none:
          not Accepted: NoMatchingParent: there is no Service shop/none
          not ResolvedRefs: BackendNotFound: there is no Service shop/web
    "#]],
    );
}

#[test]
fn a_status_says_who_has_the_connections_to_a_port() {
    let route = |kind: &str, version: &str, name: &str, day: u32| {
        format!(
            "
---
apiVersion: gateway.networking.k8s.io/{version}
kind: {kind}
metadata: {{name: {name}, namespace: shop, generation: 1, resourceVersion: '5', creationTimestamp: '2026-01-0{day}T00:00:00Z'}}
spec:
  parentRefs: [{{group: '', kind: Service, name: two}}, {{group: '', kind: Service, name: web, port: 80}}]
  rules: [{{backendRefs: [{{name: web, port: 80}}, {{name: none, port: 80}}]}}]
"
        )
    };
    let tls = route("TLSRoute", "v1alpha3", "names", 1);
    let (first, second) =
        (route("TCPRoute", "v1alpha2", "first", 1), route("TCPRoute", "v1alpha2", "second", 2));
    let http = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: requests, namespace: shop, generation: 1, resourceVersion: '5'}
spec: {parentRefs: [{group: '', kind: Service, name: two, port: 81}, {group: '', kind: Service, name: web}]}
";
    let services = "
{kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: two, namespace: shop}, spec: {clusterIP: 10.0.0.2, ports: [{port: 80, name: a}, {port: 81, name: b}]}}
";
    let mut world = world_of(&[services, &tls, &first, &second, http].concat());
    let written = writes(&mut world);
    let versions: Vec<(&str, &str)> = written.iter().map(|it| (&*it.key.name, it.version)).collect();
    // What the API server has of them, be it not the newest.
    assert_eq!(
        versions,
        [("requests", "v1"), ("names", "v1alpha3"), ("first", "v1alpha2"), ("second", "v1alpha2")]
    );
    written.into_iter().for_each(|write| world.look_again(write.key));
    check(
        &mut world,
        &expect![[r#"
        HTTPRoute shop/requests at two: Accepted ResolvedRefs
        HTTPRoute shop/requests at web: Accepted ResolvedRefs
        TLSRoute shop/names at two: Accepted
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TLSRoute shop/names at web:
          not Accepted: Conflicted: the port 80 is HTTPRoute shop/requests's, beside which no TLSRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/first at two:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/first at web:
          not Accepted: Conflicted: the port 80 is HTTPRoute shop/requests's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at two:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at web:
          not Accepted: Conflicted: the port 80 is HTTPRoute shop/requests's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
    "#]],
    );
    // Without the HTTPRoute the TLSRoute has all that it asks for, and comes before those that go by nothing.
    tell(&mut world, Kind::HttpRoute, http.trim_start_matches("\n---"), Event::Delete);
    check(
        &mut world,
        &expect![[r#"
        TLSRoute shop/names at two: Accepted
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TLSRoute shop/names at web: Accepted
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/first at two:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/first at web:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at two:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at web:
          not Accepted: Conflicted: the port 80 is TLSRoute shop/names's, beside which no TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
    "#]],
    );
    tell(&mut world, Kind::TlsRoute, tls.trim_start_matches("\n---"), Event::Delete);
    check(
        &mut world,
        &expect![[r#"
        TCPRoute shop/first at two: Accepted
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/first at web: Accepted
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at two:
          not Accepted: Conflicted: the port 80 is TCPRoute shop/first's, beside which no other TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
        TCPRoute shop/second at web:
          not Accepted: Conflicted: the port 80 is TCPRoute shop/first's, beside which no other TCPRoute is in force on it
          not ResolvedRefs: BackendNotFound: there is no Service shop/none
    "#]],
    );
}

#[test]
fn a_status_says_which_of_several_policies_a_service_goes_by() {
    let policy = |kind: &str, name: &str, created: &str, spec: &str| {
        let group = if kind == "TrafficPolicy" { "undermesh.io" } else { "gateway.networking.x-k8s.io" };
        format!(
            "{{apiVersion: {group}/v1alpha1, kind: {kind}, metadata: {{name: {name}, namespace: shop, generation: 1, \
             resourceVersion: '5', creationTimestamp: '{created}'}}, spec: {{{spec}}}}}\n---\n"
        )
    };
    let web = "targetRefs: [{group: '', kind: Service, name: web}]";
    let two = "targetRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: none}]";
    let yaml = policy("TrafficPolicy", "first", "2026-01-01T00:00:00Z", web)
        + &policy("TrafficPolicy", "second", "2026-01-02T00:00:00Z", two)
        + &policy("TrafficPolicy", "bad", "2025-01-01T00:00:00Z", &format!("{web}, retry: {{attempts: -1}}"))
        + &policy(
            "XBackendTrafficPolicy",
            "budget",
            "2026-01-03T00:00:00Z",
            &format!("{web}, retryConstraint: {{}}"),
        )
        + WORLD.split("---").next().unwrap();
    let mut world = world_of(&yaml);
    check(
        &mut world,
        &expect![[r#"
        XBackendTrafficPolicy shop/budget at web: Accepted
        TrafficPolicy shop/bad at web:
          not Accepted: Invalid: spec.retry.attempts: expected 0 to 100, found -1; until then the policy is not in force
        TrafficPolicy shop/first at web: Accepted
        TrafficPolicy shop/second at web:
          not Accepted: Conflicted: the port 80 goes by TrafficPolicy shop/first, which is older
        TrafficPolicy shop/second at none:
          not Accepted: TargetNotFound: there is no Service shop/none
    "#]],
    );
    let first = policy("TrafficPolicy", "first", "2026-01-01T00:00:00Z", web);
    tell(&mut world, Kind::TrafficPolicy, &first, Event::Delete);
    check(
        &mut world,
        &expect![[r#"
        TrafficPolicy shop/second at web: Accepted
        TrafficPolicy shop/second at none:
          not Accepted: TargetNotFound: there is no Service shop/none
    "#]],
    );
}

/// The API server may have no newer one.
#[tokio::test]
async fn a_status_is_written_in_the_version_that_the_object_was_read_in() {
    let api = FakeApi::new(|question| {
        let path = "/apis/gateway.networking.k8s.io/v1alpha2/namespaces/shop/tcproutes/db/status";
        assert_eq!((question.method.as_str(), question.path.as_str()), ("PATCH", path));
        Some((200, json!({ "metadata": { "name": "db", "namespace": "shop" } })))
    });
    let key = Key { kind: Kind::TcpRoute, namespace: "shop".into(), name: "db".into() };
    let write = Write {
        key,
        version: "v1alpha2",
        resource_version: "5".into(),
        list: "parents",
        entries: Vec::new(),
    };
    send(&api.client(), &write).await.unwrap();
}

/// HTTPRoutes alone are installed, one write is refused and one comes too late.
#[tokio::test(start_paused = true)]
async fn a_status_is_written_onto_the_route_as_it_is_and_again_after_a_failure() {
    let route = |version: &str| {
        let mut route = objects::<Value>(WORLD, "HTTPRoute").remove(0);
        route["metadata"]["resourceVersion"] = version.into();
        route
    };
    let end = |kind: &str| {
        let metadata =
            json!({ "resourceVersion": "7", "annotations": { "k8s.io/initial-events-end": "true" } });
        json!({ "type": "BOOKMARK", "object": { "apiVersion": "v1", "kind": kind, "metadata": metadata } })
    };
    let service = objects::<Value>(WORLD, "Service").remove(0);
    const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/";
    let (patches, written) = (AtomicU32::new(0), Arc::new(Mutex::new(Vec::new())));
    let (writing, told) = (written.clone(), AtomicBool::new(false));
    let api = FakeApi::new(move |question| {
        let is_initial = question.query.contains("sendInitialEvents=true");
        match (question.method.as_str(), question.path.as_str()) {
            ("GET", "/apis/gateway.networking.k8s.io/v1") => {
                let resource = json!({ "name": "httproutes", "singularName": "httproute", "namespaced": true,
                    "kind": "HTTPRoute", "verbs": ["list", "watch", "patch"] });
                let list =
                    json!({ "kind": "APIResourceList", "groupVersion": "g/v1", "resources": [resource] });
                Some((200, list))
            }
            (
                "GET",
                "/apis/gateway.networking.k8s.io/v1beta1"
                | "/apis/gateway.networking.k8s.io/v1alpha3"
                | "/apis/gateway.networking.k8s.io/v1alpha2"
                | "/apis/gateway.networking.x-k8s.io/v1alpha1"
                | "/apis/undermesh.io/v1alpha1",
            ) => failure(404, "NotFound"),
            ("GET", path) if path.starts_with(DEFINITIONS) => {
                no_such("customresourcedefinitions", &path[DEFINITIONS.len()..])
            }
            ("GET", "/api/v1/services") if is_initial => {
                Some((200, json!([{ "type": "ADDED", "object": service }, end("Service")])))
            }
            ("GET", "/api/v1/pods") if is_initial => Some((200, json!([end("Pod")]))),
            ("GET", "/apis/gateway.networking.k8s.io/v1/httproutes") if is_initial => {
                Some((200, json!([{ "type": "ADDED", "object": route("5") }, end("HTTPRoute")])))
            }
            // What it has become is told once our write has come too late.
            ("GET", "/apis/gateway.networking.k8s.io/v1/httproutes") => {
                match patches.load(Ordering::SeqCst) {
                    0 | 1 => failure(500, "InternalError"),
                    2 if !told.swap(true, Ordering::SeqCst) => {
                        Some((200, json!([{ "type": "MODIFIED", "object": route("6") }])))
                    }
                    _ => None,
                }
            }
            ("PATCH", "/apis/gateway.networking.k8s.io/v1/namespaces/shop/httproutes/good/status") => {
                let version = question.body["metadata"]["resourceVersion"].clone();
                writing.lock().unwrap().push(version);
                match patches.fetch_add(1, Ordering::SeqCst) {
                    0 => failure(500, "InternalError"),
                    1 => failure(409, "Conflict"),
                    _ => {
                        assert_eq!(question.body["status"]["parents"].as_array().unwrap().len(), 2);
                        Some((200, route("7")))
                    }
                }
            }
            ("GET", _) => None,
            other => panic!("{other:?}"),
        }
    });
    let (_leads, leader) = watch::channel(true);
    let client = api.client();
    _ = tokio::time::timeout(Duration::from_secs(300), lead(&client, "mesh", leader)).await;
    let written = written.lock().unwrap();
    assert_eq!(written[..3], ["5", "5", "6"], "{written:?}");
}

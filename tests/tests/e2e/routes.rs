//! Routes: what people get burnt by. What the conformance suite of the Gateway API asks is in [`crate::conformance`].

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests};

/// Another namespace with a client of its own.
const CONSUMER: &str = "consumer";

/// The Services of the suite: `echo` in front of both servers, and each server's own.
pub struct Stage {
    pub mesh: Mesh,
    pub client: Pod,
    pub consumer: Pod,
    servers: [Pod; 2],
    _running: Vec<Process>,
}

impl Stage {
    pub fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        mesh.lab.apply(&Manifest::namespace(CONSUMER).label("undermesh.io/mesh", "enabled"))?;
        let client = mesh.pod(0, "client")?;
        let consumer = mesh.add(0, PodSpec::new(CONSUMER, "consumer"))?;
        let server = |node, name: &str| {
            let spec = PodSpec::new(SHOP, name).label("app", "echo");
            mesh.add(node, spec.label("version", name.trim_start_matches("echo-")))
        };
        let servers = [server(0, "echo-v1")?, server(1, "echo-v2")?];
        for (service, selector) in [
            ("echo", json!({ "app": "echo" })),
            ("echo-v1", json!({ "version": "v1" })),
            ("echo-v2", json!({ "version": "v2" })),
        ] {
            let ports: Value =
                [("http", 80, 8080), ("http-alt", 8080, 8080), ("grpc", 7070, 8080), ("tls", 8443, 8443)]
                    .iter()
                    .map(|(name, port, target)| json!({ "name": name, "port": port, "targetPort": target }))
                    .collect();
            let service = Manifest::service(SHOP, service, &[cluster_ip(service)], &[], &[]);
            mesh.lab.apply(&service.with("spec.ports", ports).with("spec.selector", selector))?;
        }
        let running = servers.iter().map(serve_requests).collect::<Result<_>>()?;
        mesh.ready()?;
        let stage = Self { mesh, client, consumer, servers, _running: running };
        eventually(SOON, "the Services are served", || {
            for service in ["echo", "echo-v1", "echo-v2"] {
                stage.ask(service, "/", &[])?.answered(200)?;
            }
            Ok(())
        })?;
        Ok(stage)
    }

    /// Asks a Service by its name, on its port 80 or the one that the name has after a colon.
    pub fn ask(&self, service: &str, path: &str, args: &[&str]) -> Result<Asked> {
        ask_from(&self.client, service, path, args)
    }

    /// Has these routes be in force, and no others.
    pub fn route(&self, routes: &[(&str, &str, Value)]) -> Result<()> {
        for (index, (kind, namespace, spec)) in routes.iter().enumerate() {
            let route = Manifest::new(API, kind, Some(namespace), &format!("route-{index}"));
            self.mesh.lab.apply(&route.with("spec", spec.clone()))?;
        }
        Ok(())
    }

    pub fn unroute(&self, routes: &[(&str, &str, Value)]) -> Result<()> {
        for (index, (kind, namespace, _)) in routes.iter().enumerate() {
            self.mesh.lab.delete(&Manifest::new(API, kind, Some(namespace), &format!("route-{index}")))?;
        }
        Ok(())
    }
}

const API: &str = "gateway.networking.k8s.io/v1";

pub fn ask_from(client: &Pod, service: &str, path: &str, args: &[&str]) -> Result<Asked> {
    let (name, port) = service.split_once(':').unwrap_or((service, "80"));
    let url = format!("http://{}{path}", SocketAddr::new(cluster_ip(name), port.parse()?));
    let host = if args.contains(&"--host") { &[][..] } else { &["--host", name] };
    ask(client, &url, &[host, args].concat())
}

fn cluster_ip(service: &str) -> IpAddr {
    let last = match service {
        "echo" => 30,
        "echo-v1" => 31,
        "echo-v2" => 32,
        other => unreachable!("there is no Service {other}"),
    };
    IpAddr::from([10, 96, 0, last])
}

pub fn service(name: &str) -> Value {
    json!({ "group": "", "kind": "Service", "name": name })
}

pub fn service_port(name: &str, port: u16) -> Value {
    json!({ "group": "", "kind": "Service", "name": name, "port": port })
}

pub fn backend(name: &str) -> Value {
    json!({ "name": name, "port": 8080 })
}

pub fn prefix(path: &str) -> Value {
    json!({ "path": { "type": "PathPrefix", "value": path } })
}

/// Routes on `echo`, port 80, in the Service's own namespace.
pub fn on_echo(rules: Value) -> Vec<(&'static str, &'static str, Value)> {
    vec![("HTTPRoute", SHOP, json!({ "parentRefs": [service_port("echo", 80)], "rules": rules }))]
}

pub const GRPC: &[&str] = &[
    "--http2",
    "--method",
    "POST",
    "--header",
    "content-type: application/grpc",
    "--header",
    "te: trailers",
];

#[test]
fn weights_hold_for_requests_and_not_for_connections() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-weights")?;
    // MeshTrafficSplit, MeshHTTPRouteWeight, MeshGRPCRouteWeight: of 10,000 requests within 0.7 points.
    let split = |kind, port: u16, weights: [u32; 2]| {
        let backend = |name, weight| json!({ "name": name, "port": port, "weight": weight });
        let backends = json!([backend("echo-v1", weights[0]), backend("echo-v2", weights[1])]);
        vec![(
            kind,
            SHOP,
            json!({ "parentRefs": [service_port("echo", port)], "rules": [{ "backendRefs": backends }] }),
        )]
    };
    for (kind, port, args) in [("HTTPRoute", 80, &[][..]), ("GRPCRoute", 7070, GRPC)] {
        for weights in [[95, 5], [50, 50], [1, 0]] {
            let routes = split(kind, port, weights);
            stage.route(&routes)?;
            let expected = f64::from(weights[1]) / f64::from(weights[0] + weights[1]);
            let service = format!("echo:{port}");
            eventually(SOON, "the weights are in force", || {
                let asked = stage.ask(&service, "/a.B/C", &[&["--count", "400"], args].concat())?.all(200)?;
                let share = asked.get("echo-v2").copied().unwrap_or_default() as f64 / 400.0;
                ensure!((share - expected).abs() < 0.1, "{kind} {weights:?}: {asked:?}");
                Ok(())
            })?;
            let many = [&["--count", "10000", "--connections", "2"], args].concat();
            let asked = stage.ask(&service, "/a.B/C", &many)?.all(200)?;
            let share = asked.get("echo-v2").copied().unwrap_or_default() as f64 / 10_000.0;
            ensure!((share - expected).abs() <= 0.007, "{kind} {weights:?}: {asked:?}");
            if weights[1] == 0 {
                ensure!(share == 0.0, "a weight of 0 is nothing: {asked:?}");
            }
        }
        stage.unroute(&split(kind, port, [1, 1]))?;
    }
    Ok(())
}

#[test]
fn routes_of_consumers_are_theirs_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-consumer")?;
    // MeshConsumerRoute.
    let set = json!([{ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": [{ "name": "x-set", "value": "set" }] } }]);
    let mut parent = service("echo-v1");
    parent["namespace"] = json!(SHOP);
    let backends = json!([{ "name": "echo-v1", "namespace": SHOP, "port": 80 }]);
    stage.route(&[(
        "HTTPRoute",
        CONSUMER,
        json!({ "parentRefs": [parent], "rules": [{ "filters": set, "backendRefs": backends }] }),
    )])?;
    let header = |client: &Pod| -> Result<Value> {
        Ok(ask_from(client, "echo-v1", "/", &[])?.answered(200)?["headers"]["x-set"].clone())
    };
    eventually(SOON, "the consumer's requests are changed", || {
        let found = header(&stage.consumer)?;
        ensure!(found == "set", "{found}");
        Ok(())
    })?;
    ensure!(header(&stage.client)?.is_null(), "another namespace's requests are changed as well");
    Ok(())
}

#[test]
fn a_client_that_dials_pods_gets_the_routes_of_their_service_if_it_asks_for_them() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-dialled-pods")?;
    let pod = SocketAddr::new(stage.servers[0].ip(), 8080);
    let url = format!("http://{pod}/");
    let server = || -> Result<String> {
        let answer = ask(&stage.client, &url, &["--host", "echo"])?.answered(200)?;
        Ok(answer["headers"]["x-server"].as_str().context("nobody has answered")?.to_owned())
    };
    // Of the Services and ports that lead to the pod's 8080, the first by name and number counts.
    let rules = json!([{ "backendRefs": [backend("echo-v2")] }]);
    let routes = on_echo(rules.clone());
    stage.route(&routes)?;
    eventually(SOON, "the route is in force", || {
        let served = stage.ask("echo", "/", &["--count", "10"])?.all(200)?;
        ensure!(served.keys().eq(["echo-v2"]), "{served:?}");
        Ok(())
    })?;
    ensure!(server()? == "echo-v1", "who does not ask for it does not get the pod");
    let says = |value| stage.client.update(|it| it.set_annotation("undermesh.io/dialled-pods", value));
    says(Some("service"))?;
    eventually(SOON, "the route's answer", || {
        let found = server()?;
        ensure!(found == "echo-v2", "{found} answers");
        Ok(())
    })?;
    // What carries bytes as well, and without any route the Service's own endpoints.
    stage.unroute(&routes)?;
    eventually(SOON, "both servers answer without a route", || {
        let served = ask(&stage.client, &url, &["--host", "echo", "--count", "40"])?.all(200)?;
        ensure!(served.len() == 2, "{served:?}");
        Ok(())
    })?;
    stage.route(&[(
        "TCPRoute",
        SHOP,
        json!({ "parentRefs": [service_port("echo", 80)], "rules": rules }),
    )])?;
    eventually(SOON, "the TCPRoute's answers", || {
        let served = ask(&stage.client, &url, &["--host", "echo", "--count", "10", "--fresh"])?.all(200)?;
        ensure!(served.keys().eq(["echo-v2"]), "{served:?}");
        Ok(())
    })?;
    let metrics = stage.mesh.agents[0].metrics()?;
    let routed = [("destination_service", "echo"), ("destination_workload", "echo-v2")];
    let counted = metrics.sum("undermesh_tcp_connections_opened_total", &routed);
    ensure!(counted > 0.0, "they are not counted as the Service's");
    says(None)?;
    eventually(SOON, "the pod's answer again", || {
        let found = server()?;
        ensure!(found == "echo-v1", "{found} answers");
        Ok(())
    })
}

#[test]
fn what_is_wrong_with_a_route_shows_and_costs_its_own_share_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-wrong-routes")?;
    let route = |rules: Value| on_echo(rules);
    // A backend that is not there answers for its share with 500, and nobody else for it.
    let half = route(json!([{ "backendRefs": [backend("echo-v1"), backend("nobody")] }]));
    stage.route(&half)?;
    eventually(SOON, "half of the requests fail", || {
        let asked = stage.ask("echo", "/", &["--count", "200"])?;
        let count = |status: &str| asked.by_status.get(status).copied().unwrap_or_default();
        ensure!((60..140).contains(&count("500")) && count("200") + count("500") == 200, "{asked:?}");
        Ok(())
    })?;
    // An invalid version of the route is told of, and the last good one stays.
    stage.route(&route(json!([{ "matches": [{ "path": { "type": "RegularExpression", "value": "(" } }], "backendRefs": [backend("echo-v2")] }])))?;
    eventually(SOON, "the rejection is told of", || {
        let status = stage.mesh.agents[0].get("/debug/status")?.ok()?;
        ensure!(
            status.contains("HTTPRoute shop/route-0") || status.contains("spec.rules[0].matches[0].path"),
            "{status}"
        );
        Ok(())
    })?;
    let asked = stage.ask("echo", "/", &["--count", "50"])?;
    ensure!(
        asked.by_server.keys().all(|server| server != "echo-v2"),
        "the last good one does not stay: {asked:?}"
    );
    // Another namespace's Service needs its leave.
    let mut elsewhere = service("echo");
    elsewhere["namespace"] = json!(SHOP);
    stage.unroute(&half)?;
    let across = [(
        "HTTPRoute",
        CONSUMER,
        json!({ "parentRefs": [elsewhere], "rules": [{ "backendRefs": [{ "name": "echo-v2", "namespace": SHOP, "port": 8080 }] }] }),
    )];
    stage.route(&across)?;
    eventually(SOON, "no leave is given", || {
        let refused = ask_from(&stage.consumer, "echo", "/", &[])?.answered(500)?;
        let said = refused["headers"]["proxy-status"].as_str().unwrap_or_default().to_owned();
        ensure!(said.contains("ReferenceGrant"), "{said}");
        Ok(())
    })?;
    let grant = Manifest::new("gateway.networking.k8s.io/v1beta1", "ReferenceGrant", Some(SHOP), "routes");
    stage.mesh.lab.apply(&grant.with(
        "spec",
        json!({
            "from": [{ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": CONSUMER }],
            "to": [{ "group": "", "kind": "Service" }],
        }),
    ))?;
    eventually(SOON, "leave is given", || {
        ask_from(&stage.consumer, "echo", "/", &[])?.all(200)?;
        Ok(())
    })
}

#[test]
fn sessions_stay_with_their_endpoint_until_its_backend_leaves() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-sessions")?;
    let rules = |weights: [u32; 2], kind: &str| {
        let backend = |name, weight| json!({ "name": name, "port": 8080, "weight": weight });
        json!([{ "sessionPersistence": { "sessionName": "sid", "type": kind }, "backendRefs": [backend("echo-v1", weights[0]), backend("echo-v2", weights[1])] }])
    };
    for kind in ["Cookie", "Header"] {
        stage.route(&on_echo(rules([1, 0], kind)))?;
        let mut token = String::new();
        eventually(SOON, "a session begins", || {
            let answer = stage.ask("echo", "/", &[])?.answered(200)?;
            ensure!(answer["headers"]["x-server"] == "echo-v1", "{answer}");
            token = match kind {
                "Header" => format!("sid: {}", answer["headers"]["sid"].as_str().context("no session")?),
                _ => {
                    let cookie = answer["headers"]["set-cookie"].as_str().context("no session")?;
                    format!("cookie: a=b; {}", cookie.split(';').next().unwrap_or_default())
                }
            };
            Ok(())
        })?;
        // Blue/green: every new request goes to the other, and the session does not.
        stage.route(&on_echo(rules([0, 1], kind)))?;
        eventually(SOON, "the weights are in force", || {
            let served = stage.ask("echo", "/", &[])?.all(200)?;
            ensure!(served.contains_key("echo-v2"), "{served:?}");
            Ok(())
        })?;
        let served = stage.ask("echo", "/", &["--count", "20", "--header", &token])?.all(200)?;
        ensure!(served.keys().eq(["echo-v1"]), "{kind}: the session has moved: {served:?}");
        // Its backend leaves: it moves, and is told so.
        let only_v2 = json!([{ "sessionPersistence": { "sessionName": "sid", "type": kind }, "backendRefs": [backend("echo-v2")] }]);
        stage.route(&on_echo(only_v2))?;
        eventually(SOON, "the session has moved", || {
            let answer = stage.ask("echo", "/", &["--header", &token])?.answered(200)?;
            let told = if kind == "Header" { "sid" } else { "set-cookie" };
            ensure!(
                answer["headers"]["x-server"] == "echo-v2" && !answer["headers"][told].is_null(),
                "{answer}"
            );
            Ok(())
        })?;
    }
    // One that outlives the client is told for how long.
    let permanent = json!({ "sessionName": "sid", "absoluteTimeout": "1h", "cookieConfig": { "lifetimeType": "Permanent" } });
    stage
        .route(&on_echo(json!([{ "sessionPersistence": permanent, "backendRefs": [backend("echo-v1")] }])))?;
    eventually(SOON, "the cookie has an end", || {
        let answer = stage.ask("echo", "/", &[])?.answered(200)?;
        ensure!(
            answer["headers"]["set-cookie"].as_str().is_some_and(|it| it.contains("; Max-Age=3600;")),
            "{answer}"
        );
        Ok(())
    })
}

#[test]
fn a_policy_keeps_sessions_where_no_route_does() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-policy-session")?;
    let policy = Manifest::new(
        "gateway.networking.x-k8s.io/v1alpha1",
        "XBackendTrafficPolicy",
        Some(SHOP),
        "sessions",
    );
    let target = |name: &str| json!({ "group": "", "kind": "Service", "name": name });
    stage.mesh.lab.apply(&policy.with(
        "spec",
        json!({
            "targetRefs": [target("echo"), target("echo-v1")],
            "sessionPersistence": { "sessionName": "sid", "type": "Header" },
        }),
    ))?;
    let session_of = |answer: &Value| answer["headers"]["sid"].as_str().map(|sid| format!("sid: {sid}"));
    // Without a route.
    let (mut token, mut with) = (String::new(), String::new());
    eventually(SOON, "a session begins", || {
        let answer = stage.ask("echo", "/", &[])?.answered(200)?;
        token = session_of(&answer).context("no session")?;
        with = answer["headers"]["x-server"].as_str().context("nobody")?.to_owned();
        Ok(())
    })?;
    let served = stage.ask("echo", "/", &["--count", "20", "--header", &token])?.all(200)?;
    ensure!(served.keys().eq([&with]), "the session with {with} has moved: {served:?}");
    let served = stage.ask("echo", "/", &["--count", "40"])?.all(200)?;
    ensure!(served.len() == 2, "who has no session goes to either: {served:?}");
    // With a route that says nothing of sessions, of whose backends one has them.
    let backend = |name: &str| json!({ "name": name, "port": 8080 });
    stage.route(&on_echo(json!([{ "backendRefs": [backend("echo-v1"), backend("echo-v2")] }])))?;
    eventually(SOON, "of the backends one has sessions", || {
        let answers = [(); 8].map(|()| stage.ask("echo", "/", &[])?.answered(200));
        let mut seen = Vec::new();
        for answer in answers {
            let answer = answer?;
            let server = answer["headers"]["x-server"].as_str().context("nobody")?.to_owned();
            let session = session_of(&answer);
            ensure!((server == "echo-v1") == session.is_some(), "{server} has the session {session:?}");
            token = session.unwrap_or_else(|| std::mem::take(&mut token));
            seen.push(server);
        }
        ensure!(seen.iter().any(|server| server == "echo-v1"), "{seen:?}");
        Ok(())
    })?;
    let served = stage.ask("echo", "/", &["--count", "20", "--header", &token])?.all(200)?;
    ensure!(served.keys().eq(["echo-v1"]), "the session has moved: {served:?}");
    Ok(())
}

#[test]
fn mirrors_timeouts_and_retries() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-filters")?;
    let requests = |labels: &[(&str, &str)]| -> Result<f64> {
        Ok(stage.mesh.agents[0].metrics()?.sum("undermesh_http_requests_total", labels))
    };
    // Copies go elsewhere; that nobody is there, or slow, is not for the client to notice.
    stage.route(&on_echo(json!([{
        "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": backend("echo-v2") } }],
        "backendRefs": [backend("echo-v1")],
    }])))?;
    eventually(SOON, "copies arrive", || {
        let before = requests(&[("destination_workload", "echo-v2"), ("response_code", "200")])?;
        let served = stage
            .ask("echo", "/?delay_ms=1", &["--count", "20", "--method", "POST", "--body", "1000"])?
            .all(200)?;
        ensure!(served.keys().eq(["echo-v1"]), "{served:?}");
        // Soon, or the route came between two of them, and the next twenty are to show it.
        eventually(Duration::from_secs(3), "20 copies are counted", || {
            let counted =
                requests(&[("destination_workload", "echo-v2"), ("response_code", "200")])? - before;
            ensure!(counted == 20.0, "{counted} copies");
            Ok(())
        })
    })?;
    // A limit on the whole, and on one attempt.
    for (timeouts, reason) in [
        (json!({ "request": "100ms" }), "request_timeout"),
        (json!({ "request": "5s", "backendRequest": "100ms" }), "upstream_timeout"),
    ] {
        stage.route(&on_echo(json!([{ "timeouts": timeouts, "backendRefs": [backend("echo-v1")] }])))?;
        eventually(SOON, "the limit is in force", || {
            let before = requests(&[("reason", reason)])?;
            stage.ask("echo", "/?delay_ms=2000", &[])?.answered(504)?;
            ensure!(requests(&[("reason", reason)])? > before, "{reason} is not counted");
            Ok(())
        })?;
        stage.ask("echo", "/?delay_ms=1", &[])?.answered(200)?;
    }
    // What failed is tried again, elsewhere if it can be.
    stage.route(&on_echo(json!([{ "retry": { "codes": [503], "attempts": 2, "backoff": "10ms" }, "backendRefs": [backend("echo-v1")] }])))?;
    eventually(SOON, "the retries are in force", || {
        let before = served_by(&stage)?;
        stage.ask("echo", "/?status=503", &[])?.answered(503)?;
        let asked = served_by(&stage)? - before - 1.0;
        ensure!(asked == 3.0, "{asked} attempts");
        Ok(())
    })
}

/// A redirect and a preflight are answers of the rule as any other is.
#[test]
fn what_a_rule_answers_itself_has_the_headers_of_its_filters() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-own-answers")?;
    let cors = json!({ "type": "CORS", "cors": { "allowOrigins": ["https://a.test"] } });
    let set = json!([{ "name": "x-set", "value": "new" }]);
    let header = json!({ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": set } });
    let redirect = json!({ "type": "RequestRedirect", "requestRedirect": { "hostname": "b.test" } });
    stage.route(&on_echo(json!([
        { "matches": [prefix("/away")], "filters": [redirect, header, cors] },
        { "filters": [header, cors], "backendRefs": [backend("echo-v1")] },
    ])))?;
    let a = ["--header", "origin: https://a.test"];
    let asks = ["--method", "OPTIONS", "--header", "access-control-request-method: PUT"];
    let check = |path: &str, args: &[&str], status: u64, allowed: Value| {
        let answer = stage.ask("echo", path, args)?.answered(status)?;
        let headers = ["x-set", "vary", "access-control-allow-origin"].map(|it| &answer["headers"][it]);
        let expected = [&json!("new"), &json!("Origin"), &allowed];
        ensure!(headers == expected, "{path} {args:?}: {headers:?} instead of {expected:?}");
        Ok(answer)
    };
    let allowed = json!("https://a.test");
    eventually(SOON, "the routes are in force", || check("/away", &a, 302, allowed.clone()))?;
    for path in ["/away", "/"] {
        check(path, &[&a[..], &asks].concat(), 204, allowed.clone())?;
    }
    check("/", &a, 200, allowed)?;
    // What says nothing of an origin is for nobody else's cache either.
    for (path, status) in [("/away", 302), ("/", 200)] {
        check(path, &[], status, Value::Null)?;
        check(path, &["--header", "origin: https://evil.test"], status, Value::Null)?;
    }
    Ok(())
}

/// How many requests the first server has seen, this one included.
fn served_by(stage: &Stage) -> Result<f64> {
    let saw = stage.ask("echo-v1", "/", &[])?.saw()?;
    saw["requests"].as_f64().with_context(|| format!("the server does not count: {saw}"))
}

#[test]
fn connections_are_routed_by_weight_and_by_server_name() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-l4-routes")?;
    // A TCPRoute takes connections as a whole, whatever they carry.
    let weighted = |name, weight| json!({ "name": name, "port": 8080, "weight": weight });
    let rules = json!([{ "backendRefs": [weighted("echo-v1", 1), weighted("echo-v2", 3)] }]);
    let tcp = [("TCPRoute", SHOP, json!({ "parentRefs": [service_port("echo", 80)], "rules": rules }))];
    stage.route(&tcp)?;
    eventually(SOON, "connections are shared out", || {
        let served = stage.ask("echo", "/", &["--count", "200", "--fresh"])?.all(200)?;
        let share = served.get("echo-v2").copied().unwrap_or_default();
        ensure!((145..=155).contains(&share), "{served:?}");
        Ok(())
    })?;
    let one = stage.ask("echo", "/", &["--count", "20"])?.all(200)?;
    ensure!(one.len() == 1, "the requests of one connection went to {one:?}");
    stage.unroute(&tcp)?;

    // A TLSRoute goes by what the client asks for in its first message.
    let rule = |name| json!([{ "backendRefs": [{ "name": name, "port": 8443 }] }]);
    let parent = || json!([service_port("echo", 8443)]);
    let tls = [
        (
            "TLSRoute",
            SHOP,
            json!({ "parentRefs": parent(), "hostnames": ["one.test"], "rules": rule("echo-v1") }),
        ),
        (
            "TLSRoute",
            SHOP,
            json!({ "parentRefs": parent(), "hostnames": ["*.two.test"], "rules": rule("echo-v2") }),
        ),
    ];
    stage.route(&tls)?;
    let _servers: Vec<Process> = stage.servers.iter().map(says_its_name).collect::<Result<_>>()?;
    for (name, expected) in [("one.test", "echo-v1"), ("a.two.test", "echo-v2"), ("other.test", "nobody")] {
        eventually(SOON, name, || {
            let said = hello(&stage.client, SocketAddr::new(cluster_ip("echo"), 8443), name)?;
            ensure!(said == expected, "{said}");
            Ok(())
        })?;
    }
    let refused = [("reason", "no_route"), ("destination_service", "echo")];
    let counted = stage.mesh.agents[0].metrics()?.sum("undermesh_tcp_connections_refused_total", &refused);
    ensure!(counted >= 1.0, "the connection to nobody is not counted");
    Ok(())
}

/// Answers whatever comes on port 8443 with its pod's name.
fn says_its_name(pod: &Pod) -> Result<Process> {
    let script = format!(
        "import socket\ns=socket.create_server(('::',8443),family=socket.AF_INET6,dualstack_ipv6=True)\n\
         while True:\n  c,_=s.accept()\n  c.recv(4096)\n  c.sendall(b'{}')\n  c.close()\n",
        pod.name()
    );
    let mut command = Command::new("python3");
    command.args(["-c", &script]);
    let server = pod.spawn(command)?;
    pod.wait_listening(8443)?;
    Ok(server)
}

/// Begins TLS with the server of this name; what comes back first.
fn hello(client: &Pod, to: SocketAddr, name: &str) -> Result<String> {
    let script = format!(
        "import socket,ssl\nc=ssl.create_default_context()\ni,o=ssl.MemoryBIO(),ssl.MemoryBIO()\n\
         t=c.wrap_bio(i,o,server_hostname='{name}')\n\
         try: t.do_handshake()\nexcept ssl.SSLWantReadError: pass\n\
         s=socket.create_connection(('{}',{}),10)\nh=o.read()\n\
         s.sendall(h[:20])\ns.sendall(h[20:])\n\
         try: print(s.recv(100).decode() or 'nobody')\nexcept ConnectionError: print('nobody')\n",
        to.ip(),
        to.port()
    );
    let mut command = Command::new("python3");
    command.args(["-c", &script]);
    Ok(client.run(command, SOON)?.success()?.trim().to_owned())
}

//! Through the socket, as a client sees it.

use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::model::{
    Candidates, Endpoint, EndpointLoad, MtlsMode, ObjectRef, Service, ServicePort, SessionAffinity,
    TrafficDistribution, TrafficScope, Workload,
};
use crate::snapshot::{Destination, Snapshot};
use crate::telemetry::{
    CloseReason, ConnectionFacts, Logs, Peer, PodReport, PodState, Reporter, Security, Status,
    TelemetrySettings, Traces,
};

const ANY_PORT: &str = "127.0.0.1:0";

fn telemetry() -> Arc<Telemetry> {
    Telemetry::new(
        TelemetrySettings::default(),
        Status::new("node-1", Arc::default()),
        Logs::default(),
        Traces::off(),
    )
}

async fn start(telemetry: &Arc<Telemetry>) -> (SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let admin = Admin::bind(ANY_PORT.parse().unwrap(), telemetry.clone()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let address = admin.local_address();
    (address, stop, tokio::spawn(admin.serve(async { _ = stopped.await })))
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer));
    // A reset ends the answer just as well.
    _ = read.await.expect("an answer in time");
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
}

async fn get_json(address: SocketAddr, path: &str) -> serde_json::Value {
    let answer = get(address, path).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("application/json"), "{answer}");
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

fn workload() -> Arc<Workload> {
    Arc::new(Workload {
        uid: "uid-1".into(),
        pod: ObjectRef::new("shop", "db-0"),
        workload: "db".into(),
        addresses: vec!["10.0.0.2".parse().unwrap()],
        mtls: MtlsMode::Strict,
        ..Workload::example()
    })
}

fn snapshot() -> Snapshot {
    let workload = workload();
    let endpoint = Endpoint {
        address: "10.0.0.2:5432".parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        zone: None,
        for_zones: vec!["a".into()],
        for_nodes: Vec::new(),
        workload: Some(workload.clone()),
        load: EndpointLoad::default(),
    };
    let addresses = vec!["10.96.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
    let service = Arc::new(Service {
        id: ObjectRef::new("shop", "db"),
        addresses: addresses.clone(),
        ports: vec![ServicePort {
            name: "pg".into(),
            port: 5432,
            app_protocol: None,
            endpoints: Arc::new([endpoint]),
            candidates: Candidates::default(),
            load: Default::default(),
            traffic: Arc::default(),
        }],
        session_affinity: SessionAffinity::ClientIp { timeout: Duration::from_secs(9) },
        internal_traffic: TrafficScope::Cluster,
        distribution: TrafficDistribution::PreferSameZone,
        load: Default::default(),
    });
    Snapshot {
        generation: 3,
        destinations: addresses.iter().map(|a| (*a, Destination::Service(service.clone()))).collect(),
        workloads: [(workload.uid.clone(), workload)].into_iter().collect(),
        captured: addresses.into_iter().collect(),
        ..Snapshot::default()
    }
}

fn facts() -> ConnectionFacts {
    let peer = |workload, address: &str| Peer { workload, identity: None, address: address.parse().unwrap() };
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: peer(None, "10.0.0.9:40000"),
        destination: peer(Some(workload()), "10.0.0.2:5432"),
        service: None,
        security: Security::Plaintext,
        dialled: "10.0.0.2:5432".parse().unwrap(),
        client: "10.0.0.9:40000".parse().unwrap(),
        upstream: None,
        ruling: None,
    }
}

#[tokio::test]
async fn ready_once_there_is_a_snapshot_and_its_pods_are_settled() {
    let telemetry = telemetry();
    let (address, _stop, _task) = start(&telemetry).await;
    assert!(get(address, "/healthz").await.ends_with("\r\n\r\nok\n"));

    let answer = get(address, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("no configuration has been read yet\n"), "{answer}");

    telemetry.status().snapshot.store(Arc::new(snapshot()));
    assert!(get(address, "/readyz").await.ends_with("\r\n\r\npod shop/db-0 is not enrolled yet\n"));
    let pods = get_json(address, "/debug/pods").await;
    assert_eq!(pods["pods"][0]["state"], "pending", "{pods}");

    let state = PodState::Enrolled { since: std::time::UNIX_EPOCH };
    telemetry.status().set_pod("uid-1".into(), PodReport { pod: ObjectRef::new("shop", "db-0"), state });
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200 "));
    let status = get_json(address, "/debug/status").await;
    assert_eq!(status["ready"], true, "{status}");
    assert_eq!(status["pods"][0]["since"], "1970-01-01T00:00:00.000Z", "{status}");
}

#[tokio::test]
async fn certificates_are_shown_where_there_is_an_authority() {
    let (address, _stop, _task) = start(&telemetry()).await;
    let answer = get(address, "/debug/certs").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.ends_with("this agent has no certificate authority\n"), "{answer}");

    let admin = Admin::bind(ANY_PORT.parse().unwrap(), telemetry()).await.unwrap();
    let admin = admin.with_certificates(|| serde_json::json!({ "trust_domain": "cluster.local" }));
    let address = admin.local_address();
    tokio::spawn(admin.serve(std::future::pending()));
    let page = get_json(address, "/debug/certs").await;
    assert_eq!(page, serde_json::json!({ "trust_domain": "cluster.local" }));
}

#[tokio::test]
async fn what_others_miss_is_missing() {
    let telemetry = telemetry();
    let (address, _stop, _task) = start(&telemetry).await;
    telemetry.status().snapshot.store(Arc::new(Snapshot { generation: 1, ..Snapshot::default() }));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200 "));
    telemetry
        .status()
        .on_missing(|| vec!["spiffe://cluster.local/ns/shop/sa/db has no certificate yet".into()]);
    let answer = get(address, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.ends_with("\r\n\r\nspiffe://cluster.local/ns/shop/sa/db has no certificate yet\n"),
        "{answer}"
    );
    assert_eq!(get_json(address, "/debug/status").await["ready"], false);
}

#[tokio::test]
async fn metrics_are_negotiated() {
    let telemetry = telemetry();
    let (address, _stop, _task) = start(&telemetry).await;
    let text = get(address, "/metrics").await;
    assert!(text.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{text}");
    assert!(text.contains("# TYPE process_cpu_seconds_total counter\n"), "{text}");
    let accept = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\nConnection: close\r\n\r\n";
    let openmetrics = ask(address, accept).await;
    assert!(
        openmetrics.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")
    );
    assert!(openmetrics.ends_with("# EOF\n"), "{openmetrics}");
}

#[tokio::test]
async fn the_debug_pages_show_connections_and_configuration() {
    let telemetry = telemetry();
    let (address, _stop, _task) = start(&telemetry).await;
    telemetry.status().snapshot.store(Arc::new(snapshot()));
    let upstream = Some("127.0.0.1:5432".parse().unwrap());
    let open = telemetry.connection_opened(ConnectionFacts { upstream, ..facts() });
    open.add_received(7);

    let page = get_json(address, "/debug/connections").await;
    let connection = &page["connections"][0];
    assert_eq!(connection["received_bytes"], 7, "{page}");
    assert_eq!(connection["destination"]["pod"], "db-0", "{page}");
    assert_eq!(connection["source"]["pod"], serde_json::Value::Null, "{page}");
    assert_eq!(connection["upstream_address"], "127.0.0.1:5432", "{page}");
    open.close(CloseReason::Done);
    assert_eq!(get_json(address, "/debug/connections").await, serde_json::json!({ "connections": [] }));

    let config = get_json(address, "/debug/config").await;
    assert_eq!(config["generation"], 3);
    assert_eq!(config["services"].as_array().unwrap().len(), 1, "{config}");
    assert_eq!(config["services"][0]["session_affinity_seconds"], 9, "{config}");
    assert_eq!(config["services"][0]["ports"][0]["endpoints"][0]["pod"], "shop/db-0", "{config}");
    assert_eq!(config["captured"], serde_json::json!(["10.96.0.7", "fd00::7"]));
}

#[tokio::test]
async fn other_methods_paths_and_garbage() {
    let telemetry = telemetry();
    let (address, _stop, _task) = start(&telemetry).await;
    let close = "Host: x\r\nConnection: close\r\n\r\n";
    let check = async |request: String, start: &str, has: &str| {
        let answer = ask(address, &request).await;
        assert!(answer.starts_with(start) && answer.contains(has), "{request:?}: {answer}");
        answer
    };
    check(format!("GET /nothing HTTP/1.1\r\n{close}"), "HTTP/1.1 404 ", "").await;
    check(format!("GET /metrics/x HTTP/1.1\r\n{close}"), "HTTP/1.1 404 ", "").await;
    check(format!("POST /metrics HTTP/1.1\r\n{close}"), "HTTP/1.1 405 ", "allow: GET,HEAD\r\n").await;
    let head = check(format!("HEAD /metrics HTTP/1.1\r\n{close}"), "HTTP/1.1 200 ", "content-length: ").await;
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    check("\u{0}\u{1}\u{2} garbage\r\n\r\n".into(), "HTTP/1.1 400 ", "").await;
    check(format!("GET /{} HTTP/1.1\r\n{close}", "a".repeat(1 << 20)), "", "").await;
    check(format!("GET /metrics HTTP/1.1\r\nAccept: \u{e9};q=,/;\r\n{close}"), "HTTP/1.1 200 ", "").await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let first = Admin::bind(ANY_PORT.parse().unwrap(), telemetry()).await.unwrap();
    let error = Admin::bind(first.local_address(), telemetry()).await.unwrap_err();
    let expected = format!("cannot listen on the admin address {}: ", first.local_address());
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[tokio::test]
async fn shutdown_ends_idle_connections_and_does_not_wait_for_dawdlers() {
    let telemetry = telemetry();
    let (address, stop, task) = start(&telemetry).await;
    let mut dawdler = TcpStream::connect(address).await.unwrap();
    dawdler.write_all(b"GET /he").await.unwrap();
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200 "));
    stop.send(()).unwrap();
    tokio::time::timeout(DRAIN * 3, task).await.expect("the server ends").unwrap();
}

/// A client that sends its request byte by byte is cut off all the same, and its place goes to the next.
#[tokio::test]
async fn a_slow_client_loses_its_place() {
    let listener = TcpListener::bind(ANY_PORT).await.unwrap();
    let address = listener.local_addr().unwrap();
    let patience = Duration::from_millis(300);
    let limited = LimitedListener::with_limits(listener, 1, patience);
    let server = tokio::spawn(axum::serve(limited, router(telemetry(), OnDemand::default())).into_future());

    let started = Instant::now();
    let mut slow = TcpStream::connect(address).await.unwrap();
    let dribble = async {
        loop {
            if slow.write_all(b"G").await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (answer, ()) = tokio::join!(get(address, "/healthz"), dribble);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(started.elapsed() >= patience, "there was one place, and the slow one had it");
    server.abort();
}

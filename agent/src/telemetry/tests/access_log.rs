//! The lines of the access log, and what becomes of them when nobody takes them.

use std::collections::BTreeMap;
use std::io::Write;

use super::*;

/// An output that can be read afterwards, or that blocks until it is let go.
#[derive(Clone, Default)]
struct Output {
    written: Arc<Mutex<Vec<u8>>>,
    gate: Arc<Mutex<()>>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _open = self.gate.lock().unwrap();
        self.written.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn with_access_log(format: AccessLogFormat, output: Output, queue: usize) -> Arc<Telemetry> {
    let log = AccessLog::write_to(output, format, queue).unwrap();
    Telemetry::new(
        TelemetrySettings::default(),
        Status::new("node-1", Arc::default()),
        Logs { access: log, ..Logs::default() },
        Traces::off(),
    )
}

fn logged(format: AccessLogFormat) -> Vec<String> {
    let output = Output::default();
    let telemetry = with_access_log(format, output.clone(), 100);
    let upstream = Some(address("[fd00::2]:5432"));
    let open = telemetry.connection_opened(ConnectionFacts { upstream, ..facts("web -> db") });
    open.add_sent(10);
    open.add_received(20);
    open.close(CloseReason::UpstreamReset);
    let service = Some(ObjectRef::new("shop", "d\"b \u{9b}\n"));
    telemetry
        .connection_refused(ConnectionFacts { service, ..facts("? -> ?") }, RefuseReason::ConnectTimeout);
    assert!(telemetry.access_log.flush(Duration::from_secs(5)));
    String::from_utf8(output.written.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn json_lines_have_every_field() {
    let lines: Vec<BTreeMap<String, serde_json::Value>> =
        logged(AccessLogFormat::Json).iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [closed, refused] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!(closed.keys().collect::<Vec<_>>(), refused.keys().collect::<Vec<_>>());
    let time = closed["time"].as_str().unwrap();
    assert!(time.len() == "2026-01-01T00:00:00.000Z".len() && time.ends_with('Z'), "{time}");
    assert!(closed["duration_seconds"].as_f64().unwrap() < 60.0);
    let fixed: Vec<_> =
        closed.iter().filter(|(k, _)| !matches!(k.as_str(), "time" | "duration_seconds")).collect();
    expect![[r#"
        client_address="10.0.0.1:40000"
        destination_address="10.0.0.2:5432"
        destination_identity="spiffe://cluster.local/ns/shop/sa/db"
        destination_namespace="shop"
        destination_pod="db-0"
        destination_service="db"
        destination_service_namespace="shop"
        destination_workload="db"
        dialled_address="10.96.0.7:5432"
        outcome="closed"
        policy=null
        policy_audited=null
        policy_detail=null
        policy_dry_run=null
        policy_rule=null
        reason="upstream_reset"
        received_bytes=20
        reporter="source"
        security="same_node"
        sent_bytes=10
        source_address="10.0.0.1:40000"
        source_identity="spiffe://cluster.local/ns/shop/sa/web"
        source_namespace="shop"
        source_pod="web-0"
        source_workload="web"
        upstream_address="[fd00::2]:5432"
    "#]]
    .assert_eq(&fixed.iter().map(|(k, v)| format!("{k}={v}\n")).collect::<String>());
    assert_eq!(refused["source_workload"], serde_json::Value::Null);
    assert_eq!(refused["destination_service"], "d\"b \u{9b}\n");
    assert_eq!(refused["reason"], "connect_timeout");
}

#[test]
fn text_lines_leave_out_what_has_no_value_and_quote() {
    let lines = logged(AccessLogFormat::Text);
    let after_time = |line: &str| line.split_once(' ').unwrap().1.rsplit_once(' ').unwrap().0.to_owned();
    expect!["outcome=closed reason=upstream_reset reporter=source source_workload=web source_namespace=shop source_pod=web-0 source_identity=spiffe://cluster.local/ns/shop/sa/web source_address=10.0.0.1:40000 destination_workload=db destination_namespace=shop destination_pod=db-0 destination_identity=spiffe://cluster.local/ns/shop/sa/db destination_address=10.0.0.2:5432 destination_service=db destination_service_namespace=shop security=same_node dialled_address=10.96.0.7:5432 client_address=10.0.0.1:40000 upstream_address=[fd00::2]:5432 sent_bytes=10 received_bytes=20"]
    .assert_eq(&after_time(&lines[0]));
    assert!(lines[1].contains(r#" destination_service="d\"b \u009b\u000a" "#), "{}", lines[1]);
    assert!(!lines[1].contains("source_workload"), "{}", lines[1]);
}

#[test]
fn a_blocked_output_costs_lines_and_no_time() {
    let output = Output::default();
    let closed = output.gate.lock().unwrap();
    let telemetry = with_access_log(AccessLogFormat::Json, output.clone(), 10);
    let started = Instant::now();
    for _ in 0..1000 {
        drop(telemetry.connection_opened(facts("web -> db")));
    }
    assert!(!telemetry.access_log.flush(Duration::from_millis(10)), "the output is blocked");
    assert!(started.elapsed() < Duration::from_secs(5));
    let dropped = telemetry.access_log.dropped();
    // All but the queue's worth, and what the writer had taken out of it before it met the closed gate: up to a batch,
    // which is a hundred lines.
    assert!((850..1000).contains(&dropped), "{dropped}");
    drop(closed);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !telemetry.access_log.flush(Duration::from_secs(1)) {
        assert!(Instant::now() < deadline);
    }
    let lines = output.written.lock().unwrap().iter().filter(|b| **b == b'\n').count() as u64;
    assert_eq!(lines + telemetry.access_log.dropped(), 1000);
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let output = AccessLogOutput::File("/nonexistent/access.log".into());
    let error = AccessLog::start(&AccessLogSettings { output, ..Default::default() }).unwrap_err();
    assert!(error.to_string().starts_with("/nonexistent/access.log: "), "{error}");
}

fn logged_requests(format: AccessLogFormat) -> Vec<String> {
    let output = Output::default();
    let telemetry = with_access_log(format, output.clone(), 100);
    let full = HttpRequest {
        grpc_status: Some(4711),
        path: "/a \"b\"\u{9b}=\n".into(),
        backend: Some((ObjectRef::new("shop", "db-canary"), 5432)),
        detail: Some("shop/db-canary: no \"endpoints\"".into()),
        attempts: 2,
        request_bytes: 10,
        trace: Some(traced("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")),
        version: ::http::Version::HTTP_2,
        ..http::request("PURGE 200")
    };
    telemetry.request_finished(&[], full);
    let facts = Arc::new(facts("? -> ?"));
    let bare = HttpRequest {
        route: None,
        upstream: None,
        facts,
        end: RequestEnd::ClientGone,
        path: "é".repeat(2_000),
        ..http::request(&format!("{} -", "M".repeat(3_000)))
    };
    telemetry.request_finished(&[], bare);
    assert!(telemetry.access_log.flush(Duration::from_secs(5)));
    String::from_utf8(output.written.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_request_has_a_line_with_every_field() {
    let lines: Vec<BTreeMap<String, serde_json::Value>> = logged_requests(AccessLogFormat::Json)
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let [full, bare] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!(full.keys().collect::<Vec<_>>(), bare.keys().collect::<Vec<_>>());
    let of_connections = logged(AccessLogFormat::Json);
    let of_connections: BTreeMap<String, serde_json::Value> =
        serde_json::from_str(&of_connections[0]).unwrap();
    assert!(of_connections.keys().all(|field| full.contains_key(field)), "{full:?}");
    let own = full.iter().filter(|(field, _)| {
        let told_of_both = ["outcome", "reason", "sent_bytes", "received_bytes", "duration_seconds"];
        let own = !of_connections.contains_key(*field) && *field != "path";
        own || told_of_both.contains(&field.as_str())
    });
    expect![[r#"
        attempts=2
        authority="db.shop"
        backend="shop/db-canary:5432"
        detail="shop/db-canary: no \"endpoints\""
        duration_seconds=0.003
        grpc_status=4711
        method="PURGE"
        outcome="request"
        reason="done"
        received_bytes=1000
        route="HTTPRoute/shop/db"
        rule="0"
        sent_bytes=10
        status=200
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736"
        version="HTTP/2"
    "#]]
    .assert_eq(&own.map(|(k, v)| format!("{k}={v}\n")).collect::<String>());
    assert_eq!(full["path"], "/a \"b\"\u{9b}=\n");
    for absent in [
        "status",
        "grpc_status",
        "route",
        "rule",
        "backend",
        "detail",
        "trace_id",
        "upstream_address",
        "source_pod",
    ] {
        assert_eq!(bare[absent], serde_json::Value::Null, "{absent}");
    }
    assert_eq!(bare["path"], "é".repeat(1_024), "a path is cut between characters");
    assert_eq!(bare["method"], "M".repeat(2_048));
}

#[test]
fn a_line_of_text_is_one_line_whatever_the_client_sends() {
    let lines = logged_requests(AccessLogFormat::Text);
    assert_eq!(lines.len(), 2, "{lines:?}");
    let own = |line: &str| line.split_once(" sent_bytes=").unwrap().1.to_owned();
    expect![[r#"10 received_bytes=1000 duration_seconds=0.003000 method=PURGE authority=db.shop path="/a \"b\"\u009b=\u000a" version=HTTP/2 status=200 grpc_status=4711 route=HTTPRoute/shop/db rule=0 backend=shop/db-canary:5432 detail="shop/db-canary: no \"endpoints\"" attempts=2 trace_id=4bf92f3577b34da6a3ce929d0e0e4736"#]].assert_eq(&own(&lines[0]));
    assert!(own(&lines[1]).starts_with("0 received_bytes=1000 duration_seconds=0.003000 method=MMM"));
    assert!(!lines[1].contains(" status=") && !lines[1].contains(" route="), "{}", lines[1]);
}

#[test]
fn the_fields_of_both_kinds_of_lines_are_documented() {
    let page = include_str!("../../../../docs/metrics.md").split_once("\n## Access log\n").unwrap().1;
    let (of_all, of_requests) = page.split_once("\n### Requests\n").unwrap();
    let documented = |part: &str| -> Vec<String> {
        let rows = part.lines().filter(|line| line.starts_with("| `"));
        let names = rows.flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2));
        names.map(str::to_owned).collect()
    };
    let check = |line: &str, mut documented: Vec<String>| {
        let fields: BTreeMap<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        documented.sort_unstable();
        assert_eq!(fields.into_keys().collect::<Vec<_>>(), documented);
    };
    check(&logged(AccessLogFormat::Json)[0], documented(of_all));
    check(&logged_requests(AccessLogFormat::Json)[0], [documented(of_all), documented(of_requests)].concat());
}

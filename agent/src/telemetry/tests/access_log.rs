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
    Telemetry::new(TelemetrySettings::default(), Status::new("node-1", Arc::default()), log)
}

fn logged(format: AccessLogFormat) -> Vec<String> {
    let output = Output::default();
    let telemetry = with_access_log(format, output.clone(), 100);
    let open = telemetry.connection_opened(facts("web -> db"));
    open.set_upstream(address("[fd00::2]:5432"));
    open.add_sent(10);
    open.add_received(20);
    open.close(CloseReason::UpstreamReset);
    let service = Some(ObjectRef::new("shop", "d\"b \u{9b}\n"));
    telemetry
        .connection_refused(ConnectionFacts { service, ..facts("? -> ?") }, RefuseReason::ConnectTimeout);
    assert!(telemetry.access_log().flush(Duration::from_secs(5)));
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
    assert!(!telemetry.access_log().flush(Duration::from_millis(10)), "the output is blocked");
    assert!(started.elapsed() < Duration::from_secs(5));
    let dropped = telemetry.access_log().dropped();
    // The queue's worth, and what the writer had taken out of it before it met the closed gate.
    assert!((900..1000).contains(&dropped), "{dropped}");
    drop(closed);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !telemetry.access_log().flush(Duration::from_secs(1)) {
        assert!(Instant::now() < deadline);
    }
    let lines = output.written.lock().unwrap().iter().filter(|b| **b == b'\n').count() as u64;
    assert_eq!(lines + telemetry.access_log().dropped(), 1000);
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let output = AccessLogOutput::File("/nonexistent/access.log".into());
    let error = AccessLog::start(&AccessLogSettings { output, ..Default::default() }).unwrap_err();
    assert!(error.to_string().starts_with("access log /nonexistent/access.log: "), "{error}");
}

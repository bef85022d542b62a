//! Telemetry as its users have it: connections go in, pages come out.

mod access_log;
mod formats;
mod http;

use std::net::SocketAddr;
use std::sync::Barrier;

use expect_test::{Expect, expect};

use super::*;
use crate::model::{Enrolment, ObjectRef, Probers, Workload};

fn telemetry(settings: TelemetrySettings) -> Arc<Telemetry> {
    Telemetry::new(settings, Status::new("node-1", Arc::default()), Logs::default(), Traces::off())
}

/// Of a request that comes with this `traceparent`.
fn traced(traceparent: &'static str) -> RequestTrace {
    let mut headers = ::http::HeaderMap::new();
    headers.insert("traceparent", ::http::HeaderValue::from_static(traceparent));
    Traces::off().place(&headers, true).unwrap()
}

fn workload(namespace: &str, name: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("{namespace}/{name}").into(),
        pod: ObjectRef::new(namespace, format!("{name}-0")),
        workload: name.into(),
        ..Workload::example()
    })
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// `"web -> db"`; `?` is a peer that is no known pod.
fn facts(call: &str) -> ConnectionFacts {
    let (source, destination) = call.split_once(" -> ").unwrap();
    let peer = |name: &str, at: &str| Peer {
        workload: (name != "?").then(|| workload("shop", name)),
        identity: (name != "?").then(|| format!("spiffe://cluster.local/ns/shop/sa/{name}").into()),
        address: address(at),
    };
    ConnectionFacts {
        reporter: Reporter::Source,
        source: peer(source, "10.0.0.1:40000"),
        destination: peer(destination, "10.0.0.2:5432"),
        service: (destination != "?").then(|| ObjectRef::new("shop", destination)),
        security: Security::SameNode,
        dialled: address("10.96.0.7:5432"),
        client: address("10.0.0.1:40000"),
        upstream: None,
        ruling: None,
    }
}

fn snapshot(workloads: &[&str]) -> Snapshot {
    let workloads = workloads.iter().map(|name| workload("shop", name)).map(|w| (w.uid.clone(), w));
    Snapshot { workloads: workloads.collect(), ..Snapshot::default() }
}

/// The samples of the connection metrics, the constant labels left out.
fn samples(telemetry: &Telemetry) -> String {
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let constant = [
        "reporter=\"source\",",
        ",source_namespace=\"shop\"",
        ",destination_namespace=\"shop\"",
        ",destination_service_namespace=\"shop\"",
        ",security=\"same_node\"",
    ];
    // One service account each.
    let identity =
        |side: &str, of: &str| format!(",{side}_identity=\"spiffe://cluster.local/ns/shop/sa/{of}\"");
    let constant: Vec<String> = (constant.into_iter().map(str::to_owned))
        .chain(["web", "api", "a", "b"].map(|of| identity("source", of)))
        .chain(["db"].map(|of| identity("destination", of)))
        .collect();
    page.lines()
        .filter(|line| line.starts_with("undermesh_tcp") && !line.contains("_seconds"))
        .map(|line| {
            constant.iter().fold(line.to_owned(), |line, gone| line.replace(gone.as_str(), "")) + "\n"
        })
        .collect()
}

fn check(telemetry: &Telemetry, expect: Expect) {
    expect.assert_eq(&samples(telemetry));
}

#[test]
fn bytes_of_an_open_connection_show_at_the_scrape_and_are_counted_once() {
    let telemetry = telemetry(TelemetrySettings::default());
    let open = telemetry.connection_opened(facts("web -> db"));
    open.add_sent(5);
    open.add_received(1);
    check(
        &telemetry,
        expect![[r#"
            undermesh_tcp_connections_opened_total{source_workload="web",destination_workload="db",destination_service="db"} 1
            undermesh_tcp_connections_active{source_workload="web",destination_workload="db",destination_service="db"} 1
            undermesh_tcp_sent_bytes_total{source_workload="web",destination_workload="db",destination_service="db"} 5
            undermesh_tcp_received_bytes_total{source_workload="web",destination_workload="db",destination_service="db"} 1
        "#]],
    );
    open.add_sent(7);
    open.close(CloseReason::Done);
    check(
        &telemetry,
        expect![[r#"
            undermesh_tcp_connections_opened_total{source_workload="web",destination_workload="db",destination_service="db"} 1
            undermesh_tcp_connections_closed_total{source_workload="web",destination_workload="db",destination_service="db",reason="done"} 1
            undermesh_tcp_connections_active{source_workload="web",destination_workload="db",destination_service="db"} 0
            undermesh_tcp_sent_bytes_total{source_workload="web",destination_workload="db",destination_service="db"} 12
            undermesh_tcp_received_bytes_total{source_workload="web",destination_workload="db",destination_service="db"} 1
        "#]],
    );
}

#[test]
fn a_refused_connection_and_an_unknown_peer() {
    let telemetry = telemetry(TelemetrySettings::default());
    telemetry.connection_refused(facts("web -> ?"), RefuseReason::NoEndpoints);
    check(
        &telemetry,
        expect![[r#"
            undermesh_tcp_connections_refused_total{source_workload="web",destination_workload="unknown",destination_namespace="unknown",destination_service="unknown",destination_service_namespace="unknown",destination_identity="unknown",reason="no_endpoints"} 1
        "#]],
    );
}

#[test]
fn dropped_without_a_word_is_cancelled() {
    let telemetry = telemetry(TelemetrySettings::default());
    drop(telemetry.connection_opened(facts("web -> db")));
    assert!(samples(&telemetry).contains(r#"reason="cancelled"} 1"#));
    assert!(telemetry.connections().is_empty());
}

#[test]
fn label_sets_beyond_the_maximum_are_folded_and_counted() {
    let telemetry = telemetry(TelemetrySettings { max_label_sets: 2, ..TelemetrySettings::default() });
    for call in ["a -> db", "b -> db", "c -> db", "d -> db", "a -> db"] {
        telemetry.connection_opened(facts(call)).close(CloseReason::Done);
    }
    let page = samples(&telemetry);
    let opened: Vec<_> = page.lines().filter(|l| l.contains("opened_total")).collect();
    assert_eq!(opened.len(), 3, "{page}");
    assert!(opened.iter().any(|l| l.contains(r#"source_workload="other""#) && l.ends_with(" 2")), "{page}");
    assert!(opened.iter().any(|l| l.contains(r#"source_workload="a""#) && l.ends_with(" 2")), "{page}");
    let all = telemetry.scrape(MetricsFormat::PrometheusText);
    assert!(all.contains("\nundermesh_metrics_series_overflow_total 2\n"), "{all}");
}

#[test]
fn series_of_what_is_gone_go_after_the_grace_and_make_room() {
    let grace = Duration::from_secs(300);
    let telemetry = telemetry(TelemetrySettings {
        max_label_sets: 1,
        series_grace: grace,
        ..TelemetrySettings::default()
    });
    // The dialled Service is none that the snapshots below would have to have.
    let call = |call| ConnectionFacts { service: None, ..facts(call) };
    let opened = |name: &str| samples(&telemetry).contains(&format!("source_workload=\"{name}\""));
    let (both, db) = (snapshot(&["web", "db"]), snapshot(&["db"]));
    let start = Instant::now();

    let open = telemetry.connection_opened(call("web -> db"));
    telemetry.retain(&both, start);
    telemetry.retain(&db, start + grace);
    telemetry.retain(&db, start + grace * 3);
    assert!(opened("web"), "a series with an open connection stays");

    open.close(CloseReason::Done);
    telemetry.retain(&db, start + grace * 4);
    assert!(opened("web"), "the grace has only begun");
    telemetry.retain(&both, start + grace * 9 / 2);
    telemetry.retain(&db, start + grace * 5);
    assert!(opened("web"), "its return has ended the grace");
    telemetry.retain(&db, start + grace * 6);
    assert!(!opened("web"), "the grace is over");
    assert!(!telemetry.scrape(MetricsFormat::OpenMetrics).contains("duration_seconds_count"));

    drop(telemetry.connection_opened(call("api -> db")));
    assert!(opened("api"), "the place has been given back");
}

#[test]
fn threads_that_open_and_close_at_once_lose_nothing() {
    const THREADS: u64 = 8;
    const EACH: u64 = 500;
    let telemetry = telemetry(TelemetrySettings::default());
    let barrier = Barrier::new(THREADS as usize + 1);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (telemetry, barrier) = (&telemetry, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut open = Vec::new();
                for i in 0..EACH {
                    let connection = telemetry.connection_opened(facts("web -> db"));
                    connection.add_sent(3);
                    if (i + thread) % 2 == 0 {
                        connection.close(CloseReason::Done)
                    } else {
                        open.push(connection)
                    }
                }
                open.into_iter().for_each(|connection| connection.close(CloseReason::ClientReset));
            });
        }
        barrier.wait();
        for _ in 0..20 {
            telemetry.scrape(MetricsFormat::OpenMetrics);
            telemetry.retain(&Snapshot::default(), Instant::now() + Duration::from_secs(1_000_000));
        }
    });
    assert!(telemetry.connections().is_empty());
    // The empty snapshot may have retired the series while nothing was open, so only what is consistent is asserted.
    let page = samples(&telemetry);
    let value = |name: &str| -> u64 {
        page.lines()
            .filter(|l| l.starts_with(name))
            .map(|l| l.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    };
    assert_eq!(value("undermesh_tcp_connections_active"), 0);
    assert_eq!(
        value("undermesh_tcp_connections_opened_total"),
        value("undermesh_tcp_connections_closed_total")
    );
    assert_eq!(value("undermesh_tcp_sent_bytes_total"), 3 * value("undermesh_tcp_connections_opened_total"));
}

#[test]
fn agent_metrics_follow_the_status_and_the_kernel() {
    let status = Status::new("node-1", Arc::default());
    let mut world = snapshot(&["web", "db", "new"]);
    let mut host = (*workload("shop", "host")).clone();
    host.enrolment = Enrolment::Impossible("it uses the host's network".into());
    world.workloads.insert(host.uid.clone(), Arc::new(host));
    world.generation = 7;
    status.snapshot.store(Arc::new(world));
    let report = |name: &str, state| {
        status.set_pod(format!("shop/{name}").into(), PodReport { pod: ObjectRef::new("shop", name), state });
    };
    assert_eq!(status.missing().len(), 3);
    report("web", PodState::Enrolled { since: std::time::SystemTime::now() });
    report("db", PodState::NotEnrolled { reason: NotEnrolledReason::AttachFailed, detail: "no BTF".into() });
    report("new", PodState::Pending);
    let being_enrolled = "pod shop/new-0 is being enrolled";
    assert_eq!(status.missing(), [being_enrolled]);
    let (node, nobody) = (Probers::Node("no kubelet".into()), Probers::Nobody("no kubelet".into()));
    for (probers, missing, warnings) in [
        (Probers::Kubelet, None, None),
        (nobody.clone(), nobody.trouble(), None),
        (node.clone(), None, node.trouble()),
    ] {
        status.set_probers(probers);
        let all: Vec<_> = [being_enrolled.to_owned()].into_iter().chain(missing).collect();
        assert_eq!((status.missing(), status.warnings()), (all, Vec::from_iter(warnings)));
    }
    status.set_rejections(vec![Rejection {
        origin: "web.yaml".into(),
        line: Some(3),
        object: Some("Service shop/web".into()),
        field: Some("spec.ports[0].port".into()),
        message: "70000 is no port: expected 1 to 65535".into(),
    }]);
    assert_eq!(
        status.rejections()[0].to_string(),
        "web.yaml:3: Service shop/web: spec.ports[0].port: 70000 is no port: expected 1 to 65535"
    );

    let telemetry = Telemetry::new(TelemetrySettings::default(), status, Logs::default(), Traces::off());
    telemetry.on_scrape(|telemetry| {
        let pod = ObjectRef::new("shop", "web-0");
        telemetry.set_kernel_counters(KernelCounters {
            bypassed: vec![("agent_down", 4)],
            refused: vec![("plaintext", 2)],
            pods: vec![PodTcp {
                pod,
                retransmits: 1,
                timeouts: 2,
                connected: 3,
                accepted: 4,
                before_enrolment: 5,
            }],
        });
    });
    telemetry.watch_failed("pods");
    telemetry.watch_failed("pods");
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let agent: String =
        page.lines().filter(|l| l.starts_with("undermesh_")).flat_map(|l| [l, "\n"]).collect();
    expect![[r#"
        undermesh_tunnels_open{reporter="source"} 0
        undermesh_tunnels_open{reporter="destination"} 0
        undermesh_tunnel_streams_open{reporter="source"} 0
        undermesh_tunnel_streams_open{reporter="destination"} 0
        undermesh_tunnel_bypasses_total 0
        undermesh_pods_enrolled 1
        undermesh_pods_not_enrolled{reason="attach_failed"} 1
        undermesh_pods_not_enrolled{reason="impossible"} 1
        undermesh_pods_not_enrolled{reason="pending"} 1
        undermesh_bypassed_connections_total{reason="agent_down"} 4
        undermesh_kernel_refused_connections_total{reason="plaintext"} 2
        undermesh_probe_callers{who="kubelet"} 0
        undermesh_probe_callers{who="node"} 1
        undermesh_probe_callers{who="nobody"} 0
        undermesh_pod_tcp_retransmits_total{pod_name="web-0",pod_namespace="shop"} 1
        undermesh_pod_tcp_timeouts_total{pod_name="web-0",pod_namespace="shop"} 2
        undermesh_pod_tcp_connected_total{pod_name="web-0",pod_namespace="shop"} 3
        undermesh_pod_tcp_accepted_total{pod_name="web-0",pod_namespace="shop"} 4
        undermesh_pod_connections_before_enrolment{pod_name="web-0",pod_namespace="shop"} 5
        undermesh_clock_skew_seconds 0.0
        undermesh_build_info{version="0.1.0"} 1
        undermesh_config_generation 7
        undermesh_config_rejected_documents 1
        undermesh_kubernetes_watch_failures_total{resource="pods"} 2
        undermesh_mtls_downgrades_total 0
        undermesh_metrics_series_overflow_total 0
        undermesh_access_log_dropped_total 0
        undermesh_audit_log_dropped_total 0
        undermesh_trace_spans_exported_total 0
        undermesh_trace_spans_dropped_total{reason="queue_full"} 0
        undermesh_trace_spans_dropped_total{reason="unavailable"} 0
        undermesh_trace_spans_dropped_total{reason="rejected"} 0
    "#]]
    .assert_eq(&agent);
}

/// Strangers: callers whom the snapshot does not know, with a certificate all the same.
#[test]
fn identities_are_labels_that_go_with_their_workloads() {
    let grace = Duration::from_secs(300);
    let telemetry = telemetry(TelemetrySettings {
        max_label_sets: 2,
        series_grace: grace,
        ..TelemetrySettings::default()
    });
    let stranger = |name: &str| {
        let mut facts = ConnectionFacts { service: None, security: Security::MutualTls, ..facts("? -> db") };
        facts.source.identity = Some(format!("spiffe://elsewhere.test/ns/a/sa/{name}").into());
        facts
    };
    let sources = || -> String {
        let page = telemetry.scrape(MetricsFormat::PrometheusText);
        let opened = page.lines().filter(|line| line.starts_with("undermesh_tcp_connections_opened_total"));
        let label = |line: &str| {
            line.split("source_identity=\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
        };
        let mut labels: Vec<_> = opened.map(label).collect();
        labels.sort_unstable();
        labels.join(" ")
    };
    for name in ["a", "b", "c", "a"] {
        drop(telemetry.connection_opened(stranger(name)));
    }
    assert_eq!(sources(), "other spiffe://elsewhere.test/ns/a/sa/a spiffe://elsewhere.test/ns/a/sa/b");
    let start = Instant::now();
    telemetry.retain(&snapshot(&["db"]), start);
    telemetry.retain(&snapshot(&["db"]), start + grace);
    assert_eq!(sources(), "other", "the last connection is long over");

    let plain = ConnectionFacts { service: None, security: Security::Plaintext, ..facts("? -> db") };
    drop(telemetry.connection_opened(plain));
    telemetry.retain(&snapshot(&["db"]), start + grace * 2);
    telemetry.retain(&snapshot(&["db"]), start + grace * 3);
    assert_eq!(sources(), "other unknown", "plaintext callers are always somebody");
}

#[test]
fn tunnels_are_counted() {
    let telemetry = telemetry(TelemetrySettings::default());
    let tunnels = telemetry.tunnels();
    tunnels.handshake_succeeded(Reporter::Source);
    tunnels.handshake_failed(Reporter::Destination, "expired");
    tunnels.handshake_failed(Reporter::Destination, "expired");
    tunnels.request_refused(400, "bad_request");
    tunnels.request_refused(503, "connect_refused");
    let (one, other) = (tunnels.opened(Reporter::Source), tunnels.opened(Reporter::Destination));
    one.stream_opened();
    one.stream_opened();
    one.stream_closed();
    other.ends(TunnelEnd::Idle);
    other.ends(TunnelEnd::Closed);
    drop(other);
    drop(tunnels.opened(Reporter::Destination));
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let counted =
        page.lines().filter(|l| l.starts_with("undermesh_tunnel") || l.starts_with("undermesh_tls"));
    expect![[r#"
        undermesh_tls_handshakes_total{reporter="source",result="success",reason="none"} 1
        undermesh_tls_handshakes_total{reporter="destination",result="failure",reason="expired"} 2
        undermesh_tunnel_requests_refused_total{status="400",reason="bad_request"} 1
        undermesh_tunnel_requests_refused_total{status="503",reason="connect_refused"} 1
        undermesh_tunnels_open{reporter="source"} 1
        undermesh_tunnels_open{reporter="destination"} 0
        undermesh_tunnel_streams_open{reporter="source"} 1
        undermesh_tunnel_streams_open{reporter="destination"} 0
        undermesh_tunnels_closed_total{reporter="destination",reason="idle"} 1
        undermesh_tunnels_closed_total{reporter="destination",reason="cancelled"} 1
        undermesh_tunnel_bypasses_total 0
    "#]]
    .assert_eq(&counted.flat_map(|line| [line, "\n"]).collect::<String>());
}

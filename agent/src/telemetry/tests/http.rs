//! Requests go in, samples come out.

use super::*;
use crate::model::Name;

/// `"GET 200"`, under the first rule of a route to the database.
pub(super) fn request(what: &str) -> HttpRequest {
    let (method, status) = what.split_once(' ').unwrap();
    HttpRequest {
        route: Some(route("db", "0")),
        backend: None,
        method: method.parse().unwrap(),
        status: status.parse().ok(),
        grpc_status: None,
        version: ::http::Version::HTTP_11,
        authority: "db.shop".into(),
        path: "/orders".into(),
        end: RequestEnd::Done,
        detail: None,
        attempts: 1,
        duration: Duration::from_millis(3),
        request_bytes: 0,
        response_bytes: 1000,
        facts: Arc::new(facts("web -> db")),
        upstream: Some(address("10.0.0.2:5432")),
        ruling: None,
        trace: None,
    }
}

pub(super) fn route(name: &str, rule: &str) -> RouteLabel {
    RouteLabel { kind: "HTTPRoute", id: ObjectRef::new("shop", name), rule: rule.into() }
}

/// The samples of the metrics of requests, the labels of connections left out but for the source's workload.
fn samples(telemetry: &Telemetry) -> String {
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let lines = page.lines().filter(|line| line.starts_with("undermesh_http")).map(|line| {
        let (name, rest) = line.split_once('{').unwrap();
        let (labels, value) = rest.rsplit_once("} ").unwrap();
        let told = |label: &&str| {
            let name = label.split('=').next().unwrap();
            let of_connections = name.starts_with("destination_") || name.starts_with("source_");
            name == "source_workload" || !of_connections && !matches!(name, "reporter" | "security")
        };
        let labels: Vec<_> = labels.split(',').filter(told).collect();
        format!("{name}{{{}}} {value}\n", labels.join(","))
    });
    lines.collect()
}

fn counted(telemetry: &Telemetry) -> String {
    samples(telemetry).lines().filter(|l| l.contains("requests_total")).flat_map(|l| [l, "\n"]).collect()
}

fn sum(counted: &str) -> u64 {
    counted.lines().map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn requests_are_counted_by_what_they_were() {
    let telemetry = telemetry(TelemetrySettings::default());
    let counters = telemetry.http_counters(&facts("web -> db"));
    assert_eq!(samples(&telemetry), "");
    for what in ["GET 200", "GET 200", "POST 503", "PURGE 200"] {
        telemetry.request_finished(std::slice::from_ref(&counters), request(what));
    }
    let grpc = |status| HttpRequest {
        grpc_status: Some(status),
        route: Some(RouteLabel { kind: "GRPCRoute", ..route("db", "by-name") }),
        ..request("POST 200")
    };
    for status in [0, 16, 17, 4711] {
        telemetry.request_finished(std::slice::from_ref(&counters), grpc(status));
    }
    let gone = HttpRequest { route: None, end: RequestEnd::ClientGone, ..request("GET -") };
    telemetry.request_finished(&[counters], gone);
    expect![[r#"
        undermesh_http_requests_total{source_workload="web",method="GET",response_code="none",grpc_status="",route_kind="none",route_name="none",route_namespace="none",route_rule="none",reason="client_gone"} 1
        undermesh_http_requests_total{source_workload="web",method="POST",response_code="200",grpc_status="0",route_kind="GRPCRoute",route_name="db",route_namespace="shop",route_rule="by-name",reason="done"} 1
        undermesh_http_requests_total{source_workload="web",method="POST",response_code="200",grpc_status="16",route_kind="GRPCRoute",route_name="db",route_namespace="shop",route_rule="by-name",reason="done"} 1
        undermesh_http_requests_total{source_workload="web",method="POST",response_code="200",grpc_status="other",route_kind="GRPCRoute",route_name="db",route_namespace="shop",route_rule="by-name",reason="done"} 2
        undermesh_http_requests_total{source_workload="web",method="GET",response_code="200",grpc_status="",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0",reason="done"} 2
        undermesh_http_requests_total{source_workload="web",method="POST",response_code="503",grpc_status="",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0",reason="done"} 1
        undermesh_http_requests_total{source_workload="web",method="other",response_code="200",grpc_status="",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0",reason="done"} 1
    "#]]
    .assert_eq(&counted(&telemetry));
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    assert!(!page.contains("\nundermesh_tcp"), "no connection has been told of: {page}");
    assert!(page.contains("\nundermesh_metrics_series_overflow_total 0\n"), "{page}");
}

#[test]
fn histograms_are_kept_for_the_destination() {
    let telemetry = telemetry(TelemetrySettings::default());
    let both = ["web -> db", "api -> db"].map(|call| telemetry.http_counters(&facts(call)));
    telemetry.request_finished(&both, request("GET 200"));
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let of_some = ["_count{", "_sum{", "le=\"0.002\"", "le=\"0.004\"", "le=\"256.0\"", "le=\"1024.0\""];
    let told = page.lines().filter(|line| {
        let is_histogram = line.contains("_duration_seconds") || line.contains("_bytes");
        line.starts_with("undermesh_http") && is_histogram && of_some.iter().any(|part| line.contains(part))
    });
    expect![[r#"
        undermesh_http_request_duration_seconds_sum{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node",destination_service="db",destination_service_namespace="shop",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0"} 0.006
        undermesh_http_request_duration_seconds_count{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node",destination_service="db",destination_service_namespace="shop",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0"} 2
        undermesh_http_request_duration_seconds_bucket{le="0.002",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node",destination_service="db",destination_service_namespace="shop",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0"} 0
        undermesh_http_request_duration_seconds_bucket{le="0.004",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node",destination_service="db",destination_service_namespace="shop",route_kind="HTTPRoute",route_name="db",route_namespace="shop",route_rule="0"} 2
        undermesh_http_request_bytes_sum{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 0.0
        undermesh_http_request_bytes_count{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2
        undermesh_http_request_bytes_bucket{le="256.0",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2
        undermesh_http_request_bytes_bucket{le="1024.0",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2
        undermesh_http_response_bytes_sum{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2000.0
        undermesh_http_response_bytes_count{reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2
        undermesh_http_response_bytes_bucket{le="256.0",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 0
        undermesh_http_response_bytes_bucket{le="1024.0",reporter="source",destination_workload="db",destination_namespace="shop",security="same_node"} 2
    "#]].assert_eq(&told.flat_map(|line| [line, "\n"]).collect::<String>());
}

#[test]
fn requests_are_active_until_they_are_dropped() {
    let telemetry = telemetry(TelemetrySettings::default());
    let counters = telemetry.http_counters(&facts("web -> db"));
    let (one, other) = (counters.enter(), counters.enter());
    let active = |value| format!("undermesh_http_requests_active{{source_workload=\"web\"}} {value}\n");
    assert_eq!(samples(&telemetry), active(2));
    drop(one);
    telemetry.request_finished(&[counters], request("GET 200"));
    drop(other);
    assert!(samples(&telemetry).contains(&active(0)));
}

#[test]
fn what_is_beyond_the_maximum_is_folded_and_counted_and_places_come_back() {
    let grace = Duration::from_secs(300);
    let settings =
        TelemetrySettings { max_request_sets: 15, series_grace: grace, ..TelemetrySettings::default() };
    let telemetry = telemetry(settings);
    let call = |call: &str| ConnectionFacts { service: None, ..facts(call) };
    // A tenth of the places each, rounded up: two.
    let finish = |source: &str| {
        let counters = [telemetry.http_counters(&call(&format!("{source} -> db")))];
        for what in ["GET 200", "GET 404", "GET 500", "GET 501", "GET 404"] {
            telemetry.request_finished(&counters, request(what));
        }
    };
    finish("web");
    let others = r#"method="other",response_code="other",grpc_status="other",route_kind="other",route_name="other",route_namespace="other",route_rule="other",reason="other"} 2"#;
    let page = counted(&telemetry);
    assert_eq!(page.lines().count(), 3, "{page}");
    assert!(page.contains(r#"response_code="404""#) && page.contains(others), "{page}");
    let overflow = || {
        let page = telemetry.scrape(MetricsFormat::PrometheusText);
        let line = page.lines().find(|l| l.starts_with("undermesh_metrics_series_overflow_total ")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(overflow(), 2);

    // Seven times two, one for the eighth and none for the ninth.
    let sources = ["a", "b", "c", "d", "e", "f", "g", "h"];
    sources.into_iter().for_each(finish);
    let page = counted(&telemetry);
    assert_eq!(page.lines().filter(|l| !l.contains(r#"method="other""#)).count(), 15, "{page}");
    assert_eq!(sum(&page), 9 * 5);

    let start = Instant::now();
    telemetry.retain(&snapshot(&["db", "h"]), start);
    telemetry.retain(&snapshot(&["db", "h"]), start + grace);
    let page = counted(&telemetry);
    assert!(!page.contains("source_workload=\"a\"") && sum(&page) == 5, "{page}");
    sources[..6].iter().for_each(|source| finish(source));
    let page = counted(&telemetry);
    assert_eq!(page.lines().filter(|l| !l.contains(r#"method="other""#)).count(), 12, "{page}");
}

#[test]
fn an_upstream_connection_keeps_its_series() {
    let grace = Duration::from_secs(300);
    let telemetry = telemetry(TelemetrySettings { series_grace: grace, ..TelemetrySettings::default() });
    let kept = telemetry.http_counters(&facts("web -> db"));
    telemetry.request_finished(std::slice::from_ref(&kept), request("GET 200"));
    let start = Instant::now();
    for round in 0..3 {
        telemetry.retain(&Snapshot::default(), start + grace * round);
    }
    assert_eq!(sum(&counted(&telemetry)), 1);
    drop(kept);
    for round in 3..5 {
        telemetry.retain(&Snapshot::default(), start + grace * round);
    }
    assert_eq!(samples(&telemetry), "");
}

#[test]
fn threads_that_count_at_once_make_one_sample_of_a_kind_and_lose_nothing() {
    const THREADS: u64 = 8;
    let telemetry = telemetry(TelemetrySettings::default());
    let barrier = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let counters = [telemetry.http_counters(&facts("web -> db"))];
                barrier.wait();
                for status in 200..600 {
                    let status = Some(status);
                    telemetry.request_finished(&counters, HttpRequest { status, ..request("GET 200") });
                }
            });
        }
    });
    let page = counted(&telemetry);
    assert_eq!(page.lines().count(), 400, "{page}");
    assert!(page.lines().all(|line| line.ends_with(&format!("}} {THREADS}"))), "{page}");
    assert!(telemetry.scrape(MetricsFormat::OpenMetrics).contains("series_overflow_total 0"));
}

/// What a request costs the worker that carries it. By hand, built with `--release`:
/// `cargo test --release -p undermesh --lib telemetry::tests::http::cost -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn cost() {
    const EACH: u32 = 1_000_000;
    let telemetry = telemetry(TelemetrySettings::default());
    let both = [Reporter::Source, Reporter::Destination]
        .map(|reporter| telemetry.http_counters(&ConnectionFacts { reporter, ..facts("web -> db") }));
    // As many kinds as a busy pair of workloads has.
    let requests: Vec<HttpRequest> = ["GET 200", "POST 201", "GET 404", "GET 503"]
        .into_iter()
        .flat_map(|what| (0..8).map(move |i| (what, Name::from(i.to_string()))))
        .map(|(what, rule)| HttpRequest { route: Some(route("db", &rule)), ..request(what) })
        .collect();
    let measure = |threads: u32, counters: &[HttpCounters]| {
        let barrier = Barrier::new(threads as usize);
        let times = std::thread::scope(|scope| {
            let threads = (0..threads).map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let mut spent = [Duration::ZERO; 2];
                    for (turn, counters) in [(0, &[][..]), (1, counters)] {
                        let start = Instant::now();
                        for i in 0..EACH {
                            let _active = counters.first().map(HttpCounters::enter);
                            // The clone stands for what the proxy has made anyway, and is taken off below.
                            telemetry
                                .request_finished(counters, requests[i as usize % requests.len()].clone());
                        }
                        spent[turn] = start.elapsed();
                    }
                    (spent[1].saturating_sub(spent[0])) / EACH
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        println!("{threads} threads, {} reporters: {times:?} a request", counters.len());
    };
    for threads in [1, 2, 8] {
        measure(threads, &both[..1]);
        measure(threads, &both);
    }
}

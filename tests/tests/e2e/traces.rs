//! Traces through the mesh: requests keep theirs, and collectors get the spans of both sides, joined.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests};

/// Where each node's collector listens, for the agent alone.
const COLLECTOR: &str = "127.0.0.1:4317";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const EXPORTED: &str = "undermesh_trace_spans_exported_total";
const DROPPED: &str = "undermesh_trace_spans_dropped_total";

/// A client, the Service `near` with a server on its node, and `far` with one on the other; and a collector on each.
struct Stage {
    mesh: Mesh,
    client: Pod,
    collectors: Vec<Process>,
    _running: Vec<Process>,
}

impl Stage {
    fn set(name: &str, agent_args: &[&str], with_collectors: bool) -> Result<Self> {
        Self::set_with(name, agent_args, with_collectors, &[])
    }

    /// With manifests that are there from the first request on.
    fn set_with(
        name: &str,
        agent_args: &[&str],
        with_collectors: bool,
        manifests: &[Manifest],
    ) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, agent_args)?;
        manifests.iter().try_for_each(|manifest| mesh.lab.apply(manifest))?;
        let client = mesh.pod(0, "client")?;
        let mut running = Vec::new();
        for (node, name) in ["near", "far"].into_iter().enumerate() {
            let server = mesh.add(node, PodSpec::new(SHOP, name).label("app", name))?;
            let port = json!([{ "name": "http", "port": 80, "targetPort": 8080 }]);
            let service = Manifest::service(SHOP, name, &[address(name)], &[], &[("app", name)]);
            mesh.lab.apply(&service.with("spec.ports", port))?;
            running.push(serve_requests(&server)?);
        }
        let collect = |node: &undermesh_tests::lab::Node| {
            let mut collector = Command::new(binary("collector")?);
            collector.args(["--address", COLLECTOR]);
            node.spawn(collector)
        };
        let nodes = mesh.nodes.iter().filter(|_| with_collectors);
        let collectors = nodes.map(collect).collect::<Result<Vec<_>>>()?;
        mesh.ready()?;
        let stage = Self { mesh, client, collectors, _running: running };
        eventually(SOON, "the Services are served", || {
            stage.ask("near", "/", &[])?.answered(200)?;
            stage.ask("far", "/", &[])?.answered(200).map(drop)
        })?;
        Ok(stage)
    }

    fn ask(&self, service: &str, path: &str, args: &[&str]) -> Result<Asked> {
        ask(&self.client, &format!("http://{}{path}", SocketAddr::new(address(service), 80)), args)
    }

    /// The headers of a trace that the server saw.
    fn seen(&self, service: &str, path: &str, args: &[&str]) -> Result<[Value; 2]> {
        let saw = self.ask(service, path, args)?.answered(200)?["saw"].clone();
        Ok(["traceparent", "tracestate"].map(|name| saw["headers"][name].clone()))
    }

    /// The spans that the collectors of both nodes have got of requests to this path.
    fn spans(&self, path: &str) -> Vec<[Value; 2]> {
        let of_node = |(node, collector): (usize, &Process)| {
            let output = collector.output();
            let spans = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let asked = spans.filter(|span| span["attributes"]["url.path"] == path);
            asked.map(|span| [json!(node), span]).collect::<Vec<_>>()
        };
        self.collectors.iter().enumerate().flat_map(of_node).collect()
    }

    /// Waits until there are exactly so many.
    fn wait_spans(&self, path: &str, count: usize) -> Result<Vec<Value>> {
        eventually(SOON, &format!("{count} spans of {path}"), || {
            let spans = self.spans(path);
            ensure!(spans.len() == count, "{spans:#?}");
            Ok(spans.into_iter().map(|[_, span]| span).collect())
        })
    }
}

fn address(service: &str) -> IpAddr {
    IpAddr::from([10, 96, 0, if service == "near" { 70 } else { 71 }])
}

fn traceparent(flags: &str) -> String {
    format!("traceparent: 00-{TRACE}-{CALLER}-{flags}")
}

/// What is asked by whoever has tracing on.
fn tracing(sampling: &str) -> Vec<&str> {
    vec!["--trace-endpoint", "http://127.0.0.1:4317", "--trace-sampling", sampling]
}

#[test]
fn a_trace_goes_through_the_agents_of_both_nodes() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    // The server's side looks at requests where there is a limit, however high.
    let limit = json!({
        "targetRefs": [{ "group": "", "kind": "Service", "name": "far" }],
        "rateLimits": [{ "requests": 100_000, "per": "1s" }],
    });
    let policy = Manifest::new("undermesh.io/v1alpha1", "TrafficPolicy", Some(SHOP), "far");
    let stage = Stage::set_with("um-e2e-traces", &tracing("1"), true, &[policy.with("spec", limit)])?;
    let sampled = traceparent("01");
    let joins = ["--header", &sampled, "--header", "tracestate: a=1,b=2"];

    for (version, args) in [("1.1", &[][..]), ("2", &["--http2"])] {
        let path = format!("/both/{version}");
        let [parent, state] = stage.seen("far", &path, &[&joins, args].concat())?;
        let spans = stage.wait_spans(&path, 2)?;
        let kind = |kind: &str| {
            let found = spans.iter().find(|span| span["kind"] == kind);
            found.with_context(|| format!("no {kind} among {spans:#?}"))
        };
        let (client, server) = (kind("SPAN_KIND_CLIENT")?, kind("SPAN_KIND_SERVER")?);
        ensure!(client["trace"] == TRACE && client["parent"] == CALLER, "{client:#}");
        ensure!(server["trace"] == TRACE && server["parent"] == client["id"], "{server:#}\n{client:#}");
        let told = format!("00-{TRACE}-{}-01", server["id"].as_str().unwrap_or_default());
        ensure!(parent == json!([told]) && state == json!(["a=1,b=2"]), "{parent} {state} {server:#}");
        ensure!(client["state"] == "a=1,b=2" && client["protocol"] == "grpc", "{client:#}");
        for (span, node) in [(client, "node1"), (server, "node2")] {
            ensure!(span["resource"]["service.name"] == "undermesh", "{span:#}");
            ensure!(span["resource"]["k8s.node.name"] == node, "{span:#}");
            ensure!(span["name"] == "GET" && span["failed"] == false, "{span:#}");
            let attributes = &span["attributes"];
            let expected = [
                ("http.request.method", json!("GET")),
                ("http.response.status_code", json!(200)),
                ("network.protocol.version", json!(version)),
                ("undermesh.security", json!("mutual_tls")),
                ("undermesh.source.workload", json!("client")),
                ("undermesh.source.identity", json!("spiffe://cluster.local/ns/shop/sa/default")),
                ("undermesh.destination.workload", json!("far")),
                ("undermesh.destination.namespace", json!(SHOP)),
                ("undermesh.attempts", json!(1)),
                ("undermesh.reason", json!("done")),
            ];
            for (name, value) in expected {
                ensure!(attributes[name] == value, "{name}: {attributes:#}");
            }
        }
        // The client's span is around the server's.
        ensure!(client["took_ns"].as_u64() >= server["took_ns"].as_u64(), "{client:#}\n{server:#}");
    }

    // On one node there is one agent on both sides, and one span.
    let [parent, _] = stage.seen("near", "/near?secret=hush", &joins)?;
    let spans = stage.wait_spans("/near", 1)?;
    let told = format!("00-{TRACE}-{}-01", spans[0]["id"].as_str().unwrap_or_default());
    ensure!(parent == json!([told]) && spans[0]["kind"] == "SPAN_KIND_CLIENT", "{parent} {spans:#?}");
    ensure!(spans[0]["attributes"]["undermesh.security"] == "same_node", "{spans:#?}");
    ensure!(!spans[0].to_string().contains("hush"), "{spans:#?}");

    // Nobody has begun one: the client's agent does, and the server's joins it.
    let [parent, _] = stage.seen("far", "/new", &[])?;
    let spans = stage.wait_spans("/new", 2)?;
    ensure!(spans[0]["trace"] == spans[1]["trace"] && spans[0]["trace"] != TRACE, "{spans:#?}");
    ensure!(spans.iter().filter(|span| span["parent"] == "").count() == 1, "{spans:#?}");
    ensure!(parent[0].as_str().is_some_and(|parent| parent.ends_with("-03")), "{parent}");

    // What the caller does not want to have recorded is not, and is passed on as it came.
    let unsampled = traceparent("00");
    let [parent, state] =
        stage.seen("far", "/unsampled", &["--header", &unsampled, "--header", "tracestate: a=1"])?;
    ensure!(
        parent == json!([format!("00-{TRACE}-{CALLER}-00")]) && state == json!(["a=1"]),
        "{parent} {state}"
    );
    // What comes later is there: then that is not still to come.
    stage.seen("far", "/later", &[])?;
    stage.wait_spans("/later", 2)?;
    ensure!(stage.spans("/unsampled").is_empty(), "{:#?}", stage.spans("/unsampled"));

    let metrics = stage.mesh.agents[1].metrics()?;
    ensure!(metrics.sum(EXPORTED, &[]) >= 4.0 && metrics.sum(DROPPED, &[]) == 0.0, "{}", metrics.text);
    Ok(())
}

#[test]
fn routes_retries_and_mirrors_show_in_spans() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-traces-routes", &tracing("1"), true)?;
    let backend = |name| json!({ "name": name, "port": 80 });
    let rule = json!({
        "name": "again",
        "matches": [{ "path": { "type": "PathPrefix", "value": "/routed" } }],
        "retry": { "codes": [503], "attempts": 2, "backoff": "10ms" },
        "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": backend("near") } }],
        "backendRefs": [backend("far")],
    });
    let parent = json!([{ "group": "", "kind": "Service", "name": "far", "port": 80 }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "orders");
    stage.mesh.lab.apply(&route.with("spec", json!({ "parentRefs": parent, "rules": [rule] })))?;
    eventually(SOON, "the route is in force", || stage.ask("far", "/", &[])?.answered(404).map(drop))?;

    let sampled = traceparent("01");
    stage.ask("far", "/routed?status=503", &["--header", &sampled])?.answered(503)?;
    let spans = stage.wait_spans("/routed", 2)?;
    let of = |service: &str| {
        let found = spans.iter().find(|span| span["attributes"]["undermesh.destination.workload"] == service);
        found.with_context(|| format!("no span to {service} among {spans:#?}"))
    };
    let (first, copy) = (of("far")?, of("near")?);
    ensure!(first["parent"] == CALLER && first["name"] == "GET shop/orders", "{first:#}");
    ensure!(first["failed"] == true, "{first:#}");
    let attributes = &first["attributes"];
    let expected = [
        ("undermesh.route", json!("HTTPRoute/shop/orders")),
        ("undermesh.rule", json!("again")),
        ("undermesh.attempts", json!(3)),
        ("http.request.resend_count", json!(2)),
        ("http.response.status_code", json!(503)),
        ("error.type", json!("503")),
    ];
    for (name, value) in expected {
        ensure!(attributes[name] == value, "{name}: {attributes:#}");
    }
    ensure!(copy["trace"] == TRACE && copy["parent"] == first["id"], "{copy:#}\n{first:#}");

    // What fits no rule has a span too, and says why it failed.
    stage.ask("far", "/elsewhere", &[])?.answered(404)?;
    let spans = stage.wait_spans("/elsewhere", 1)?;
    ensure!(spans[0]["attributes"]["error.type"] == "no_route" && spans[0]["failed"] == true, "{spans:#?}");
    Ok(())
}

#[test]
fn with_no_share_only_what_callers_want_is_recorded() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let folder = tempfile::tempdir()?;
    let (token, log) = (folder.path().join("token"), folder.path().join("access.json"));
    fs::write(&token, "Bearer of-a-test\n")?;
    let (header, log_arg) = (format!("authorization={}", token.display()), log.display().to_string());
    let mut args = tracing("0");
    args.extend(["--trace-protocol", "http", "--trace-header-file", &header]);
    args.extend(["--access-log", "json", "--access-log-file", &log_arg]);
    let stage = Stage::set("um-e2e-traces-none", &args, true)?;

    // All behind are told that nobody records it.
    let [parent, _] = stage.seen("far", "/alone", &[])?;
    let parent = parent[0].as_str().context("no traceparent")?.to_owned();
    let trace = parent.split('-').nth(1).context("no trace id")?;
    ensure!(parent.starts_with("00-") && parent.ends_with("-02"), "{parent}");
    // One that makes no sense is none, and what goes with it neither.
    let [parent, state] = stage.seen(
        "far",
        "/odd",
        &["--header", "traceparent: 00-00-00-01", "--header", "tracestate: a=1"],
    )?;
    ensure!(parent[0].as_str().is_some_and(|it| it.ends_with("-02")) && state.is_null(), "{parent} {state}");

    stage.seen("far", "/wanted", &["--header", &traceparent("01")])?;
    let spans = stage.wait_spans("/wanted", 1)?;
    ensure!(spans[0]["trace"] == TRACE && spans[0]["protocol"] == "http", "{spans:#?}");
    ensure!(spans[0]["authorization"] == "Bearer of-a-test", "{spans:#?}");
    ensure!(stage.spans("/alone").is_empty() && stage.spans("/odd").is_empty(), "more than that is recorded");
    let logged = eventually(SOON, "the requests are logged", || logged(&log, "/wanted"))?;
    ensure!(logged == TRACE, "{logged}");
    ensure!(self::logged(&log, "/alone")? == trace, "another trace than {parent} is logged");
    Ok(())
}

/// The trace's id in the line of a request to this path.
fn logged(log: &std::path::Path, path: &str) -> Result<String> {
    let text = fs::read_to_string(log)?;
    let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.find(|line| line["path"] == path).with_context(|| format!("no line of {path}"))?;
    Ok(line["trace_id"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn without_tracing_contexts_pass_and_are_logged() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("access.json");
    let args = ["--access-log", "json", "--access-log-file", &log.display().to_string()];
    let stage = Stage::set("um-e2e-traces-off", &args, false)?;
    ensure!(stage.seen("far", "/alone", &[])? == [Value::Null, Value::Null]);
    let (sampled, odd) = (traceparent("01"), "traceparent: 00-00-00-01");
    let [parent, state] =
        stage.seen("far", "/joined", &["--header", &sampled, "--header", "tracestate: a=1"])?;
    ensure!(
        parent == json!([format!("00-{TRACE}-{CALLER}-01")]) && state == json!(["a=1"]),
        "{parent} {state}"
    );
    // What others make of one that makes no sense is theirs to say.
    ensure!(stage.seen("far", "/odd", &["--header", odd])?[0] == json!(["00-00-00-01"]));
    eventually(SOON, "the requests are logged", || {
        ensure!(logged(&log, "/joined")? == TRACE);
        ensure!(logged(&log, "/odd")?.is_empty() && logged(&log, "/alone")?.is_empty());
        Ok(())
    })
}

#[test]
fn a_collector_that_is_not_there_costs_spans_and_nothing_else() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-traces-gone", &tracing("1"), false)?;
    let many = ["--count", "10000", "--connections", "4"];
    for service in ["near", "far"] {
        stage.ask(service, "/many", &many)?.all(200)?;
    }
    // The queue holds 8,192 of the 20,000, and what was sent is given up after some seconds.
    let agent = &stage.mesh.agents[0];
    agent.wait_metrics(Duration::from_secs(30), "spans are dropped and counted", |metrics| {
        let dropped = |reason| metrics.sum(DROPPED, &[("reason", reason)]);
        dropped("queue_full") > 5_000.0 && dropped("unavailable") > 0.0
    })?;
    let words = agent.process().output();
    let warnings = words.lines().filter(|line| line.contains("the traces' collector")).count();
    ensure!(warnings == 1, "{warnings} warnings:\n{words}");
    ensure!(agent.metrics()?.sum(EXPORTED, &[]) == 0.0);

    // It comes, and gets what comes from then on.
    let mut collector = Command::new(binary("collector")?);
    collector.args(["--address", COLLECTOR]);
    let collector = stage.mesh.nodes[0].spawn(collector)?;
    eventually(Duration::from_secs(60), "the collector gets spans", || {
        ensure!(collector.output().contains("SPAN_KIND_CLIENT"));
        Ok(())
    })
}

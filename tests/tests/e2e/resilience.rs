//! Resilience: what the mesh does by itself where servers fail, are slow or are asked too much, and what it must not do.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests, serve_requests_with};
use crate::routes::service;

const RETRIES: &str = "undermesh_http_retries_total";
pub const EJECTIONS: &str = "undermesh_http_ejections_total";
const EJECTED: &str = "undermesh_endpoints_ejected";
const WITHHELD: &str = "undermesh_http_retries_withheld_total";

/// A client and so many servers `s0`, `s1`... on its node, all behind the Service `web`.
pub struct Stage {
    pub mesh: Mesh,
    pub client: Pod,
    pub servers: Vec<Pod>,
    pub running: Vec<Process>,
}

impl Stage {
    pub fn set(name: &str, servers: usize) -> Result<Self> {
        let mut mesh = Mesh::start(name, 1, &[])?;
        let client = mesh.pod(0, "client")?;
        let server =
            |index| mesh.add(0, PodSpec::new(SHOP, format!("s{index}").as_str()).label("app", "web"));
        let servers = (0..servers).map(server).collect::<Result<Vec<_>>>()?;
        mesh.lab.apply(&http_service("web", web(), json!({ "app": "web" })))?;
        let running = servers.iter().map(serve_requests).collect::<Result<_>>()?;
        mesh.ready()?;
        let stage = Self { mesh, client, servers, running };
        eventually(SOON, "the Service is served", || {
            stage.ask("/", &["--count", "20"])?.all(200)?;
            Ok(())
        })?;
        Ok(stage)
    }

    pub fn ask(&self, path: &str, args: &[&str]) -> Result<Asked> {
        ask(&self.client, &format!("http://{}{path}", SocketAddr::new(web(), 80)), args)
    }

    /// How many of so many requests each server answers.
    fn spread(&self, path: &str, args: &[&str]) -> Result<BTreeMap<String, usize>> {
        Ok(self.ask(path, args)?.by_server)
    }

    pub fn counted(&self, metric: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.agents[0].metrics()?.sum(metric, labels))
    }

    /// Has requests that are answered with 503 sent again, and waits until that is so.
    fn retry(&self, attempts: u32) -> Result<()> {
        self.mesh.lab.apply(&retried("web", attempts))?;
        eventually(SOON, "the retries are in force", || {
            let before = self.counted(RETRIES, &[])?;
            self.ask("/?status=503", &[])?.answered(503)?;
            ensure!(self.counted(RETRIES, &[])? > before, "nothing is sent again");
            Ok(())
        })
    }

    /// How many requests the server has seen, this one not included.
    fn seen(&self, server: usize) -> Result<u64> {
        seen(&self.client, &self.servers[server])
    }
}

fn web() -> IpAddr {
    IpAddr::from([10, 96, 0, 40])
}

pub fn http_service(name: &str, address: IpAddr, selector: Value) -> Manifest {
    let ports = json!([{ "name": "http", "port": 80, "targetPort": 8080 }]);
    Manifest::service(SHOP, name, &[address], &[], &[])
        .with("spec.ports", ports)
        .with("spec.selector", selector)
}

/// A route that has requests to the Service sent again that are answered with 503.
fn retried(name: &str, attempts: u32) -> Manifest {
    let rules = json!([{
        "retry": { "codes": [503], "attempts": attempts, "backoff": "10ms" },
        "backendRefs": [{ "name": name, "port": 80 }],
    }]);
    Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), name)
        .with("spec", json!({ "parentRefs": [service(name)], "rules": rules }))
}

fn seen(client: &Pod, server: &Pod) -> Result<u64> {
    let saw = ask(client, &format!("http://{}/", SocketAddr::new(server.ip(), 8080)), &[])?.saw()?;
    Ok(saw["requests"].as_u64().with_context(|| format!("the server does not count: {saw}"))? - 1)
}

/// Five services in a row, each of which retries twice what the next one fails; none passes on more than a status.
#[test]
fn retries_do_not_multiply_along_a_chain() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let names = ["a", "b", "c", "d", "e"];
    let address = |index: usize| IpAddr::from([10, 96, 0, 50 + index as u8]);
    let mut mesh = Mesh::start("um-e2e-retry-chain", 1, &[])?;
    let client = mesh.pod(0, "client")?;
    let pods = names
        .iter()
        .map(|name| mesh.add(0, PodSpec::new(SHOP, name).label("app", name)))
        .collect::<Result<Vec<_>>>()?;
    for (index, name) in names.iter().enumerate() {
        mesh.lab.apply(&http_service(name, address(index), json!({ "app": name })))?;
        mesh.lab.apply(&retried(name, 2))?;
    }
    let mut running = Vec::new();
    for (index, pod) in pods.iter().enumerate() {
        let next = format!("http://{}", SocketAddr::new(address(index + 1), 80));
        let forward = ["--forward", next.as_str()];
        running.push(serve_requests_with(pod, if index + 1 < names.len() { &forward } else { &[] })?);
    }
    mesh.ready()?;
    let retries = || -> Result<f64> { Ok(mesh.agents[0].metrics()?.sum(RETRIES, &[])) };
    let url = |path: &str| format!("http://{}{path}", SocketAddr::new(address(0), 80));
    eventually(SOON, "the chain stands, and its hops retry", || {
        ask(&client, &url("/"), &[])?.answered(200)?;
        let before = retries()?;
        ask(&client, &url("/?status=503"), &[])?.answered(503)?;
        ensure!(retries()? >= before + 5.0, "a hop does not retry");
        Ok(())
    })?;

    let many = ["--count", "3000", "--connections", "16"];
    let load = |path: &str, status: u16| -> Result<f64> {
        let (before, began) = (seen(&client, &pods[4])?, Instant::now());
        ask(&client, &url(path), &many)?.all(status)?;
        // Asking for the figure is a request as well.
        let load = (seen(&client, &pods[4])? - before - 1) as f64 / 3_000.0;
        println!("{path}: the last service sees {load:.3} requests for each, in {:?}", began.elapsed());
        Ok(load)
    };
    ensure!(load("/", 200)? < 1.01, "what goes well is sent again");
    let failing = load("/?status=503", 503)?;
    ensure!(failing <= 1.3, "the last service sees {failing} times its load");
    let withheld = mesh.agents[0].metrics()?.sum(WITHHELD, &[("reason", "budget")]);
    ensure!(withheld > 1_000.0, "only {withheld} retries were withheld");
    Ok(())
}

#[test]
fn retries_know_of_other_retries_of_waiting_and_of_small_bodies() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-retries", 1)?;
    stage.retry(2)?;
    let attempts = |path: &str, args: &[&str]| -> Result<(u64, Value, Duration)> {
        let (before, began) = (stage.seen(0)?, Instant::now());
        let answer = stage.ask(path, args)?.last;
        let took = began.elapsed();
        Ok((stage.seen(0)? - before - 1, answer, took))
    };
    // What was sent again in vain says so, and how often.
    let (made, answer, _) = attempts("/?status=503", &[])?;
    ensure!(made == 3 && answer["headers"]["undermesh-retried"] == "2", "{made} attempts: {answer}");
    // The server sees which attempt it is.
    let (made, answer, _) = attempts(&format!("/?status=503&first={}", stage.seen(0)? + 3), &[])?;
    ensure!(made == 2 && answer["status"] == 200, "{made} attempts: {answer}");
    ensure!(answer["saw"]["headers"]["undermesh-attempt"] == json!(["2"]), "{answer}");
    ensure!(answer["headers"]["undermesh-retried"].is_null(), "it was not in vain: {answer}");
    // Who has retried already, before this hop or behind it, is enough.
    for (path, args) in [
        ("/?status=503", &["--header", "undermesh-attempt: 2"][..]),
        ("/?status=503&header=undermesh-retried:2", &[]),
    ] {
        let before = stage.counted(WITHHELD, &[("reason", "retried_elsewhere")])?;
        let (made, answer, _) = attempts(path, args)?;
        ensure!(made == 1 && answer["status"] == 503, "{path}: {made} attempts: {answer}");
        ensure!(stage.counted(WITHHELD, &[("reason", "retried_elsewhere")])? == before + 1.0, "{path}");
    }
    // A server that wants to be left alone is, for as long as a client can be made to wait.
    let (made, answer, took) =
        attempts(&format!("/?status=503&first={}&header=retry-after:1", stage.seen(0)? + 3), &[])?;
    ensure!(
        made == 2 && answer["status"] == 200 && took.as_millis() >= 1_000,
        "{made} attempts in {took:?}: {answer}"
    );
    let (made, answer, took) = attempts("/?status=503&header=retry-after:60", &[])?;
    ensure!(made == 1 && answer["headers"]["retry-after"] == "60", "{made} attempts in {took:?}: {answer}");
    ensure!(stage.counted(WITHHELD, &[("reason", "retry_after")])? == 1.0, "it is not counted");
    // Short bodies are sent again, long ones are not.
    for version in [&[][..], &["--http2"]] {
        for (bytes, expected) in [("1000", 2), ("65536", 2), ("65537", 1)] {
            let path = format!("/?status=503&first={}", stage.seen(0)? + 3);
            let (made, answer, _) =
                attempts(&path, &[&["--method", "POST", "--body", bytes], version].concat())?;
            ensure!(made == expected, "{bytes} bytes: {made} attempts: {answer}");
            ensure!(made == 1 || answer["saw"]["bytes"] == bytes.parse::<u64>()?, "{bytes} bytes: {answer}");
        }
    }
    Ok(())
}

#[test]
fn an_endpoint_that_fails_is_left_alone_and_comes_back() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-ejection", 3)?;
    let ejections = |reason| stage.counted(EJECTIONS, &[("reason", reason), ("destination_service", "web")]);
    // One of three fails all that it is sent, at once: it would be the first to be free for more.
    let failed = stage.ask("/?status=500&by=s1", &["--count", "200"])?;
    let failures = failed.by_status.get("500").copied().unwrap_or_default();
    ensure!(failures == 5, "{failures} of 200 requests failed: {failed:?}");
    let began = Instant::now();
    ensure!(ejections("server_errors")? == 1.0 && stage.counted(EJECTED, &[])? == 1.0, "it is not counted");
    let config = stage.mesh.agents[0].get("/debug/config")?.ok()?;
    ensure!(
        config.matches("\"ejected\":true").count() + config.matches("\"ejected\": true").count() == 1,
        "{config}"
    );
    // The others bear it, the second one is spared no more.
    let served = stage.spread("/", &["--count", "100"])?;
    ensure!(served.keys().eq(["s0", "s2"]), "{served:?}");
    // How much of it, the latencies say; five failures would have the second one ejected, if it might be.
    let mut failures = 0;
    eventually(Duration::from_secs(5), "the second one goes on failing", || {
        let failed = stage.ask("/?status=500&by=s2", &["--count", "100"])?;
        failures += failed.by_status.get("500").copied().unwrap_or_default();
        ensure!(failures > 20, "more than half are left alone, after {failures} failures: {failed:?}");
        Ok(())
    })?;
    ensure!(stage.counted(EJECTED, &[])? == 1.0, "more than half are left alone");
    // After its time one request tries it again, and finds it as it was.
    std::thread::sleep((began + Duration::from_millis(11_100)).saturating_duration_since(Instant::now()));
    let failed = stage.ask("/?status=500&by=s1", &["--count", "100"])?;
    ensure!(failed.by_status.get("500") == Some(&1), "not one request has tried it: {failed:?}");
    ensure!(ejections("failed_probe")? == 1.0, "the probe is not counted");
    let began = Instant::now();
    std::thread::sleep(
        (began + Duration::from_secs(22) + Duration::from_millis(100))
            .saturating_duration_since(Instant::now()),
    );
    let served = stage.ask("/", &["--count", "100"])?.all(200)?;
    ensure!(served.len() == 3, "it has not come back: {served:?}");
    ensure!(stage.counted(EJECTED, &[])? == 0.0, "it still counts as ejected");
    Ok(())
}

/// Whoever finds nobody listening goes elsewhere, and nobody else tries but for the one after each ejection.
#[test]
fn an_endpoint_without_a_server_costs_one_attempt() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-ejection-gone", 3)?;
    let ejections = |stage: &Stage, service: &str, reason: &str| {
        stage.counted(EJECTIONS, &[("reason", reason), ("destination_service", service)])
    };
    // Attempts that failed, of which all but the first are for the endpoint's time being over.
    let is_tried_once = |stage: &Stage, service: &str, before: u64| -> Result<()> {
        let (failed, probes) =
            (failed_connects(&stage.client)? - before, ejections(stage, service, "failed_probe")?);
        ensure!(ejections(stage, service, "refused")? == 1.0, "it is not ejected");
        ensure!(failed as f64 == 1.0 + probes, "{failed} attempts failed, {probes} of them probes");
        Ok(())
    };
    stage.running.remove(1);
    let before = failed_connects(&stage.client)?;
    stage.ask("/", &["--count", "200", "--fresh"])?.all(200)?;
    let served = stage.spread("/", &["--count", "50"])?;
    ensure!(served.keys().eq(["s0", "s2"]), "{served:?}");
    is_tried_once(&stage, "web", before)?;
    // And so with connections that carry something else.
    let mut running = stage.servers.iter().map(crate::kit::serve).collect::<Result<Vec<_>>>()?;
    let address = IpAddr::from([10, 96, 0, 41]);
    let ports = json!([{ "name": "tcp", "port": 7000, "targetPort": 7000 }]);
    let service = Manifest::service(SHOP, "greet", &[address], &[], &[]);
    let service = service.with("spec.ports", ports).with("spec.selector", json!({ "app": "web" }));
    stage.mesh.lab.apply(&service)?;
    let all_serve = |stage: &Stage| {
        let served = crate::kit::dial(&stage.client, address, 40)?.all_served()?;
        ensure!(served.len() == 3, "{served:?}");
        Ok(())
    };
    eventually(SOON, "all of them serve", || all_serve(&stage))?;
    running.remove(1).kill();
    let before = failed_connects(&stage.client)?;
    let served = crate::kit::dial(&stage.client, address, 40)?.all_served()?;
    ensure!(served.keys().eq(["s0", "s2"]), "{served:?}");
    is_tried_once(&stage, "greet", before)?;
    running.push(crate::kit::serve(&stage.servers[1])?);
    eventually(SOON, "it has come back", || all_serve(&stage))
}

/// How often a connection that was begun in the pod came to nothing.
fn failed_connects(pod: &Pod) -> Result<u64> {
    let mut command = Command::new("cat");
    command.arg("/proc/net/snmp");
    let snmp = pod.run(command, SOON)?.success()?;
    let mut rows = snmp.lines().filter(|line| line.starts_with("Tcp:")).map(str::split_whitespace);
    let (names, values) = rows.next().zip(rows.next()).context("no figures of TCP")?;
    let (_, value) = names.zip(values).find(|(name, _)| *name == "AttemptFails").context("no such figure")?;
    Ok(value.parse()?)
}

#[test]
fn sessions_leave_an_endpoint_that_fails() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-ejection-session", 2)?;
    let rules = json!([{
        "sessionPersistence": { "sessionName": "sid", "type": "Header" },
        "backendRefs": [{ "name": "web", "port": 80 }],
    }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "web");
    stage.mesh.lab.apply(&route.with("spec", json!({ "parentRefs": [service("web")], "rules": rules })))?;
    let mut session = String::new();
    let mut with = String::new();
    eventually(SOON, "a session begins", || {
        let answer = stage.ask("/", &[])?.answered(200)?;
        session = format!("sid: {}", answer["headers"]["sid"].as_str().context("no session")?);
        with = answer["headers"]["x-server"].as_str().context("nobody answers")?.to_owned();
        Ok(())
    })?;
    let kept = ["--header", session.as_str(), "--count", "20"];
    ensure!(stage.spread("/", &kept)?.keys().eq([&with]), "it is no session");
    let failed = stage.ask(&format!("/?status=502&by={with}"), &kept)?;
    ensure!(failed.by_status.get("502") == Some(&5), "the session stays with what fails: {failed:?}");
    let answer = stage.ask("/", &["--header", session.as_str()])?.answered(200)?;
    ensure!(
        answer["headers"]["x-server"] != with.as_str() && !answer["headers"]["sid"].is_null(),
        "{answer}"
    );
    Ok(())
}

#[test]
fn a_slow_endpoint_gets_few_requests_and_as_many_connections_as_others() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-slow", 3)?;
    let many = ["--count", "600", "--connections", "6"];
    let share = |path: &str| -> Result<usize> {
        let served = stage.ask(path, &many)?.all(200)?;
        ensure!(["s0", "s2"].iter().all(|name| served.get(*name).is_some_and(|n| *n >= 100)), "{served:?}");
        Ok(served.get("s1").copied().unwrap_or_default())
    };
    ensure!(share("/?delay_ms=10")? >= 100, "equal endpoints do not get equal shares");
    let slow = share("/?delay_ms=100&by=s1")?;
    ensure!((1..60).contains(&slow), "the slow one of three got {slow} of 600 requests");
    // Whoever says that it has too much to do is as good as slow, however fast it says so.
    stage.ask("/?status=429&by=s2", &many)?;
    let served = stage.spread("/", &many)?;
    ensure!(served.get("s2").copied().unwrap_or_default() < 150, "{served:?}");
    Ok(())
}

#[test]
fn what_waits_at_an_endpoint_is_bounded_and_the_rest_fails_at_once() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-overload", 1)?;
    let overloaded = || stage.counted("undermesh_http_requests_total", &[("reason", "overloaded")]);
    let many = ["--count", "1200", "--connections", "1200", "--fresh", "--limit-ms", "60000"];
    let asked = stage.ask("/?delay_ms=8000", &many)?;
    let count = |status: &str| asked.by_status.get(status).copied().unwrap_or_default();
    // Each worker thread looks and then enters: two that do so in one moment let one more in.
    let (answered, refused) = (count("200"), count("503"));
    ensure!((1_024..=1_031).contains(&answered) && asked.failed.is_empty(), "{asked:?}");
    ensure!(answered + refused == 1_200, "{asked:?}");
    ensure!(overloaded()? == refused as f64, "{} of {refused} are counted", overloaded()?);
    stage.ask("/", &["--count", "20"])?.all(200)?;
    Ok(())
}

/// Who says how long it waits has that time, and the next one is told what is left of it.
#[test]
fn deadlines_travel_with_requests() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-deadlines", 1)?;
    const GRPC: [&str; 5] = ["--http2", "--method", "POST", "--header", "content-type: application/grpc"];
    let told = |args: &[&str], header: &str| -> Result<Option<String>> {
        let saw = stage.ask("/", args)?.saw()?;
        Ok(saw["headers"][header][0].as_str().map(str::to_owned))
    };
    let grpc = |timeout| [&GRPC[..], &["--header", timeout]].concat();
    ensure!(told(&[], "undermesh-timeout-ms")?.is_none(), "a deadline out of nothing");
    let left =
        told(&["--header", "undermesh-timeout-ms: 5000"], "undermesh-timeout-ms")?.context("no deadline")?;
    ensure!((4_000..=5_000).contains(&left.parse::<u64>()?), "{left} ms are left of 5,000");
    let left = told(&grpc("grpc-timeout: 5S"), "grpc-timeout")?.context("no deadline")?;
    let micros: u64 = left.strip_suffix('u').context("not in microseconds")?.parse()?;
    ensure!((4_000_000..=5_000_000).contains(&micros), "{left} are left of 5S");
    // Each is answered in its own words when the time is over, and nobody is blamed for it.
    for _ in 0..10 {
        let began = Instant::now();
        stage.ask("/?delay_ms=3000", &["--header", "undermesh-timeout-ms: 50"])?.answered(504)?;
        let answer = stage.ask("/?delay_ms=3000", &grpc("grpc-timeout: 50m"))?.answered(200)?;
        ensure!(answer["headers"]["grpc-status"] == "4", "{answer}");
        ensure!(began.elapsed() < Duration::from_secs(2), "it took {:?}", began.elapsed());
    }
    // A stream that goes on for longer has a status as well.
    let answer = stage.ask("/?drip_ms=20", &grpc("grpc-timeout: 300m"))?.answered(200)?;
    ensure!(answer["trailers"]["grpc-status"] == "4" && answer["bytes"].as_u64() > Some(0), "{answer}");
    ensure!(stage.counted(EJECTIONS, &[])? == 0.0, "an endpoint is blamed for its clients' hurry");
    // A rule's limit is told as well, if it is the shorter one; gRPC has streams that a rule does not limit.
    let rules = json!([{ "timeouts": { "request": "2s" }, "backendRefs": [{ "name": "web", "port": 80 }] }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "web")
        .with("spec", json!({ "parentRefs": [service("web")], "rules": rules }));
    stage.mesh.lab.apply(&route)?;
    eventually(SOON, "the rule's limit is told", || {
        let left = told(&["--header", "undermesh-timeout-ms: 5000"], "undermesh-timeout-ms")?;
        let left: u64 = left.context("no deadline")?.parse()?;
        ensure!((1_000..=2_000).contains(&left), "{left} ms");
        Ok(())
    })?;
    ensure!(told(&GRPC, "grpc-timeout")?.is_none(), "a rule limits a stream");
    let streamed = stage.ask("/?drip_ms=20", &[&GRPC[..], &["--limit-ms", "2500"]].concat())?;
    ensure!(streamed.failed.keys().eq(["no answer in time"]), "a rule ends a stream: {streamed:?}");
    Ok(())
}

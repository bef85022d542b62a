//! Resilience: what the mesh does by itself where servers fail, are slow or are asked too much, and what it must not do.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests, serve_requests_with};
use crate::routes::service;

const RETRIES: &str = "undermesh_http_retries_total";
const WITHHELD: &str = "undermesh_http_retries_withheld_total";

/// A client and so many servers `s0`, `s1`... on its node, all behind the Service `web`.
struct Stage {
    mesh: Mesh,
    client: Pod,
    servers: Vec<Pod>,
    _running: Vec<Process>,
}

impl Stage {
    fn set(name: &str, servers: usize) -> Result<Self> {
        let mut mesh = Mesh::start(name, 1, &[])?;
        let client = mesh.pod(0, "client")?;
        let server =
            |index| mesh.add(0, PodSpec::new(SHOP, format!("s{index}").as_str()).label("app", "web"));
        let servers = (0..servers).map(server).collect::<Result<Vec<_>>>()?;
        mesh.lab.apply(&http_service("web", web(), json!({ "app": "web" })))?;
        let running = servers.iter().map(serve_requests).collect::<Result<_>>()?;
        mesh.ready()?;
        let stage = Self { mesh, client, servers, _running: running };
        eventually(SOON, "the Service is served", || {
            stage.ask("/", &["--count", "20"])?.all(200)?;
            Ok(())
        })?;
        Ok(stage)
    }

    fn ask(&self, path: &str, args: &[&str]) -> Result<Asked> {
        ask(&self.client, &format!("http://{}{path}", SocketAddr::new(web(), 80)), args)
    }

    fn counted(&self, metric: &str, labels: &[(&str, &str)]) -> Result<f64> {
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

fn http_service(name: &str, address: IpAddr, selector: Value) -> Manifest {
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
    let attempts = |path: &str, args: &[&str]| -> Result<(u64, Value, std::time::Duration)> {
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
            ensure!(made == 1 || answer["saw"]["bytes"].to_string() == bytes, "{bytes} bytes: {answer}");
        }
    }
    Ok(())
}

//! Attempts that come to nothing, or are slow in coming to something: what that says of an endpoint, and whose doing it is.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, PodSpec, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON, full_server};
use crate::requests::{Asked, ask, serve_requests_with};
use crate::resilience::{EJECTIONS, Stage, http_service};
use crate::routes::service;

const REQUESTS: &str = "undermesh_http_requests_total";

/// How many of the clients have given up.
fn given_up(asked: &Asked) -> usize {
    asked.failed.get("no answer in time").copied().unwrap_or_default()
}

/// An endpoint that takes requests and answers none is asked seldom, although all that is ever seen of it is clients that leave.
#[test]
fn an_endpoint_that_hangs_is_not_preferred() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-hung", 3)?;
    let many = ["--count", "500", "--connections", "6", "--limit-ms", "1000"];
    stage.running[1].signal(Signal::SIGSTOP);
    let asked = stage.ask("/?delay_ms=50", &many)?;
    stage.running[1].signal(Signal::SIGCONT);
    let (hung, answered) = (given_up(&asked), asked.by_status.get("200").copied().unwrap_or_default());
    ensure!(hung + answered == 500, "{asked:?}");
    // A fair share is 167. The first six connections know nothing of it.
    ensure!((1..60).contains(&hung), "the one of three that hangs got {hung} of 500 requests: {asked:?}");
    // The same where the client says how long it waits.
    let timeouts = [("reason", "request_timeout"), ("reporter", "source")];
    let before = stage.counted(REQUESTS, &timeouts)?;
    stage.running[2].signal(Signal::SIGSTOP);
    let patient = [&many[..4], &["--header", "undermesh-timeout-ms: 1000"]].concat();
    let asked = stage.ask("/?delay_ms=50", &patient)?;
    stage.running[2].signal(Signal::SIGCONT);
    let hung = asked.by_status.get("504").copied().unwrap_or_default();
    ensure!((1..60).contains(&hung), "the one of three that hangs got {hung} of 500 requests: {asked:?}");
    ensure!(stage.counted(REQUESTS, &timeouts)? == before + hung as f64, "{asked:?}");
    ensure!(stage.counted(EJECTIONS, &[])? == 0.0, "an endpoint is blamed for its clients' hurry");
    Ok(())
}

/// A limit on the whole, and on one attempt, with how that is told of.
fn limits(time: &str) -> [(Value, &'static str); 2] {
    [
        (json!({ "request": time }), "request_timeout"),
        (json!({ "request": "5s", "backendRequest": time }), "upstream_timeout"),
    ]
}

/// A route says so from now on.
fn limited(stage: &Stage, timeouts: Value) -> Result<()> {
    let rules = json!([{ "timeouts": timeouts, "backendRefs": [{ "name": "web", "port": 80 }] }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "web")
        .with("spec", json!({ "parentRefs": [service("web")], "rules": rules }));
    stage.mesh.lab.apply(&route)
}

/// An answer that has begun must have ended in time, too.
#[test]
fn answers_that_do_not_end_in_time_are_broken_off() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-endless", 1)?;
    for (timeouts, reason) in limits("300ms") {
        limited(&stage, timeouts)?;
        eventually(SOON, "the limit is in force", || {
            stage.ask("/?delay_ms=2000", &[])?.answered(504).map(drop)
        })?;
        let begun = [("reason", reason), ("response_code", "200"), ("reporter", "source")];
        for version in [&[][..], &["--http2"]] {
            let before = stage.counted(REQUESTS, &begun)?;
            let broken = stage.ask("/?drip_ms=20", &[version, &["--limit-ms", "3000"]].concat())?;
            let whys: Vec<_> = broken.failed.keys().collect();
            ensure!(whys.len() == 1 && whys[0].contains("broke off"), "{version:?}: {broken:?}");
            let counted = stage.counted(REQUESTS, &begun)? - before;
            ensure!(counted == 1.0, "{version:?}: {counted} answers that do not end are counted as {reason}");
        }
    }
    Ok(())
}

/// Time in which a client is still to send more of its request is not the endpoint's, whatever limit it exceeds; time after that is.
#[test]
fn a_client_that_sends_slowly_is_not_held_against_endpoints() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-upload", 3)?;
    let ejections = || stage.counted(EJECTIONS, &[]);
    for (timeouts, reason) in limits("200ms") {
        limited(&stage, timeouts)?;
        let labels = [("reason", reason), ("reporter", "source")];
        let slow = ["--method", "POST", "--drip-ms", "20", "--limit-ms", "2000"];
        eventually(SOON, "the limit is in force", || {
            let before = stage.counted(REQUESTS, &labels)?;
            stage.ask("/", &slow)?;
            ensure!(stage.counted(REQUESTS, &labels)? > before, "it is not");
            Ok(())
        })?;
        let asked = stage.ask("/", &[&slow[..], &["--count", "30", "--connections", "3"]].concat())?;
        ensure!(asked.by_status.get("504") == Some(&30), "{reason}: {asked:?}");
        ensure!(ejections()? == 0.0, "{reason}: endpoints are blamed for how slowly their clients send");
    }
    let body = ["--method", "POST", "--body", "100", "--count", "30", "--connections", "3"];
    stage.ask("/?delay_ms=2000", &body)?.all(504)?;
    ensure!(
        ejections()? > 0.0,
        "an endpoint that has all of the request and does not answer is not to blame"
    );
    Ok(())
}

/// However few requests a server takes at a time on one connection, none waits for another to end.
#[test]
fn long_requests_get_as_many_connections_as_their_server_wants() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    // Connections to servers belong to a thread.
    let mut mesh = Mesh::start("um-e2e-streams", 2, &["--workers", "1"])?;
    let client = mesh.pod(0, "client")?;
    let servers = [mesh.pod(0, "near")?, mesh.pod(1, "far")?];
    mesh.ready()?;
    for server in &servers {
        let _running = serve_requests_with(server, &["--streams", "5"])?;
        let url = |path| format!("http://{}:8080{path}", server.ip());
        ask(&client, &url("/"), &["--http2"])?.answered(200)?;
        let began = Instant::now();
        let many = ["--http2", "--count", "40", "--connections", "40"];
        ask(&client, &url("/?delay_ms=3000"), &many)?.all(200)?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(6), "{}: some have waited for others: {took:?}", server.name());
        // One that stood, and seven more.
        let saw = ask(&client, &url("/"), &[])?.saw()?;
        let made = saw["connection"].as_u64().context("it does not count")?;
        ensure!(made == 8, "{}: {made} connections were made", server.name());
    }
    Ok(())
}

/// Requests whose clients leave before there is a connection are told of as any other.
#[test]
fn requests_that_wait_for_a_connection_are_told_of() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut stage = Stage::set("um-e2e-black-hole", 1)?;
    stage.running.clear();
    let _full = full_server(&stage.servers[0], 8080)?;
    let gone = [("reason", "client_gone"), ("destination_service", "web")];
    let before = stage.counted(REQUESTS, &gone)?;
    let asked = stage.ask("/", &["--count", "5", "--limit-ms", "300"])?;
    ensure!(given_up(&asked) == 5, "{asked:?}");
    eventually(SOON, "they are counted", || {
        let counted = stage.counted(REQUESTS, &gone)? - before;
        ensure!(counted == 5.0, "{counted} of 5 requests are counted");
        Ok(())
    })
}

/// Copies arrive and are counted, and a mirror that hangs holds nothing up.
#[test]
fn copies_arrive_and_hold_nothing_up() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-copies", 1)?;
    let mirror = stage.mesh.add(0, PodSpec::new(SHOP, "mirror").label("app", "mirror"))?;
    stage.mesh.lab.apply(&http_service("mirror", [10, 96, 0, 41].into(), json!({ "app": "mirror" })))?;
    let running = serve_requests_with(&mirror, &[])?;
    stage.mesh.ready()?;
    let backend = json!({ "name": "mirror", "port": 80 });
    let rules = json!([{
        "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": backend } }],
        "backendRefs": [{ "name": "web", "port": 80 }],
    }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "web")
        .with("spec", json!({ "parentRefs": [service("web")], "rules": rules }));
    stage.mesh.lab.apply(&route)?;
    let counted = |outcome: &str| {
        let labels = [("outcome", outcome), ("destination_service", "mirror")];
        stage.counted("undermesh_http_mirrored_total", &labels)
    };
    eventually(SOON, "requests are mirrored", || {
        let before = counted("sent")?;
        stage.ask("/", &[])?;
        eventually(Duration::from_secs(1), "the copy is counted", || {
            ensure!(counted("sent")? > before, "no copy arrives");
            Ok(())
        })
    })?;
    // One after the other: copies have room for two of these, and a mirror may be slower than who is mirrored.
    for version in [&[][..], &["--http2"]] {
        for nth in 1..=5 {
            let before = counted("sent")?;
            stage.ask("/", &[&["--method", "POST", "--body", "8000000"], version].concat())?.all(200)?;
            eventually(SOON, "the copy is counted", || {
                ensure!(counted("sent")? > before, "{version:?}: copy {nth} is not counted as sent");
                Ok(())
            })?;
        }
    }
    for outcome in ["dropped", "failed"] {
        ensure!(counted(outcome)? == 0.0, "a copy is {outcome}");
    }
    // One that takes connections and answers nothing has time, but no more than a copy is given; that costs clients nothing.
    running.signal(Signal::SIGSTOP);
    stage.ask("/", &["--method", "POST", "--body", "8000000", "--count", "5"])?.all(200)?;
    running.signal(Signal::SIGCONT);
    Ok(())
}

//! Connections end as they end without the mesh: half-closed, reset, refused.
//!
//! A script for each side is followed without the mesh first; then with it, each side must see the same, step by step.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{AgentOptions, Manifest, Process, eventually, patient};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::full_server;
use crate::mesh::{Mesh, OPENED, PORT, REFUSED, SERVICE_PORT, at, counted, listen, service_ips};
use crate::tunnel::SOON;

/// A witness waits for the other side for 20 s at most.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the client does, what the server does.
pub struct Story {
    name: &'static str,
    client: &'static str,
    server: &'static str,
}

pub const HALF_CLOSES: [Story; 7] = [
    Story {
        name: "the server closes before a late reader has begun",
        client: "pause:300,drain:5000000:1,hear-end",
        server: "pour:5000000:1",
    },
    Story {
        name: "the client closes before a late reader has begun",
        client: "pour:5000000:2",
        server: "pause:300,drain:5000000:2,hear-end",
    },
    Story {
        name: "the server speaks first",
        client: "hear:7,say:hello,hear-end",
        server: "say:welcome,hear:5,say:bye",
    },
    Story {
        name: "the client ends its stream, the server goes on sending",
        client: "say:question,shut,hear:6,hear-end",
        server: "hear-end,say:answer,pour:300000:1",
    },
    Story {
        name: "the server ends its stream, the client goes on sending",
        client: "hear-end,pour:300000:2,say:last",
        server: "say:first,shut,drain:300000:2,hear:4,hear-end",
    },
    Story { name: "both end at once", client: "say:ping,shut,hear-end", server: "say:pong,shut,hear-end" },
    Story {
        name: "the client ends its stream without a word",
        client: "shut,hear-end",
        server: "hear-end,say:answer",
    },
];

pub const RESETS: [Story; 11] = [
    Story {
        name: "the client closes with unread bytes",
        client: "say:ping,hear:2",
        server: "hear:4,say:pong,hear:1",
    },
    Story { name: "the client resets", client: "say:ping,hear:4,reset", server: "hear:4,say:pong,hear:1" },
    Story { name: "the server resets", client: "say:ping,hear:4,hear:1", server: "hear:4,say:pong,reset" },
    Story {
        name: "the client resets while nobody reads or writes",
        client: "say:ping,hear:4,reset",
        server: "hear:4,say:pong,broken",
    },
    Story {
        name: "the server resets while nobody reads or writes",
        client: "say:ping,hear:4,broken",
        server: "hear:4,say:pong,reset",
    },
    Story {
        name: "the client resets after it had ended its stream, the server is idle",
        client: "say:ping,shut,hear:4,reset",
        server: "hear-end,say:pong,broken",
    },
    Story {
        name: "the server resets after it had ended its stream, the client is idle",
        client: "say:ping,hear-end,say:pong,broken",
        server: "hear:4,shut,hear:4,reset",
    },
    Story {
        name: "the server resets after the client had ended its stream",
        client: "say:ping,shut,hear:1",
        server: "hear-end,reset",
    },
    Story {
        name: "the client resets after the server had ended its stream",
        client: "hear-end,say:ping,reset",
        server: "shut,hear:4,hear:1",
    },
    Story { name: "the client resets and the server has not read", client: "fill:1,reset", server: "broken" },
    Story { name: "the server resets and the client has not read", client: "broken", server: "fill:1,reset" },
];

#[test]
fn half_closes_are_passed_on() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    same_with_and_without("um-e2e-half-close", &HALF_CLOSES, |mesh| mesh.start(&[]))?;
    same_with_and_without("um-e2e-half-plain", &HALF_CLOSES, |mesh| mesh.start_plaintext(&[]))
}

#[test]
fn resets_are_passed_on() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    same_with_and_without("um-e2e-reset", &RESETS, |mesh| mesh.start(&[]))?;
    same_with_and_without("um-e2e-reset-plain", &RESETS, |mesh| mesh.start_plaintext(&[]))
}

#[test]
fn what_was_refused_is_now_accepted_and_reset() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-refused")?;
    let dial = |mesh: &Mesh| -> Result<Vec<Value>> {
        let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        let args = ["--script", "hear-end"];
        ips.map(|ip| mesh.client(&[&["connect", &at(ip, 9)], args.as_slice()].concat())).collect()
    };
    for told in dial(&mesh)? {
        ensure!(told[0]["connect"] == "ECONNREFUSED", "without the mesh: {told}");
    }
    mesh.start(&[])?;
    for told in dial(&mesh)? {
        ensure!(told[0]["connect"] == "ok" && told[0]["saw"][0] == "|ECONNRESET", "with the mesh: {told}");
    }
    // The agent that dials the server sees the refusal. Across nodes that is the far one; to the near one it looks
    // like a connection that was reset, or never came about, depending on how fast the reset is.
    for (agent, server) in mesh.agents.iter().zip(mesh.servers()) {
        agent.wait_metrics(Duration::from_secs(5), "the refused connections are counted", |metrics| {
            let labels = [("reason", "connect_refused"), ("destination_workload", server.name())];
            metrics.sum(REFUSED, &labels) == 2.0
        })?;
    }
    Ok(())
}

/// The agent that dials tells the client's agent through the tunnel.
#[test]
fn both_ends_of_a_tunnel_know_why_a_server_is_not_reached() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = Mesh::running("um-e2e-told", &["--connect-timeout", "1"])?;
    // Else the client's agent would be the first to give up.
    mesh.agents[0].terminate(SOON)?;
    mesh.agents[0] = mesh.nodes[0].spawn_agent(AgentOptions::default())?;
    mesh.agents[0].wait_ready(SOON)?;
    mesh.agents[1].wait_published(&[mesh.far.ip()], SOON)?;
    let _full = full_server(&mesh.far, 9)?;
    let told = mesh.client(&["connect", &at(mesh.far.ip(), 9), "--script", "hear-end"])?;
    ensure!(told[0]["saw"][0] == "|ECONNRESET", "{told}");
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("reason", "connect_timeout")];
        agent.wait_metrics(SOON, reporter, |metrics| metrics.sum(REFUSED, &labels) == 1.0)?;
    }
    Ok(())
}

#[test]
fn an_unreachable_server_resets_within_the_time_limit() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-unreachable", &["--connect-timeout", "2"])?;
    mesh.lab.cut(&mesh.nodes[1])?;
    let began = Instant::now();
    let told = mesh.client(&["connect", &at(mesh.far.ip(), PORT), "--script", "hear-end"])?;
    let took = began.elapsed();
    ensure!(told[0]["connect"] == "ok" && told[0]["saw"][0] == "|ECONNRESET", "{told}");
    ensure!(took < patient(Duration::from_secs(5)), "it took {took:?}");
    mesh.agent().wait_metrics(Duration::from_secs(5), "the lost way is counted", |metrics| {
        counted(metrics, REFUSED, "connect_timeout") + counted(metrics, REFUSED, "connect_unreachable") == 1.0
    })?;
    Ok(())
}

/// The relay passes no urgent byte on, and a server that asks for none misses none.
#[test]
fn urgent_data_leaves_the_rest_of_the_stream_whole() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let story =
        Story { name: "urgent", client: "say:one,urgent:X,say:two,shut,hear-end", server: "hear-end" };
    same_with_and_without("um-e2e-urgent", &[story], |mesh| mesh.start(&[]))
}

#[test]
fn a_service_that_cannot_serve_resets() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-no-endpoints")?;
    let empty: [IpAddr; 2] = ["10.96.0.30".parse()?, "fd96::30".parse()?];
    mesh.lab.apply(&Manifest::service(
        "shop",
        "empty",
        &empty,
        &[(SERVICE_PORT, PORT)],
        &[("app", "nobody")],
    ))?;
    let without = dial_all(&mesh, &empty)?;
    mesh.start(&[])?;
    for (family, ip) in service_ips(&mesh.near).into_iter().enumerate() {
        let told = mesh.client(&["connect", &at(ip, 81), "--script", "hear-end"])?;
        ensure!(told[0]["connect"] == "ok" && told[0]["saw"][0] == "|ECONNRESET", "port 81 of {ip}: {told}");
        mesh.agent().wait_metrics(Duration::from_secs(5), "the unknown port is counted", |metrics| {
            counted(metrics, REFUSED, "unknown_port") == (family + 1) as f64
        })?;
    }
    mesh.near.set_ready(false)?;
    for (family, ip) in service_ips(&mesh.near).into_iter().enumerate() {
        eventually(Duration::from_secs(5), "the Service has no endpoint any more", || {
            let told = mesh.client(&["connect", &at(ip, SERVICE_PORT), "--script", "shut,hear-end"])?;
            ensure!(told[0]["connect"] == "ok" && told[0]["saw"][1] == "|ECONNRESET", "{ip}: {told}");
            Ok(())
        })?;
        mesh.agent().wait_metrics(Duration::from_secs(5), "the lack is counted", |metrics| {
            counted(metrics, REFUSED, "no_endpoints") == (family + 1) as f64
        })?;
    }
    // One that never had any is not known to the mesh, and goes where it went without it.
    let with = dial_all(&mesh, &empty)?;
    ensure!(with == without, "without: {without:?}\n   with: {with:?}");
    Ok(())
}

fn dial_all(mesh: &Mesh, ips: &[IpAddr]) -> Result<Vec<String>> {
    ips.iter()
        .map(|ip| Ok(mesh.client(&["connect", &at(*ip, SERVICE_PORT)])?[0]["connect"].to_string()))
        .collect()
}

/// Follows every story to both servers, first without and then with the agents.
fn same_with_and_without(
    name: &str,
    stories: &[Story],
    start: impl Fn(&mut Mesh) -> Result<()>,
) -> Result<()> {
    let mut mesh = Mesh::create(name)?;
    let stages = stages(&mesh, stories)?;
    let without = follow(&mesh, &stages, 0)?;
    start(&mut mesh)?;
    let with = follow(&mesh, &stages, 1)?;
    let mut wrong = String::new();
    for (without, with) in without.iter().zip(&with).filter(|(without, with)| without != with) {
        wrong.push_str(&format!("without: {without}\n   with: {with}\n"));
    }
    ensure!(wrong.is_empty(), "{wrong}");
    let captured = mesh.agent().metrics()?.sum(OPENED, &[("reporter", "source")]);
    ensure!(captured == stages.len() as f64, "{captured} of {} connections were captured", stages.len());
    Ok(())
}

/// One story with one server.
struct Stage<'a> {
    story: &'a Story,
    to: String,
    server: Process,
}

fn stages<'a>(mesh: &Mesh, stories: &'a [Story]) -> Result<Vec<Stage<'a>>> {
    let mut stages = Vec::new();
    for pod in mesh.servers() {
        for (story, port) in stories.iter().zip(7100..) {
            let server = listen(pod, port, &["--script", story.server])?;
            stages.push(Stage { story, to: at(pod.ip(), port), server });
        }
    }
    Ok(stages)
}

/// What both sides of every stage saw, a line each. The servers have told of so many earlier connections.
fn follow(mesh: &Mesh, stages: &[Stage<'_>], earlier: usize) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    for Stage { story, to, server } in stages {
        let client = mesh.client(&["connect", to, "--script", story.client])?;
        let what = format!("the server of \"{}\" is done; the client saw {client}", story.name);
        let told = eventually(PATIENCE, &what, || {
            server.output().lines().nth(earlier).map(str::to_owned).context("it has not told what it saw")
        })?;
        let told: Value = serde_json::from_str(&told)?;
        seen.push(format!("{} ({to}): client {}, server {}", story.name, client[0]["saw"], told["saw"]));
    }
    Ok(seen)
}

//! Certificates from an authority that speaks Istio's protocol: while it answers, while it is away, while it refuses.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Pod, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{Mesh, OPENED, PORT, at, names, witness};
use crate::tunnel::{HANDSHAKES, SOON, authority};
use crate::tunnel_identity::not_ready;

const RENEWALS: &str = "undermesh_certificate_renewals_total";

/// What the authority takes.
const TOKEN: &str = "token-of-the-node";

/// The shortest life that an agent asks for.
const LIFE: Duration = Duration::from_secs(30);

fn address(mesh: &Mesh) -> String {
    SocketAddr::new(mesh.nodes[0].addresses()[0], 15012).to_string()
}

/// Starts the authority on the first node, and waits until it listens.
fn start_authority(mesh: &Mesh) -> Result<Process> {
    let mut istiod = Command::new(binary("istiod")?);
    istiod.arg("--ca-dir").arg(mesh.lab.dir().join("ca"));
    istiod.args(["--address", &address(mesh), "--token", TOKEN]);
    let istiod = mesh.nodes[0].spawn(istiod)?;
    eventually(SOON, "the authority listens", || {
        ensure!(istiod.output().contains("listening"), "{}", istiod.output());
        Ok(())
    })?;
    Ok(istiod)
}

fn agent_args(mesh: &Mesh) -> Vec<String> {
    let file = |name: &str| mesh.lab.dir().join(name).display().to_string();
    let address = format!("https://{}", address(mesh));
    let (root, token, state) = (file("ca/root-1.pem"), file("token"), file("state"));
    ["--ca-address", &address, "--ca-root", &root, "--ca-token", &token, "--state-dir", &state]
        .into_iter()
        .chain(["--certificate-lifetime", "30s"])
        .map(str::to_owned)
        .collect()
}

fn set_token(mesh: &Mesh, token: &str) -> Result<()> {
    Ok(fs::write(mesh.lab.dir().join("token"), token)?)
}

/// Waits until each agent has had so many requests of this outcome.
fn wait_renewals(mesh: &Mesh, result: &str, count: f64) -> Result<()> {
    for agent in &mesh.agents {
        let what = format!("{count} requests of {} end with {result}", agent.node().name());
        agent.wait_metrics(2 * LIFE, &what, |m| m.sum(RENEWALS, &[("result", result)]) >= count)?;
    }
    Ok(())
}

fn dial(from: &Pod, to: &Pod) -> Result<()> {
    names(&witness(from, &["connect", &at(to.ip(), PORT)])?).map(drop)
}

#[test]
fn renewal_goes_on_after_the_authority_was_away() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-grpc-authority")?;
    authority(&mesh.lab)?;
    set_token(&mesh, TOKEN)?;
    let mut istiod = start_authority(&mesh)?;
    let args = agent_args(&mesh);
    mesh.start(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    dial(&mesh.client, &mesh.far)?;
    wait_renewals(&mesh, "success", 2.0)?;

    istiod.kill();
    wait_renewals(&mesh, "unavailable", 1.0)?;
    // A handshake of its own, by the certificates that are there.
    dial(&mesh.near, &mesh.far)?;

    let _istiod = start_authority(&mesh)?;
    wait_renewals(&mesh, "success", 3.0)?;
    // What was there before the authority went has expired by now.
    std::thread::sleep(LIFE * 2 / 3);
    dial(&mesh.far, &mesh.client)?;
    let tunnels = [("reporter", "source"), ("result", "success")];
    let plain = [("security", "plaintext")];
    for (agent, tunnels_made) in mesh.agents.iter().zip([2.0, 1.0]) {
        agent.wait_metrics(SOON, "all went through tunnels", |m| {
            m.sum(HANDSHAKES, &tunnels) == tunnels_made && m.sum(OPENED, &plain) == 0.0
        })?;
    }
    Ok(())
}

#[test]
fn a_wrong_token_is_refused_and_told_of() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    const WRONG: &str = "token-of-somebody-else";
    let mut mesh = Mesh::create("um-e2e-grpc-token")?;
    authority(&mesh.lab)?;
    set_token(&mesh, WRONG)?;
    let istiod = start_authority(&mesh)?;
    let args = agent_args(&mesh);
    let options = || crate::kit::options(&args.iter().map(String::as_str).collect::<Vec<_>>());
    for node in &mesh.nodes {
        mesh.agents.push(node.spawn_agent(options())?);
    }
    let why = "the certificate authority refuses: Unauthenticated: the token is not valid";
    for agent in &mesh.agents {
        eventually(SOON, "the agent runs", || agent.metrics())?;
        not_ready(agent, why)?;
        agent.wait_metrics(SOON, "it is counted", |m| m.sum(RENEWALS, &[("result", "refused")]) >= 1.0)?;
        let log = agent.process().output();
        ensure!(log.lines().any(|line| line.contains("WARN") && line.contains(why)), "{log}");
        ensure!(!log.contains(WRONG), "the log has the token: {log}");
    }
    ensure!(
        istiod.output().contains("refused spiffe://cluster.local/ns/shop/sa/default"),
        "{}",
        istiod.output()
    );

    // The token is read anew for each request.
    set_token(&mesh, TOKEN)?;
    for agent in &mut mesh.agents {
        agent.wait_ready(2 * LIFE)?;
    }
    mesh.agents[1].wait_published(&[mesh.far.ip()], SOON)?;
    dial(&mesh.client, &mesh.far)?;
    let through = [("reporter", "destination"), ("security", "mutual_tls")];
    mesh.agents[1].wait_metrics(SOON, "by a tunnel", |m| m.sum(OPENED, &through) == 1.0)?;
    Ok(())
}

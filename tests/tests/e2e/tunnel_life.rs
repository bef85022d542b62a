//! Tunnels that die, are told to go, or lead to a pod that leaves the mesh: what has begun goes on where it can, and
//! nothing new is lost.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::intruders::publish;
use crate::kit::{Mesh, PORT, Run, SHOP, SOON, Talk, dial, serve};
use crate::mesh::{OPENED, REFUSED};
use crate::pki::{Authority, Leaf};

const TUNNELS: &str = "undermesh_tunnels_open";

/// A client and a server on another node that takes tunnels.
fn pair(name: &str, args: &[&str]) -> Result<(Mesh, Pod, Pod)> {
    let mut mesh = Mesh::start(name, 2, args)?;
    let (client, far) = (mesh.pod(0, "client")?, mesh.pod(1, "far")?);
    std::mem::forget(serve(&far)?);
    mesh.ready()?;
    Ok((mesh, client, far))
}

fn opened(mesh: &Mesh, security: &str) -> Result<f64> {
    Ok(mesh.agents[0].metrics()?.sum(OPENED, &[("reporter", "source"), ("security", security)]))
}

#[test]
fn a_tunnel_whose_agent_was_replaced_costs_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mut mesh, client, far) = pair("um-e2e-tunnel-replaced", &[])?;
    for _ in 0..3 {
        dial(&client, far.ip(), 5)?.all_served()?;
        mesh.agents[1].kill();
        mesh.restart(1, &[])?;
    }
    dial(&client, far.ip(), 5)?.all_served()?;
    let (tunnelled, plaintext) = (opened(&mesh, "mutual_tls")?, opened(&mesh, "plaintext")?);
    ensure!((tunnelled, plaintext) == (20.0, 0.0), "{tunnelled} through tunnels, {plaintext} in plaintext");
    Ok(())
}

/// Packets of the tunnels that stand are dropped from now on; new ones pass.
fn silence(client: &Pod, far: &Pod) -> Result<()> {
    let mut ss = Command::new("ss");
    ss.args(["-Htn", "state", "established", "dport", "=", ":15008"]);
    let told = client.run(ss, SOON)?.success()?;
    let local = |line: &str| Some(line.split_whitespace().nth(2)?.rsplit_once(':')?.1.to_owned());
    let ports: Vec<String> = told.lines().filter_map(local).collect();
    ensure!(!ports.is_empty(), "the client has no tunnel: {told}");
    for port in &ports {
        let mut iptables = Command::new("iptables");
        iptables.args(["-A", "INPUT", "-p", "tcp", "--dport", "15008", "--sport", port, "-j", "DROP"]);
        far.run(iptables, SOON)?.success().context("iptables")?;
    }
    Ok(())
}

#[test]
fn a_tunnel_that_fell_silent_costs_seconds_and_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let (mesh, client, far) = pair("um-e2e-tunnel-silent", &[])?;
    dial(&client, far.ip(), 5)?.all_served()?;
    silence(&client, &far)?;
    let began = Instant::now();
    let mut command = Command::new(binary("traffic")?);
    command.args(["dial", &format!("{}:7000", far.ip()), "--limit-ms", "9000"]);
    let told = client.run(command, SOON)?.success()?;
    ensure!(told.contains("\"far\":1"), "{told}");
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(6), "the dead tunnel was found out only after {took:?}");
    ensure!(opened(&mesh, "plaintext")? == 0.0, "the connection went past the tunnel");
    Ok(())
}

/// A tunnel may break when the stream is asked for already: another endpoint does better.
#[test]
fn a_tunnel_that_breaks_before_its_answer_costs_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    const COUNT: usize = 20;
    let (mesh, client, far) = pair("um-e2e-tunnel-breaks", &[])?;
    let addresses = [IpAddr::from([10, 96, 0, 10]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 0x10])];
    let service = Manifest::service(SHOP, "till", &addresses, &[(PORT, PORT)], &[("app", far.name())]);
    mesh.lab.apply(&service)?;
    // Of the same service account as every pod here, so it is who its client expects.
    let breaker = mesh.lab.add_node()?.add_pod(PodSpec::new(SHOP, "breaker").label("app", far.name()))?;
    let certificate = Authority::of_lab(&mesh.lab)?.sign(mesh.lab.dir(), "breaker", Leaf::GOOD)?;
    let script = mesh.lab.dir().join("breaker.py");
    fs::write(&script, include_str!("breaker.py"))?;
    let mut python = Command::new("python3");
    python.arg(&script).arg(&certificate);
    let broken = breaker.spawn(python)?;
    breaker.wait_listening(15008)?;
    publish(&mesh.lab, &mesh.agents[0], &breaker)?;
    let asked = || broken.output().lines().count();

    for ip in addresses {
        let before = asked();
        let served = eventually(SOON, "the Service is known", || dial(&client, ip, 1)?.all_served())?;
        ensure!(served.keys().eq(["far"]), "{ip} is served by {served:?}");
        dial(&client, ip, COUNT)?.all_served()?;
        ensure!(asked() > before, "{ip}: no tunnel broke");
    }
    // Where there is no other endpoint the client hears of it.
    for ip in [breaker.ip(), breaker.ip6()] {
        dial(&client, ip, COUNT)?.all_failed("ECONNRESET")?;
    }
    let labels =
        [("reason", "connect_reset"), ("security", "mutual_tls"), ("destination_workload", "breaker")];
    let refused = mesh.agents[0].metrics()?.sum(REFUSED, &labels);
    ensure!(refused == 2.0 * COUNT as f64, "{refused} are counted");
    ensure!(opened(&mesh, "plaintext")? == 0.0, "connections went past the tunnel");
    Ok(())
}

/// While an agent is down, its pods are reached as it has chosen: past it, or not at all.
#[test]
fn a_server_whose_agent_is_down_is_reached_as_it_chose() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    for mode in ["open", "closed"] {
        let name = format!("um-e2e-tunnel-down-{mode}");
        let (mut mesh, client, far) = pair(&name, &["--on-agent-down", mode])?;
        let strict = mesh.add(1, PodSpec::new(SHOP, "strict").annotation("undermesh.io/mtls", "strict"))?;
        let _server = serve(&strict)?;
        mesh.ready()?;
        for pod in [&far, &strict] {
            dial(&client, pod.ip(), 5)?.all_served()?;
        }
        ensure!(opened(&mesh, "mutual_tls")? == 10.0, "not all went through tunnels");
        mesh.agents[1].kill();
        for ip in [far.ip(), far.ip6()] {
            let dialled = dial(&client, ip, 5)?;
            match mode {
                "open" => dialled.all_served().map(drop)?,
                _ => dialled.all_failed("ECONNRESET")?,
            }
        }
        dial(&client, strict.ip(), 5)?.all_failed("ECONNRESET")?;
        let metrics = mesh.agents[0].metrics()?;
        let (bypasses, down) = match mode {
            "open" => (10.0, 5.0),
            _ => (0.0, 15.0),
        };
        let told = metrics.sum("undermesh_tunnel_bypasses_total", &[]);
        let refused = metrics.sum(REFUSED, &[("reason", "agent_down")]);
        ensure!((told, refused) == (bypasses, down), "{mode}: {told} bypasses, {refused} refused");
        mesh.restart(1, &["--on-agent-down", mode])?;
        dial(&client, far.ip(), 5)?.all_served()?;
        ensure!(opened(&mesh, "mutual_tls")? == 15.0, "the agent is back, and there is no tunnel");
    }
    Ok(())
}

#[test]
fn un_enrolling_the_server_under_load_costs_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, client, far) = pair("um-e2e-tunnel-leaves", &[])?;
    let mut talk = Talk::begin(&client, far.ip())?;
    let run = Run::begin(&client, far.ip(), 2)?;
    for _ in 0..3 {
        far.set_mesh(false)?;
        mesh.wait_enrolled(1, 0)?;
        talk.goes_on()?;
        far.set_mesh(true)?;
        mesh.wait_enrolled(1, 1)?;
        talk.goes_on()?;
    }
    mesh.agents[1].wait_published(&[far.ip()], SOON)?;
    let before = opened(&mesh, "mutual_tls")?;
    dial(&client, far.ip6(), 5)?.all_served()?;
    ensure!(opened(&mesh, "mutual_tls")? >= before + 5.0, "back in the mesh, and still no tunnel");
    let ran = run.end()?;
    ensure!(ran.failed_in_all == 0, "of {} connections some failed: {:?}", ran.made, ran.failed);
    talk.end()
}

#[test]
fn a_pod_that_leaves_takes_its_tunnels_along() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, client, far) = pair("um-e2e-tunnel-gone", &[])?;
    dial(&client, far.ip(), 5)?.all_served()?;
    dial(&client, far.ip6(), 5)?.all_served()?;
    for agent in &mesh.agents {
        ensure!(agent.metrics()?.sum(TUNNELS, &[]) >= 1.0, "no tunnel on {}", agent.node().name());
    }
    client.set_mesh(false)?;
    for agent in &mesh.agents {
        agent.wait_metrics(SOON, "no tunnel is left", |m| m.sum(TUNNELS, &[]) == 0.0)?;
    }
    Ok(())
}

//! Between the nodes: mutual TLS on port 15008, and nothing else.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use undermesh_tests::lab::{Lab, Pod, PodSpec, Process, binary, eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{
    LIMIT, Mesh, OPENED, PORT, REFUSED, SERVICE_PORT, at, listen, names, service_ips, witness,
};

/// The port of the tunnel.
const TUNNEL: u16 = 15008;

/// What no packet between the nodes may show.
const MARKER: &str = "plaintext-that-must-not-be-seen";

const SOON: Duration = Duration::from_secs(20);

/// A certificate authority for the lab; the arguments that have an agent use it.
fn authority(lab: &Lab) -> Result<Vec<String>> {
    let (ca, state) = (lab.dir().join("ca"), lab.dir().join("state"));
    let mut init = Command::new(binary("undermesh")?);
    init.args(["ca", "init", "--ca-dir"]).arg(&ca);
    run_here(init, LIMIT)?.success()?;
    Ok(vec!["--ca-dir".into(), ca.display().to_string(), "--state-dir".into(), state.display().to_string()])
}

/// A mesh whose nodes trust each other, once they know of each other's pods.
fn running(name: &str) -> Result<Mesh> {
    let mut mesh = Mesh::create(name)?;
    start(&mut mesh)?;
    Ok(mesh)
}

fn start(mesh: &mut Mesh) -> Result<()> {
    let args = authority(&mesh.lab)?;
    mesh.start(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    wait_published(mesh, &mesh.far)
}

/// Waits until the other node's pod is known to take tunnels.
fn wait_published(mesh: &Mesh, pod: &Pod) -> Result<()> {
    let statement = mesh.lab.dir().join(format!("state/enrolled-{}.json", pod.node().name()));
    eventually(SOON, &format!("{} is published", pod.name()), || {
        let text = fs::read_to_string(&statement)?;
        ensure!(text.contains(&format!("\"{}\"", pod.ip())), "{text}");
        Ok(())
    })?;
    // The other agent is told at once; it may need a moment to read.
    std::thread::sleep(Duration::from_millis(300));
    Ok(())
}

#[test]
fn pods_of_two_nodes_talk_through_mutual_tls() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = running("um-e2e-tunnel")?;
    let mut count = 0.0;
    for (number, ip) in [mesh.far.ip(), mesh.far.ip6()].into_iter().enumerate() {
        let service = service_ips(&mesh.far)[number];
        for to in [at(ip, PORT), at(service, SERVICE_PORT)] {
            let seen = names(&mesh.client(&["connect", &to])?)?;
            // The server's socket is of both families.
            let seen = seen.replace(&format!("[::ffff:{ip}]"), &ip.to_string());
            let client = if ip.is_ipv6() { mesh.client.ip6() } else { mesh.client.ip() };
            // The client's address *and port*, which only the tunnel can carry.
            let seen = seen.replace(&format!("[::ffff:{client}]"), &client.to_string());
            let (own, server) = (at_port(client), at(ip, PORT));
            let expected = format!("client {own} sees {to}, server {server} sees {own}, accepted {own}");
            ensure!(seen == expected, "\n     saw: {seen}\nexpected: {expected}");
            count += 1.0;
        }
    }
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("security", "mutual_tls"), ("source_workload", "client")];
        agent.wait_metrics(SOON, reporter, |metrics| metrics.sum(OPENED, &labels) == count)?;
        let plaintext = agent.metrics()?.sum(OPENED, &[("security", "plaintext")]);
        ensure!(plaintext == 0.0, "{plaintext} plaintext connections on {}", agent.node().name());
    }
    Ok(())
}

/// As [`names`] writes the client's own name.
fn at_port(ip: IpAddr) -> String {
    let address = at(ip, 1);
    format!("{}:PORT", address.strip_suffix(":1").unwrap_or(&address))
}

//! A pod's space of source ports is what it is without the mesh: one for each destination, and for those who call it no bound.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;
use undermesh_tests::lab::{Node, Pod, PodSpec, Process, binary, in_netns};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{BYPASSED, LIMIT, Mesh, OPENED, REFUSED, at, witness_within};

const PORT: u16 = 7002;

#[test]
fn three_hundred_ports_hold_750_connections_to_three_destinations() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut crowd = Crowd::create("um-e2e-ports-few")?;
    has_three_hundred_ports(&crowd.mesh.client)?;
    crowd.mesh.start(&[])?;
    for family in [Pod::ip, Pod::ip6] {
        crowd.connect(&crowd.all(), family, 750, 750, LIMIT)?;
    }
    Ok(())
}

/// Its clients end their connections first, which keeps ports in TIME_WAIT.
#[test]
fn a_server_with_three_hundred_ports_takes_two_thousand_connections() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut crowd = Crowd::create("um-e2e-ports-server")?;
    has_three_hundred_ports(&crowd.mesh.far)?;
    crowd.mesh.start(&[])?;
    for family in [Pod::ip, Pod::ip6] {
        crowd.connect(&[&crowd.mesh.far], family, 2000, 750, LIMIT)?;
    }
    Ok(())
}

#[test]
fn sixty_thousand_connections_leave_one_pod_for_three_destinations() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut crowd = Crowd::create("um-e2e-ports-many")?;
    crowd.mesh.start(&[])?;
    // The agent needs two descriptors for each, and some apart.
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let at_once = (descriptors.saturating_sub(1500) / 2).min(20_000) as usize;
    crowd.connect(&crowd.all(), Pod::ip, 60_000, at_once, Duration::from_secs(240))
}

/// Before the agent comes, which takes one of them for its listeners.
fn has_three_hundred_ports(pod: &Pod) -> Result<()> {
    in_netns(pod.netns(), || Ok(std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40299")?))
}

struct Crowd {
    _servers: Vec<Process>,
    third: Pod,
    mesh: Mesh,
}

impl Crowd {
    fn create(name: &str) -> Result<Self> {
        let mesh = Mesh::create(name)?;
        let node: &Node = &mesh.nodes[0];
        let third = node.add_pod(PodSpec::new("shop", "third"))?;
        let mut servers = Vec::new();
        for pod in [&mesh.near, &mesh.far, &third] {
            let mut reflect = Command::new(binary("witness")?);
            reflect.args(["reflect", "--port", &PORT.to_string()]);
            servers.push(pod.spawn(reflect)?);
            pod.wait_listening(PORT)?;
        }
        Ok(Self { _servers: servers, third, mesh })
    }

    fn all(&self) -> [&Pod; 3] {
        [&self.mesh.near, &self.mesh.far, &self.third]
    }

    /// Connects in turn to these servers, and requires that every connection was made, captured and answered.
    fn connect(
        &self,
        servers: &[&Pod],
        family: fn(&Pod) -> std::net::IpAddr,
        total: usize,
        at_once: usize,
        limit: Duration,
    ) -> Result<()> {
        let mesh = &self.mesh;
        let opened = || -> Result<f64> { Ok(mesh.agent().metrics()?.sum(OPENED, &[("reporter", "source")])) };
        let before = opened()?;
        let (total_arg, at_once_arg) = (total.to_string(), at_once.to_string());
        let to: Vec<_> = servers.iter().map(|pod| at(family(pod), PORT)).collect();
        let mut args = vec!["crowd", "--total", &total_arg, "--at-once", &at_once_arg];
        args.extend(to.iter().map(String::as_str));
        let told = witness_within(&mesh.client, &args, limit)?;
        eprintln!("{total} connections: {told}");
        ensure!(told["made"] == total && told["failed"] == json!({}), "not all were made: {told}");
        ensure!(told["most_at_once"] == total.min(at_once), "they were not held at one time: {told}");
        let metrics = mesh.agent().metrics()?;
        let (bypassed, refused) = (metrics.sum(BYPASSED, &[]), metrics.sum(REFUSED, &[]));
        ensure!(bypassed == 0.0 && refused == 0.0, "{bypassed} were bypassed, {refused} refused");
        let captured = opened()? - before;
        ensure!(captured == total as f64, "{captured} of {total} were captured");
        Ok(())
    }
}

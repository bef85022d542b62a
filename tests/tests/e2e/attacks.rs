//! What a pod, a neighbour or a misfortune might try against the mesh, and does not get.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::{AgentOptions, Manifest, Node, Pod, PodSpec, eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{KERNEL_REFUSED, LIMIT, Mesh, OPENED, PORT, REFUSED, at, counted, listen, witness};

const SOON: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;

#[test]
fn a_neighbour_dials_no_code_in_a_pods_name() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Kernel(5, 17));
    let mesh = Mesh::running("um-e2e-neighbour", &[])?;
    let stranger = stranger(&mesh)?;
    // The pod routes the IPv6 codes to itself, so whoever is next to it can send packets there.
    let via = mesh.near.ip6().to_string();
    let mut route = Command::new("ip");
    route.args(["-6", "route", "add", "fd75:6d65:7368:1::/64", "via", &via]);
    stranger.run(route, LIMIT)?.success()?;

    for code in 16..32 {
        let told = witness(&stranger, &["connect", &format!("[fd75:6d65:7368:1::{code:x}]:{PORT}")])?;
        ensure!(told[0]["connect"] == "ECONNREFUSED", "code {code}: the stranger saw {told}");
    }
    let metrics = mesh.agent().metrics()?;
    let opened = metrics.sum(OPENED, &[]);
    ensure!(opened == 0.0, "{opened} connections went through");
    let refused = counted(&metrics, KERNEL_REFUSED, "listener_dial");
    ensure!(refused >= 16.0, "{refused} of 16 dials were counted");
    Ok(())
}

#[test]
fn connections_that_no_server_accepts_leave_no_voucher() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("nginx"), Feature::Program("bpftool"));
    let mesh = Mesh::running("um-e2e-vouchers", &[])?;
    // TCP_DEFER_ACCEPT: until the first byte the server has no socket for the connection.
    let conf = mesh.lab.dir().join("deferred.conf");
    let pid = mesh.lab.dir().join("deferred.pid");
    fs::write(
        &conf,
        format!(
            "daemon off; pid {}; error_log stderr; events {{}} \
             http {{ access_log off; server {{ listen 7009 deferred; location / {{ return 200; }} }} }}",
            pid.display()
        ),
    )?;
    let mut nginx = Command::new("nginx");
    nginx.arg("-c").arg(&conf);
    let _nginx = mesh.near.spawn(nginx)?;
    mesh.near.wait_listening(7009)?;
    for _ in 0..20 {
        witness(&mesh.client, &["connect", &at(mesh.near.ip(), 7009), "--script", "reset"])?;
    }
    // A reset that comes before the agent has dialled leaves nothing to vouch for, and counts as refused.
    mesh.agent().wait_metrics(
        SOON,
        "each of 20 connections is captured, some up to the server",
        |metrics| {
            let source = [("reporter", "source")];
            let opened = metrics.sum(OPENED, &source);
            opened > 0.0 && opened + metrics.sum(REFUSED, &source) == 20.0
        },
    )?;
    eventually(SOON, "every voucher is removed", || {
        let left = vouched(&mesh.nodes[0])?;
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
}

#[test]
fn a_pod_does_not_remove_the_vouchers_of_another() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    let mesh = Mesh::running("um-e2e-impostor", &[])?;
    let gate = mesh.lab.dir().join("gate");
    let mut held = Command::new(undermesh_tests::lab::binary("witness")?);
    held.args(["connect", &at(mesh.near.ip(), PORT), "--script"]);
    held.arg(format!("hear-line,gate:{},shut,hear-end", gate.display()));
    let mut held = mesh.client.spawn(held)?;
    let tuple = eventually(SOON, "the connection is vouched for", || vouched_tuple(&mesh.nodes[0]))?;

    // The impostor gives itself both ends and plays the connection inside of its own namespace.
    let impostor = mesh.nodes[0].add_pod(PodSpec::new("shop", "impostor").enrolled())?;
    mesh.agent().wait_metrics(SOON, "the impostor is enrolled", |metrics| {
        metrics.sum("undermesh_pods_enrolled", &[]) == 3.0
    })?;
    for address in [mesh.client.ip(), mesh.near.ip()] {
        let mut ip = Command::new("ip");
        ip.args(["address", "add", &format!("{address}/32"), "dev", "lo"]);
        impostor.run(ip, LIMIT)?.success()?;
    }
    let _server = listen(&impostor, tuple.1, &[])?;
    let bind = at(mesh.client.ip(), tuple.0);
    let played = witness(&impostor, &["connect", &at(mesh.near.ip(), tuple.1), "--bind", &bind])?;
    ensure!(played[0]["connect"] == "ok", "the play did not come off: {played}");
    let left = vouched(&mesh.nodes[0])?;
    ensure!(left == 1, "{left} vouchers are left of one");
    fs::write(&gate, "")?;
    held.wait(LIMIT)?;
    Ok(())
}

#[test]
fn urgent_data_in_the_midst_of_bulk_loses_nothing_else() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-urgent-bulk", &[])?;
    let (bulk, rest) = (32 * MIB, MIB);
    for server in mesh.servers() {
        let script = format!("drain:{bulk}:1,drain:{rest}:2,hear-end");
        let served = listen(server, 7001, &["--script", &script])?;
        let script = format!("pour:{bulk}:1,urgent:!,pour:{rest}:2,shut,hear-end");
        let told = mesh.client(&["connect", &at(server.ip(), 7001), "--script", &script])?;
        let saw = eventually(SOON, "the server has seen the end", || {
            served.output().lines().next().map(str::to_owned).context("nothing yet")
        })?;
        ensure!(
            saw.contains(&format!("drained {bulk}")) && saw.contains(&format!("drained {rest}")),
            "{}: the client saw {told}, the server {saw}",
            server.name()
        );
    }
    Ok(())
}

#[test]
fn a_strict_pod_that_a_new_agent_cannot_enrol_stays_shut() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::running("um-e2e-reenrol", &[])?;
    let stranger = stranger(&mesh)?;
    mesh.near.update(|pod| pod.set_annotation("undermesh.io/mtls", Some("strict")))?;
    let to = at(mesh.near.ip(), PORT);
    let is_refused =
        || Ok((witness(&stranger, &["connect", &to])?[0]["connect"] == "ECONNREFUSED").then_some(()));
    eventually(SOON, "the pod is strict", is_refused)?;

    mesh.agents[0].kill();
    is_refused().context("while there was no agent")?;
    // In the way of one of the new agent's pins.
    let obstacle = pins_of(&mesh.nodes[0], "shop_near_")?.join("watch_tcp_new");
    fs::create_dir(&obstacle)?;
    mesh.agents[0] = mesh.nodes[0].spawn_agent(AgentOptions::default())?;
    mesh.agents[0].wait_metrics(SOON, "the enrolment fails", |metrics| {
        metrics.sum("undermesh_pods_not_enrolled", &[]) == 1.0
    })?;
    for _ in 0..20 {
        is_refused().context("while the pod could not be enrolled")?;
    }
    fs::remove_dir(&obstacle)?;
    mesh.agents[0].wait_ready(SOON)?;
    is_refused().context("once it was enrolled again")?;
    let told = mesh.client(&["connect", &to])?;
    ensure!(told[0]["connect"] == "ok", "a pod of the mesh saw {told}");
    Ok(())
}

/// A pod outside of the mesh, on the client's node.
fn stranger(mesh: &Mesh) -> Result<Pod> {
    mesh.lab.apply(&Manifest::namespace("outside"))?;
    mesh.nodes[0].add_pod(PodSpec::new("outside", "stranger"))
}

fn pins_of(node: &Node, prefix: &str) -> Result<std::path::PathBuf> {
    for entry in fs::read_dir(node.pins().join("pods"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} has no pins of {prefix}", node.name())
}

fn vouchers(node: &Node) -> Result<Vec<serde_json::Value>> {
    let mut dump = Command::new("bpftool");
    dump.args(["-j", "map", "dump", "pinned"]).arg(node.pins().join("maps/vouched"));
    let dump: serde_json::Value = serde_json::from_str(&run_here(dump, LIMIT)?.success()?)?;
    Ok(dump.as_array().cloned().unwrap_or_default())
}

fn vouched(node: &Node) -> Result<usize> {
    Ok(vouchers(node)?.len())
}

/// How many connections are vouched for from one pod to another, and not from what the agent dials from within a pod.
pub fn direct_vouchers(node: &Node) -> Result<usize> {
    let mut direct = 0;
    for voucher in vouchers(node)? {
        let octets: [u8; 16] =
            serde_json::from_value(voucher["formatted"]["key"]["source"]["octets"].clone())?;
        let source = IpAddr::from(octets).to_canonical().to_string();
        direct += usize::from(!source.starts_with("192.0.0.") && !source.starts_with("fd75:6d65:7368:1:"));
    }
    Ok(direct)
}

/// The ports of the first voucher: source, destination.
pub fn vouched_tuple(node: &Node) -> Result<(u16, u16)> {
    let first = vouchers(node)?.into_iter().next().context("no voucher")?;
    let key = &first["formatted"]["key"];
    let port = |name: &str| key[name].as_u64().and_then(|port| u16::try_from(port).ok());
    port("source_port")
        .zip(port("destination_port"))
        .with_context(|| format!("a voucher without ports: {first}"))
}

//! Bytes arrive whole, whatever their number and pace.

use std::process::Command;
use std::thread::scope;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{LIMIT, Mesh, PORT, at, listen, witness_within};

const MIB: u64 = 1 << 20;

#[test]
fn bulk_in_both_directions_at_once_arrives_whole() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-bulk", &[])?;
    let size = 64 * MIB;
    for pod in mesh.servers() {
        let script = format!("exchange:{size}:2:1,hear-end");
        let server = listen(pod, 7001, &["--script", &script])?;
        for (number, ip) in [pod.ip(), pod.ip6()].into_iter().enumerate() {
            let script = format!("exchange:{size}:1:2,shut,hear-end");
            let told = mesh.client(&["connect", &at(ip, 7001), "--script", &script])?;
            let whole = format!("poured {size}, drained {size}");
            ensure!(told[0]["saw"][0] == *whole && told[0]["saw"][2] == "|end", "the client at {ip}: {told}");
            let server = nth_line(&server, number)?;
            ensure!(server["saw"][0] == *whole && server["saw"][1] == "|end", "the server at {ip}: {server}");
        }
    }
    Ok(())
}

#[test]
fn a_slow_reader_slows_its_sender_and_fills_no_memory() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-slow-reader", &[])?;
    let gate = mesh.lab.dir().join("gate");
    let server_script = format!("gate:{},drain-all:1", gate.display());
    let to: Vec<String> = mesh.servers().map(|pod| at(pod.ip(), 7001)).into();
    let servers = mesh.servers().into_iter().map(|pod| listen(pod, 7001, &["--script", &server_script]));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    let before = resident(&mesh)?;

    let connections = 16;
    let (mut clients, mut marks) = (Vec::new(), Vec::new());
    for number in 0..connections {
        let mut client = Command::new(binary("witness")?);
        // It stays for as long as the gate is closed, and ends when all has been taken. Once the gate is open a sender
        // that is not held up yet would never be.
        let full = mesh.lab.dir().join(format!("full-{number}"));
        let script = format!("stuff:1,mark:{},gate:{},shut,hear-end", full.display(), gate.display());
        marks.push(full);
        client.args(["connect", &to[number % 2], "--script", &script]);
        clients.push(mesh.client.spawn(client)?);
    }
    mesh.agent().wait_metrics(Duration::from_secs(30), "every sender is relayed", |metrics| {
        metrics.sum("undermesh_tcp_connections_active", &[("reporter", "source")]) == connections as f64
    })?;
    eventually(Duration::from_secs(60), "every sender is held up", || {
        let missing: Vec<_> = marks.iter().filter(|mark| !mark.exists()).collect();
        ensure!(missing.is_empty(), "{missing:?} are not");
        Ok(())
    })?;
    let grown = resident(&mesh)?.saturating_sub(before);
    // In the kernel, but for the half that is across nodes: a stream's window is what may be under way in a tunnel.
    let windows = connections as u64 / 2 * 4 * MIB;
    ensure!(
        grown < 24 * MIB + windows,
        "the agents' memory grew by {grown} bytes for {connections} slow readers"
    );

    std::fs::write(&gate, "")?;
    let mut sent = Vec::new();
    for client in &mut clients {
        client.wait(LIMIT)?;
        let told: Value = serde_json::from_str(&client.output())?;
        let bytes = told[0]["saw"][0].as_str().and_then(|bytes| bytes.parse::<u64>().ok());
        sent.push(bytes.with_context(|| format!("a sender saw {told}"))?);
        ensure!(told[0]["saw"][4] == "|end", "a sender saw {told}");
    }
    let most = kernel_buffers()?;
    ensure!(sent.iter().all(|bytes| *bytes < most), "a sender was not held up at {most} bytes: {sent:?}");
    let mut received = Vec::new();
    for server in &servers {
        for number in 0..connections / 2 {
            let told = nth_line(server, number)?;
            let bytes = told["saw"][1].as_str().and_then(|bytes| bytes.parse::<u64>().ok());
            received.push(bytes.with_context(|| format!("a receiver saw {told}"))?);
        }
    }
    sent.sort_unstable();
    received.sort_unstable();
    ensure!(sent == received, "sent {sent:?}, received {received:?}");
    Ok(())
}

#[test]
fn an_idle_minute_ends_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    // Every second a probe, so that sixty have been answered by the end.
    let keepalive = ["--keepalive-time", "1", "--keepalive-interval", "1", "--keepalive-probes", "3"];
    let mesh = Mesh::running("um-e2e-idle", &keepalive)?;
    let script = "hear-line,say:ping,hear:4,pause:60000,say:still,hear:5,shut,hear-end";

    let dial = |ip| {
        let to = at(ip, PORT);
        witness_within(&mesh.client, &["connect", &to, "--script", script], 2 * LIMIT)
    };
    let all_told = scope(|scope| {
        let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        let idle: Vec<_> = ips.map(|ip| scope.spawn(move || dial(ip))).collect();
        idle.into_iter().map(|idle| idle.join().expect("no panic")).collect::<Result<Vec<_>>>()
    })?;
    for told in all_told {
        ensure!(told[0]["saw"][5] == "still" && told[0]["saw"][7] == "|end", "after an idle minute: {told}");
    }
    Ok(())
}

/// The line that a scripted server prints at the end of its n-th connection.
fn nth_line(server: &Process, number: usize) -> Result<Value> {
    let line = eventually(LIMIT, "the server has told what it saw", || {
        let output = server.output();
        output.lines().nth(number).map(str::to_owned).with_context(|| format!("so far: {output}"))
    })?;
    Ok(serde_json::from_str(&line)?)
}

/// Resident memory of both agents.
fn resident(mesh: &Mesh) -> Result<u64> {
    mesh.agents.iter().map(|agent| agent.process().resident_bytes()).sum()
}

/// What the kernel's own buffers may hold between a sender and a reader on another node: three connections, each with a
/// send and a receive buffer, and a pipe in each agent.
fn kernel_buffers() -> Result<u64> {
    let most = |file: &str| -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{file}"))?;
        Ok(text.split_whitespace().nth(2).context("three numbers")?.parse()?)
    };
    Ok(3 * (most("tcp_rmem")? + most("tcp_wmem")?) + 2 * MIB)
}

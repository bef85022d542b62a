//! What a client of the mesh speaks HTTP/2 with, its own node's agent: the conformance suite (h2spec), and floods.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use undermesh_tests::lab::Pod;
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::Mesh;
use crate::requests::{ask, serve_requests};

/// What need not hold: a client that does not begin with the preface of HTTP/2 speaks something else, for all that the agent knows, and
/// its bytes pass as they are. What is to be said to it is for the server to say.
const NOT_OURS: [&str; 1] = ["× 2: Sends invalid connection preface"];

#[test]
fn all_of_h2spec_holds_of_what_clients_speak_with() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("h2spec"));
    let mut mesh = Mesh::start("um-e2e-h2spec", 2, &[])?;
    let (client, near, far) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?, mesh.pod(1, "far")?);
    mesh.ready()?;
    let running = [serve_requests(&near)?, serve_requests(&far)?];
    for to in [SocketAddr::new(near.ip(), 8080), SocketAddr::new(far.ip(), 8080)] {
        let said = h2spec(&client, to)?;
        let failed: Vec<&str> = said.lines().map(str::trim).filter(|line| line.starts_with('×')).collect();
        ensure!(failed == NOT_OURS, "{to}: {said}");
        ensure!(said.contains("145 tests, 144 passed, 0 skipped, 1 failed"), "{to}: {said}");
    }
    drop(running);
    Ok(())
}

/// Whoever floods its agent with frames ends its own connection, if any, and is no burden to others.
#[test]
fn floods_of_a_client_end_its_own_connection_and_no_other() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = Mesh::start("um-e2e-h2floods", 2, &[])?;
    let (attacker, client, far) = (mesh.pod(0, "attacker")?, mesh.pod(0, "client")?, mesh.pod(1, "far")?);
    mesh.ready()?;
    let _server = serve_requests(&far)?;
    let script = mesh.lab.dir().join("caller.py");
    fs::write(&script, include_str!("caller.py"))?;
    let to = SocketAddr::new(far.ip(), 8080);
    let url = format!("http://{to}/");
    ask(&client, &url, &["--http2"])?.answered(200)?;
    for (kind, count, expected) in [
        ("reset", "20000", "goaway 11"),
        ("continuation", "200000", "goaway 11"),
        ("settings", "200000", ""),
        ("ping", "200000", ""),
        ("window", "200000", ""),
        ("streams", "20000", ""),
    ] {
        let resident = || mesh.agents[0].process().resident_bytes();
        let before = resident()?;
        let mut flood = Command::new("python3");
        flood.arg(&script).args([
            &to.ip().to_string(),
            "--plain",
            "8080",
            "flood",
            kind,
            count,
            &to.to_string(),
        ]);
        let mut flood = attacker.spawn(flood)?;
        while flood.check_running().is_ok() {
            let answer = ask(&client, &url, &["--http2"]).and_then(|asked| asked.answered(200));
            answer.with_context(|| format!("during a flood of {kind}"))?;
        }
        let told = flood.output();
        let grown = resident()?.saturating_sub(before);
        eprintln!("{} (memory grew by {grown} bytes)", told.trim());
        ensure!(told.contains(&format!("{kind}: {expected}")), "a flood of {kind}: {told}");
        ensure!(grown < 32 << 20, "a flood of {kind} took {grown} bytes of memory");
    }
    Ok(())
}

fn h2spec(client: &Pod, to: SocketAddr) -> Result<String> {
    let mut command = Command::new("h2spec");
    command.args(["--host", &to.ip().to_string(), "--port", &to.port().to_string(), "--timeout", "5"]);
    Ok(client.run(command, Duration::from_secs(120))?.stdout)
}

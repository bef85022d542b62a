//! The conformance suite of HTTP/2 (h2spec) against what a client of the mesh speaks with: its own node's agent.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::Pod;
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::Mesh;
use crate::requests::serve_requests;

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

fn h2spec(client: &Pod, to: SocketAddr) -> Result<String> {
    let mut command = Command::new("h2spec");
    command.args(["--host", &to.ip().to_string(), "--port", &to.port().to_string(), "--timeout", "5"]);
    Ok(client.run(command, Duration::from_secs(120))?.stdout)
}

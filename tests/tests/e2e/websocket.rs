//! WebSocket through the mesh, with both ends of a library that is not ours.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Lab, Pod, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SOON};

/// Debian's own: another one on the PATH does not have its modules.
pub const PYTHON: &str = "/usr/bin/python3";

#[test]
fn conversations_pass_as_they_are() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::PythonModule("websockets"));
    let mut mesh = Mesh::start("um-e2e-websocket", 2, &[])?;
    let (client, near, far) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?, mesh.pod(1, "far")?);
    mesh.ready()?;
    for (server, ip) in [(&near, near.ip()), (&far, far.ip6())] {
        let running = serve(&mesh.lab, server, 8080)?;
        converse(&mesh.lab, &client, SocketAddr::new(ip, 8080), &running)
            .with_context(|| format!("with {}", server.name()))?;
    }
    Ok(())
}

/// Starts a server and waits until it listens.
pub fn serve(lab: &Lab, pod: &Pod, port: u16) -> Result<Process> {
    let server = pod.spawn(script(lab, &["serve", &port.to_string()])?)?;
    pod.wait_listening(port)?;
    Ok(server)
}

/// Says all kinds of things; fails unless each came back as it was said, and both sides have heard how the other one ended.
pub fn converse(lab: &Lab, client: &Pod, to: SocketAddr, server: &Process) -> Result<()> {
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let talk = script(lab, &["talk", &host, &port, "/chat?room=1"])?;
    let said: Value = serde_json::from_str(&client.run(talk, Duration::from_secs(60))?.success()?)?;
    let expected = json!({
        "subprotocol": "chat.v2", "compressed": ["permessage-deflate"],
        "text": true, "empty": true, "binary": true, "big": true, "big binary": true, "in pieces": true,
        "ping": true, "both ways": true, "closed": [3007, "enough"],
        "uncompressed": true, "left": [4001, "as you wish"],
    });
    ensure!(said == expected, "the client found {said}");
    let heard = "/chat?room=1 chat.v2 3007 enough\n/chat?room=1 chat.v2 4001 as you wish\n";
    eventually(SOON, "the server has heard how both ended", || {
        let said = server.output();
        ensure!(said.ends_with(heard), "it says {said}");
        Ok(())
    })
}

fn script(lab: &Lab, args: &[&str]) -> Result<Command> {
    let file = lab.dir().join("websocket.py");
    fs::write(&file, include_str!("websocket.py"))?;
    let mut command = Command::new(PYTHON);
    command.arg(file).args(args);
    Ok(command)
}

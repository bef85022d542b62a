//! CONNECT, and what its connection goes on as where policies want to see requests.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use undermesh_tests::lab::{Pod, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::access::{in_force, policy};
use crate::kit::SOON;
use crate::rates::Stage;
use crate::requests::ask;

const PORT: &str = "8090";

#[test]
fn nobody_gets_past_policies_by_a_connect() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let stage = Stage::set("um-e2e-connect", &[])?;
    let script = stage.mesh.lab.dir().join("connect.py");
    fs::write(&script, include_str!("connect.py"))?;
    let ip = stage.server.ip().to_string();
    let python = |args: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(&script).args(args);
        command
    };
    let server = stage.server.spawn(python(&["serve", PORT]))?;
    stage.server.wait_listening(8090)?;
    let clients = [&stage.near, &stage.far, &stage.outside];
    let got = |client: &Pod| client.run(python(&["get", &ip, PORT]), SOON)?.success();
    let check = |expected: &str| -> Result<()> {
        clients.iter().try_for_each(|client| {
            let got = got(client)?;
            ensure!(got.trim() == expected, "{}: {got:?}, not {expected:?}", client.name());
            Ok(())
        })
    };
    // Where nobody wants to see requests, bytes are bytes.
    check("200 200")?;
    let asked_for = |what: &str| server.output().lines().filter(|line| *line == what).count();
    ensure!(asked_for("GET /admin") == 3, "the server saw {}", server.output());

    let mut held = Vec::new();
    for client in clients {
        held.push((client, client.spawn(python(&["hold", &ip, PORT]))?));
    }
    eventually(SOON, "they are agreed to", || {
        ensure!(held.iter().all(|(_, held)| held.output() == "200\n"), "not yet");
        Ok(())
    })?;
    let admin = json!({ "action": "Deny", "rules": [{ "to": [{ "paths": ["/admin"] }] }] });
    in_force(&stage, &policy("admin", admin))?;
    for (client, mut held) in held {
        held.wait(Duration::from_secs(2)).with_context(|| format!("what {} holds goes on", client.name()))?;
    }
    // The connection is HTTP still, and so is looked at.
    eventually(SOON, "the policy holds", || check("405 403"))?;
    ensure!(asked_for("GET /admin") == 3, "the server saw {}", server.output());
    for client in clients {
        let url = format!("http://{ip}:8080/");
        let connect = |target| ask(client, &url, &["--http2", "--method", "CONNECT", "--target", target]);
        let refused = connect("a:80")?.answered(405)?;
        let status = refused["headers"]["proxy-status"].as_str().unwrap_or_default();
        ensure!(status.contains("error=http_request_denied"), "{}: {refused}", client.name());
    }
    // Whom policies let in whatever is asked for may say what it likes.
    let near =
        json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }, { "to": [{ "paths": ["/"] }] }] });
    in_force(&stage, &policy("admin", near))?;
    eventually(SOON, "the policy holds", || {
        let got = (got(&stage.near)?, got(&stage.far)?);
        ensure!((got.0.trim(), got.1.trim()) == ("200 200", "405 403"), "{got:?}");
        Ok(())
    })
}

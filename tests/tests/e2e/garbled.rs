//! What two readers could understand differently: requests that are no good HTTP, from a table, and what comes of each.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use undermesh_tests::lab::{Manifest, Pod};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP};
use crate::traffic::in_force;

/// The table, and how to read it.
const CASES: &str = include_str!("garbled.txt");

#[test]
fn what_two_readers_could_understand_differently_goes_no_further() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = Mesh::start("um-e2e-garbled", 1, &[])?;
    let (member, stranger) = (mesh.pod(0, "member")?, mesh.outsider(0, "stranger")?);
    let (plain, guarded) = (mesh.pod(0, "plain")?, mesh.pod(0, "guarded")?);
    let doors = [(&member, &plain), (&stranger, &guarded), (&member, &guarded)];
    mesh.ready()?;
    let policy = Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "guard");
    let rules = json!([{ "to": [{ "paths": ["/denied"] }] }]);
    let spec =
        json!({ "selector": { "matchLabels": { "app": "guarded" } }, "action": "Deny", "rules": rules });
    in_force(&mesh, &policy.with("spec", spec))?;

    let folder = mesh.lab.dir();
    let script = folder.join("garbled.py");
    fs::write(&script, include_str!("garbled.py"))?;
    let python = |args: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(&script).args(args);
        command
    };
    let record = |server: &Pod| folder.join(server.name()).display().to_string();
    let mut running = Vec::new();
    for server in [&plain, &guarded] {
        running.push(server.spawn(python(&["serve", "8080", &record(server)]))?);
        server.wait_listening(8080)?;
    }
    for (door, (client, server)) in doors.into_iter().enumerate() {
        let expected = cases(door);
        let file = folder.join(format!("cases-{door}")).display().to_string();
        fs::write(&file, expected.join("\n"))?;
        let ip = server.ip().to_string();
        let say = python(&["say", &ip, "8080", &record(server), &file]);
        let found = client.run(say, Duration::from_secs(120))?.success()?;
        let found: Vec<&str> = found.lines().collect();
        ensure!(found.len() == expected.len(), "{} of {} cases were tried", found.len(), expected.len());
        let pairs = expected.iter().zip(found).filter(|(expected, found)| expected != found);
        let wrong: String =
            pairs.map(|(expected, found)| format!("\nexpected {expected}\n   found {found}")).collect();
        ensure!(wrong.is_empty(), "at the door of {} for {}:{wrong}", server.name(), client.name());
    }
    Ok(())
}

/// What is sent at this door, and what must come of it. The last that is said is for all doors that are left.
fn cases(door: usize) -> Vec<String> {
    let lines = CASES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let lines = lines.filter_map(|line| {
        let (sent, comes) = line.split_once(" => ")?;
        Some(format!("{sent} => {}", comes.split(" | ").take(door + 1).last().unwrap_or(comes)))
    });
    lines.collect()
}

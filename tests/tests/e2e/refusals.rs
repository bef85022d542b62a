//! Requests that a server of HTTP/2 does not take, and those that it takes and does not answer.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::Mesh;
use crate::requests::ask;

/// One request: its arguments, what the server does with it each time that it comes, and what its client gets.
type Step = (&'static [&'static str], &'static [&'static str], Result<&'static str, u64>);

/// Each server begins with none.
const STEPS: &[Step] = &[
    (&[], &["answer"], Ok("connection 1, request 1, 0 bytes")),
    (&["--method", "POST"], &["refuse", "answer"], Ok("connection 2, request 3, 0 bytes")),
    (
        &["--method", "POST", "--body", "5000"],
        &["refuse", "answer"],
        Ok("connection 3, request 5, 5000 bytes"),
    ),
    (&["--method", "POST"], &["go", "answer"], Ok("connection 4, request 7, 0 bytes")),
    (&["--method", "POST", "--body", "60000"], &["go", "answer"], Ok("connection 5, request 9, 60000 bytes")),
    // More than is kept: the client hears of it.
    (&["--method", "POST", "--body", "65537"], &["refuse"], Err(502)),
    // It takes no more after this one.
    (&["--method", "POST"], &["finish"], Ok("connection 5, request 11, 0 bytes")),
    (&[], &["answer"], Ok("connection 6, request 12, 0 bytes")),
    // What it has begun with is not sent again, unless it may be sent twice.
    (&["--method", "POST"], &["break"], Err(502)),
    (&[], &["answer"], Ok("connection 7, request 14, 0 bytes")),
    (&["--method", "POST", "--body", "10"], &["end"], Err(502)),
    (&[], &["answer"], Ok("connection 8, request 16, 0 bytes")),
    (&["--method", "POST"], &["reset"], Err(502)),
    (&[], &["answer"], Ok("connection 8, request 18, 0 bytes")),
    (
        &["--method", "PUT", "--body", "5000"],
        &["break", "answer"],
        Ok("connection 9, request 20, 5000 bytes"),
    ),
    // Once: what is refused twice is not tried for ever.
    (&[], &["refuse", "refuse"], Err(502)),
];

#[test]
fn what_a_server_has_not_begun_with_is_sent_again_and_what_it_has_is_not() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    // Connections to servers belong to a thread.
    let mut mesh = Mesh::start("um-e2e-refusals", 2, &["--workers", "1"])?;
    let client = mesh.pod(0, "client")?;
    let servers = [mesh.pod(0, "near")?, mesh.pod(1, "far")?];
    mesh.ready()?;
    let script = mesh.lab.dir().join("refusals.py");
    fs::write(&script, include_str!("refusals.py"))?;
    let acts: Vec<&str> = STEPS.iter().flat_map(|(_, acts, _)| *acts).copied().collect();
    for server in &servers {
        let mut command = Command::new("python3");
        command.arg(&script).arg("8080").args(&acts);
        let running = server.spawn(command)?;
        server.wait_listening(8080)?;
        let url = format!("http://{}:8080/", server.ip());
        let mut came = 0;
        for (args, acts, expected) in STEPS {
            let asked = ask(&client, &url, &[&["--http2"], *args].concat())?;
            match expected {
                Ok(text) => ensure!(asked.last["text"] == *text, "{args:?} of {}: {asked:?}", server.name()),
                Err(status) => {
                    asked.answered(*status).with_context(|| format!("{args:?} of {}", server.name()))?;
                }
            }
            came += acts.len();
            let seen = running.output().lines().count();
            ensure!(seen == came, "{args:?} of {}: {seen} requests came, not {came}", server.name());
        }
    }
    Ok(())
}

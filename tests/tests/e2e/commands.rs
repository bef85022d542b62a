//! The commands by which people turn security on: who would be kept out, what would be decided, and why.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Output, Pod, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SOON, Talk, dial, serve, undermesh};

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

const READINESS: [&str; 5] = ["mtls", "readiness", "shop", "--window", "10s"];

/// What the command says as JSON, and its exit code.
fn json(mesh: &Mesh, node: usize, args: &[&str]) -> Result<(Value, i32)> {
    let output = undermesh(&mesh.nodes[node], &[args, &["-o", "json"]].concat())?;
    let value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("{args:?} says {}{}", output.stdout, output.stderr))?;
    Ok((value, code(&output)))
}

/// A mesh of one node whose pod `near` serves, a client in it and one outside.
fn scene(name: &str) -> Result<(Mesh, Pod, Pod, Pod, Process)> {
    let mut mesh = Mesh::start(name, 1, &[])?;
    let (client, near) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?);
    let outsider = mesh.outsider(0, "outsider")?;
    let server = serve(&near)?;
    mesh.ready()?;
    Ok((mesh, client, near, outsider, server))
}

#[test]
fn readiness_names_who_calls_in_plaintext() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, client, near, outsider, _server) = scene("um-e2e-readiness")?;
    dial(&client, near.ip(), 4)?.all_served()?;
    let nobody_is_in_the_way = || {
        eventually(SOON, "for ten seconds nobody has called in plaintext", || {
            let (report, exit) = json(&mesh, 0, &READINESS)?;
            ensure!(exit == 0, "{report:#}");
            Ok(())
        })
    };
    nobody_is_in_the_way()?;

    dial(&outsider, near.ip(), 3)?.all_served()?;
    let (report, exit) = json(&mesh, 0, &READINESS)?;
    ensure!(exit == 1, "the outsider would be refused, not {exit}: {report:#}");
    let workloads = report["workloads"].as_array().context("no workloads")?;
    for workload in workloads {
        let (is_near, callers) = (workload["workload"] == "near", &workload["callers"]);
        ensure!(workload["mtls"] == "permissive" && workload["ready"] == !is_near, "{report:#}");
        ensure!(callers.as_array().is_some_and(|it| it.len() == usize::from(is_near)), "{report:#}");
        if is_near {
            let caller = &callers[0];
            ensure!(caller["source"] == "outside/outsider" && caller["connections"] == 3, "{report:#}");
            ensure!(
                caller["port"] == crate::kit::PORT && caller["last_seconds"].as_u64() < Some(10),
                "{report:#}"
            );
        }
    }
    ensure!(workloads.len() == 2, "{report:#}");

    // A connection is not over because it was opened long ago.
    let mut talk = Talk::begin(&outsider, near.ip())?;
    eventually(SOON, "it was opened ten seconds ago", || {
        let (report, exit) = json(&mesh, 0, &READINESS)?;
        ensure!(exit == 1, "the connection is still open: {report:#}");
        let talking = &report["workloads"][1]["callers"][0];
        ensure!(talking["first_seconds"].as_u64() > Some(10), "{report:#}");
        Ok(())
    })?;
    talk.goes_on()?;
    let table = undermesh(&mesh.nodes[0], &READINESS)?;
    ensure!(code(&table) == 1 && table.stdout.contains("outside/outsider"), "{}", table.stdout);
    talk.end()?;
    nobody_is_in_the_way()
}

#[test]
fn readiness_says_what_it_cannot_know() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, ..) = scene("um-e2e-unready")?;
    let check = |args: &[&str], told: &str| -> Result<()> {
        let output = undermesh(&mesh.nodes[0], &[&["mtls", "readiness"], args].concat())?;
        let is_told = output.stdout.contains(told);
        ensure!(code(&output) == 2 && is_told, "{args:?} says {}{}", output.stdout, output.stderr);
        Ok(())
    };
    check(&[], "incomplete: the agent of node1 has watched for ")?;
    check(&["nowhere"], "incomplete: no pod of the namespace nowhere is or was in the mesh")?;
    let nobody = ["--admin-address", "127.0.0.1:1", "--window", "1s"];
    check(&nobody, "incomplete: not asked: no agent at 127.0.0.1:1")?;
    let output = undermesh(&mesh.nodes[0], &["mtls", "readiness", "--window", "25h"])?;
    ensure!(output.stderr.contains("agents remember 24 hours"), "{}", output.stderr);
    Ok(())
}

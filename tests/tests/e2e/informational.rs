//! Answers ahead of the answer (103 and its like) through the mesh, with both ends written down byte by byte.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Lab, Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON, last_line};
use crate::requests::{ask, serve_requests};
use crate::traffic::in_force;

/// As many of the flood's as fit into 64 KiB.
const OF_THE_FLOOD: usize = 64 * 1024 / "HTTP/1.1 103 Early Hints\r\nx-flood: 1\r\n\r\n".len();

#[test]
fn what_is_said_ahead_of_an_answer_is_heard_ahead_of_it() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = Mesh::start("um-e2e-informational", 2, &[])?;
    let client = mesh.pod(0, "client")?;
    let servers = [mesh.pod(0, "near")?, mesh.pod(1, "far")?, mesh.pod(1, "guarded")?];
    mesh.ready()?;
    // The requests of this one are looked at on its own node as well.
    let policy = Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "guard");
    let spec = json!({
        "selector": { "matchLabels": { "app": "guarded" } },
        "action": "Deny",
        "rules": [{ "to": [{ "paths": ["/denied"] }] }],
    });
    mesh.lab.apply(&policy.with("spec", spec))?;
    let _running = servers.iter().map(|server| serve(&mesh.lab, server)).collect::<Result<Vec<_>>>()?;
    eventually(SOON, "the policy is in force", || {
        ask(&client, &format!("http://{}:8080/denied", servers[2].ip()), &[])?.answered(403).map(drop)
    })?;
    for server in &servers {
        let asking = script(&mesh.lab, &["ask", &server.ip().to_string(), "8080"])?;
        let found: Value = last_line(&client.run(asking, Duration::from_secs(90))?.success()?)?;
        let hint = "HTTP/1.1 103 Early Hints\r\n";
        let in_turn: Vec<Value> =
            (0..5).map(|number| json!([format!("</{number}.css>"), 2, format!("/{number}")])).collect();
        let expected = json!({
            "ahead": [format!("{hint}link: </ahead.css>\r\nx-twice: a\r\nx-twice: b\r\n"), "/ahead True"],
            "body": [hint.trim_end(), "HTTP/1.1 100 Continue\r\n", "/body True body"],
            "in turn": in_turn,
            "flood": [OF_THE_FLOOD, 1, "/flood"],
            "upgrade": [hint.trim_end(), "HTTP/1.1 101 Switching Protocols", "echo"],
            // Who knows of no such answers gets none.
            "old": ["HTTP/1.0 200 OK\r\n"],
        });
        ensure!(found == expected, "from {}: {found:#}\nexpected {expected:#}", server.name());
    }
    Ok(())
}

#[test]
fn what_is_said_ahead_of_a_mirrors_answer_goes_nowhere() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"), Feature::Program("curl"));
    let mut mesh = Mesh::start("um-e2e-informational-mirror", 1, &[])?;
    let client = mesh.pod(0, "client")?;
    let server = |name: &str| mesh.add(0, PodSpec::new(SHOP, name).label("app", name));
    let (main, mirror) = (server("main")?, server("mirror")?);
    let address = |last| IpAddr::from([10, 96, 0, last]);
    for (name, last) in [("main", 90), ("mirror", 91)] {
        let ports = json!([{ "name": "http", "port": 80, "targetPort": 8080 }]);
        let service = Manifest::service(SHOP, name, &[address(last)], &[], &[]).with("spec.ports", ports);
        mesh.lab.apply(&service.with("spec.selector", json!({ "app": name })))?;
    }
    let _running = (serve_requests(&main)?, serve(&mesh.lab, &mirror)?);
    mesh.ready()?;
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "main");
    let copied = json!([{ "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "mirror", "port": 80 } } }]);
    let rules = json!([{ "filters": copied, "backendRefs": [{ "name": "main", "port": 80 }] }]);
    let parents = json!([{ "group": "", "kind": "Service", "name": "main" }]);
    in_force(&mesh, &route.with("spec.parentRefs", parents).with("spec.rules", rules))?;
    let answered = |by: &str| -> Result<f64> {
        let labels = [("destination_workload", by), ("reporter", "source"), ("response_code", "200")];
        Ok(mesh.agents[0].metrics()?.sum("undermesh_http_requests_total", &labels))
    };
    let heard_of = |last, path: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-sSi", "--max-time", "10", &format!("http://{}{path}", address(last))]);
        client.run(curl, Duration::from_secs(20))?.success()
    };
    let heard = eventually(SOON, "a request is mirrored", || {
        let before = answered("mirror")?;
        // The mirror has answered long before.
        let heard = heard_of(90, "/?delay_ms=400")?;
        ensure!(answered("mirror")? == before + 1.0, "the mirror has not answered");
        Ok(heard)
    })?;
    ensure!(heard.starts_with("HTTP/1.1 200 OK\r\n"), "heard {heard}");
    // Whoever asks the mirror itself hears it.
    let heard = heard_of(91, "/")?;
    ensure!(heard.starts_with("HTTP/1.1 103 Early Hints\r\n"), "heard {heard}");
    Ok(())
}

fn serve(lab: &Lab, pod: &Pod) -> Result<Process> {
    let server = pod.spawn(script(lab, &["serve", "8080"])?)?;
    pod.wait_listening(8080)?;
    Ok(server)
}

fn script(lab: &Lab, args: &[&str]) -> Result<Command> {
    let file = lab.dir().join("informational.py");
    fs::write(&file, include_str!("informational.py")).context("writing a script")?;
    let mut command = Command::new("python3");
    command.arg(file).args(args);
    Ok(command)
}

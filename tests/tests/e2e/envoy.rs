//! Another proxy at either end of the mesh: an Envoy in front of applications, and one that calls Services for its own.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::envoy::{self, ADMIN, Speaks, cluster, listener};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::ask;
use crate::websocket;

const LIMIT: Duration = Duration::from_secs(60);
/// The Service, and its ports: requests, and WebSocket.
const ECHO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 80));
const HTTP: u16 = 80;
const CHAT: u16 = 81;
/// Bytes of a body.
const BIG: u64 = 5_000_000;
/// Where an Envoy in front of the mesh listens for what it sends as HTTP/1.1 and as HTTP/2, to the one port and to the other.
const IN_FRONT: [(u16, u16, Speaks); 4] = [
    (9001, HTTP, Speaks::Http1),
    (9002, HTTP, Speaks::Http2),
    (9003, CHAT, Speaks::Http1),
    (9004, CHAT, Speaks::Http2),
];

/// Servers behind an Envoy each, on both nodes and behind one Service.
struct Stage {
    mesh: Mesh,
    client: Pod,
    running: Vec<Process>,
    /// Those that speak WebSocket.
    chatting: Process,
}

impl Stage {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        let client = mesh.pod(0, "client")?;
        let server = |node, name: &str| mesh.add(node, PodSpec::new(SHOP, name).label("part", "echo"));
        let servers = [server(0, "near")?, server(1, "far")?];
        let ports = json!([
            { "name": "http", "port": HTTP, "targetPort": 8080 },
            { "name": "chat", "port": CHAT, "targetPort": 8090, "appProtocol": "kubernetes.io/ws" },
        ]);
        let service = Manifest::service(SHOP, "echo", &[ECHO], &[], &[]).with("spec.ports", ports);
        mesh.lab.apply(&service.with("spec.selector", json!({ "part": "echo" })))?;
        mesh.ready()?;
        let mut running = Vec::new();
        for pod in &servers {
            let mut server = Command::new(binary("requests")?);
            server.args(["serve", "--port", "8081", "--name", pod.name()]);
            running.push(pod.spawn(server)?);
            pod.wait_listening(8081)?;
            // One of the two: who hears the whole of a conversation is known then.
            let chat = SocketAddr::new(servers[1].ip(), 8091);
            let pairs = [
                (here(8080), cluster(loopback(8081), None, Speaks::Either)),
                (here(8090), cluster(chat, None, Speaks::Http1)),
            ];
            running.push(start(&mesh, pod, &pairs, 8090)?);
        }
        let chatting = websocket::serve(&mesh.lab, &servers[1], 8091)?;
        let stage = Self { mesh, client, running, chatting };
        eventually(SOON, "the Service is served", || {
            ask(&stage.client, &format!("http://{}/", SocketAddr::new(ECHO, HTTP)), &[])?
                .answered(200)
                .map(drop)
        })?;
        Ok(stage)
    }

    /// Fails unless all that HTTP can carry comes through, to where the client dials and with what is spoken behind that.
    fn check(&self, requests: SocketAddr, chat: SocketAddr, behind: Speaks) -> Result<()> {
        let url = |query: &str| format!("http://{requests}/?{query}");
        let ask = |query: &str, args: &[&str]| ask(&self.client, &url(query), args);
        for version in [&[][..], &["--http2"]] {
            let with = |args: &[&'static str]| [args, version].concat();
            let served = ask("x=y", &with(&["--count", "200", "--connections", "4"]))?.all(200)?;
            ensure!(served.keys().eq(["far", "near"]), "200 requests went to {served:?}");
            let upload = ask("x=y", &with(&["--method", "POST", "--body", "5000000"]))?;
            ensure!(upload.saw()?["bytes"] == BIG, "an upload: {upload:?}");
            let download = ask("bytes=5000000", version)?.answered(200)?;
            ensure!(download["bytes"] == BIG, "a download of {} bytes", download["bytes"]);
            let trailers = ask("trailer=at-the-end", &with(&["--header", "te: trailers"]))?.answered(200)?;
            // An answer of HTTP/2 may have a length and trailers, one of HTTP/1 has one of the two.
            let are_lost = version.is_empty() && behind == Speaks::Http2;
            let expected = if are_lost { json!({}) } else { json!({ "x-trailer": "at-the-end" }) };
            ensure!(trailers["trailers"] == expected, "{version:?}: trailers: {trailers}");
            let failed = ask("status=503", version)?.answered(503)?;
            ensure!(
                failed["headers"].get("proxy-status").is_none(),
                "the answer is not the server's: {failed}"
            );
        }
        for version in [&["--h1"][..], &["-m", "20"]] {
            let mut h2load = Command::new("h2load");
            h2load.args(["-n", "3000", "-c", "10", "-t", "1"]).args(version).arg(url("x=y"));
            let said = self.client.run(h2load, LIMIT)?.success()?;
            ensure!(said.contains("3000 succeeded, 0 failed, 0 errored, 0 timeout"), "{version:?}: {said}");
            ensure!(said.contains("status codes: 3000 2xx,"), "{version:?}: {said}");
        }
        websocket::converse(&self.mesh.lab, &self.client, chat, &self.chatting)
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn here(port: u16) -> Value {
    listener(SocketAddr::from(([0; 4], port)), None)
}

/// Starts an Envoy, and waits until it listens on the last of its ports.
fn start(mesh: &Mesh, pod: &Pod, pairs: &[(Value, Value)], last: u16) -> Result<Process> {
    let mut envoy = envoy::start(Path::new("envoy"), &mesh.lab, pod, pairs)?;
    pod.wait_listening(last).or_else(|error| envoy.check_running().and(Err(error)))?;
    Ok(envoy)
}

#[test]
fn an_envoy_behind_the_mesh_is_a_server_as_any_other() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("envoy"), Feature::Program("h2load"));
    require!(Feature::PythonModule("websockets"));
    let stage = Stage::set("um-e2e-envoy")?;
    stage.check(SocketAddr::new(ECHO, HTTP), SocketAddr::new(ECHO, CHAT), Speaks::Either)
}

#[test]
fn an_envoy_in_front_of_the_mesh_is_a_client_as_any_other() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("envoy"), Feature::Program("h2load"));
    require!(Feature::PythonModule("websockets"), Feature::Program("curl"));
    let mut stage = Stage::set("um-e2e-envoy-front")?;
    let pairs = IN_FRONT.map(|(port, to, speaks)| {
        let mut cluster = cluster(SocketAddr::new(ECHO, to), None, speaks);
        if to == HTTP {
            cluster["health_checks"] = health_check(speaks);
        }
        (listener(loopback(port), None), cluster)
    });
    stage.running.push(start(&stage.mesh, &stage.client, &pairs, 9004)?);
    stage.check(loopback(9001), loopback(9003), Speaks::Http1).context("HTTP/1.1")?;
    stage.check(loopback(9002), loopback(9004), Speaks::Http2).context("HTTP/2")?;
    for cluster in ["upstream-0", "upstream-1"] {
        let told = |name: &str| statistic(&stage.client, &format!("cluster.{cluster}.{name}"));
        eventually(SOON, "the mesh is found healthy again and again", || {
            ensure!(told("health_check.success")? >= 10);
            Ok(())
        })?;
        for name in [
            "health_check.failure",
            "upstream_cx_connect_fail",
            "upstream_rq_rx_reset",
            "upstream_rq_timeout",
        ] {
            ensure!(told(name)? == 0, "{cluster} has {name} {}", told(name)?);
        }
        // Connections are kept: that of the health checks, and no more than there were requests at a time.
        let (connections, requests) = (told("upstream_cx_total")?, told("upstream_rq_completed")?);
        ensure!(connections < requests / 20, "{cluster}: {connections} connections for {requests} requests");
    }
    Ok(())
}

fn health_check(speaks: Speaks) -> Value {
    let codec = if speaks == Speaks::Http2 { "HTTP2" } else { "HTTP1" };
    json!([{
        "timeout": "5s", "interval": "0.1s", "no_traffic_interval": "0.1s", "unhealthy_threshold": 1, "healthy_threshold": 1,
        "http_health_check": { "path": "/healthy", "codec_client_type": codec },
    }])
}

/// What Envoy counts under this name.
fn statistic(pod: &Pod, name: &str) -> Result<u64> {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", &format!("http://{}/stats?filter=^{name}$", SocketAddr::from(ADMIN))]);
    let said = pod.run(curl, SOON)?.success()?;
    let value = said.trim().rsplit(' ').next().and_then(|value| value.parse().ok());
    value.with_context(|| format!("Envoy says of {name}: {said:?}"))
}

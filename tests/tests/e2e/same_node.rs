//! Between pods of one node: in plaintext where policies are about connections alone, through a tunnel where they are about requests.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{AgentOptions, Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::access::in_force;
use crate::attacks::direct_vouchers;
use crate::kit::{self, Mesh, PORT, SHOP, SOON, Talk, options, serve_on};
use crate::rates::{Stage, web};
use crate::requests::ask;
use crate::traffic;
use crate::tunnel::TUNNEL;

const OPENED: &str = "undermesh_tcp_connections_opened_total";
const CLOSED: &str = "undermesh_tcp_connections_closed_total";
const REQUESTS: &str = "undermesh_http_requests_total";
const HTTP_PORT: u16 = 8080;

fn policy(spec: Value) -> Manifest {
    Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "same-node")
        .with("spec", spec)
        .with("spec.selector", json!({ "matchLabels": { "app": "web" } }))
}

/// A pod that asks another one of its node, and can send raw packets.
struct Forgery {
    mesh: Mesh,
    client: Pod,
    server: Pod,
    /// Says what it is asked for.
    listed: Process,
}

impl Forgery {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 1, &[])?;
        fs::write(mesh.lab.dir().join("forger.py"), include_str!("forger.py"))?;
        let client = mesh.pod(0, "client")?;
        let server = mesh.add(0, PodSpec::new(SHOP, "server").label("app", "web"))?;
        let listed = forger(&mesh, &server, &["serve", &HTTP_PORT.to_string()])?;
        server.wait_listening(HTTP_PORT)?;
        mesh.ready()?;
        Ok(Self { mesh, client, server, listed })
    }

    fn addresses(&self) -> [IpAddr; 2] {
        [self.server.ip(), self.server.ip6()]
    }

    fn ask(&self, to: IpAddr, path: &str) -> Result<Value> {
        Ok(ask(&self.client, &format!("http://{}{path}", SocketAddr::new(to, HTTP_PORT)), &[])?.last["status"].clone())
    }

    /// Has it ask, and adds a request to what it says to this port, and another one when there is the file.
    fn inject(&self, to: IpAddr, port: u16, gate: &str) -> Result<Process> {
        let gate = self.mesh.lab.dir().join(gate).display().to_string();
        let injector =
            forger(&self.mesh, &self.client, &["inject", &to.to_string(), &port.to_string(), &gate])?;
        let says = |what: &str| {
            eventually(SOON, "the forger is that far", || {
                ensure!(injector.output().lines().any(|line| line == what), "{}", injector.output());
                Ok(())
            })
        };
        says("hearing")?;
        ensure!(self.ask(to, "/open")? == 200, "what the pod asks for itself is not answered");
        says("/forged")?;
        Ok(injector)
    }

    /// How often the application was asked for this.
    fn asked_for(&self, path: &str) -> usize {
        self.listed.output().lines().filter(|line| *line == path).count()
    }
}

fn forger(mesh: &Mesh, pod: &Pod, args: &[&str]) -> Result<Process> {
    let mut command = Command::new("python3");
    command.arg("-u").arg(mesh.lab.dir().join("forger.py")).args(args);
    pod.spawn(command)
}

/// Where nobody looks at requests, one can be forged; and whoever has done so has nothing of it once somebody does.
#[test]
fn forged_requests_reach_no_application_of_which_policies_see_requests() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"), Feature::Program("bpftool"));
    let scene = Forgery::set("um-e2e-forged-requests")?;
    let node = &scene.mesh.nodes[0];
    for (number, to) in (1..).zip(scene.addresses()) {
        eventually(SOON, "a connection in plaintext stands", || {
            ensure!(scene.ask(to, "/open")? == 200, "not answered");
            ensure!(direct_vouchers(node)? > 0, "none is vouched for");
            Ok(())
        })?;
        let mut injector = scene.inject(to, HTTP_PORT, &format!("gate-{number}"))?;
        eventually(SOON, "the forged request is served", || {
            ensure!(scene.asked_for("/forged") == number, "{}", scene.listed.output());
            Ok(())
        })?;

        traffic::in_force(&scene.mesh, &policy(json!({ "rules": [{ "to": [{ "paths": ["/open"] }] }] })))?;
        eventually(Duration::from_secs(1), "no connection of before stands", || {
            let left = direct_vouchers(node)?;
            ensure!(left == 0, "{left} are left");
            Ok(())
        })?;
        fs::write(scene.mesh.lab.dir().join(format!("gate-{number}")), "")?;
        ensure!(injector.wait(SOON)?.success(), "{}", injector.log_tail(3));
        let answers = [scene.ask(to, "/open")?, scene.ask(to, "/forged")?];
        ensure!(answers == [200, 403], "its own requests: {answers:?}");

        let broken = || {
            Ok::<_, anyhow::Error>(
                scene.mesh.agents[0]
                    .metrics()?
                    .sum("undermesh_tunnels_closed_total", &[("reason", "broken")]),
            )
        };
        let before = broken()?;
        let _injector = scene.inject(to, TUNNEL, "never")?;
        eventually(SOON, "the tunnel that was spoken into has ended", || {
            let now = broken()?;
            ensure!(now > before, "{now}");
            Ok(())
        })?;
        let answers = [scene.ask(to, "/open")?, scene.ask(to, "/forged")?];
        ensure!(answers == [200, 403], "its own requests through another one: {answers:?}");
        let served = (scene.asked_for("/forged"), scene.asked_for("/forged/later"));
        ensure!(served == (number, 0), "the application was asked for {served:?}: {}", scene.listed.output());
        scene.mesh.lab.delete(&policy(json!({})))?;
    }
    Ok(())
}

impl Stage {
    /// What a client of the server's node gets, and by what its requests were protected since.
    fn by(&self, client: &Pod, path: &str, args: &[&str]) -> Result<(Value, Vec<&'static str>)> {
        let count = || -> Result<Vec<f64>> {
            let metrics = self.mesh.agents[0].metrics()?;
            let labels = |security| {
                [("source_workload", client.name()), ("security", security), ("reporter", "source")]
            };
            Ok(SECURITIES.iter().map(|security| metrics.sum(REQUESTS, &labels(security))).collect())
        };
        let before = count()?;
        let url = format!("http://{}{path}", SocketAddr::new(web(), 80));
        let got = ask(client, &url, args)?.last["status"].clone();
        let after = eventually(SOON, "it is counted", || {
            let after = count()?;
            ensure!(after != before, "{after:?}");
            Ok(after)
        })?;
        let more = SECURITIES.iter().zip(before).zip(after).filter(|((_, before), after)| after > before);
        Ok((got, more.map(|((security, _), _)| *security).collect()))
    }
}

const SECURITIES: [&str; 3] = ["same_node", "mutual_tls", "plaintext"];

/// Whoever is let in by what it asks for comes through a tunnel; where it is not asked for that, nothing is spent on one.
#[test]
fn a_tunnel_is_taken_where_policies_are_about_requests() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-same-node", &[])?;
    let grpc = ["--http2", "--method", "POST", "--header", "content-type: application/grpc"];
    let paths = json!({ "rules": [{ "to": [{ "paths": ["/open", "/shop.v1.Orders/*"] }] }] });
    for (what, spec, security, secret) in [
        (
            "by account",
            json!({ "rules": [{ "from": [{ "serviceAccounts": ["near", "default"] }] }] }),
            "same_node",
            200,
        ),
        ("by port", json!({ "action": "Deny", "rules": [{ "to": [{ "ports": [9] }] }] }), "same_node", 200),
        ("by path", paths, "mutual_tls", 403),
        (
            "by path, at another port",
            json!({ "action": "Deny", "rules": [{ "to": [{ "ports": [9], "paths": ["/x"] }] }] }),
            "mutual_tls",
            200,
        ),
    ] {
        in_force(&stage, &policy(spec))?;
        for args in [&[][..], &["--http2"]] {
            eventually(Duration::from_secs(1), "it is reached so", || {
                let got = stage.by(&stage.near, "/open", args)?;
                ensure!(got == (json!(200), vec![security]), "{what} {args:?}: {got:?}");
                Ok(())
            })?;
            let got = stage.by(&stage.near, "/secret", args)?;
            ensure!(got == (json!(secret), vec![security]), "{what} {args:?}, what is secret: {got:?}");
        }
        let got = stage.by(&stage.near, "/shop.v1.Orders/List", &grpc)?;
        ensure!(got == (json!(200), vec![security]), "{what}, a call of gRPC: {got:?}");
        // What it says to itself never leaves its loopback, and is held to the same.
        let got = stage.by(&stage.server, "/secret", &[])?;
        ensure!(got == (json!(secret), vec!["same_node"]), "{what}, to itself: {got:?}");
    }
    stage.mesh.lab.delete(&policy(json!({})))?;
    eventually(SOON, "no policy is left", || {
        let got = stage.by(&stage.near, "/open", &[])?;
        ensure!(got == (json!(200), vec!["same_node"]), "{got:?}");
        Ok(())
    })
}

/// What stands in plaintext when requests begin to matter ends within a second, and comes again through a tunnel.
#[test]
fn what_stands_moves_to_a_tunnel_when_requests_begin_to_matter() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-same-node-live", &[])?;
    let _server = serve_on(&stage.server, PORT)?;
    let talk = || Talk::with(&stage.near, SocketAddr::new(stage.server.ip(), PORT));
    let agent = &stage.mesh.agents[0];
    let ended = || {
        Ok::<_, anyhow::Error>(agent.metrics()?.sum(CLOSED, &[("reason", "denied"), ("reporter", "source")]))
    };
    let (plain, before) = (talk()?, ended()?);
    // Whatever it is that is said, it would be let in: it is written down.
    in_force(&stage, &policy(json!({ "action": "Audit", "rules": [{ "to": [{ "paths": ["/money"] }] }] })))?;
    plain.ends_somehow(Duration::from_secs(1))?;
    ensure!(ended()? == before + 1.0, "{} connections have ended so", ended()?);
    let mut tunnelled = talk()?;
    let labels = [("security", "mutual_tls"), ("reporter", "destination"), ("source_workload", "near")];
    agent.wait_metrics(SOON, "it goes through a tunnel", |m| m.sum(OPENED, &labels) == 1.0)?;
    // Nothing is lost when they matter no more.
    stage.mesh.lab.delete(&policy(json!({})))?;
    let same_node = [("security", "same_node"), labels[1], labels[2]];
    eventually(SOON, "new ones go in plaintext", || {
        talk()?.end()?;
        let opened = agent.metrics()?.sum(OPENED, &same_node);
        ensure!(opened >= 2.0, "{opened}");
        Ok(())
    })?;
    tunnelled.goes_on()?;
    tunnelled.end()
}

/// With the setting all pods are reached so, also by what an agent without it has made: that ends when the next one takes its place.
#[test]
fn all_of_a_node_is_tunnelled_where_that_is_wanted() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-same-node-all", 1, &["--drain", "60s"])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = kit::serve(&server)?;
    mesh.ready()?;
    let talk = Talk::begin(&client, server.ip())?;
    let own = Talk::begin(&server, server.ip6())?;
    let admin_address = Some("127.0.0.1:15030".to_owned());
    let options = AgentOptions { admin_address, ..options(&["--same-node", "tunnel", "--take-over"]) };
    let next = mesh.nodes[0].spawn_agent(options)?;
    let _replaced = std::mem::replace(&mut mesh.agents[0], next);
    mesh.ready()?;
    talk.ends_somehow(Duration::from_secs(2))?;
    own.end()?;
    let labels = [("security", "mutual_tls"), ("reporter", "destination"), ("source_workload", "client")];
    for (count, to) in [(1.0, server.ip()), (2.0, server.ip6())] {
        Talk::begin(&client, to)?.end()?;
        let what = format!("{count} connections went through a tunnel");
        mesh.agents[0].wait_metrics(SOON, &what, |m| m.sum(OPENED, &labels) == count)?;
    }
    Ok(())
}

//! NetworkPolicies: the rules that plugins of the network make of them hold in the mesh as they do without it.
//!
//! The rules are netfilter's, on the node: of packets, by the pods' addresses, with connections let through once they stand.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Node, Pod, eventually, in_netns};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Dialled, Mesh, PORT, Talk, dial, serve};
use crate::requests::{ask, serve_requests};

const TUNNEL_PORT: u16 = 15008;
const HTTP_PORT: u16 = 8080;
const LIMIT: Duration = Duration::from_secs(15);
const MANY: usize = 8;
/// A minute until connections are handed on no more, the time limit of a connect, and what machines take.
const FORGOTTEN: Duration = Duration::from_secs(90);

/// Who may talk to whom, in the order of the cases below.
struct Scene {
    mesh: Mesh,
    /// Lets in the friends, and the friend of another node on the tunnel's port alone.
    server: Pod,
    /// Lets in everybody.
    open: Pod,
    near_friend: Pod,
    far_friend: Pod,
    near_stranger: Pod,
    far_stranger: Pod,
    /// May call the server alone, and so is the one whose own node refuses.
    confined: Pod,
}

impl Scene {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        let [server, open, near_friend, near_stranger] =
            ["server", "open", "near-friend", "near-stranger"].map(|name| mesh.pod(0, name));
        let [far_friend, far_stranger, confined] =
            ["far-friend", "far-stranger", "confined"].map(|name| mesh.pod(1, name));
        mesh.ready()?;
        let scene = Self {
            server: server?,
            open: open?,
            near_friend: near_friend?,
            far_friend: far_friend?,
            near_stranger: near_stranger?,
            far_stranger: far_stranger?,
            confined: confined?,
            mesh,
        };
        scene.enforce()?;
        Ok(scene)
    }

    fn enforce(&self) -> Result<()> {
        let [near, far] = [&self.mesh.nodes[0], &self.mesh.nodes[1]];
        for (family, program) in ["iptables", "ip6tables"].into_iter().enumerate() {
            let ip = |pod: &Pod| [pod.ip(), pod.ip6()][family];
            let server = ip(&self.server);
            let lets_in =
                |from: IpAddr, port: u16| format!("-s {from} -d {server} -p tcp --dport {port} -j ACCEPT");
            begin(near, program)?;
            for port in [PORT, HTTP_PORT] {
                rule(near, program, &lets_in(ip(&self.near_friend), port))?;
            }
            for from in [&self.far_friend, &self.confined] {
                rule(near, program, &lets_in(ip(from), TUNNEL_PORT))?;
            }
            rule(near, program, &format!("-d {server} -j DROP"))?;
            begin(far, program)?;
            let confined = ip(&self.confined);
            rule(far, program, &lets_in(confined, TUNNEL_PORT))?;
            rule(far, program, &format!("-s {confined} -j DROP"))?;
        }
        Ok(())
    }

    /// Lets in nobody any more.
    fn close(&self) -> Result<()> {
        ["iptables", "ip6tables"].into_iter().try_for_each(|program| {
            netfilter(&self.mesh.nodes[0], program, "--insert FORWARD 2 -p tcp --dport 1:65535 -j REJECT")
        })
    }

    fn try_all(&self) -> Result<()> {
        let pairs = [
            (&self.near_friend, &self.server, true),
            (&self.far_friend, &self.server, true),
            (&self.confined, &self.server, true),
            (&self.near_stranger, &self.server, false),
            (&self.far_stranger, &self.server, false),
            (&self.confined, &self.open, false),
            (&self.near_stranger, &self.open, true),
            (&self.far_stranger, &self.open, true),
        ];
        for (client, server, is_let_in) in pairs {
            for to in [server.ip(), server.ip6()] {
                let Dialled { served, failed } = dial(client, to, 1)?;
                let what = format!("{} to {} at {to}: {served:?}, {failed:?}", client.name(), server.name());
                ensure!(
                    served.contains_key(server.name()) == is_let_in && failed.is_empty() == is_let_in,
                    "{what}"
                );
            }
        }
        Ok(())
    }
}

#[test]
fn what_the_network_refuses_is_refused_on_one_node_and_between_nodes() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let scene = Scene::set("um-e2e-networkpolicies")?;
    let _servers = [serve(&scene.server)?, serve(&scene.open)?];
    scene.try_all()
}

#[test]
fn what_the_network_comes_to_refuse_does_not_live_on_in_what_is_kept_warm() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let scene = Scene::set("um-e2e-networkpolicieslater")?;
    let _servers = [serve(&scene.server)?, serve(&scene.open)?, serve_requests(&scene.server)?];
    let url = format!("http://{}:{HTTP_PORT}/", scene.server.ip());
    // As many as it takes for each of the agent's threads to have something that is warm.
    let dial = || dial(&scene.far_friend, scene.server.ip(), MANY);
    let ask = || ask(&scene.near_friend, &url, &["--fresh", "--count", &MANY.to_string()]);
    let mut talk = Talk::begin(&scene.far_friend, scene.server.ip())?;
    dial()?.all_served()?;
    ask()?.all(200)?;
    scene.close()?;
    let (dialled, asked) = (dial()?.served, ask()?.by_status);
    ensure!(!dialled.is_empty() && asked.contains_key("200"), "nothing was warm: {dialled:?}, {asked:?}");
    eventually(FORGOTTEN, "what is new is refused", || {
        let (dialled, asked) = (dial()?, ask()?);
        ensure!(dialled.served.is_empty() && !asked.by_status.contains_key("200"), "{dialled:?}, {asked:?}");
        Ok(())
    })?;
    talk.goes_on()?;
    talk.end()
}

/// Packets that stay on the node's bridge are looked at as well, and connections that stand go on.
fn begin(node: &Node, program: &str) -> Result<()> {
    in_netns(node.netns(), || Ok(fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{program}"), "1")?))?;
    rule(node, program, "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT")
}

fn rule(node: &Node, program: &str, rule: &str) -> Result<()> {
    netfilter(node, program, &format!("--append FORWARD {rule}"))
}

fn netfilter(node: &Node, program: &str, change: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(change.split(' '));
    node.run(command, LIMIT)?.success().map(drop)
}

//! An attacker's pod, against a pod that takes no plaintext and one that policies guard: on their node and on another one, with IPv4 and
//! IPv6, while their agent runs and while it is killed. What their applications saw is compared at the end: nothing of it.

use std::cell::Cell;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Node, Pod, PodSpec, Process, binary, eventually, put_behind};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::attacks::vouched_tuple;
use crate::kit::{self, SHOP, SOON};
use crate::mesh::{BYPASSED, KERNEL_REFUSED, PORT, REFUSED, at, counted, listen, names, witness};

/// Datagrams are answered here.
const UDP_PORT: u16 = 7003;
/// A NodePort that leads to the pod that takes no plaintext, and one to the pod with policies.
const NODE_PORTS: [u16; 2] = [30_701, 30_702];
const LIMIT: Duration = Duration::from_secs(30);

struct Scene {
    mesh: kit::Mesh,
    /// Takes no plaintext.
    strict: Pod,
    /// Lets in its friend alone.
    guarded: Pod,
    friend: Pod,
    /// A pod of the mesh, on their node, that is not let in.
    member: Pod,
    /// Outside of the mesh, on their node and on the other one.
    near: Pod,
    far: Pod,
    /// A network namespace behind the member's, as a container engine inside of a pod makes them.
    inner: Pod,
    servers: [Process; 2],
    _datagrams: [Process; 2],
}

/// How a try ended at each of the two pods.
type Ends = [&'static str; 2];

/// Who tries, from where, and how: an end's name as [`end`] has it, by the pod's address.
type Try<'a> = (&'static str, Box<dyn Fn(IpAddr) -> Result<String> + 'a>, Ends);

impl Scene {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = kit::Mesh::start(name, 2, &[])?;
        let strict = PodSpec::new(SHOP, "strict").annotation("undermesh.io/mtls", "strict");
        let strict = mesh.add(0, strict)?;
        let guarded = mesh.pod(0, "guarded")?;
        let friend = mesh.add(0, PodSpec::new(SHOP, "friend").service_account("friend"))?;
        let member = mesh.pod(0, "member")?;
        let (near, far) = (mesh.outsider(0, "near")?, mesh.outsider(1, "far")?);
        let inner = mesh.outsider(0, "inner")?;
        let spec = json!({
            "selector": { "matchLabels": { "app": "guarded" } },
            "rules": [{ "from": [{ "serviceAccounts": ["friend"] }] }],
        });
        mesh.lab.apply(
            &Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "friends")
                .with("spec", spec),
        )?;
        let servers = [listen(&strict, PORT, &[])?, listen(&guarded, PORT, &[])?];
        let datagrams = [answer_datagrams(&strict)?, answer_datagrams(&guarded)?];
        fs::write(mesh.lab.dir().join("forger.py"), include_str!("forger.py"))?;
        put_behind(member.netns(), inner.netns())?;
        for (pod, node_port) in [&strict, &guarded].into_iter().zip(NODE_PORTS) {
            lead_node_port(&mesh.nodes[0], node_port, pod, PORT)?;
        }
        mesh.ready()?;
        let scene =
            Self { mesh, strict, guarded, friend, member, near, far, inner, servers, _datagrams: datagrams };
        eventually(SOON, "the policy is in force", || {
            let told = witness(&scene.near, &["connect", &at(scene.guarded.ip(), PORT)])?;
            ensure!(end(&told) == "ECONNRESET", "{told}");
            Ok(())
        })?;
        Ok(scene)
    }

    fn victims(&self) -> [&Pod; 2] {
        [&self.strict, &self.guarded]
    }

    /// Each of an attacker's ways to connect to another pod's port.
    fn tries(&self) -> Vec<Try<'_>> {
        const SHUT: Ends = ["ECONNREFUSED", "ECONNRESET"];
        let by = |pod: &'_ Pod, to: IpAddr, args: &[&str]| {
            Ok(end(&witness(pod, &[&["connect", &at(to, PORT)], args].concat())?))
        };
        let node = |node: &Node, to: IpAddr| -> Result<String> {
            let mut command = Command::new(binary("witness")?);
            command.args(["connect", &at(to, PORT)]);
            Ok(end(&serde_json::from_str(&node.run(command, LIMIT)?.success()?)?))
        };
        vec![
            ("a stranger on the node", Box::new(move |to| by(&self.near, to, &[])), SHUT),
            ("a stranger on another node", Box::new(move |to| by(&self.far, to, &[])), SHUT),
            ("a process of the node itself", Box::new(move |to| node(&self.mesh.nodes[0], to)), SHUT),
            ("a process of another node", Box::new(move |to| node(&self.mesh.nodes[1], to)), SHUT),
            ("a NodePort, and so the node's address", Box::new(|to| self.by_node_port(to)), SHUT),
            (
                "a network namespace behind a pod of the mesh",
                Box::new(move |to| {
                    by(&self.member, to, &["--netns", &self.inner.netns().display().to_string()])
                }),
                SHUT,
            ),
            ("the address of a friend, taken over", Box::new(|to| self.impersonate(to)), SHUT),
            (
                "an address of the pod's interface that nobody was told of",
                Box::new(|to| self.by_link_local(to)),
                ["ECONNREFUSED"; 2],
            ),
        ]
    }

    fn by_node_port(&self, to: IpAddr) -> Result<String> {
        let port = NODE_PORTS[usize::from([self.guarded.ip(), self.guarded.ip6()].contains(&to))];
        let node = self.mesh.nodes[0].addresses()[usize::from(to.is_ipv6())];
        Ok(end(&witness(&self.far, &["connect", &at(node, port)])?))
    }

    fn impersonate(&self, to: IpAddr) -> Result<String> {
        let friend = if to.is_ipv6() { self.friend.ip6() } else { self.friend.ip() };
        // The pod that is called has to know its neighbour to be told that it has moved.
        witness(&self.friend, &["udp", &at(to, UDP_PORT)])?;
        let length = if to.is_ipv6() { 128 } else { 32 };
        let address = format!("{friend}/{length}");
        run(&self.near, "ip", &["address", "add", &address, "dev", "eth0", "nodad"])?;
        let ends = [&friend.to_string(), &to.to_string(), &PORT.to_string()];
        let told = self.forger(&self.near, &[&["impersonate"], &ends.map(String::as_str)[..]].concat());
        run(&self.near, "ip", &["address", "del", &address, "dev", "eth0"])?;
        run(self.victim(to)?, "ip", &["neighbour", "flush", "dev", "eth0"])?;
        told
    }

    /// By the address that the kernel gives every interface of its own accord.
    fn by_link_local(&self, to: IpAddr) -> Result<String> {
        let (victim, own) = (interface(self.victim(to)?)?, interface(&self.near)?);
        let mut addresses = victim["addr_info"].as_array().into_iter().flatten();
        let local = addresses.find(|it| it["scope"] == "link").context("no link-local address")?;
        let to = format!("[{}%{}]:{PORT}", local["local"].as_str().unwrap_or_default(), own["ifindex"]);
        Ok(end(&witness(&self.near, &["connect", &to])?))
    }

    fn victim(&self, address: IpAddr) -> Result<&Pod> {
        let mut victims = self.victims().into_iter();
        victims.find(|pod| [pod.ip(), pod.ip6()].contains(&address)).context("nobody's address")
    }

    /// How often the kernel programs or the agent of the node have refused what was for the two pods.
    fn refused(&self) -> Result<[f64; 2]> {
        let metrics = self.mesh.agents[0].metrics()?;
        let denied = metrics.sum(REFUSED, &[("reason", "denied"), ("reporter", "destination")]);
        Ok([counted(&metrics, KERNEL_REFUSED, "plaintext"), denied])
    }

    /// Fails unless the applications have had these connections alone, each to its end.
    fn only_served(&self, friends: [usize; 2]) -> Result<()> {
        let friend = [self.friend.ip(), self.friend.ip6()];
        for (server, friends) in self.servers.iter().zip(friends) {
            let served = eventually(SOON, "the friend's connections have ended", || {
                let served = server.output();
                ensure!(served.lines().count() >= friends, "{served}");
                Ok(served)
            })?;
            for line in served.lines() {
                let line: Value = serde_json::from_str(line)?;
                let peer: SocketAddr = line["peer"].as_str().context("no peer")?.parse()?;
                let is_friend = friend.contains(&peer.ip().to_canonical());
                ensure!(is_friend && line["saw"][1] == "echoed 4", "it was served: {line}");
            }
            ensure!(served.lines().count() == friends, "{served}");
        }
        Ok(())
    }

    /// The friend is let in by both, by both families.
    fn friend_is_served(&self) -> Result<()> {
        for victim in self.victims() {
            for to in [victim.ip(), victim.ip6()] {
                names(&witness(&self.friend, &["connect", &at(to, PORT)])?)
                    .with_context(|| victim.name().to_owned())?;
            }
        }
        Ok(())
    }

    fn forger(&self, pod: &Pod, args: &[&str]) -> Result<String> {
        let script = self.mesh.lab.dir().join("forger.py").display().to_string();
        Ok(run(pod, "python3", &[&[script.as_str()], args].concat())?.trim().to_owned())
    }
}

#[test]
fn no_way_leads_past_a_strict_pod_or_policies() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"), Feature::Program("iptables"));
    let mut scene = Scene::set("um-e2e-attacker")?;
    scene.friend_is_served()?;
    let all = |scene: &Scene, expected: &dyn Fn(Ends) -> Ends, told: &dyn Fn(usize) -> Result<()>| {
        for (who, connect, ends) in scene.tries() {
            for (number, (victim, expected)) in scene.victims().into_iter().zip(expected(ends)).enumerate() {
                for to in [victim.ip(), victim.ip6()] {
                    let what = || format!("{who} to {} at {to}", victim.name());
                    let got = connect(to).with_context(what)?;
                    ensure!(got == expected, "{}: {got}, not {expected}", what());
                    told(usize::from(number == 1 && expected == "ECONNRESET")).with_context(what)?;
                }
            }
        }
        Ok(())
    };
    let before = Cell::new(scene.refused()?);
    all(&scene, &|ends| ends, &|kind| {
        let now = eventually(SOON, "it is told of", || {
            let now = scene.refused()?;
            ensure!(now[kind] > before.get()[kind], "{now:?}");
            Ok(now)
        })?;
        before.set(now);
        Ok(())
    })?;
    scene.friend_is_served()?;

    scene.mesh.agents[0].kill();
    all(&scene, &|_| ["ECONNREFUSED"; 2], &|_| Ok(()))?;
    scene.mesh.restart(0, &[])?;
    let (metrics, tries) = (scene.mesh.agents[0].metrics()?, scene.tries().len() as f64);
    let strict = counted(&metrics, KERNEL_REFUSED, "plaintext") - before.get()[0];
    let guarded = counted(&metrics, KERNEL_REFUSED, "inbound_agent_down");
    // By two families each; the address that nobody was told of is plaintext to both.
    ensure!(strict >= 2.0 * tries && guarded >= 2.0 * (tries - 1.0), "told of {strict} and {guarded}");
    let inner = counted(&metrics, BYPASSED, "inner_netns");
    ensure!(inner == 8.0, "{inner} connections of 8 from the inner namespace were told of");
    scene.friend_is_served()?;
    scene.only_served([6, 6])
}

/// Who forges packets sees no answer to them, and what is vouched for is not to be guessed at.
#[test]
fn forged_packets_reach_no_application() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"), Feature::Program("bpftool"));
    let mut scene = Scene::set("um-e2e-forger")?;
    scene.friend_is_served()?;
    let forge = |scene: &Scene| -> Result<()> {
        for victim in scene.victims() {
            for (to, family) in [(victim.ip(), 0), (victim.ip6(), 1)] {
                let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), "::1".parse()?];
                let friend = [scene.friend.ip(), scene.friend.ip6()][family];
                let agent: [IpAddr; 2] = [[192, 0, 0, 64].into(), "fd75:6d65:7368:1:0:1::".parse()?];
                let node = scene.mesh.nodes[0].addresses()[family];
                for source in [friend, to, loopback[family], agent[family], node] {
                    for attacker in [&scene.near, &scene.far] {
                        let ends = [&source.to_string(), "4321", &to.to_string(), &PORT.to_string()];
                        scene.forger(attacker, &[&["forge"], &ends[..]].concat())?;
                    }
                }
            }
        }
        Ok(())
    };
    // A connection that is vouched for, in the midst of which somebody else speaks.
    let gate = scene.mesh.lab.dir().join("gate");
    let mut held = Command::new(binary("witness")?);
    held.args(["connect", &at(scene.strict.ip(), PORT), "--script"]);
    held.arg(format!("hear-line,gate:{},say:ping,hear:4,shut,hear-end", gate.display()));
    let mut held = scene.friend.spawn(held)?;
    let (port, _) = eventually(SOON, "it is vouched for", || vouched_tuple(&scene.mesh.nodes[0]))?;
    let (source, to) = (scene.friend.ip().to_string(), scene.strict.ip().to_string());
    scene.forger(&scene.near, &["forge", &source, &port.to_string(), &to, &PORT.to_string()])?;
    fs::write(&gate, "")?;
    ensure!(
        held.wait(SOON)?.success() && held.output().contains(r#""ping","shut","|end""#),
        "{}",
        held.output()
    );

    let before = scene.refused()?[0];
    forge(&scene)?;
    // To the strict pod from its friend's address and from the node's, by two families and two attackers.
    eventually(SOON, "they are told of", || {
        let refused = scene.refused()?[0] - before;
        ensure!(refused >= 8.0, "{refused} of 8 were told of");
        Ok(())
    })?;
    scene.friend_is_served()?;
    scene.mesh.agents[0].kill();
    forge(&scene)?;
    scene.mesh.restart(0, &[])?;
    scene.only_served([5, 4])
}

/// What is not the mesh's: datagrams, a pod's own loopback. And what is nobody else's: the agent's admin port.
#[test]
fn datagrams_pass_and_neither_loopback_nor_the_admin_port_leads_in() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let mut scene = Scene::set("um-e2e-attacker-own")?;
    let check = |scene: &Scene| -> Result<()> {
        for victim in scene.victims() {
            for to in [victim.ip(), victim.ip6()] {
                for attacker in [&scene.near, &scene.far, &scene.member] {
                    let told = witness(attacker, &["udp", &at(to, UDP_PORT)])?;
                    ensure!(told["from"] == at(to, UDP_PORT), "{}: {told}", attacker.name());
                }
                // The pod's talk with itself is its own business.
                names(&witness(victim, &["connect", &at(to, PORT)])?)?;
            }
        }
        for loopback in ["127.0.0.1", "::1"] {
            let told = witness(&scene.member, &["connect", &at(loopback.parse()?, PORT)])?;
            ensure!(end(&told) == "ECONNREFUSED", "the member's own loopback: {told}");
        }
        let gateways = ["10.77.1.1", "fd77:1::1"].map(|it| it.parse().expect("an address"));
        for node in scene.mesh.nodes[0].addresses().into_iter().chain(gateways) {
            for attacker in [&scene.near, &scene.far, &scene.member] {
                let told = witness(attacker, &["connect", &at(node, 15020)])?;
                ensure!(end(&told) == "ECONNREFUSED", "the admin port, to {}: {told}", attacker.name());
            }
        }
        Ok(())
    };
    check(&scene)?;
    let bound = ["--bind", "127.0.0.1:0"];
    let told = witness(&scene.member, &[&["connect", &at(scene.guarded.ip(), PORT)], &bound[..]].concat())?;
    ensure!(end(&told) == "ECONNRESET", "from its loopback to the other pod: {told}");
    scene.mesh.agents[0].kill();
    check(&scene)
}

/// As kube-proxy does it: to the pod, and with the node's own address.
pub fn lead_node_port(node: &Node, node_port: u16, pod: &Pod, port: u16) -> Result<()> {
    for (program, family) in [("iptables", 0), ("ip6tables", 1)] {
        let nat = |rule: &str| {
            let mut command = Command::new(program);
            command.args(["-t", "nat", "-A"]).args(rule.split(' '));
            node.run(command, LIMIT)?.success()
        };
        let (own, to) = (node.addresses()[family], at([pod.ip(), pod.ip6()][family], port));
        nat(&format!("PREROUTING -d {own} -p tcp --dport {node_port} -j DNAT --to-destination {to}"))?;
        nat(&format!("POSTROUTING -o pods -p tcp --dport {port} -m conntrack --ctstate DNAT -j MASQUERADE"))?;
    }
    Ok(())
}

fn answer_datagrams(pod: &Pod) -> Result<Process> {
    let mut server = Command::new(binary("witness")?);
    server.args(["udp-listen", "--port", &UDP_PORT.to_string()]);
    let server = pod.spawn(server)?;
    eventually(SOON, "the UDP server answers", || {
        ensure!(server.output().contains("answering"), "it says: {}", server.output());
        Ok(())
    })?;
    Ok(server)
}

/// What `ip` shows of the pod's interface.
fn interface(pod: &Pod) -> Result<Value> {
    let shown: Value = serde_json::from_str(&run(pod, "ip", &["-j", "address", "show", "dev", "eth0"])?)?;
    Ok(shown[0].clone())
}

/// How a connection ended that waited for its server to speak: by an error, or with the server's greeting.
pub fn end(told: &Value) -> String {
    let told = &told[0];
    let at = if told["connect"] == "ok" { &told["saw"][0] } else { &told["connect"] };
    at.as_str().unwrap_or_default().to_owned()
}

fn run(pod: &Pod, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    pod.run(command, LIMIT)?.success()
}

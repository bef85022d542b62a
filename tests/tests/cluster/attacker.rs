//! An attacker on real nodes: in pods outside of the mesh, on the server's node and on another one, and in one of the mesh that is not let
//! in; with keys, forged packets, the mesh's own addresses and [others' names](impostor), and once more while the agent of the server's
//! node is killed.

mod impostor;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use undermesh_tests::cluster::{Cluster, Node};
use undermesh_tests::lab::{Place, binary, eventually, in_netns, put_behind, run_here};
use undermesh_tests::pki::{Authority, Leaf};

use crate::access::NODE_PORTS;
use crate::installed::{A_WHILE, LIMIT, PORT, SHOP, SYSTEM, counted};

pub(crate) use impostor::{DENIED, SHUT};

const HANDSHAKES: &str = "undermesh_tls_handshakes_total";
const KERNEL_REFUSED: &str = "undermesh_kernel_refused_connections_total";
/// A kubelet looks after the files of its pods each minute and a half at the latest.
const LONG: Duration = Duration::from_secs(120);
/// Who is let in, on the server's node, and a pod of the mesh on the other node that is not.
const FRIEND: &str = "near";
const MEMBER: &str = "far";
/// Identities, of the friend and of the other.
const IDS: [&str; 2] = ["spiffe://cluster.local/ns/shop/sa/near", "spiffe://cluster.local/ns/shop/sa/far"];

/// The ConfigMap with the list of certificates that have been taken back, and the one of them that the attacker has.
const LIST: &str = "revoked";
const REVOKED: &str = "stolen in time";

/// What names the list at the installation. It is to be there then, and is another authority's first: of nobody.
pub(crate) fn expect_a_list(cluster: &Cluster) -> Result<[&'static str; 2]> {
    cluster.kubectl(&["create", "namespace", SYSTEM])?;
    write_list(cluster, &Authority::stranger("cluster.local")?.revoke(&[])?)?;
    Ok(["identity.revocationLists[0].configMap=revoked", "identity.revocationLists[0].key=crl.pem"])
}

/// Writes the list that names the attacker's certificate. Kubelets bring it to the agents in their own time.
pub(crate) fn revoke(cluster: &Cluster) -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_list(cluster, &authority(cluster, folder.path())?.revoke(&[REVOKED])?)
}

fn write_list(cluster: &Cluster, list: &str) -> Result<()> {
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": LIST, "namespace": SYSTEM },
        "data": { "crl.pem": list },
    });
    cluster.apply(&map.to_string()).map(drop)
}

/// What the attacker has: the network of pods outside of the mesh, a network behind the friend's, and files.
pub(crate) struct Attacker<'a> {
    cluster: &'a Cluster,
    /// On the server's node, and on the other one.
    networks: [PathBuf; 2],
    server: &'a [IpAddr],
    friend: Vec<IpAddr>,
    /// Where the friend's programs run, and what they run in the network namespace behind its own.
    friends: Place,
    inner: Place,
    folder: tempfile::TempDir,
    ours: Authority,
}

impl<'a> Attacker<'a> {
    /// In the network of two pods outside of the mesh, which are on the server's node and on the other one. A third one's network comes
    /// to be behind the friend's.
    pub(crate) fn new(cluster: &'a Cluster, pods: [&str; 3], server: &'a [IpAddr]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        for (name, text) in
            [("caller.py", include_str!("../e2e/caller.py")), ("forger.py", include_str!("../e2e/forger.py"))]
        {
            fs::write(folder.path().join(name), text)?;
        }
        let [near, far] = cluster.nodes() else { bail!("not two nodes") };
        let network = |node, pod| Ok::<_, anyhow::Error>(place(cluster, node, pod)?.netns);
        let networks = [network(near, pods[0])?, network(far, pods[1])?];
        let friends = place(cluster, near, FRIEND)?;
        let inner = Place { netns: network(near, pods[2])?, ..friends.clone() };
        put_behind(&friends.netns, &inner.netns)?;
        let friend = addresses(&cluster.get(&["pod", FRIEND, "--namespace", SHOP])?)?;
        let ours = authority(cluster, folder.path())?;
        Ok(Self { cluster, networks, server, friend, friends, inner, folder, ours })
    }

    /// All that it tries while the agents run.
    pub(crate) fn tries(&self) -> Result<()> {
        self.by_certificates()?;
        self.by_forged_packets(true)?;
        let before = counted(self.cluster, KERNEL_REFUSED, &[("reason", "listener_dial")])?;
        self.by_codes()?;
        let told = counted(self.cluster, KERNEL_REFUSED, &[("reason", "listener_dial")])? - before;
        ensure!(told >= 16.0, "{told} of 16 were told of");
        self.by_loopback()?;
        self.in_the_friends_name(&SHUT)?;
        self.by_requests()?;
        self.by_changes()
    }

    /// The tunnel's port: who has no certificate, one of another authority or one that has expired is not let in, and who has one of
    /// its own gets neither to another pod nor past policies.
    fn by_certificates(&self) -> Result<()> {
        let theirs = Authority::stranger("cluster.local")?;
        let sign = |authority: &Authority, name: &str, leaf: Leaf<'_>| -> Result<String> {
            Ok(authority.sign(self.folder.path(), name, leaf)?.display().to_string())
        };
        let stranger = sign(&theirs, "theirs", Leaf { id: IDS[0], ..Leaf::GOOD })?;
        let stolen = sign(&self.ours, "stolen", Leaf { id: IDS[0], valid: (-48, -1) })?;
        let own = sign(&self.ours, "own", Leaf { id: IDS[1], ..Leaf::GOOD })?;
        let revoked = sign(&self.ours, REVOKED, Leaf { id: IDS[0], ..Leaf::GOOD })?;
        let hello = ["--certificate", &revoked, "hello"];
        eventually(LONG, "what is revoked is refused", || {
            let told = self.call(&self.networks[0], self.server[0], &hello)?;
            ensure!(told == "alert SSLV3_ALERT_CERTIFICATE_REVOKED", "{told}");
            Ok(())
        })?;
        for network in &self.networks {
            for (family, to) in self.server.iter().enumerate() {
                for (reason, expected, certificate) in [
                    ("no_certificate", "alert TLSV13_ALERT_CERTIFICATE_REQUIRED", None),
                    ("unknown_issuer", "alert TLSV1_ALERT_UNKNOWN_CA", Some(&stranger)),
                    ("expired", "alert SSLV3_ALERT_CERTIFICATE_EXPIRED", Some(&stolen)),
                    ("revoked", "alert SSLV3_ALERT_CERTIFICATE_REVOKED", Some(&revoked)),
                ] {
                    let labels = [("result", "failure"), ("reason", reason)];
                    let before = counted(self.cluster, HANDSHAKES, &labels)?;
                    let shown = certificate.into_iter().flat_map(|file| ["--certificate", file]);
                    let told = self.call(network, *to, &shown.chain(["hello"]).collect::<Vec<_>>())?;
                    ensure!(told == expected, "{reason}: it is told `{told}`");
                    let after = counted(self.cluster, HANDSHAKES, &labels)?;
                    ensure!(after == before + 1.0, "{reason}: {after} are told of, {before} before");
                }
                for (authority, expected) in
                    [(self.friend[family], "400"), (*to, "401"), (IpAddr::from([127, 0, 0, 1]), "400")]
                {
                    let authority = SocketAddr::new(authority, PORT).to_string();
                    let told =
                        self.call(network, *to, &["--certificate", &own, "ask", "CONNECT", &authority])?;
                    ensure!(told == expected, "CONNECT {authority} at {to}: {told}");
                }
            }
        }
        Ok(())
    }

    /// Raw packets in the names of the friend, of the server itself, of loopback and of the node.
    fn by_forged_packets(&self, is_told: bool) -> Result<()> {
        let reason = [("reason", "plaintext")];
        let before = if is_told { counted(self.cluster, KERNEL_REFUSED, &reason)? } else { 0.0 };
        for (family, to) in self.server.iter().enumerate() {
            let loopback = if to.is_ipv6() { "::1" } else { "127.0.0.1" };
            let node = self.cluster.nodes()[0].addresses()[family];
            for source in [self.friend[family], *to, loopback.parse()?, node] {
                for network in &self.networks {
                    let ends = [&source.to_string(), "4321", &to.to_string(), &PORT.to_string()];
                    let told = self.python(network, "forger.py", &[&["forge"], &ends[..]].concat())?;
                    ensure!(told == "forged", "{told}");
                }
            }
        }
        if !is_told {
            return Ok(());
        }
        eventually(A_WHILE, "they are told of", || {
            // At least what its neighbour says in the friend's name and in the node's, by both families.
            let told = counted(self.cluster, KERNEL_REFUSED, &reason)? - before;
            ensure!(told >= 4.0, "{told} of 4");
            Ok(())
        })
    }

    /// The addresses by which pods' sockets come to the agent, dialled from outside.
    fn by_codes(&self) -> Result<()> {
        let network = &self.networks[0];
        let via = self.server.iter().find(|address| address.is_ipv6()).context("no IPv6")?.to_string();
        let mut route = Command::new("ip");
        route.args(["-6", "route", "replace", "fd75:6d65:7368:1::/64", "via", &via]);
        in_netns(network, || run_here(route, LIMIT)?.success())?;
        for code in 16..32 {
            let got = self.dial(network, &format!("[fd75:6d65:7368:1::{code:x}]:{PORT}"))?;
            ensure!(got == "ECONNREFUSED", "code {code}: {got}");
        }
        Ok(())
    }

    /// A pod's own loopback leads to itself alone.
    fn by_loopback(&self) -> Result<()> {
        for to in [format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}")] {
            let exec = ["exec", "--namespace", SHOP, MEMBER, "--container", "main", "--"];
            let dial = [undermesh_tests::cluster::app::TRAFFIC, "dial", "--count", "1", &to];
            let told = self.cluster.kubectl(&[&exec[..], &dial].concat())?;
            let told: Value = serde_json::from_str(told.lines().last().unwrap_or_default())?;
            let failed = told["failed"].as_object().and_then(|failed| failed.keys().next());
            ensure!(failed.is_some_and(|error| error == "ECONNREFUSED"), "{to}: {told}");
        }
        Ok(())
    }

    /// The same while the agent of the server's node is killed, and its kubelet cannot start another. Nothing but the kernel's
    /// programs is left, and they let nobody in.
    pub(crate) fn tries_without_an_agent(&self) -> Result<()> {
        let node = &self.cluster.nodes()[0];
        let of_node = |script: &str| node.run(&["sh", "-c", script], A_WHILE)?.success();
        let refused = || counted(self.cluster, KERNEL_REFUSED, &[]);
        let before = refused()?;
        of_node("kill -STOP $(pidof kubelet)")?;
        let killed = of_node(
            "for pid in $(pidof undermesh); do
                tr '\\0' ' ' < /proc/$pid/cmdline | grep -q ' agent ' && kill -KILL $pid && echo $pid; done; true",
        )?;
        let tried = self.every_way_is_refused();
        of_node("kill -CONT $(pidof kubelet)")?;
        ensure!(killed.lines().count() == 1, "killed: {killed:?}");
        tried?;
        eventually(LONG, "the next agent tells of them", || {
            // Three ports dialled from two pods and two from the node, by both families, four NodePorts and sixteen codes.
            let told = refused()? - before;
            ensure!(told >= 36.0, "{told} of 36");
            Ok(())
        })
    }

    fn every_way_is_refused(&self) -> Result<()> {
        self.by_forged_packets(false)?;
        for to in self.server {
            for network in &self.networks {
                for port in [PORT, 8080, 15008] {
                    let got = self.dial(network, &SocketAddr::new(*to, port).to_string())?;
                    ensure!(got == "ECONNREFUSED", "{to}, port {port}, without an agent: {got}");
                }
            }
            // Probes come to the latter, from the kubelet alone.
            for port in [PORT, 8080] {
                let dial = node_dial(&self.cluster.nodes()[0], SocketAddr::new(*to, port))?;
                ensure!(dial == "ECONNREFUSED", "{to}:{port} from the node itself, without an agent: {dial}");
            }
        }
        for node in self.cluster.nodes()[0].addresses() {
            for port in NODE_PORTS {
                let got = self.dial(&self.networks[1], &SocketAddr::new(node, port).to_string())?;
                ensure!(got == "ECONNREFUSED", "by the NodePort {port} of {node}, without an agent: {got}");
            }
        }
        self.by_codes()?;
        self.by_forwarding("ECONNREFUSED")?;
        self.by_a_taken_address("ECONNREFUSED")?;
        self.by_loopback()
    }

    fn call(&self, network: &Path, to: IpAddr, args: &[&str]) -> Result<String> {
        self.python(network, "caller.py", &[&[to.to_string().as_str()], args].concat())
    }

    fn python(&self, network: &Path, script: &str, args: &[&str]) -> Result<String> {
        let mut python = Command::new("python3");
        python.arg(self.folder.path().join(script)).args(args);
        Ok(in_netns(network, || run_here(python, LIMIT)?.success())?.trim().to_owned())
    }

    /// How a connection ended that waited for its server to speak.
    fn dial(&self, network: &Path, to: &str) -> Result<String> {
        let mut witness = Command::new(binary("witness")?);
        witness.args(["connect", to]);
        end(&in_netns(network, || run_here(witness, LIMIT)?.success())?)
    }
}

fn node_dial(node: &Node, to: SocketAddr) -> Result<String> {
    let mut witness = Command::new(binary("witness")?);
    witness.args(["connect", &to.to_string()]);
    end(&in_netns(&node.netns(), || run_here(witness, LIMIT)?.success())?)
}

fn end(told: &str) -> Result<String> {
    let told: Value = serde_json::from_str(told)?;
    let at = if told[0]["connect"] == "ok" { &told[0]["saw"][0] } else { &told[0]["connect"] };
    Ok(at.as_str().unwrap_or_default().to_owned())
}

/// Where a container of the pod runs, by one of its processes.
fn place(cluster: &Cluster, node: &Node, pod: &str) -> Result<Place> {
    let pod = cluster.get(&["pod", pod, "--namespace", SHOP])?;
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
    let mut find = Command::new("find");
    find.arg(node.cgroup()).args(["-path", &format!("*{uid}*/cgroup.procs")]);
    for processes in run_here(find, LIMIT)?.success()?.lines().map(Path::new) {
        if let (Some(pid), Some(cgroup)) = (fs::read_to_string(processes)?.lines().next(), processes.parent())
        {
            return Ok(Place { netns: format!("/proc/{pid}/ns/net").into(), cgroup: cgroup.into() });
        }
    }
    bail!("{pod} has no processes")
}

pub(crate) fn addresses(pod: &Value) -> Result<Vec<IpAddr>> {
    let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
    ips.map(|ip| Ok(ip["ip"].as_str().context("no address")?.parse()?)).collect()
}

/// The cluster's own, with its key, as only its controllers have it.
fn authority(cluster: &Cluster, folder: &Path) -> Result<Authority> {
    let secrets = cluster.get(&["secrets", "--namespace", SYSTEM])?;
    let mut secrets = secrets["items"].as_array().into_iter().flatten();
    let secret = secrets.find(|secret| !secret["data"]["root-1.key.pem"].is_null()).context("no root")?;
    for file in ["root-1.pem", "root-1.key.pem"] {
        fs::write(folder.join(file), STANDARD.decode(secret["data"][file].as_str().context("no root")?)?)?;
    }
    Authority::read(folder)
}

//! A ztunnel on a node of the lab, without a cluster: to be measured, or to be the other end of our tunnel.
//!
//! Three things stand in for what it finds in a cluster. A file of workloads takes the place of the control plane,
//! and its built-in test authority that of the certificate authority. A thread takes the place of the CNI agent:
//! over a SOCK_SEQPACKET socket it hands over each pod's namespace. And rules in each pod redirect connections, as
//! the CNI agent would have written them.

use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen,
    recv, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::json;
use undermesh_tests::lab::{Lab, Node, Pod, Process, eventually};

const LIMIT: Duration = Duration::from_secs(20);

/// Starts a ztunnel on the node for these pods of it; `all` are the pods of every node. With the log level `info` it
/// writes a line for each connection.
pub fn start(binary: &Path, lab: &Lab, node: &Node, all: &[&Pod], log_level: &str) -> Result<Process> {
    let own: Vec<&&Pod> = all.iter().filter(|pod| pod.node().name() == node.name()).collect();
    let uds = lab.dir().join(format!("ztunnel-{}.sock", node.name()));
    let workloads = lab.dir().join("ztunnel-workloads.yaml");
    // JSON is YAML too.
    let list: Vec<_> = all.iter().map(|pod| workload(pod)).collect();
    fs::write(&workloads, json!({ "workloads": list, "policies": [], "services": [] }).to_string())?;
    let introductions = own.iter().map(|pod| Introduction::of(pod)).collect::<Result<Vec<_>>>()?;
    let introduced = introduce(&uds, introductions)?;

    let mut ztunnel = Command::new(binary);
    ztunnel.env("PROXY_MODE", "shared").env("NODE_NAME", node.name()).env("INPOD_UDS", &uds);
    ztunnel.env("FAKE_CA", "true").env("XDS_ADDRESS", "").env("LOCAL_XDS_PATH", &workloads);
    ztunnel.env("RUST_LOG", log_level);
    let mut process = node.spawn(ztunnel)?;
    let met = introduced
        .recv_timeout(LIMIT)
        .context("ztunnel has not asked for the node's pods")
        .and_then(|met| met);
    met.with_context(|| format!("ztunnel's last words:\n{}", process.log_tail(20)))?;
    eventually(LIMIT, "ztunnel gets ready", || node.get("127.0.0.1:15021", "/healthz/ready", &[])?.ok())
        .with_context(|| format!("ztunnel's last words:\n{}", process.log_tail(20)))?;
    process.check_running()?;
    for pod in own {
        redirect(lab, pod)?;
    }
    Ok(process)
}

fn workload(pod: &Pod) -> serde_json::Value {
    json!({
        "uid": uid(pod), "name": pod.name(), "namespace": pod.namespace(), "serviceAccount": "default",
        "trustDomain": "cluster.local", "workloadIps": [pod.ip(), pod.ip6()], "protocol": "HBONE", "node": pod.node().name(), "network": "", "services": {},
    })
}

fn uid(pod: &Pod) -> String {
    format!("bench//v1/Pod/{}/{}", pod.namespace(), pod.name())
}

/// A pod as the CNI agent introduces it.
struct Introduction {
    message: Vec<u8>,
    netns: File,
}

impl Introduction {
    fn of(pod: &Pod) -> Result<Self> {
        Ok(Self {
            message: add_workload(&uid(pod), pod.name(), pod.namespace()),
            netns: File::open(pod.netns())?,
        })
    }
}

/// Listens, and on a thread introduces the pods to the ztunnel that connects. What is returned tells how it went.
fn introduce(uds: &PathBuf, pods: Vec<Introduction>) -> Result<mpsc::Receiver<Result<()>>> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(uds)?)?;
    listen(&listener, Backlog::new(1)?)?;
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::new(LIMIT.as_secs() as i64, 0))?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let met = meet(&listener, &pods);
        let peer = met.as_ref().ok().map(AsRawFd::as_raw_fd);
        // Nobody may wait any more; then there is nobody to tell.
        let _ = tell.send(met.as_ref().map(|_| ()).map_err(|error| anyhow::anyhow!("{error:#}")));
        if let Some(peer) = peer {
            // The connection stays open until ztunnel ends: else it would ask for everything again.
            let _ = recv(peer, &mut [0; 512], MsgFlags::empty());
        }
    });
    Ok(told)
}

fn meet(listener: &OwnedFd, pods: &[Introduction]) -> Result<OwnedFd> {
    let peer = accept(listener.as_raw_fd()).context("ztunnel has not connected")?;
    // SAFETY: accept has just made the descriptor, and nobody else has it.
    let peer: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(peer) };
    setsockopt(&peer, sockopt::ReceiveTimeout, &TimeVal::new(LIMIT.as_secs() as i64, 0))?;
    receive(&peer).context("no hello")?;
    for pod in pods {
        let netns = [pod.netns.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&netns)];
        sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(&pod.message)], &rights, MsgFlags::empty(), None)?;
        acknowledged(&receive(&peer)?)?;
    }
    sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(&SNAPSHOT_SENT)], &[], MsgFlags::empty(), None)?;
    acknowledged(&receive(&peer)?)?;
    setsockopt(&peer, sockopt::ReceiveTimeout, &TimeVal::new(0, 0))?;
    Ok(peer)
}

fn receive(peer: &OwnedFd) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let length = recv(peer.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    if length == 0 {
        bail!("ztunnel has closed the connection");
    }
    buffer.truncate(length);
    Ok(buffer)
}

/// `WorkloadRequest { snapshot_sent: {} }`, field 3.
const SNAPSHOT_SENT: [u8; 2] = [3 << 3 | 2, 0];

/// `WorkloadRequest { add: { uid, workload_info: { name, namespace, service_account } } }`.
fn add_workload(uid: &str, name: &str, namespace: &str) -> Vec<u8> {
    let info = [field(1, name.as_bytes()), field(2, namespace.as_bytes()), field(3, b"default")].concat();
    field(1, &[field(1, uid.as_bytes()), field(2, &info)].concat())
}

/// A length-delimited field of a protobuf message; no message here is longer than two length bytes can say.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    match content.len() {
        short if short < 0x80 => bytes.push(short as u8),
        long => bytes.extend([(long & 0x7f) as u8 | 0x80, (long >> 7) as u8]),
    }
    bytes.extend_from_slice(content);
    bytes
}

/// `WorkloadResponse { ack: { error } }`: the error is absent or empty if all is well.
fn acknowledged(response: &[u8]) -> Result<()> {
    match response {
        [0x0a, _] | [0x0a, _, 0x0a, 0] => Ok(()),
        [0x0a, _, 0x0a, _, error @ ..] => bail!("ztunnel refuses: {}", String::from_utf8_lossy(error)),
        other => bail!("ztunnel answers {other:x?}"),
    }
}

/// Outbound connections to 15001 and inbound ones to 15006, except ztunnel's own, which carry its mark. Answers on
/// connections that it made in a client's name come back to it by the routing table.
fn redirect(lab: &Lab, pod: &Pod) -> Result<()> {
    for (iptables, family, loopback, everything) in
        [("iptables", "-4", "127.0.0.1/32", "0.0.0.0/0"), ("ip6tables", "-6", "::1/128", "::/0")]
    {
        let file = lab.dir().join(format!("ztunnel-{}.{iptables}", pod.name()));
        fs::write(&file, rules(loopback))?;
        let mut restore = Command::new(format!("/usr/sbin/{iptables}-restore"));
        restore.args(["--wait", "10"]).arg(&file);
        pod.run(restore, LIMIT)?.success()?;
        for line in [
            format!("route add local {everything} dev lo table 100"),
            "rule add fwmark 0x111/0xfff pref 32764 lookup 100".to_owned(),
        ] {
            let mut ip = Command::new("ip");
            ip.arg(family).args(line.split(' '));
            pod.run(ip, LIMIT)?.success()?;
        }
    }
    Ok(())
}

fn rules(loopback: &str) -> String {
    format!(
        "\
*mangle
-A PREROUTING -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
-A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A OUTPUT ! -d {loopback} -o lo -j ACCEPT
-A OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
-A PREROUTING ! -d {loopback} -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
COMMIT
"
    )
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{connect, send};

    use super::*;

    #[test]
    fn introduces_pods_one_by_one() {
        let dir = std::env::temp_dir().join(format!("um-zds-{}", std::process::id()));
        let netns = File::open("/proc/self/ns/net").unwrap();
        let message = add_workload("u", "web", "shop");
        assert_eq!(message, b"\x0a\x19\x0a\x01u\x12\x14\x0a\x03web\x12\x04shop\x1a\x07default".to_vec());
        let told = introduce(&dir, vec![Introduction { message: message.clone(), netns }]).unwrap();

        let peer = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(peer.as_raw_fd(), &UnixAddr::new(&dir).unwrap()).unwrap();
        let say = |bytes: &[u8]| send(peer.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
        say(&[8, 1]);
        assert_eq!(receive(&peer).unwrap(), message);
        say(&[0x0a, 0]);
        assert_eq!(receive(&peer).unwrap(), SNAPSHOT_SENT);
        say(&[0x0a, 0]);
        told.recv().unwrap().unwrap();
        fs::remove_file(dir).unwrap();
    }

    #[test]
    fn a_refusal_has_its_reason() {
        let error = acknowledged(b"\x0a\x05\x0a\x03bad").unwrap_err();
        assert_eq!(error.to_string(), "ztunnel refuses: bad");
    }
}

//! Pods that come and go, and what is left of them: nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Agent, Pod, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kernel::{map_entries, programs};
use crate::kit::{Hold, Mesh, SOON, Talk, dial, namespace, serve, wait_enrolled};

const CLOSED: &str = "undermesh_tcp_connections_closed_total";
const ACTIVE: &str = "undermesh_tcp_connections_active";

/// A code outlives its destination by a minute.
const CODES_GONE: Duration = Duration::from_secs(75);

#[test]
fn both_ends_notice_when_a_pod_is_removed() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-removed", 2, &[])?;
    let (client, other) = (mesh.pod(0, "client")?, mesh.pod(1, "other")?);
    let (near, far) = (mesh.pod(0, "near")?, mesh.pod(1, "far")?);
    let servers = [serve(&near)?, serve(&far)?, serve(&other)?];
    mesh.ready()?;
    let kept = Talk::begin(&client, other.ip())?;
    let cut = [
        Talk::begin(&client, near.ip())?,
        Talk::begin(&client, far.ip())?,
        Talk::begin(&client, far.ip6())?,
        Talk::begin(&near, other.ip())?,
    ];
    let namespaces = [&near, &far].map(|pod| fs::metadata(pod.netns()).map(|file| file.ino()));
    near.remove()?;
    far.remove()?;
    for talk in cut {
        // Its server, or the client itself, was killed with the pod: an end or a reset, at once and not a silence.
        talk.ends_somehow(Duration::from_secs(3))?;
    }
    wait_enrolled(&mesh.agents[0], 1)?;
    wait_enrolled(&mesh.agents[1], 1)?;
    for (agent, namespace) in mesh.agents.iter().zip(namespaces) {
        agent.wait_metrics(SOON, "only one connection is open", |m| {
            m.sum(ACTIVE, &[("reporter", "source"), ("source_workload", "client")])
                + m.sum(ACTIVE, &[("reporter", "destination"), ("destination_workload", "other")])
                == 1.0
        })?;
        let namespace = namespace?;
        eventually(SOON, "the agent lets the namespace go", || lets_go(agent, &BTreeSet::from([namespace])))?;
    }
    kept.end()?;
    drop(servers);
    Ok(())
}

#[test]
fn a_removed_pod_with_idle_connections_is_let_go() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-deserted", 1, &[])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let held = Hold::begin(&client, server.ip(), 20)?;
    let namespace = fs::metadata(client.netns())?.ino();
    // Nobody closes these: the client's processes die while its network is already gone.
    drop_link(&client)?;
    held.kill();
    client.delete()?;
    wait_enrolled(&mesh.agents[0], 1)?;
    mesh.agents[0].wait_metrics(SOON, "no connection is open", |m| m.sum(ACTIVE, &[]) == 0.0)?;
    fs::metadata(client.netns())?;
    eventually(SOON, "the agent lets the namespace go", || {
        lets_go(&mesh.agents[0], &BTreeSet::from([namespace]))
    })
}

/// Takes the pod's interface down, as a CNI plugin does that is faster than the containers' end.
fn drop_link(pod: &Pod) -> Result<()> {
    let mut ip = std::process::Command::new("ip");
    ip.args(["link", "set", "eth0", "down"]);
    pod.run(ip, SOON)?.success().map(drop)
}

#[test]
fn a_peer_that_vanished_ends_its_connections() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let keepalive = ["--keepalive-time", "1", "--keepalive-interval", "1", "--keepalive-probes", "3"];
    let mut mesh = Mesh::start("um-e2e-vanished", 2, &keepalive)?;
    let (client, far) = (mesh.pod(0, "client")?, mesh.pod(1, "far")?);
    let _server = serve(&far)?;
    mesh.ready()?;
    let idle = Hold::begin(&client, far.ip(), 3)?;
    let mut busy = Talk::begin(&client, far.ip6())?;
    mesh.lab.cut(&mesh.nodes[1])?;
    let limit = Duration::from_secs(20);
    let labels = [("reporter", "source"), ("reason", "upstream_timeout")];
    mesh.agents[0].wait_metrics(limit, "idle connections are ended", |m| m.sum(CLOSED, &labels) == 3.0)?;
    let labels = [("reporter", "destination"), ("reason", "client_timeout")];
    mesh.agents[1].wait_metrics(limit, "the other side ends them, too", |m| m.sum(CLOSED, &labels) >= 3.0)?;
    idle.kill();
    mesh.lab.heal(&mesh.nodes[1])?;
    eventually(SOON, "connections get through again", || dial(&client, far.ip(), 1)?.all_served())?;
    // What was sent into the gap is sent again, as without the mesh, and finds that its connection is gone.
    if busy.goes_on().is_ok() {
        return busy.end();
    }
    let how = busy.breaks(SOON)?;
    ensure!(how == "ECONNRESET", "the busy connection ended with {how}");
    Ok(())
}

#[test]
fn a_hundred_pods_enrolled_and_removed_ten_times_leave_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    const PODS: usize = 100;
    let mesh = Mesh::start("um-e2e-hundreds", 1, &[])?;
    let stays = mesh.outsider(0, "stays")?;
    stays.set_mesh(true)?;
    let _server = serve(&stays)?;
    let pods = (0..PODS).map(|n| mesh.pod(0, &format!("pod-{n}"))).collect::<Result<Vec<_>>>()?;
    wait_enrolled(&mesh.agents[0], PODS + 1)?;
    let round = |mesh: &Mesh| -> Result<()> {
        dial(&pods[0], stays.ip(), 3)?.all_served()?;
        dial(&pods[PODS - 1], stays.ip6(), 3)?.all_served()?;
        mesh.lab.apply(&namespace(false))?;
        wait_enrolled(&mesh.agents[0], 1)?;
        mesh.lab.apply(&namespace(true))?;
        wait_enrolled(&mesh.agents[0], PODS + 1)
    };
    // The first rounds warm up: the allocator's arenas and the tables grow to their sizes.
    for _ in 0..2 {
        round(&mesh)?;
    }
    let full = Holdings::of(&mesh)?;
    for _ in 0..10 {
        round(&mesh)?;
    }
    eventually(SOON, "nothing has grown after ten rounds", || full.compare(&Holdings::of(&mesh)?))?;

    mesh.lab.apply(&namespace(false))?;
    wait_enrolled(&mesh.agents[0], 1)?;
    eventually(SOON, "no programs are left on pods", || {
        let left = programs(&mesh.nodes[0])?;
        ensure!(left.len() == 8, "programs are left on pods: {left:#?}");
        Ok(())
    })?;
    mesh.lab.apply(&namespace(true))?;
    wait_enrolled(&mesh.agents[0], PODS + 1)?;

    // Now the pods really go, while they are in the mesh.
    let namespaces = pods.iter().map(|pod| Ok(fs::metadata(pod.netns())?.ino())).collect::<Result<_>>()?;
    for pod in pods {
        pod.remove()?;
    }
    wait_enrolled(&mesh.agents[0], 1)?;
    let agent = &mesh.agents[0];
    eventually(SOON, "the agent lets the namespaces go", || lets_go(agent, &namespaces))?;
    eventually(SOON, "nothing of the pods is left", || {
        let left = programs(&mesh.nodes[0])?;
        ensure!(left.len() == 8, "programs are left: {left:#?}");
        let pins = fs::read_dir(mesh.nodes[0].pins().join("pods"))?.count();
        ensure!(pins == 1, "{pins} pods are pinned");
        Ok(())
    })?;
    eventually(CODES_GONE, "the maps hold one pod", || {
        let entries = map_entries(&mesh.nodes[0])?;
        for (map, expected) in
            // Counters: of the pod, of those that have left, of no pod.
            [("pods", 1), ("listeners", 2), ("destinations", 2), ("codes", 2), ("counters", 3)]
        {
            ensure!(entries[map] == expected, "{map} is to have {expected} entries: {entries:?}");
        }
        ensure!(entries["vouched"] == 0 && entries["dials"] == 0, "vouchers are left: {entries:?}");
        Ok(())
    })
}

/// What an agent takes up.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    resident: u64,
    entries: BTreeMap<String, usize>,
}

impl Holdings {
    fn of(mesh: &Mesh) -> Result<Self> {
        let process = mesh.agents[0].process();
        Ok(Self {
            descriptors: process.descriptors()?,
            resident: process.resident_bytes()?,
            entries: map_entries(&mesh.nodes[0])?,
        })
    }

    fn compare(&self, after: &Self) -> Result<()> {
        eprintln!("before {self:?}, after {after:?}");
        ensure!(after.descriptors <= self.descriptors + 4, "descriptors leak: {self:?} became {after:?}");
        ensure!(after.resident <= self.resident * 11 / 10, "memory leaks: {self:?} became {after:?}");
        // Two of the counters' entries come when there is first something to count: of pods that have left, of no pod.
        let counters_of_pods = |entries: &BTreeMap<String, usize>| entries["counters"] <= entries["pods"] + 2;
        ensure!(counters_of_pods(&after.entries), "counters leak: {self:?} became {after:?}");
        let others = |entries: &BTreeMap<String, usize>| {
            entries.iter().filter(|(map, _)| *map != "counters").map(|(_, n)| *n).collect::<Vec<_>>()
        };
        ensure!(others(&after.entries) == others(&self.entries), "entries leak: {self:?} became {after:?}");
        Ok(())
    }
}

/// Fails if the agent holds one of the network namespaces open, by a descriptor or a thread inside of it.
pub fn lets_go(agent: &Agent, namespaces: &BTreeSet<u64>) -> Result<()> {
    let process = Path::new("/proc").join(agent.process().pid().to_string());
    let threads = fs::read_dir(process.join("task"))?.map(|task| Ok(task?.path().join("ns/net")));
    let descriptors = fs::read_dir(process.join("fd"))?.map(|fd| Ok(fd?.path()));
    for path in threads.chain(descriptors).collect::<Result<Vec<_>>>()? {
        let target = fs::read_link(&path).unwrap_or_default();
        let inode = target.to_str().and_then(|t| t.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok());
        let held = inode.is_some_and(|inode| namespaces.contains(&inode));
        ensure!(!held, "{} is {}", path.display(), target.display());
    }
    Ok(())
}

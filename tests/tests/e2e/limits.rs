//! Many connections at one time: a thousand at once, as many as the limit of open files allows, and more than that.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::{Agent, eventually};
use undermesh_tests::require;
use undermesh_tests::require::{Feature, MOST_OPEN_FILES};

use crate::kernel::map_entries;
use crate::kit::{Hold, Mesh, PORT, SOON, Talk, dial, dial_at_once, serve};

const OPENED: &str = "undermesh_tcp_connections_opened_total";
const CLOSED: &str = "undermesh_tcp_connections_closed_total";
const REFUSED: &str = "undermesh_tcp_connections_refused_total";
const ACTIVE: &str = "undermesh_tcp_connections_active";
const TUNNELS: &str = "undermesh_tunnels_open";

#[test]
fn a_thousand_connections_open_and_close_at_once() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    let mut mesh = Mesh::start("um-e2e-thousand", 2, &[])?;
    let (client, near, far) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?, mesh.pod(1, "far")?);
    let _servers = [serve(&near)?, serve(&far)?];
    mesh.ready()?;
    let addresses = [near.ip(), near.ip6(), far.ip(), far.ip6()];
    // The first ones make the allocator grow.
    for ip in addresses {
        dial_at_once(&client, SocketAddr::new(ip, PORT), 1000, 1000)?.all_served()?;
    }
    let idle =
        |mesh: &Mesh| mesh.agents[0].wait_metrics(SOON, "all are closed", |m| m.sum(ACTIVE, &[]) == 0.0);
    idle(&mesh)?;
    let process = mesh.agents[0].process();
    let (descriptors, resident) = (process.descriptors()?, process.resident_bytes()?);
    for ip in addresses {
        dial_at_once(&client, SocketAddr::new(ip, PORT), 1000, 1000)?.all_served()?;
    }
    let metrics = idle(&mesh)?;
    let done = [("reporter", "source"), ("reason", "done")];
    let (opened, done) = (metrics.sum(OPENED, &done[..1]), metrics.sum(CLOSED, &done));
    ensure!(opened == 8000.0 && done == 8000.0, "{opened} were opened and {done} ended in order, not 8000");
    let after = (process.descriptors()?, process.resident_bytes()?);
    ensure!(after.0 <= descriptors + 4, "{} descriptors became {}", descriptors, after.0);
    ensure!(after.1 <= resident * 11 / 10, "{resident} bytes of memory became {}", after.1);
    eventually(SOON, "nothing is vouched for", || {
        let entries = map_entries(&mesh.nodes[0])?;
        ensure!(entries["vouched"] == 0 && entries["dials"] == 0, "the maps hold {entries:?}");
        Ok(())
    })
}

/// What root may do on every machine; the goal is tried where a process may open that many files.
#[test]
fn as_many_idle_connections_as_the_limit_of_open_files_allows() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    hold_at_one_time("um-e2e-many", Way::Node, |possible| possible.min(GOAL / 2))
}

#[test]
fn as_many_idle_connections_through_tunnels_as_the_limit_of_open_files_allows() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    // A tunnel takes a place, too.
    hold_at_one_time("um-e2e-many-tunnels", Way::Tunnels, |possible| (possible - possible / 40).min(GOAL / 2))
}

#[test]
fn twenty_thousand_connections_at_one_time() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::OpenFiles(MOST_OPEN_FILES));
    hold_at_one_time("um-e2e-goal", Way::Node, |_| GOAL)
}

#[test]
fn twenty_thousand_connections_through_tunnels() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::OpenFiles(MOST_OPEN_FILES));
    hold_at_one_time("um-e2e-goal-tunnels", Way::Tunnels, |_| GOAL)
}

/// How many connections one node is to carry. An agent reckons with two files for each, and with some for tunnels.
const GOAL: usize = 20_000;

/// One pod has 28,000 ephemeral ports, and its client as many files as the agent.
const CLIENTS: usize = 2;

/// Connections that share a tunnel at most.
const STREAMS: usize = 100;

/// Where the held connections lead.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// To pods of the same node, in plaintext.
    Node,
    /// To pods of another node, by mutual TLS.
    Tunnels,
}

impl Way {
    fn nodes(self) -> usize {
        match self {
            Self::Node => 1,
            Self::Tunnels => 2,
        }
    }

    fn security(self) -> &'static str {
        match self {
            Self::Node => "same_node",
            Self::Tunnels => "mutual_tls",
        }
    }

    /// Tunnels that so many connections may need: each worker fills its own, for each pair of pods.
    fn tunnels(self, connections: usize) -> RangeInclusive<usize> {
        match self {
            Self::Node => 0..=0,
            Self::Tunnels => {
                let workers = std::thread::available_parallelism().map_or(1, usize::from);
                let full = connections / STREAMS;
                full..=full + CLIENTS * workers
            }
        }
    }

    /// Descriptors that an agent may need for them.
    fn descriptors(self, connections: usize) -> usize {
        match self {
            Self::Node => 2 * connections,
            Self::Tunnels => connections + self.tunnels(connections).end(),
        }
    }
}

/// Opens connections between pods until there are as many as `choose` says of those that are possible. Each is greeted
/// when it is opened; once all are open, each one carries a line back and forth and ends in order.
fn hold_at_one_time(lab: &str, way: Way, choose: impl FnOnce(usize) -> usize) -> Result<()> {
    let mut mesh = Mesh::start(lab, way.nodes(), &[])?;
    let clients = (0..CLIENTS).map(|n| mesh.pod(0, &format!("client-{n}"))).collect::<Result<Vec<_>>>()?;
    let servers = (0..CLIENTS).map(|n| mesh.pod(way.nodes() - 1, &format!("server-{n}")));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    let _running = servers.iter().map(serve).collect::<Result<Vec<_>>>()?;
    mesh.ready()?;
    let count = choose(said_limit(&mesh.agents[0].process().output())?) / CLIENTS * CLIENTS;
    let pairs = || clients.iter().zip(&servers);
    // Grows the tables that do not grow with the connections.
    pairs().try_for_each(|(client, server)| dial(client, server.ip(), 10)?.all_served().map(drop))?;
    let idle = mesh.agents.iter().map(Usage::of).collect::<Result<Vec<_>>>()?;
    let held = pairs().map(|(client, server)| Hold::begin(client, server.ip(), count / CLIENTS));
    let held = held.collect::<Result<Vec<_>>>()?;
    for (agent, idle) in mesh.agents.iter().zip(&idle) {
        carries(agent, way, count, idle)?;
    }
    held.into_iter().try_for_each(Hold::end)?;
    for (agent, idle) in mesh.agents.iter().zip(&idle) {
        has_ended(agent, way, count + 10 * CLIENTS, idle)?;
    }
    Ok(())
}

/// What an agent uses of the machine.
struct Usage {
    resident: u64,
    descriptors: usize,
}

impl Usage {
    fn of(agent: &Agent) -> Result<Self> {
        let process = agent.process();
        Ok(Self { resident: process.resident_bytes()?, descriptors: process.descriptors()? })
    }
}

/// Fails unless the agent carries so many connections now, the way they are to go, at no more than they may cost.
fn carries(agent: &Agent, way: Way, count: usize, idle: &Usage) -> Result<()> {
    let (node, now, metrics) = (agent.node().name(), Usage::of(agent)?, agent.metrics()?);
    let active = metrics.sum(ACTIVE, &[("reporter", reporter(agent, way))]);
    ensure!(active == count as f64, "{active} of {count} connections are active on {node}");
    let tunnels = metrics.sum(TUNNELS, &[]) as usize;
    ensure!(way.tunnels(count).contains(&tunnels), "{tunnels} tunnels for {count} connections on {node}");
    let each = now.resident.saturating_sub(idle.resident) / count as u64;
    let opened = now.descriptors - idle.descriptors;
    eprintln!(
        "{count} idle connections on {node}, in {tunnels} tunnels: {opened} descriptors and {each} bytes of memory each"
    );
    ensure!(each < 5 * 1024, "an idle connection takes {each} bytes of the memory of the agent of {node}");
    ensure!(opened <= way.descriptors(count) + SLACK, "the agent of {node} has {opened} descriptors more");
    Ok(())
}

/// Fails unless all of its connections have ended in order and what they used is given back. Tunnels stay for a while.
fn has_ended(agent: &Agent, way: Way, all: usize, idle: &Usage) -> Result<()> {
    let metrics = agent.wait_metrics(SOON, "all are closed", |m| m.sum(ACTIVE, &[]) == 0.0)?;
    let mut labels = vec![("reporter", reporter(agent, way)), ("security", way.security())];
    let opened = metrics.sum(OPENED, &labels);
    labels.push(("reason", "done"));
    let done = metrics.sum(CLOSED, &labels);
    let node = agent.node().name();
    ensure!((opened, done) == (all as f64, all as f64), "{node}: of {all}, {opened} opened and {done} done");
    let (left, most) = (Usage::of(agent)?.descriptors, idle.descriptors + way.tunnels(all).end() + SLACK);
    ensure!(left <= most, "{left} descriptors of the agent of {node} are left, not {most} at most");
    Ok(())
}

/// Descriptors for what else an agent does: its pipes, and whoever asks for its metrics.
const SLACK: usize = 16;

/// As whom the agent sees the connections: that of the only node does as both.
fn reporter(agent: &Agent, way: Way) -> &'static str {
    if way == Way::Node || agent.node().name() == "node1" { "source" } else { "destination" }
}

/// What the agent's log says it can carry.
fn said_limit(log: &str) -> Result<usize> {
    let told = log.lines().find(|line| line.contains("INFO") && line.contains(" connections="));
    let number = told.and_then(|line| line.rsplit_once("connections=")?.1.trim().parse().ok());
    number.with_context(|| format!("the log does not say how many connections are possible:\n{log}"))
}

#[test]
fn beyond_the_limit_connections_are_refused_and_nothing_breaks() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-limit", 1, &["--max-connections", "50"])?;
    let (client, server, outsider) =
        (mesh.pod(0, "client")?, mesh.pod(0, "server")?, mesh.outsider(0, "outsider")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let held = Hold::begin(&client, server.ip(), 49)?;
    let mut last = Talk::begin(&client, server.ip6())?;
    dial_at_once(&client, SocketAddr::new(server.ip(), PORT), 100, 100)?.all_failed("ECONNRESET")?;
    dial(&outsider, server.ip(), 10)?.all_failed("ECONNRESET")?;
    let agent = &mesh.agents[0];
    for (reporter, count) in [("source", 100.0), ("destination", 10.0)] {
        let labels = [("reporter", reporter), ("reason", "limit")];
        agent.wait_metrics(SOON, "the refused ones are counted", |m| m.sum(REFUSED, &labels) == count)?;
    }
    last.goes_on()?;
    last.end()?;
    held.end()?;
    eventually(Duration::from_secs(2), "there is room again", || {
        dial(&client, server.ip(), 20)?.all_served()
    })?;
    Ok(())
}

//! Many connections at one time: a thousand at once, as many as the limit of open files allows, and more than that.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::eventually;
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kernel::map_entries;
use crate::kit::{Hold, Mesh, PORT, SOON, Talk, dial, dial_at_once, serve};

const OPENED: &str = "undermesh_tcp_connections_opened_total";
const CLOSED: &str = "undermesh_tcp_connections_closed_total";
const REFUSED: &str = "undermesh_tcp_connections_refused_total";
const ACTIVE: &str = "undermesh_tcp_connections_active";

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
    hold_at_one_time("um-e2e-many", |possible| possible.min(GOAL / 2))
}

#[test]
fn twenty_thousand_connections_at_one_time() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::OpenFiles(2 * GOAL as u64 + 2000));
    hold_at_one_time("um-e2e-goal", |_| GOAL)
}

/// How many connections one node is to carry.
const GOAL: usize = 20_000;

/// Opens connections between pods of one node until there are as many as `choose` says of those that are possible. Each
/// is greeted when it is opened; once all are open, each one carries a line back and forth and ends in order.
fn hold_at_one_time(lab: &str, choose: impl FnOnce(usize) -> usize) -> Result<()> {
    /// One pod has 28,000 ephemeral ports, and its client as many files as the agent.
    const CLIENTS: usize = 2;
    let mut mesh = Mesh::start(lab, 1, &[])?;
    let clients = (0..CLIENTS).map(|n| mesh.pod(0, &format!("client-{n}"))).collect::<Result<Vec<_>>>()?;
    let servers = (0..CLIENTS).map(|n| mesh.pod(0, &format!("server-{n}"))).collect::<Result<Vec<_>>>()?;
    let _running = servers.iter().map(serve).collect::<Result<Vec<_>>>()?;
    mesh.ready()?;
    let agent = &mesh.agents[0];
    let count = choose(said_limit(&agent.process().output())?) / CLIENTS * CLIENTS;
    let pairs = || clients.iter().zip(&servers);
    // Grows the tables that do not grow with the connections.
    pairs().try_for_each(|(client, server)| dial(client, server.ip(), 10)?.all_served().map(drop))?;
    let before = agent.process().resident_bytes()?;
    let held = pairs().map(|(client, server)| Hold::begin(client, server.ip(), count / CLIENTS));
    let held = held.collect::<Result<Vec<_>>>()?;
    let metrics = agent.metrics()?;
    let active = metrics.sum(ACTIVE, &[("reporter", "source")]);
    ensure!(active == count as f64, "{active} of {count} connections are active");
    let each = agent.process().resident_bytes()?.saturating_sub(before) / count as u64;
    eprintln!("{count} idle connections at one time: {each} bytes of the agent's memory each");
    ensure!(each < 8 * 1024, "an idle connection takes {each} bytes of the agent's memory");
    held.into_iter().try_for_each(Hold::end)?;
    let metrics = agent.wait_metrics(SOON, "all are closed", |m| m.sum(ACTIVE, &[]) == 0.0)?;
    let done = metrics.sum(CLOSED, &[("reporter", "source"), ("reason", "done")]);
    let all = count + 10 * CLIENTS;
    ensure!(done == all as f64, "{done} of {all} connections ended in order");
    Ok(())
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

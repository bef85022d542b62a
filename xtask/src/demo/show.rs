//! What there is to see, each with the command that shows it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use undermesh_tests::lab::{ADMIN_ADDRESS, Node, Pod, cgroup_root};

use super::LAB;
use super::shop::{Shop, agent_binary, shop};
use crate::command::{describe, output};
use crate::say;

const LIMIT: Duration = Duration::from_secs(30);

/// The opened connections by who, to whom, and how.
const OPENED: &str = "undermesh_tcp_connections_opened_total";

/// Nodes, pods, addresses.
pub fn pods(shop: &Shop) -> Result<()> {
    say::heading("The pods");
    let mut rows = vec![["NODE", "NAMESPACE", "POD", "IPV4", "IPV6"].map(str::to_owned).to_vec()];
    for pod in shop.pods() {
        let names = [pod.node().name(), pod.namespace(), pod.name()].map(str::to_owned);
        rows.push(names.into_iter().chain([pod.ip().to_string(), pod.ip6().to_string()]).collect());
    }
    println!("{}", say::table(&rows));
    Ok(())
}

/// One request to look at, then some.
pub fn requests(running: &Shop) -> Result<()> {
    say::heading("The shop, as a pod outside of the mesh sees it");
    println!(
        "client -> web -> catalog (v1 or v2) -> db; `.._saw` is the caller's address as each server saw it.\n"
    );
    let page = format!("{}/pears", running.page());
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "10", &page]);
    in_pod(&running.client, curl)?;
    load(running, 40)
}

/// So many requests, and who answered them.
pub fn load(running: &Shop, requests: u32) -> Result<()> {
    let requests = requests.to_string();
    in_pod(
        &running.client,
        shop(&["load", "--url", &running.page(), "--requests", &requests, "--rate", "200"]),
    )
}

/// Who talks to whom, from both agents' counters.
pub fn conversations(shop: &Shop) -> Result<()> {
    say::heading("Who talks to whom");
    let columns = ["source_workload", "destination_workload", "destination_service", "security", "reporter"];
    let mut counted = BTreeMap::<Vec<String>, f64>::new();
    for agent in &shop.agents {
        for sample in agent.metrics()?.select(OPENED, &[]) {
            let label = |name: &&str| sample.labels.get(*name).cloned().unwrap_or_default();
            *counted.entry(columns.iter().map(label).collect()).or_default() += sample.value;
        }
    }
    let header = ["SOURCE", "DESTINATION", "SERVICE", "SECURITY", "REPORTED BY", "CONNECTIONS"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(counted.into_iter().map(|(mut row, count)| {
        row.push(count.to_string());
        row
    }));
    say::shown(&format!("curl {ADMIN_ADDRESS}/metrics   # on both nodes: {OPENED}"), &say::table(&rows));
    Ok(())
}

/// The live table of each agent.
pub fn connections(shop: &Shop) -> Result<()> {
    say::heading("Connections that are open now");
    for node in &shop.nodes {
        let mut table = Command::new(agent_binary());
        table.args(["connections", "--admin-address", ADMIN_ADDRESS]);
        on_node(node, table, 20)?;
    }
    Ok(())
}

/// A few of the metrics, as Prometheus scrapes them.
pub fn metrics(shop: &Shop) -> Result<()> {
    say::heading("Metrics of node1's agent");
    let page = shop.agents[0].metrics()?.text;
    let telling = [
        OPENED,
        "undermesh_http_requests_total",
        "undermesh_tcp_sent_bytes_total",
        "undermesh_pods_enrolled",
        "undermesh_config_generation",
        "process_resident_memory_bytes",
    ];
    let mut excerpt = Vec::new();
    for name in telling {
        let lines = page
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        excerpt.extend(lines.take(3));
    }
    excerpt.push("...");
    let netns = shop.nodes[0].netns().file_name().unwrap_or_default().to_string_lossy();
    let command = format!("ip netns exec {netns} curl {ADMIN_ADDRESS}/metrics");
    say::shown(&command, &excerpt.join("\n"));
    Ok(())
}

/// Attached programs, pinned maps and what is in some of them.
pub fn kernel(shop: &Shop) -> Result<()> {
    say::heading("What the kernel does");
    let mut tree = Command::new("bpftool");
    tree.args(["cgroup", "tree"]).arg(cgroup_root()?.join(LAB));
    here(tree, 60)?;

    let pins = pinned(&shop.nodes[0].pins());
    let named = |part: &'static str| pins.iter().filter(move |pin| pin.to_string_lossy().contains(part));
    if let Some(link) = named("sk_lookup").next() {
        let mut show = Command::new("bpftool");
        show.args(["link", "show", "pinned"]).arg(link);
        here(show, 10)?;
    }
    let mut list = Command::new("ls");
    list.arg(shop.nodes[0].pins().join("maps"));
    here(list, 40)?;
    // Those that say most: which addresses are captured, and how often that happened.
    for map in named("/destinations").chain(named("/counters")) {
        let mut dump = Command::new("bpftool");
        dump.args(["map", "dump", "pinned"]).arg(map);
        here(dump, 20)?;
    }
    Ok(())
}

/// Runs and shows a command in a pod.
fn in_pod(pod: &Pod, command: Command) -> Result<()> {
    let shown = format!("/run/{LAB}/enter {} {}", pod.name(), describe(&command));
    say::shown(&shown, &pod.run(command, LIMIT)?.success()?);
    Ok(())
}

fn on_node(node: &Node, command: Command, most: usize) -> Result<()> {
    let netns = node.netns().file_name().unwrap_or_default().to_string_lossy();
    let shown = format!("ip netns exec {netns} {}", describe(&command));
    say::shown(&shown, &say::head(&node.run(command, LIMIT)?.success()?, most));
    Ok(())
}

fn here(command: Command, most: usize) -> Result<()> {
    let shown = describe(&command);
    say::shown(&shown, &say::head(&output(command, LIMIT)?, most));
    Ok(())
}

/// All pins below a directory.
fn pinned(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.path().is_dir() {
            true => found.extend(pinned(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

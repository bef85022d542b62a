//! A node of the lab.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};

use super::process::{Place, run_at};
use super::{
    Agent, AgentOptions, Output, Pod, PodSpec, Process, Response, Shared, cgroup, http, netns, network,
};

/// A node: a network namespace with its bridge, its cgroup, its pins. Clones are handles to the same node.
#[derive(Clone, Debug)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lab: Arc<Shared>,
    name: String,
    number: u8,
    place: Place,
    /// The numbers on the bridge that pods have; the gateway's is among them.
    taken: Mutex<BTreeSet<u8>>,
    second_network: Mutex<bool>,
}

impl Node {
    pub(super) fn create(lab: Arc<Shared>, number: u8) -> Result<Self> {
        let name = format!("node{number}");
        let place = Place {
            netns: netns::path(&format!("{}-{name}", lab.state.name)),
            cgroup: lab.cgroup.join(&name).join("agent"),
        };
        lab.state.record("pins", Self::pins_of(&lab, &name))?;
        cgroup::create(&place.cgroup)?;
        cgroup::create(&lab.cgroup.join(&name).join("pods"))?;
        network::create_node(&lab.state, &name, number)?;
        let taken = Mutex::new(BTreeSet::from([1]));
        let inner = Inner { lab, name, number, place, taken, second_network: Mutex::new(false) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// `node1`, `node2`...
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The node's IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        network::node_addresses(self.inner.number)
    }

    /// The file that opens its network namespace.
    pub fn netns(&self) -> &Path {
        &self.inner.place.netns
    }

    /// The node's directory in the cgroup2 tree, above `agent` and `pods`.
    pub fn cgroup(&self) -> PathBuf {
        self.inner.lab.cgroup.join(&self.inner.name)
    }

    /// The directory where the node's agent pins maps and links.
    pub fn pins(&self) -> PathBuf {
        Self::pins_of(&self.inner.lab, &self.inner.name)
    }

    /// Makes a pod on this node and writes its manifest.
    pub fn add_pod(&self, spec: PodSpec) -> Result<Pod> {
        if spec.second_network {
            let mut made = self.inner.second_network.lock().unwrap();
            if !*made {
                network::create_second_network(&self.inner.lab.state.name, self.name(), self.inner.number)?;
                *made = true;
            }
        }
        Pod::create(self.inner.lab.clone(), self.clone(), spec)
    }

    /// Starts this node's agent.
    pub fn spawn_agent(&self, options: AgentOptions) -> Result<Agent> {
        Agent::spawn(self.clone(), &self.inner.lab.state, options)
    }

    /// Starts a program on the node, outside of every pod, beside the agent.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        let log = self.inner.lab.log_file(self.name(), &command.get_program().to_string_lossy());
        Process::start(&self.inner.place, command, log)
    }

    /// Runs a program on the node to its end, or to the limit.
    pub fn run(&self, command: Command, limit: Duration) -> Result<Output> {
        run_at(&self.inner.place, command, limit)
    }

    /// Runs a program on the node to its end, as one of its services: with a cgroup of that name below [`Self::cgroup`].
    pub fn run_as(&self, service: &str, command: Command, limit: Duration) -> Result<Output> {
        let place = Place { cgroup: self.cgroup().join(service), ..self.inner.place.clone() };
        cgroup::create(&place.cgroup)?;
        run_at(&place, command, limit)
    }

    /// An HTTP GET from the node's own namespace.
    pub fn get(&self, address: &str, path: &str, headers: &[(&str, &str)]) -> Result<Response> {
        http::get(self.netns(), address.parse()?, path, headers)
    }

    pub(super) fn number(&self) -> u8 {
        self.inner.number
    }

    /// The lowest free number on the node's bridge.
    pub(super) fn take_host(&self) -> Result<u8> {
        let mut taken = self.inner.taken.lock().unwrap();
        let free = (2..=254).find(|host| !taken.contains(host)).context("a node has room for 253 pods")?;
        taken.insert(free);
        Ok(free)
    }

    pub(super) fn free_host(&self, host: u8) {
        self.inner.taken.lock().unwrap().remove(&host);
    }

    fn pins_of(lab: &Shared, name: &str) -> PathBuf {
        Path::new("/sys/fs/bpf").join(format!("{}-{name}", lab.state.name))
    }
}

//! What a cluster stands on: its journal, its group in the cgroup2 tree, its folder of data, the namespace in which its
//! nodes meet. Whatever is made here is listed in the journal first, and the lab's sweep removes it.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | control plane | 10.80.0.1/16 | fd80::1/64 |
//! | node N | 10.80.1.N/16 | fd80::1:N/64 |
//! | pods of node N | 10.81.N.0/24 | fd81:N::/64 |
//! | cluster IPs | 10.96.0.0/16 | fd96::/108 |

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::tools::Tools;
use crate::lab::process::{Place, run_at};
use crate::lab::state::State;
use crate::lab::{self, Output, cgroup, netns, network, signals, sweep};

/// Where the API server listens.
pub(super) const API_PORT: u16 = 6443;

/// Ranges of cluster IPs.
pub(super) const SERVICES: &str = "10.96.0.0/16,fd96::/108";

/// Ranges of all pods.
pub(super) const PODS: &str = "10.81.0.0/16,fd81::/16";

/// The first cluster IPs: those of the API server.
pub(super) const API_SERVICE: [&str; 2] = ["10.96.0.1", "fd96::1"];

/// The cluster's grounds; dropped, they are swept.
#[derive(Debug)]
pub(super) struct Grounds {
    pub(super) state: Arc<State>,
    pub(super) tools: Tools,
    /// The cluster's group in the cgroup2 tree.
    pub(super) cgroup: PathBuf,
    /// The controllers that it has for its nodes.
    pub(super) controllers: Vec<String>,
}

impl Grounds {
    /// Sweeps what an earlier run of the same name left, and makes the grounds anew.
    pub(super) fn make(name: &str, tools: Tools) -> Result<Self> {
        lab::require_root()?;
        let root = cgroup::root()?;
        let state = Arc::new(State::open(name)?);
        sweep::clear(&state).context("what an earlier run left could not be swept")?;
        state.begin()?;
        signals::register(&state);
        let controllers = wanted(&cgroup::controllers(&root)?);
        let grounds = Self { cgroup: root.join(name), state, tools, controllers };
        grounds.make_cgroups(&root)?;
        grounds.state.record("tree", grounds.data())?;
        // After the machine was booted anew there is no journal, which is in /run, but this is still there.
        sweep::remove_tree(&grounds.data())?;
        fs::create_dir_all(grounds.data())?;
        grounds.make_fabric()?;
        Ok(grounds)
    }

    /// The folder for what is too large for /run.
    pub(super) fn data(&self) -> PathBuf {
        State::data_directory(&self.state.name)
    }

    /// The name of a namespace, or of a node, of this cluster.
    pub(super) fn named(&self, part: &str) -> String {
        format!("{}-{part}", self.state.name)
    }

    /// Where the control plane runs, and whoever calls it from the cluster's network.
    pub(super) fn control(&self) -> Place {
        Place { netns: netns::path(&self.named("control")), cgroup: self.cgroup.join("control") }
    }

    /// True where the machine has given controllers to cgroup v1, so that limits cannot be set.
    pub(super) fn lacks_controllers(&self) -> bool {
        ["cpu", "memory", "pids"].iter().any(|needed| !self.controllers.iter().any(|there| there == needed))
    }

    /// Runs a program of the cluster's, in the network namespace of its control plane.
    pub(super) fn run(&self, command: Command, limit: Duration) -> Result<Output> {
        run_at(&self.control(), command, limit)
    }

    fn make_cgroups(&self, root: &Path) -> Result<()> {
        let given = fs::read_to_string(root.join("cgroup.subtree_control"))?;
        let given: Vec<_> = given.split_whitespace().collect();
        for name in &self.controllers {
            // On a hybrid machine nobody else uses them here: another cluster that does keeps them by itself.
            if self.lacks_controllers() || !given.contains(&name.as_str()) {
                self.state.record("controller", root.join(name))?;
            }
        }
        self.state.record("cgroup", &self.cgroup)?;
        cgroup::give_controllers(root, &self.controllers)?;
        cgroup::create(&self.cgroup)?;
        cgroup::give_controllers(&self.cgroup, &self.controllers)?;
        cgroup::create(&self.control().cgroup)
    }

    /// The control plane's namespace, with the bridge that joins the nodes.
    fn make_fabric(&self) -> Result<()> {
        let control = self.named("control");
        network::new_namespace(
            &self.state,
            &control,
            &["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"],
        )?;
        let [v4, v6] = control_addresses();
        network::ip(
            Some(&control),
            &format!(
                "link add nodes address 02:50:00:00:00:01 type bridge
                 addr add {v4}/16 dev nodes
                 addr add {v6}/64 dev nodes nodad
                 link set nodes up"
            ),
        )
    }

    /// A node's namespace, its link to the others, and the way to its pods.
    pub(super) fn make_node(&self, part: &str, number: u8) -> Result<()> {
        let (control, node) = (self.named("control"), self.named(part));
        let forwarding = [
            "net/ipv4/ip_forward",
            "net/ipv6/conf/all/forwarding",
            // Between two pods of one node, too, an answer goes through the rules that rewrote the question.
            "net/bridge/bridge-nf-call-iptables",
            "net/bridge/bridge-nf-call-ip6tables",
        ];
        network::new_namespace(&self.state, &node, &forwarding)?;
        network::ip(
            Some(&control),
            &format!(
                "link add node-{part} type veth peer name eth0 netns {node}
                 link set node-{part} master nodes up"
            ),
        )?;
        let ([v4, v6], [gateway4, gateway6]) = (node_addresses(number), control_addresses());
        // The control plane leads nowhere else, but the node's own calls to cluster IPs need a route to be rewritten.
        network::ip(
            Some(&node),
            &format!(
                "addr add {v4}/16 dev eth0
                 addr add {v6}/64 dev eth0 nodad
                 link set eth0 up
                 route add default via {gateway4}
                 route add default via {gateway6}"
            ),
        )?;
        self.route_pods(&control, number)?;
        for other in 1..number {
            self.route_pods(&node, other)?;
            self.route_pods(&self.named(&part_of(other)), number)?;
        }
        Ok(())
    }

    fn route_pods(&self, netns: &str, of: u8) -> Result<()> {
        let ([via4, via6], [pods4, pods6]) = (node_addresses(of), pods_of(of));
        network::ip(Some(netns), &format!("route add {pods4} via {via4}\nroute add {pods6} via {via6}"))
    }
}

impl Drop for Grounds {
    fn drop(&mut self) {
        if let Err(error) = sweep::everything(&self.state) {
            eprintln!("cluster {}: {error:#}", self.state.name);
        }
        // Only now: a signal during the sweep has the signal's thread end it.
        signals::unregister(&self.state);
    }
}

/// The node's letter.
pub(super) fn part_of(number: u8) -> String {
    char::from(b'a' + number - 1).to_string()
}

pub(super) fn control_addresses() -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 80, 0, 1).into(), Ipv6Addr::new(0xfd80, 0, 0, 0, 0, 0, 0, 1).into()]
}

pub(super) fn node_addresses(number: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 80, 1, number).into(), Ipv6Addr::new(0xfd80, 0, 0, 0, 0, 0, 1, number.into()).into()]
}

/// The ranges of a node's pods.
pub(super) fn pods_of(number: u8) -> [String; 2] {
    [format!("10.81.{number}.0/24"), format!("fd81:{number:x}::/64")]
}

/// Those that a kubelet and a runtime use.
fn wanted(available: &[String]) -> Vec<String> {
    let used = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];
    available.iter().filter(|name| used.contains(&name.as_str())).cloned().collect()
}

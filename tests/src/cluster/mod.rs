//! A real Kubernetes on this machine: a control plane and nodes, each in namespaces of its own.
//!
//! Everything is what a cluster is made of elsewhere: etcd, the API server with RBAC and admission, containerd or
//! CRI-O with NRI, kubelets, CNI plugins, kube-proxy. Only what this machine cannot give a node is missing, and `node` says what.
//! There is no registry and no way out: images are imported. As with a lab, all that a cluster makes is in its journal
//! first, so that it can be swept when it was killed; the sweep is the lab's. It knows nothing of the mesh.

pub mod app;
mod certificates;
mod control;
mod dns;
mod grounds;
pub mod image;
pub mod init;
mod kube;
mod node;
pub mod product;
mod relay;
mod runtime;
mod tools;

use std::fs;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::{self, Output, Process, eventually, sweep};
use control::{ADMINS, Access, Control};
use grounds::{API_PORT, Grounds, control_addresses};
use image::{Image, Layer};
use relay::Relay;

pub use kube::Kube;
pub use node::Node;
pub use tools::{PROGRAMS, PROGRAMS_VARIABLE, Tools};

/// The longest that nodes take until they are ready, on a busy machine.
const UNTIL_READY: Duration = Duration::from_secs(180);

/// A running cluster, as which it may be used by whoever may do everything (its API server is at a loopback port while this
/// process lives); dropped, it is as if it had never been.
// The order is that of dropping: the grounds, which sweep, are last.
#[derive(Debug)]
pub struct Cluster {
    relay: Relay,
    kube: Kube,
    control: Control,
    nodes: Vec<Node>,
    grounds: Arc<Grounds>,
}

impl Deref for Cluster {
    type Target = Kube;

    fn deref(&self) -> &Kube {
        &self.kube
    }
}

impl Cluster {
    /// Starts a cluster of so many nodes, up to 26, and waits until they are ready and names are resolved. The name begins with `um-`;
    /// clusters and labs of different names may live side by side. What an earlier run of the same name may have left
    /// is swept first.
    pub fn start(name: &str, nodes: usize, tools: Tools) -> Result<Self> {
        if !(1..=26).contains(&nodes) {
            bail!("a cluster has 1 to 26 nodes, not {nodes}");
        }
        let grounds = Arc::new(Grounds::make(name, tools)?);
        let access = Access::create(&grounds)?;
        let server = SocketAddr::new(control_addresses()[0], API_PORT);
        let relay = Relay::start(&grounds.control().netns, server)?;
        let url = format!("https://{}", relay.address());
        let kubeconfig = access.kubeconfig_for("admin", "admin", ADMINS, &url)?;
        let kube = Kube::made_of(&grounds.tools, kubeconfig, grounds.data().join("home"));
        let control = Control::start(&grounds, &access, || kube.kubectl(&["get", "--raw=/readyz"]))?;
        let mut cluster = Self { relay, kube, control, nodes: Vec::new(), grounds };
        for _ in 0..nodes {
            cluster.boot_node(&access)?;
        }
        cluster.import_program(runtime::PAUSE_IMAGE, "pause")?;
        cluster.import_program(dns::IMAGE, "coredns")?;
        cluster.wait_ready()?;
        cluster.start_dns()?;
        Ok(cluster)
    }

    /// Sweeps what a run that was killed left under this name.
    pub fn sweep(name: &str) -> Result<()> {
        lab::require_root()?;
        sweep::what_is_left_of(name)
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.grounds.state.name
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One of its nodes, to stop and start it.
    pub fn node_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    /// One of the programs of its control plane, by its name, for instance to pause it.
    pub fn control_program(&mut self, name: &str) -> Result<&mut Process> {
        self.control.program(name)
    }

    /// Keeps etcd's state as it is, for [`Self::restore_etcd`]. The API server is away for a moment.
    pub fn back_up_etcd(&mut self) -> Result<()> {
        self.control.without_etcd(&self.grounds, copy)
    }

    /// Puts etcd back to the state that was kept, and starts the API server anew.
    pub fn restore_etcd(&mut self) -> Result<()> {
        self.control.without_etcd(&self.grounds, |etcd, backup| {
            fs::remove_dir_all(etcd)?;
            copy(backup, etcd)
        })
    }

    /// The API server's loopback address.
    pub fn api_address(&self) -> SocketAddr {
        self.relay.address()
    }

    /// The folder of the logs of the control plane and of the nodes' first processes; see [`Node::log`] for others.
    pub fn log_dir(&self) -> PathBuf {
        self.grounds.state.log_dir()
    }

    /// Copies all logs into a folder that outlives the cluster.
    pub fn keep_logs(&self, into: &Path) -> Result<()> {
        let mut folders = vec![(self.log_dir(), into.to_owned())];
        folders.extend(self.nodes.iter().map(|node| (node.data().join("log"), into.join(node.name()))));
        for (from, to) in folders {
            fs::create_dir_all(&to)?;
            for log in fs::read_dir(from)? {
                let log = log?;
                if log.file_type()?.is_file() {
                    fs::copy(log.path(), to.join(log.file_name())).context("a log cannot be kept")?;
                }
            }
        }
        Ok(())
    }

    /// The programs that it is made of, helm and kubectl among them.
    pub fn tools(&self) -> &Tools {
        &self.grounds.tools
    }

    /// Imports images from a tar on all nodes.
    pub fn import(&self, tar: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(tar))
    }

    /// Runs a program in the control plane's network namespace, from where nodes, pods and the API server can be
    /// reached by their addresses.
    pub fn run(&self, command: Command, limit: Duration) -> Result<Output> {
        self.grounds.run(command, limit)
    }

    /// Waits until all nodes are ready, and pods can be created.
    pub fn wait_ready(&mut self) -> Result<()> {
        eventually(UNTIL_READY, "all nodes are ready", || {
            let ended = self.check_running();
            if ended.is_err() {
                return Ok(ended);
            }
            self.check_nodes().inspect_err(|_| std::thread::sleep(Duration::from_millis(250))).map(Ok)
        })
        .with_context(|| self.kubelet_logs())??;
        // Made by the controller manager, and needed by every pod.
        self.kubectl(&["wait", "--for=create", "serviceaccount/default", "--timeout=60s"])?;
        Ok(())
    }

    fn check_running(&mut self) -> Result<()> {
        self.control.check_running()?;
        self.nodes.iter_mut().try_for_each(Node::check_running)
    }

    fn check_nodes(&self) -> Result<()> {
        let nodes = self.get(&["nodes"])?;
        let ready = |node: &Value| {
            let conditions = node["status"]["conditions"].as_array();
            let ready = conditions.is_some_and(|conditions| {
                conditions
                    .iter()
                    .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
            });
            ready && node["spec"]["taints"].is_null()
        };
        let found =
            nodes["items"].as_array().map_or(0, |nodes| nodes.iter().filter(|node| ready(node)).count());
        if found < self.nodes.len() {
            bail!("{found} of {} nodes are ready", self.nodes.len());
        }
        Ok(())
    }

    /// The ends of the kubelets' logs.
    fn kubelet_logs(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let log = fs::read(node.log("kubelet")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<_> = log.lines().collect();
            text += &format!("{}:\n{}\n", node.name(), lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        text
    }

    fn boot_node(&mut self, access: &Access) -> Result<()> {
        let number = u8::try_from(self.nodes.len() + 1)?;
        self.nodes.push(Node::create(&self.grounds, number, access)?);
        Ok(())
    }

    /// Gives all nodes an image of one of the static programs.
    fn import_program(&self, image: &str, program: &str) -> Result<()> {
        let layer = Layer::default().file(program, 0o755, &self.tools().program(program))?;
        let tar = tempfile::NamedTempFile::new()?;
        Image::new(image).layer(layer).entrypoint(&[&format!("/{program}")]).write(tar.path())?;
        self.import(tar.path())
    }

    fn start_dns(&self) -> Result<()> {
        self.apply(&dns::manifests())?;
        let rollout = ["rollout", "status", "deployment/coredns", "--namespace=kube-system", "--timeout=90s"];
        self.kubectl(&rollout)?;
        Ok(())
    }
}

/// A folder and all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(from).arg(to);
    lab::run_here(copy, Duration::from_secs(30))?.success().map(drop)
}

//! The agent of one node, driven as a user would: by its command line, its signals and its admin endpoint.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::state::State;
use super::{Metrics, Node, Process, Response, eventually};

/// Where every agent of a lab answers, each in its own node's namespace.
pub const ADMIN_ADDRESS: &str = "127.0.0.1:15020";

/// How an agent is started.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// The program; none is the one that was built beside this one.
    pub binary: Option<PathBuf>,
    /// Further arguments of `undermesh agent`.
    pub args: Vec<String>,
    /// Further environment variables.
    pub env: Vec<(String, String)>,
    /// Without the lab's certificate authority: connections between nodes are plaintext.
    pub plaintext: bool,
    /// Another admin address than [`ADMIN_ADDRESS`], for a second agent of the node.
    pub admin_address: Option<String>,
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    process: Process,
    state_dir: PathBuf,
    admin_address: String,
}

impl Agent {
    pub(super) fn spawn(node: Node, lab: &State, options: AgentOptions) -> Result<Self> {
        let binary = options.binary.map_or_else(|| binary("undermesh"), Ok)?;
        let mut command = Command::new(binary);
        let admin_address = options.admin_address.unwrap_or_else(|| ADMIN_ADDRESS.to_owned());
        command.args(["agent", "--node-name", node.name(), "--admin-address", &admin_address]);
        command.arg("--config-dir").arg(lab.config_dir()).arg("--bpffs").arg(node.pins());
        let authority = |arg: &String| arg.starts_with("--ca-");
        if !options.plaintext && !options.args.iter().any(authority) {
            // The first agent makes it.
            command.arg("--ca-dir").arg(lab.dir.join("ca")).arg("--state-dir").arg(lab.dir.join("state"));
        }
        command.args(options.args).envs(options.env);
        let process = node.spawn(command)?;
        Ok(Self { node, process, state_dir: lab.dir.join("state"), admin_address })
    }

    /// Waits until the agent says that every pod of its node is enrolled, or has a reason not to be.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let what = format!("the agent of {} gets ready", self.node.name());
        let ready = eventually(limit, &what, || {
            if self.process.check_running().is_err() {
                return Ok(None);
            }
            self.get("/readyz")?.ok().map(Some)
        });
        match ready {
            Ok(Some(_)) => Ok(()),
            Ok(None) => self.process.check_running(),
            Err(error) => {
                Err(error.context(format!("the agent's last words:\n{}", self.process.log_tail(30))))
            }
        }
    }

    /// Waits until the agent has told the lab's others that its pods of these addresses take tunnels, and they had time
    /// to read it.
    pub fn wait_published(&self, pods: &[IpAddr], limit: Duration) -> Result<()> {
        eventually(limit, &format!("{pods:?} of {} are published", self.node.name()), || {
            let published = self.statement()?;
            let published = published["pods"].as_array().into_iter().flatten();
            let told: Vec<_> = published.filter_map(|pod| pod["addresses"].as_array()).flatten().collect();
            let is_told = |pod: &IpAddr| told.iter().any(|told| **told == pod.to_string());
            ensure!(pods.iter().all(is_told), "{told:?}");
            Ok(())
        })?;
        // The others are told at once; they may need a moment to read.
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }

    /// How many of its pods the agent tells the lab's others of.
    pub fn published(&self) -> Result<usize> {
        Ok(self.statement()?["pods"].as_array().map_or(0, Vec::len))
    }

    fn statement(&self) -> Result<Value> {
        let file = self.state_dir.join(format!("enrolled-{}.json", self.node.name()));
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// An HTTP GET to the admin endpoint.
    pub fn get(&self, path: &str) -> Result<Response> {
        self.node.get(&self.admin_address, path, &[])
    }

    /// Scrapes the metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        let page = self.get("/metrics").and_then(Response::ok);
        let page = page.with_context(|| format!("the agent's last words:\n{}", self.process.log_tail(30)))?;
        Ok(Metrics::parse(&page))
    }

    /// Waits until the metrics are as the probe wants them.
    pub fn wait_metrics(
        &self,
        limit: Duration,
        what: &str,
        probe: impl Fn(&Metrics) -> bool,
    ) -> Result<Metrics> {
        eventually(limit, what, || {
            let metrics = self.metrics()?;
            if probe(&metrics) { Ok(metrics) } else { bail!("the metrics are:\n{}", metrics.text) }
        })
    }

    /// Kills it as a crash would (SIGKILL).
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Asks it to end (SIGTERM) and waits.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.terminate(limit)
    }

    /// Sends it any signal: SIGSTOP makes a hung agent.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Fails, with its last words, if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        self.process.check_running()
    }

    /// The node that it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The process: its id, its log, its CPU time, memory and descriptors.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// A program of this workspace, built into the same folder as the running one (or the folder above, for tests).
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("the program `{name}` is not built: cargo xtask build"))
}

//! The lab: nodes and pods as namespaces on one machine.
//!
//! A node is a network namespace with a bridge, a pod is a network namespace on that bridge with a cgroup of its
//! own, and a namespace called the fabric joins the nodes. Manifests in one directory tell the agents about it.
//! Everything that a lab makes carries its name and is written into its journal first, so that the next run can
//! sweep what a killed one left, and nothing else.
//!
//! The lab knows nothing of the mesh but the agent's command line and its admin endpoint.

mod agent;
pub(crate) mod cgroup;
mod http;
pub mod manifest;
mod metrics;
pub(crate) mod netns;
pub(crate) mod network;
mod node;
mod pod;
pub(crate) mod process;
pub(crate) mod signals;
pub(crate) mod state;
pub(crate) mod sweep;

pub use agent::{ADMIN_ADDRESS, Agent, AgentOptions, binary};
pub use cgroup::root as cgroup_root;
pub use http::Response;
pub use manifest::Manifest;
pub use metrics::{Metrics, Sample};
pub use netns::enter as in_netns;
pub use network::put_behind;
pub use node::Node;
pub use pod::{Pod, PodSpec};
pub use process::{Output, Place, Process, run_at, run_here};
pub use signals::sweep_on_signals;
pub use sweep::leftovers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use state::State;

/// Nodes, pods and manifests under one name; dropped, it is as if it had never been.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
}

/// What a lab, its nodes and its pods hold together.
#[derive(Debug)]
struct Shared {
    state: Arc<State>,
    /// The lab's directory in the cgroup2 tree.
    cgroup: PathBuf,
    /// Numbers log files and pod uids.
    counter: AtomicU32,
    nodes: AtomicU32,
}

impl Lab {
    /// Makes an empty lab after sweeping what an earlier run of the same name may have left. The name begins with
    /// `um-`; labs of different names may live side by side.
    pub fn create(name: &str) -> Result<Self> {
        require_root()?;
        let cgroup = cgroup::root()?.join(name);
        cgroup::ensure_bpffs()?;
        let state = State::open(name)?;
        sweep::clear(&state).context("what an earlier run left could not be swept")?;
        state.begin()?;
        state.record("cgroup", &cgroup)?;
        cgroup::create(&cgroup)?;
        network::create_fabric(&state)?;
        let state = Arc::new(state);
        signals::register(&state);
        let shared = Arc::new(Shared { state, cgroup, counter: AtomicU32::new(0), nodes: AtomicU32::new(0) });
        Ok(Self { shared })
    }

    /// Sweeps what a run that was killed left under this name.
    pub fn sweep(name: &str) -> Result<()> {
        require_root()?;
        sweep::what_is_left_of(name)
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.shared.state.name
    }

    /// Adds the next node: `node1`, `node2` and so on, up to 250.
    pub fn add_node(&self) -> Result<Node> {
        let number = self.shared.nodes.fetch_add(1, Ordering::Relaxed) + 1;
        Node::create(
            self.shared.clone(),
            u8::try_from(number).ok().filter(|n| *n <= 250).context("250 nodes")?,
        )
    }

    /// Takes the node's link to the others down: for them it is gone, without a FIN or RST.
    pub fn cut(&self, node: &Node) -> Result<()> {
        network::set_uplink(&self.shared.state.name, node.name(), false)
    }

    /// Takes the node's link up again.
    pub fn heal(&self, node: &Node) -> Result<()> {
        network::set_uplink(&self.shared.state.name, node.name(), true)
    }

    /// The directory of manifests that the agents read.
    pub fn config_dir(&self) -> PathBuf {
        self.shared.state.config_dir()
    }

    /// The lab's folder: manifests, logs, and whatever a test wants to put there.
    pub fn dir(&self) -> &Path {
        &self.shared.state.dir
    }

    /// Writes a manifest into the configuration directory, in place of an earlier version of the same object.
    pub fn apply(&self, manifest: &Manifest) -> Result<()> {
        self.shared.state.apply(&manifest.file_name(), &manifest.to_yaml()?)
    }

    /// Writes any text as a file of the configuration directory, by an atomic rename.
    pub fn apply_text(&self, file_name: &str, text: &str) -> Result<()> {
        self.shared.state.apply(file_name, text)
    }

    /// Removes an object's manifest.
    pub fn delete(&self, manifest: &Manifest) -> Result<()> {
        self.shared.state.delete(&manifest.file_name())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = sweep::everything(&self.shared.state) {
            eprintln!("lab {}: {error:#}", self.shared.state.name);
        }
        // Only now: a signal during the sweep has the signal's thread end it.
        signals::unregister(&self.shared.state);
    }
}

impl Shared {
    fn next_number(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Where a program's output goes.
    fn log_file(&self, place: &str, program: &str) -> PathBuf {
        let program = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
        self.state.log_dir().join(format!("{place}-{}-{program}.log", self.next_number()))
    }
}

/// The limit as it is on this machine: an emulated processor is slow, and whoever starts it says how slow, by
/// `UNDERMESH_PATIENCE`.
pub fn patient(limit: Duration) -> Duration {
    let factor = std::env::var("UNDERMESH_PATIENCE").ok().and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}

/// Asks `probe` again and again until it has an answer; its last error is part of the complaint. The limit is
/// [`patient`].
pub fn eventually<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let limit = patient(limit);
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}: not within {limit:?}")));
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

pub(crate) fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("namespaces and cgroups need root: run this as root");
    }
    Ok(())
}

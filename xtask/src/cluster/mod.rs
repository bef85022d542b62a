//! `cargo xtask cluster`: a real Kubernetes on this machine, to look at and to try things with.
//!
//! The file tells what the user sees; `programs` builds what a cluster is made of, and `undermesh_tests::cluster` makes
//! one of it.

pub mod programs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use undermesh_tests::cluster::{Cluster, PROGRAMS_VARIABLE, Tools, app};
use undermesh_tests::lab::sweep_on_signals;

use crate::build::Build;
use crate::command::{cargo, run};
use crate::{paths, say, setup};

/// What a cluster is made of, where it is not the usual.
#[derive(Args, Default)]
struct With {
    /// With the oldest Kubernetes that is supported instead of the newest.
    #[arg(long)]
    oldest: bool,
    /// With CRI-O on its nodes instead of containerd.
    #[arg(long, conflicts_with = "oldest")]
    cri_o: bool,
}

impl With {
    fn tools(&self) -> Result<Tools> {
        setup::for_cluster()?;
        if self.cri_o {
            setup::for_cri_o()?;
            return programs::ensure_cri_o();
        }
        match self.oldest {
            true => programs::ensure_oldest(),
            false => programs::ensure(),
        }
    }
}

/// The arguments of `cargo xtask cluster`.
#[derive(Args)]
pub struct ClusterTask {
    /// How many nodes it has.
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// Its name, which begins with `um-`; its nodes are NAME-a, NAME-b and so on.
    #[arg(long, default_value = "um-cluster")]
    name: String,
    /// End once all nodes are ready: what is measured is the start.
    #[arg(long)]
    no_hold: bool,
    #[command(flatten)]
    with: With,
    /// Only build the programs.
    #[arg(long)]
    build_only: bool,
    /// Only remove what a cluster of this name has left.
    #[arg(long)]
    sweep: bool,
    /// Keep the logs when it ends.
    #[arg(long)]
    keep_logs: bool,
}

impl ClusterTask {
    /// Starts it, waits, removes it.
    pub fn run(&self) -> Result<()> {
        if self.sweep {
            return Cluster::sweep(&self.name);
        }
        let tools = self.with.tools()?;
        if self.build_only {
            say::step(&format!("the programs are in {}", tools.dir().display()));
            return Ok(());
        }
        build_init()?;
        // Before any thread is started, and after the builds, which handle Ctrl-C well themselves.
        sweep_on_signals()?;
        say::step(&format!("starting a control plane and its nodes ({})", self.nodes));
        let begun = Instant::now();
        let cluster = Cluster::start(&self.name, self.nodes, tools)?;
        say::step(&format!("all nodes are ready after {:.1} s", begun.elapsed().as_secs_f32()));
        show(&cluster)?;
        if !self.no_hold {
            println!("Ctrl-C ends the cluster and removes it.");
            loop {
                std::thread::park();
            }
        }
        if self.keep_logs {
            let kept = paths::target().join("cluster-logs");
            cluster.keep_logs(&kept)?;
            say::step(&format!("the logs are in {}", kept.display()));
        }
        drop(cluster);
        say::step("the cluster is swept: no namespace, cgroup, mount or process is left");
        Ok(())
    }
}

/// `cargo xtask e2e`: the tests that need a cluster.
#[derive(Args)]
pub struct E2e {
    /// Run only the tests whose names have this in them.
    filter: Option<String>,
    #[command(flatten)]
    with: With,
    /// Install the mesh on the cluster of this kubeconfig instead, see that it works, and remove it again. By kubectl and helm of
    /// the PATH; the nodes must have the images of `--write-images`.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["filter", "oldest", "cri_o"])]
    kubeconfig: Option<PathBuf>,
    /// With `--kubeconfig`: a value of the chart; may be given several times.
    #[arg(long = "set", value_name = "NAME=VALUE", requires = "kubeconfig")]
    values: Vec<String>,
    /// Only write the images that the tests run into this folder, for `kind load image-archive` or `ctr images import`.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["filter", "kubeconfig"])]
    write_images: Option<PathBuf>,
}

impl E2e {
    /// Builds, tests.
    pub fn run(&self) -> Result<()> {
        if let Some(folder) = &self.write_images {
            return write_images(folder);
        }
        if let Some(kubeconfig) = &self.kubeconfig {
            return on_existing(kubeconfig, &self.values);
        }
        let tools = self.with.tools()?;
        build_init()?;
        let mut test = cargo();
        test.args(["test", "--package", "undermesh-tests", "--test", "cluster"]).args(&self.filter);
        test.args(["--", "--nocapture"]);
        if self.with.oldest {
            say::step("without the Gateway API's own tests, whose definitions want a newer Kubernetes");
            test.args(["--skip", "conformance::"]);
        }
        run_on(&tools, test)
    }
}

fn write_images(folder: &Path) -> Result<()> {
    setup::for_build()?;
    Build { release: false }.run()?;
    std::fs::create_dir_all(folder)?;
    let tars = app::write_images(folder, &paths::programs(false))?;
    tars.iter().for_each(|tar| println!("{}", tar.display()));
    Ok(())
}

fn on_existing(kubeconfig: &Path, values: &[String]) -> Result<()> {
    let kubeconfig =
        kubeconfig.canonicalize().with_context(|| format!("no kubeconfig {}", kubeconfig.display()))?;
    let mut test = cargo();
    test.args(["test", "--package", "undermesh-tests", "--test", "cluster", "existing::"]);
    test.args(["--", "--ignored", "--nocapture"]);
    test.env("UNDERMESH_E2E_KUBECONFIG", kubeconfig).env("UNDERMESH_E2E_VALUES", values.join("\n"));
    run(test)
}

/// Measures the mesh in a cluster of many pods, and tries what takes too long for every day.
pub fn scale() -> Result<()> {
    setup::for_build()?;
    let tools = With::default().tools()?;
    Build { release: true }.run()?;
    let mut test = cargo();
    test.args(["test", "--release", "--package", "undermesh-tests", "--test", "cluster"]);
    // One cluster at a time: they would be in each other's way.
    test.args(["--", "--ignored", "--nocapture", "--test-threads=1", "scale::", "endurance::"]);
    run_on(&tools, test)
}

fn run_on(tools: &Tools, mut test: Command) -> Result<()> {
    test.env("UNDERMESH_E2E", "1").env(PROGRAMS_VARIABLE, tools.dir());
    run(test)
}

/// The nodes' first process is a program of the tests.
fn build_init() -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--package", "undermesh-tests", "--bin", "cluster-node"]);
    run(build)
}

/// What the cluster sets for programs that call it: also where they keep what must not outlive it.
fn environment(command: &Command) -> String {
    let set = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    set.map(|(name, value)| format!("{}={}", name.display(), value.display())).collect::<Vec<_>>().join(" ")
}

fn show(cluster: &Cluster) -> Result<()> {
    say::heading("A cluster");
    say::shown("kubectl get nodes --output wide", &cluster.kubectl(&["get", "nodes", "--output=wide"])?);
    let (tools, node) = (cluster.tools(), &cluster.nodes()[0]);
    let mut enter = node.command("sh").context("the first node is down")?;
    enter.stdin(std::process::Stdio::inherit());
    let hints = [
        (
            "call it",
            format!(
                "export {} PATH={}:$PATH",
                environment(&cluster.command("kubectl")),
                tools.dir().display()
            ),
        ),
        ("a shell on the first node, outside of its pods", crate::command::describe(&enter)),
        ("give it an image", crate::command::describe(&node.importing("NAME", "TAR")?)),
        ("the logs", format!("ls {} {}", cluster.log_dir().display(), node.data().join("log").display())),
    ];
    for (what, command) in hints {
        println!("# {what}\n{command}\n");
    }
    Ok(())
}

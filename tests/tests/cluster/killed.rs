//! What becomes of a cluster whose owner is killed: no program of it lives on, and what else is left can be swept.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::cluster::{Cluster, Tools};
use undermesh_tests::lab::{cgroup_root, eventually, leftovers, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::kit;

#[test]
fn what_a_killed_run_leaves_the_next_one_sweeps() -> Result<()> {
    require!(ACluster);
    let name = "um-e2e-killed-kube";
    let mut victim = Command::new(std::env::current_exe()?);
    victim.args(["--exact", "killed::dies_with_a_cluster", "--ignored", "--nocapture"]);
    victim.env("DIE_WITH_A_CLUSTER", name);
    let output = run_here(victim, Duration::from_secs(300))?;
    ensure!(output.stdout.contains("the pod runs"), "it died too early: {output:?}");
    ensure!(!leftovers(name)?.is_empty(), "nothing was left: {output:?}");
    let cgroup = cgroup_root()?.join(name);
    eventually(Duration::from_secs(20), "all programs of the cluster end by themselves", || {
        let running = processes(&cgroup)?;
        ensure!(running.is_empty(), "still running: {running:?}");
        Ok(())
    })?;
    Cluster::sweep(name)?;
    ensure!(leftovers(name)?.is_empty(), "left behind: {:?}", leftovers(name)?);
    Ok(())
}

/// Not a test but a victim: see above.
#[test]
#[ignore = "run by what_a_killed_run_leaves_the_next_one_sweeps"]
fn dies_with_a_cluster() -> Result<()> {
    let Some(name) = std::env::var_os("DIE_WITH_A_CLUSTER") else { return Ok(()) };
    let cluster = Cluster::start(&name.to_string_lossy(), 1, Tools::of_environment()?)?;
    kit::import_image(&cluster)?;
    cluster.apply(&kit::pod("victim", cluster.nodes()[0].name(), "sleep 1000000").to_string())?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/victim", "--timeout=60s"])?;
    let running = processes(&cgroup_root()?.join(&name))?;
    ensure!(
        running.iter().any(|name| name == "sleep"),
        "the pod is not in the cluster's cgroup: {running:?}"
    );
    println!("the pod runs");
    std::process::abort();
}

/// The names of the processes in a cgroup and below.
fn processes(cgroup: &Path) -> Result<Vec<String>> {
    let list = fs::read_to_string(cgroup.join("cgroup.procs"))
        .with_context(|| format!("no {}", cgroup.display()))?;
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    let mut found: Vec<_> = list.lines().filter_map(name).map(|name| name.trim().to_owned()).collect();
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.file_type()?.is_dir() {
            // It may go away while it is read.
            found.extend(processes(&entry.path()).unwrap_or_default());
        }
    }
    Ok(found)
}

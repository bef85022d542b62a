//! Every test.

use anyhow::{Result, bail};
use clap::Args;
use undermesh_tests::cluster::PROGRAMS_VARIABLE;
use undermesh_tests::require::{Feature, MOST_OPEN_FILES, is_installed};

use crate::build::Build;
use crate::command::{cargo, run};
use crate::fuzz::Fuzz;
use crate::vm::Vm;
use crate::{cluster, say, setup, vm};

/// The arguments of `cargo xtask test`.
#[derive(Args)]
pub struct Test {
    /// Run only the tests whose names have this in them.
    #[arg(long)]
    filter: Option<String>,
}

impl Test {
    /// Installs, builds, tests.
    pub fn run(&self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "these tests make namespaces and load programs into the kernel: run this as root, or cargo test"
            );
        }
        let path = setup::for_tests()?;
        setup::for_cluster()?;
        Build { release: false }.run()?;
        say::step("testing");
        let mut test = cargo();
        match is_installed("cargo-nextest") {
            true => test.args(["nextest", "run", "--no-fail-fast"]),
            false => test.args(["test", "--no-fail-fast"]),
        };
        test.args(["--workspace", "--exclude", "undermesh-ebpf", "--exclude", "undermesh-fuzz"])
            .args(&self.filter);
        test.env("UNDERMESH_E2E", "1").env("PATH", path);
        match cluster::programs::ensure() {
            Ok(tools) => {
                test.env(PROGRAMS_VARIABLE, tools.dir());
            }
            // What needs a cluster then skips, and says so; under CI it fails.
            Err(error) => say::step(&format!("not tested on a cluster: {error:#}")),
        }
        run(test)?;
        match self.filter {
            Some(_) => Ok(()),
            None => in_vm().and_then(|()| Fuzz::briefly().run()),
        }
    }
}

/// Runs in a VM what has just been skipped because this machine does not allow for so many open files.
fn in_vm() -> Result<()> {
    let Some(lack) = Feature::OpenFiles(MOST_OPEN_FILES).lack() else { return Ok(()) };
    if let Some(no_vm) = vm::lack() {
        say::step(&format!("not tested: what {lack}; and there is no VM: {no_vm}"));
        return Ok(());
    }
    Vm::with_tests("twenty_thousand").run()
}

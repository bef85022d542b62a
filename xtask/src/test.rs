//! Every test.

use anyhow::{Result, bail};
use clap::Args;
use undermesh_tests::require::is_installed;

use crate::build::Build;
use crate::command::{cargo, run};
use crate::fuzz::Fuzz;
use crate::{say, setup};

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
        setup::for_tests()?;
        Build { release: false }.run()?;
        say::step("testing");
        let mut test = cargo();
        match is_installed("cargo-nextest") {
            true => test.args(["nextest", "run", "--no-fail-fast"]),
            false => test.args(["test", "--no-fail-fast"]),
        };
        test.args(["--workspace", "--exclude", "undermesh-ebpf", "--exclude", "undermesh-fuzz"])
            .args(&self.filter);
        test.env("UNDERMESH_E2E", "1");
        run(test)?;
        match self.filter {
            Some(_) => Ok(()),
            None => Fuzz::briefly().run(),
        }
    }
}

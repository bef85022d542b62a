//! Builds everything: the kernel programs first, because the agent carries them.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::command::{cargo, run};
use crate::{paths, say, setup};

/// The arguments of `cargo xtask build`.
#[derive(Args, Clone, Copy)]
pub struct Build {
    /// Build the agent and the test programs with optimisation.
    #[arg(long)]
    pub release: bool,
}

impl Build {
    /// Builds; what it needs is installed.
    pub fn run(self) -> Result<()> {
        say::step("building the kernel programs");
        build_ebpf()?;
        say::step("building the agent and the test programs");
        let mut build = cargo();
        build.args(["build", "--package", "undermesh", "--package", "undermesh-tests", "--bins"]);
        if self.release {
            build.arg("--release");
        }
        run(build)
    }
}

/// A cargo subcommand for the kernel's target, with `core` built from source.
pub fn cargo_for_kernel(subcommand: &str) -> Result<Command> {
    let linker = setup::bpf_linker()?;
    let mut cargo = cargo();
    cargo.arg(subcommand).args(["--package", "undermesh-ebpf", "--bin", "undermesh-ebpf", "--release"]);
    cargo.args(["-Z", "build-std=core", "--target", "bpfel-unknown-none"]);
    // build-std is for nightly toolchains; this one is pinned, so what it does will not change under us.
    cargo.env("RUSTC_BOOTSTRAP", "1");
    // With --btf the object says what its types and maps are called, and bpftool prints those names.
    let flags = format!("-Cdebuginfo=2 -Clinker={} -Clink-arg=--btf", linker.display());
    cargo.env("RUSTFLAGS", flags).env_remove("CARGO_ENCODED_RUSTFLAGS");
    // A folder of its own: other flags in the same one would rebuild everything each time.
    cargo.env("CARGO_TARGET_DIR", paths::target().join("ebpf-build"));
    Ok(cargo)
}

fn build_ebpf() -> Result<()> {
    run(cargo_for_kernel("build")?)?;
    let built = paths::target().join("ebpf-build/bpfel-unknown-none/release/undermesh-ebpf");
    let object = fs::read(&built).with_context(|| format!("no {}", built.display()))?;
    let wanted = paths::ebpf_object();
    // Written only when it changed: the agent is rebuilt whenever this file is newer.
    if fs::read(&wanted).ok().as_ref() != Some(&object) {
        fs::create_dir_all(wanted.parent().context("a target folder")?)?;
        fs::write(&wanted, object)?;
    }
    Ok(())
}

//! Formatting, lints, dependencies, architecture, manifests.

use std::path::PathBuf;

use anyhow::Result;

use crate::command::{self, cargo, command};
use crate::{build, manifests, say, setup};

/// Runs every check and stops at the first that fails.
pub fn run() -> Result<()> {
    setup::for_lint()?;
    say::step("formatting");
    let mut fmt = cargo();
    fmt.args(["fmt", "--all", "--check"]);
    command::run(fmt)?;

    say::step("clippy");
    let mut clippy = cargo();
    clippy.args([
        "clippy",
        "--workspace",
        "--exclude",
        "undermesh-ebpf",
        "--exclude",
        "undermesh-fuzz",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    command::run(clippy)?;

    say::step("clippy for the kernel programs");
    let mut clippy = build::cargo_for_kernel("clippy")?;
    clippy.args(["--", "-D", "warnings"]);
    command::run(clippy)?;

    say::step("architecture");
    let mut tidy = cargo();
    tidy.args(["test", "--quiet", "--package", "undermesh-tests", "--test", "tidy"]);
    command::run(tidy)?;

    say::step("the Helm chart, and what is generated from it");
    manifests::check()?;

    dependencies()
}

fn dependencies() -> Result<()> {
    say::step("licences, bans and sources of the dependencies");
    let mut deny = command(setup::cargo_deny()?);
    deny.args(["--locked", "check", "licenses", "bans", "sources"]);
    command::run(deny)?;
    match advisory_database() {
        Some(_) => {
            say::step("advisories");
            let mut deny = command(setup::cargo_deny()?);
            deny.args(["--locked", "check", "--disable-fetch", "advisories"]);
            command::run(deny)
        }
        None => {
            say::step(
                "advisories: skipped, their database is not on this machine (cargo deny fetch db gets it)",
            );
            Ok(())
        }
    }
}

/// The folder of advisories that cargo-deny keeps, if there is one.
fn advisory_database() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))?;
    let databases = home.join("advisory-dbs");
    let filled = std::fs::read_dir(&databases).is_ok_and(|mut entries| entries.next().is_some());
    filled.then_some(databases)
}

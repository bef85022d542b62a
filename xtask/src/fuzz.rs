//! `cargo xtask fuzz`: malformed input for each parser of what comes from outside, found by coverage (libFuzzer).
//!
//! `cargo fuzz --fuzz-dir tests/fuzz` runs the same targets; this runs all of them on the pinned toolchain, with no
//! tool installed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::command::{cargo, command, run};
use crate::{paths, say, setup};

/// What cargo-fuzz has the compiler do, but for the sanitizers, which only nightly toolchains have.
const INSTRUMENTATION: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Copt-level=1";

/// Whatever takes longer than this, on inputs of a few kilobytes, is a bug.
const SLOWEST_SECONDS: u32 = 5;

/// The longest input, in bytes.
const LONGEST: u32 = 8192;

/// The arguments of `cargo xtask fuzz`.
#[derive(Args)]
pub struct Fuzz {
    /// The target; all of them unless given.
    target: Option<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

impl Fuzz {
    /// Every target, for a few seconds: known inputs and what is near to them.
    pub fn briefly() -> Self {
        Self { target: None, seconds: 5 }
    }

    /// Builds the targets and runs them, one after the other.
    pub fn run(&self) -> Result<()> {
        setup::for_fuzz()?;
        let targets = targets()?;
        let wanted: Vec<_> =
            targets.iter().filter(|name| self.target.as_ref().is_none_or(|target| target == *name)).collect();
        ensure!(!wanted.is_empty(), "no such target; there are {}", targets.join(", "));
        say::step("building the fuzz targets");
        build()?;
        for target in wanted {
            say::step(&format!("fuzzing {target} for {} s", self.seconds));
            self.fuzz(target).with_context(|| format!("fuzzing {target}"))?;
        }
        Ok(())
    }

    /// What is found new is kept outside of the tree; what breaks the target, too, and its path is printed.
    fn fuzz(&self, target: &str) -> Result<()> {
        let found = output_folder().join("corpus").join(target);
        let broke = output_folder().join("artifacts").join(target);
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&broke)?;
        let mut fuzz = command(paths::programs(false).join(target));
        fuzz.arg(&found)
            .arg(folder().join("corpus").join(target).canonicalize().unwrap_or_else(|_| found.clone()));
        fuzz.arg(format!("-max_total_time={}", self.seconds)).arg(format!("-max_len={LONGEST}"));
        fuzz.arg(format!("-timeout={SLOWEST_SECONDS}")).args(["-rss_limit_mb=1024", "-verbosity=0"]);
        fuzz.arg(format!("-artifact_prefix={}/", broke.display()));
        run(fuzz)
    }
}

/// Only our own crates are instrumented: what they are made of is the same as in every other build, and is there already.
fn build() -> Result<()> {
    let wrapper = output_folder().join("rustc");
    fs::create_dir_all(output_folder())?;
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n*' build_script_'*) exec \"$@\" ;;\n*) exec \"$@\" {INSTRUMENTATION} ;;\nesac\n"
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut build = cargo();
    build.args(["build", "--package", "undermesh-fuzz", "--bins"]);
    build.env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    run(build)
}

fn folder() -> PathBuf {
    paths::workspace().join("tests/fuzz")
}

fn output_folder() -> PathBuf {
    paths::target().join("fuzz")
}

fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder().join("targets"))? {
        let path = entry?.path();
        names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(ToOwned::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

//! End-to-end tests under other kernels, in a VM whose files are this machine's.
//!
//! Two things only show there: kernels that this machine does not run, and what needs more than this machine allows even
//! root, such as 20,000 connections at one time where a process may open no more than 20,000 files.

mod initramfs;
mod machine;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::build::Build;
use crate::command::{cargo, output};
use crate::setup::kernel::{self, Kernel};
use crate::{paths, say, setup};
use initramfs::quoted;
use machine::{Ending, Machine, Processor};

/// The oldest that Debian has.
const DEFAULT_KERNEL: &str = "6.1";

/// Seconds that one VM may take.
const TIMEOUT: u64 = 3600;

const MEMORY_MIB: u32 = 4096;

/// Why no VM can be had here, if so; what is missing is installed first.
pub fn lack() -> Option<String> {
    let prepare = || setup::for_vm().and_then(|()| kernel::fetch(DEFAULT_KERNEL).map(drop));
    prepare().err().map(|error| format!("{error:#}")).or_else(machine::lack)
}

/// The arguments of `cargo xtask vm`.
#[derive(Args)]
pub struct Vm {
    /// The kernels, by their series: 6.1, 6.12 or 7.3, all from Debian.
    #[arg(long = "kernel", value_delimiter = ',', default_value = DEFAULT_KERNEL)]
    kernels: Vec<String>,
    /// Run only the tests whose names have one of these in them.
    filters: Vec<String>,
    /// Leave out the tests whose names have this in them.
    #[arg(long)]
    skip: Vec<String>,
    /// Build the agent and the tests with optimisation.
    #[arg(long)]
    release: bool,
    /// Seconds that one VM may take.
    #[arg(long, default_value_t = TIMEOUT)]
    timeout: u64,
    /// The VM's memory in MiB.
    #[arg(long, default_value_t = MEMORY_MIB)]
    memory: u32,
    /// Do not try KVM, which some machines offer and do not have.
    #[arg(long)]
    emulate: bool,
}

impl Vm {
    /// Tests whose names have this in them, under the default kernel.
    pub fn with_tests(filter: &str) -> Self {
        Self {
            kernels: vec![DEFAULT_KERNEL.to_owned()],
            filters: vec![filter.to_owned()],
            skip: Vec::new(),
            release: false,
            timeout: TIMEOUT,
            memory: MEMORY_MIB,
            emulate: false,
        }
    }

    /// Installs, builds, and runs the tests under each kernel.
    pub fn run(&self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the VM sees all of this machine's files: run this as root");
        }
        setup::for_tests()?;
        setup::for_vm()?;
        if let Some(lack) = machine::lack() {
            bail!(lack);
        }
        Build { release: self.release }.run()?;
        let tests = build_tests(self.release)?;
        let mut failed = Vec::new();
        for series in &self.kernels {
            let began = Instant::now();
            let outcome = self.run_under(&kernel::fetch(series)?, &tests);
            let took = began.elapsed().as_secs();
            match outcome {
                Ok(()) => say::step(&format!("Linux {series}: passed, {took} s from power-on to power-off")),
                Err(error) => {
                    say::step(&format!("Linux {series}: {error:#}, after {took} s"));
                    failed.push(series.as_str());
                }
            }
        }
        match failed.is_empty() {
            true => Ok(()),
            false => bail!("failed under Linux {}", failed.join(", ")),
        }
    }

    fn run_under(&self, kernel: &Kernel, tests: &Tests) -> Result<()> {
        let kvm = !self.emulate && File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let mut ending = Ending::NeverBooted;
        if kvm {
            say::step(&format!("booting Linux {} by KVM", kernel.release));
            ending = self.boot(kernel, tests, Processor::Hardware)?;
        }
        if matches!(ending, Ending::NeverBooted) {
            let why = if kvm { "KVM does not work on this machine" } else { "without KVM" };
            say::step(&format!("booting Linux {} on an emulated processor: {why}", kernel.release));
            ending = self.boot(kernel, tests, Processor::Emulated)?;
        }
        match ending {
            Ending::Exited(0) => Ok(()),
            Ending::Exited(code) => bail!("the tests ended with exit code {code}"),
            Ending::NeverBooted => bail!("the kernel said nothing"),
            Ending::Broke => bail!("the VM went down before the tests ended"),
            Ending::TimedOut => bail!("not at its end after {} s (--timeout)", self.timeout),
        }
    }

    fn boot(&self, kernel: &Kernel, tests: &Tests, processor: Processor) -> Result<Ending> {
        let initramfs = initramfs::build(kernel, &self.script(tests, processor))?;
        let machine = Machine { kernel, initramfs, processor, memory_mib: self.memory };
        machine.run(Duration::from_secs(self.timeout))
    }

    /// The command, for the VM's shell. Tests run one at a time: each has the machine for itself, as its limits assume,
    /// and what it prints is shown at once, in case the VM does not live to the end.
    fn script(&self, tests: &Tests, processor: Processor) -> String {
        let patience = match processor {
            Processor::Hardware => 1,
            Processor::Emulated => EMULATED_PATIENCE,
        };
        let skips = self.skip.iter().flat_map(|name| ["--skip", name]);
        let filters = self.filters.iter().map(String::as_str);
        let words: Vec<_> =
            ["--test-threads=1", "--nocapture"].into_iter().chain(skips).chain(filters).map(quoted).collect();
        format!(
            "cd {}\nexport CI=1 UNDERMESH_E2E=1 UNDERMESH_VM=1 UNDERMESH_PATIENCE={patience}\n{} {}\n",
            quoted(&paths::workspace().join("tests").display().to_string()),
            quoted(&tests.program.display().to_string()),
            words.join(" ")
        )
    }
}

/// How many times as long as usual things may take on an emulated processor.
const EMULATED_PATIENCE: u32 = 8;

/// The built end-to-end tests.
struct Tests {
    program: PathBuf,
}

fn build_tests(release: bool) -> Result<Tests> {
    say::step("building the end-to-end tests");
    let mut build = cargo();
    build.args(["test", "--no-run", "--package", "undermesh-tests", "--test", "e2e"]);
    if release {
        build.arg("--release");
    }
    build.args(["--message-format", "json"]);
    let messages = output(build, Duration::from_secs(1800))?;
    let mut programs = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let program = message["executable"].as_str().filter(|_| message["target"]["name"] == "e2e");
        program.map(PathBuf::from)
    });
    let program = programs.next().context("cargo has not said where the tests are")?;
    Ok(Tests { program })
}

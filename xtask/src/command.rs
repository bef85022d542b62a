//! Running other programs.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use undermesh_tests::lab::run_here;

use crate::paths;

/// A command in the workspace's folder, without standard input.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.current_dir(paths::workspace()).stdin(Stdio::null());
    command
}

/// The cargo that runs us, in the workspace's folder.
pub fn cargo() -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by the cargo that runs us, for our package; the next cargo must not take it for its own.
    cargo.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_PKG_NAME");
    cargo
}

/// Runs a command, its output on the terminal, and fails if it does.
pub fn run(mut command: Command) -> Result<()> {
    let what = describe(&command);
    let status = command.status().with_context(|| format!("`{what}` cannot be run"))?;
    if !status.success() {
        bail!("`{what}` failed ({status})");
    }
    Ok(())
}

/// Runs a command and returns what it printed.
pub fn output(command: Command, limit: Duration) -> Result<String> {
    run_here(command, limit)?.success()
}

/// The command as one would type it.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

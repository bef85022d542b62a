//! The user's commands.

pub mod check;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A service mesh that lives under the pods.
#[derive(Debug, Parser)]
#[command(name = "undermesh", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(check::CheckArgs),
}

/// Entry point of the `undermesh` binary.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Check(args) => check::run(&args),
    }
}

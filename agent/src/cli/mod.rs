//! The user's commands.

pub mod agent;
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
    Agent(Box<agent::AgentArgs>),
    Check(check::CheckArgs),
}

/// Entry point of the `undermesh` binary.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Agent(args) => agent::run(&args),
        Command::Check(args) => check::run(&args),
    }
}

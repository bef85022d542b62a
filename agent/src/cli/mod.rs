//! The user's commands.

mod admin_client;
pub mod agent;
mod agents;
pub mod ca;
pub mod certs;
pub mod check;
pub mod connections;
pub mod controller;
pub mod detach;
pub mod explain;
mod log;
pub mod mtls;
mod print;
pub mod status;
mod table;
mod time;

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
    Controller(Box<controller::ControllerArgs>),
    Check(check::CheckArgs),
    Status(status::StatusArgs),
    Connections(connections::ConnectionsArgs),
    Certs(certs::CertsArgs),
    Mtls(mtls::MtlsArgs),
    Explain(Box<explain::ExplainArgs>),
    Ca(ca::CaArgs),
    Detach(detach::DetachArgs),
}

/// Entry point of the `undermesh` binary.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Agent(args) => agent::run(&args),
        Command::Controller(args) => controller::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Connections(args) => connections::run(&args),
        Command::Certs(args) => certs::run(&args),
        Command::Mtls(args) => mtls::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Ca(args) => ca::run(&args),
        Command::Detach(args) => detach::run(&args),
    }
}

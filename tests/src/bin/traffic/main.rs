//! Clients and a server for the end-to-end tests, to be run in a lab's pods.
//!
//! The server greets first, with its name, and then echoes; so every client knows who served it and that both
//! directions carry the same bytes. What a client found goes to its standard output. Nothing here knows of a mesh.

mod dial;
mod hold;
mod run;
mod serve;
mod talk;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[derive(Parser)]
#[command(about = "Clients and a server for the end-to-end tests")]
struct Traffic {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Greets with its name and echoes.
    Serve {
        /// What it calls itself.
        #[arg(long)]
        name: String,
        /// The port to listen on, IPv4 and IPv6.
        #[arg(long, default_value_t = 7000)]
        port: u16,
    },
    /// Makes connections, exchanges a line on each, and says who served them and what failed, as JSON.
    Dial {
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        count: usize,
        /// Connections that are open at one time; all of them are opened before the first one is closed.
        #[arg(long, default_value_t = 1)]
        at_once: usize,
        /// For each connection.
        #[arg(long, default_value_t = 5000)]
        limit_ms: u64,
    },
    /// Dials again and again until SIGTERM, then says how often, what failed when, and when it was led elsewhere, as JSON.
    Run {
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        clients: usize,
        /// Between one connection's end and the next one of the same client.
        #[arg(long, default_value_t = 0)]
        pause_ms: u64,
    },
    /// Keeps one connection busy until SIGTERM, then ends it in order.
    Talk { to: SocketAddr },
    /// Holds connections idle; at SIGTERM checks that each one still works.
    Hold {
        to: SocketAddr,
        #[arg(long)]
        count: usize,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    raise_descriptor_limit();
    let ended = match Traffic::parse().role {
        Role::Serve { name, port } => serve::serve(&name, port).await,
        Role::Dial { to, count, at_once, limit_ms } => {
            dial::dial(to, count, at_once, Duration::from_millis(limit_ms)).await
        }
        Role::Run { to, clients, pause_ms } => run::run(to, clients, Duration::from_millis(pause_ms)).await,
        Role::Talk { to } => talk::talk(to).await,
        Role::Hold { to, count } => hold::hold(to, count).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn raise_descriptor_limit() {
    // Whoever needs more than it gets finds out by EMFILE.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

//! Loads that no Debian package makes: requests at a fixed rate, connections that are only opened, connections that
//! are only held; and a server of gRPC. Prints one line of JSON. It runs inside a pod and knows nothing of a mesh.

mod connect;
mod grpc;
mod hold;
mod open_loop;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about = "Loads for the benchmark")]
struct Probe {
    #[command(subcommand)]
    load: Load,
}

#[derive(Subcommand)]
enum Load {
    /// HTTP requests on kept-alive connections at a fixed rate, whether or not the answers keep up.
    OpenLoop(open_loop::OpenLoop),
    /// Opens and closes connections one by one.
    Connect(connect::Connect),
    /// Answers gRPC calls until it is killed.
    Grpc(grpc::Grpc),
    /// Opens connections, says so, and holds them until it is killed.
    Hold(hold::Hold),
}

fn main() -> ExitCode {
    let done = match Probe::parse().load {
        Load::OpenLoop(load) => load.run(),
        Load::Connect(load) => load.run(),
        Load::Grpc(server) => server.run(),
        Load::Hold(load) => load.run(),
    };
    match done {
        Ok(figures) => {
            println!("{figures}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Percentiles in microseconds.
fn percentiles(mut times: Vec<Duration>) -> Value {
    times.sort_unstable();
    let at = |part: f64| {
        let index = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    };
    json!({ "count": times.len(), "p50_us": at(0.5), "p99_us": at(0.99) })
}

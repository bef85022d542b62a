//! A server and clients of HTTP for the end-to-end tests, to be run in a lab's pods.
//!
//! The server answers with what it saw of the request and does what the request's query asks for; the client says what came
//! of its requests. Nothing here knows of a mesh.

mod ask;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "A server and clients of HTTP for the end-to-end tests")]
struct Requests {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Answers with what it saw; HTTP/1 and HTTP/2 on one port.
    Serve(serve::Serve),
    /// Asks, and says what it was answered, as JSON.
    Ask(ask::Ask),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Requests::parse().role {
        Role::Serve(serve) => serve.run().await,
        Role::Ask(ask) => ask.run().await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

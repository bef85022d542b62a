//! A server and a client of gRPC for the end-to-end tests, to be run in a lab's pods: `chat.proto`, by tonic.
//!
//! Nothing here knows of a mesh.

mod call;
mod line;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "A server and a client of gRPC for the end-to-end tests")]
struct Chat {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Answers.
    Serve(serve::Serve),
    /// Makes calls of all kinds, and says what came of them, as JSON.
    Call(Box<call::Call>),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Chat::parse().role {
        Role::Serve(serve) => serve.run().await,
        Role::Call(call) => call.run().await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

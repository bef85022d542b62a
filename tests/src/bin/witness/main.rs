//! An application that does one thing with a socket and tells, as JSON, what it saw: the names that the kernel shows,
//! the errors by their names, the bytes. It runs inside a pod and knows nothing of a mesh, so the same run without
//! one says what it ought to see.

mod client;
mod crowd;
mod listen;
mod reflect;
mod script;
mod socket;
mod udp;
mod uring;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde_json::Value;

#[derive(Parser)]
#[command(about = "Does one thing with a socket and tells what it saw")]
struct Witness {
    #[command(subcommand)]
    act: Act,
}

#[derive(Subcommand)]
enum Act {
    /// Connects and follows a script.
    Connect(client::Connect),
    /// The same by io_uring, with a script of its own.
    Uring(uring::Uring),
    /// Makes very many connections and holds as many as told at one time.
    Crowd(crowd::Crowd),
    /// Sends one datagram and waits for the answer.
    Udp(udp::Udp),
    /// Listens, follows a script with each connection, and prints a line for each.
    Listen(listen::Listen),
    /// Echoes the bytes of very many connections.
    Reflect(reflect::Reflect),
    /// Answers datagrams with the address that they came from.
    UdpListen(udp::UdpListen),
}

fn main() -> ExitCode {
    match run(Witness::parse().act) {
        Ok(seen) => {
            println!("{seen}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("witness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(act: Act) -> Result<Value> {
    match act {
        Act::Connect(connect) => connect.run(),
        Act::Uring(uring) => uring.run(),
        Act::Crowd(crowd) => crowd.run(),
        Act::Udp(udp) => udp.run(),
        Act::Listen(listen) => listen.run(),
        Act::Reflect(reflect) => reflect.run(),
        Act::UdpListen(listen) => listen.run(),
    }
}

//! Connections that say nothing.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

/// The arguments of `probe hold`.
#[derive(Args)]
pub struct Hold {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// How many.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
}

impl Hold {
    /// Opens them, prints a line, and never returns.
    pub fn run(&self) -> Result<Value> {
        let open = |number| TcpStream::connect(self.to).with_context(|| format!("connection {number}"));
        let held = (0..self.connections).map(open).collect::<Result<Vec<_>>>()?;
        println!("holding {}", held.len());
        loop {
            std::thread::park();
        }
    }
}

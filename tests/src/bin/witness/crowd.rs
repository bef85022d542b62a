//! Very many connections from one pod: made in waves, all of a wave held at one time, each one used.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::script::PATIENCE;
use crate::socket::{errno, raise_descriptor_limit};

/// The arguments of `witness crowd`.
#[derive(Args)]
pub struct Crowd {
    /// Where to, in turn.
    #[arg(required = true)]
    to: Vec<SocketAddr>,
    /// How many connections in all.
    #[arg(long)]
    total: usize,
    /// How many at one time.
    #[arg(long)]
    at_once: usize,
}

/// Connections that are made before their answers are awaited: fewer than a listener's backlog takes.
const BATCH: usize = 256;

impl Crowd {
    /// Counts what was made, what failed and how, and the most that were open at one time.
    pub fn run(&self) -> Result<Value> {
        raise_descriptor_limit()?;
        let began = Instant::now();
        let mut failed: BTreeMap<String, usize> = BTreeMap::new();
        let (mut made, mut most) = (0, 0);
        let mut wanted = (0..self.total).map(|number| self.to[number % self.to.len()]);
        loop {
            let mut held: Vec<TcpStream> = Vec::new();
            while held.len() < self.at_once {
                let batch: Vec<SocketAddr> =
                    wanted.by_ref().take(BATCH.min(self.at_once - held.len())).collect();
                if batch.is_empty() {
                    break;
                }
                let first = held.len();
                for to in batch {
                    match open(to) {
                        Ok(stream) => held.push(stream),
                        Err(error) => *failed.entry(format!("{to}: {}", errno(&error))).or_default() += 1,
                    }
                }
                for stream in &mut held[first..] {
                    match stream.read_exact(&mut [0]) {
                        Ok(()) => made += 1,
                        Err(error) => *failed.entry(format!("answer: {}", errno(&error))).or_default() += 1,
                    }
                }
            }
            if held.is_empty() {
                break;
            }
            most = most.max(held.len());
        }
        Ok(
            json!({ "made": made, "failed": failed, "most_at_once": most, "seconds": began.elapsed().as_secs_f64() }),
        )
    }
}

fn open(to: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"x")?;
    Ok(stream)
}

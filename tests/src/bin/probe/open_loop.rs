//! Requests at a fixed rate. A request's time runs from the moment it was due, not from the moment it was sent, so a
//! stall counts for every request that it delayed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

/// The arguments of `probe open-loop`.
#[derive(Args)]
pub struct OpenLoop {
    /// The HTTP server.
    #[arg(long)]
    to: SocketAddr,
    /// Requests per second, of all connections.
    #[arg(long)]
    rate: u32,
    /// Connections that share them.
    #[arg(long, default_value_t = 16)]
    connections: u32,
    /// For how long.
    #[arg(long, default_value_t = 1)]
    seconds: u64,
}

impl OpenLoop {
    /// One thread for each connection.
    pub fn run(&self) -> Result<Value> {
        ensure!(self.rate > 0 && self.connections > 0, "a rate and connections are more than 0");
        let streams = (0..self.connections).map(|_| self.connect()).collect::<Result<Vec<_>>>()?;
        let start = Instant::now() + Duration::from_millis(20);
        let answers: Vec<(Duration, bool)> = std::thread::scope(|scope| {
            let turns = streams.into_iter().enumerate();
            let threads: Vec<_> =
                turns.map(|(turn, io)| scope.spawn(move || self.ask(io, start, turn))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no thread panics"));
            joined.collect::<Result<Vec<_>>>().map(|times| times.concat())
        })?;
        let took = start.elapsed().as_secs_f64();
        let refused = answers.iter().filter(|(_, is_good)| !is_good).count();
        let mut figures = crate::percentiles(answers.into_iter().map(|(took, _)| took).collect());
        figures["refused"] = json!(refused);
        figures["requests_per_second"] = json!(figures["count"].as_f64().unwrap_or(0.0) / took);
        Ok(figures)
    }

    fn connect(&self) -> Result<TcpStream> {
        let stream =
            TcpStream::connect(self.to).with_context(|| format!("{} takes no connection", self.to))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    }

    /// This connection's share of the schedule: every so-manieth request.
    fn ask(&self, mut stream: TcpStream, start: Instant, turn: usize) -> Result<Vec<(Duration, bool)>> {
        let interval = Duration::from_secs(1) / self.rate;
        let end = start + Duration::from_secs(self.seconds);
        let request = format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", self.to);
        let mut times = Vec::new();
        for number in (turn as u32..).step_by(self.connections as usize) {
            let due = start + interval * number;
            if due >= end {
                break;
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            stream.write_all(request.as_bytes())?;
            let is_good = read_answer(&mut stream)?;
            times.push((due.elapsed(), is_good));
        }
        Ok(times)
    }
}

/// Reads a head with a length, and as long a body; whether it is 200.
fn read_answer(stream: &mut TcpStream) -> Result<bool> {
    let mut buffer = [0; 4096];
    let mut filled = 0;
    loop {
        let length = stream.read(&mut buffer[filled..])?;
        if length == 0 {
            bail!("the server closed the connection, or its answer is too long");
        }
        filled += length;
        let text = String::from_utf8_lossy(&buffer[..filled]);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let wanted = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= wanted.context("an answer without a length")? {
            return Ok(head.starts_with("HTTP/1.1 200"));
        }
    }
}

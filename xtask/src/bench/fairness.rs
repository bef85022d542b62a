//! What a client that floods an endpoint costs another one of the same endpoint, where that takes so many requests and no more.
//!
//! The flood comes at a fixed rate, so that what it costs is not that it has the machine's processors: who sends as fast as answers
//! come would have them with any limit and with none.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::case::Span;
use super::column::{Column, HTTP_PORT, Http, Mesh};
use super::probe;
use super::report::summary;

/// What the endpoint takes in a second.
pub const LIMIT: u32 = 1_000;

/// What the client that floods asks for in a second, and the other one.
const FLOOD: u32 = 5_000;
const MODEST: u32 = 200;

/// The modest client's p99 beside the flood is at most so many times what it is alone.
const MOST: f64 = 1.5;

/// Measures alone and beside the flood, in turns; fails if the flood costs too much.
pub fn run(agent: PathBuf, probe: PathBuf, rounds: usize, length: Duration) -> Result<()> {
    let mesh = Mesh::Undermesh { agent, encrypts: true, http: Http::Limited };
    let column = Column::make("fairness", mesh, probe)?;
    for span in [Span::AcrossNodes, Span::SameNode] {
        let server = if span == Span::AcrossNodes { &column.far } else { &column.near };
        let to = column.address(server, HTTP_PORT).context("nothing leads to nginx")?;
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            alone.push(modest(&column, to, length)?);
            let flood = probe::flood(&column, to, FLOOD, length + Duration::from_secs(2))?;
            std::thread::sleep(Duration::from_millis(500));
            beside.push(modest(&column, to, length)?);
            flood.end(length)?;
        }
        let [[alone, ..], [beside, ..]] = [alone, beside].map(|samples| summary(&samples));
        let times = beside / alone;
        println!(
            "{}: p99 of {MODEST} requests/s: {alone:.0} us alone, {beside:.0} us beside {FLOOD}/s of another on an endpoint that takes {LIMIT}/s: {times:.2} times",
            span.name()
        );
        ensure!(times <= MOST, "that is more than {MOST} times");
    }
    Ok(())
}

/// Its p99 in microseconds.
fn modest(column: &Column, to: SocketAddr, length: Duration) -> Result<f64> {
    let (figures, answered) = probe::open_loop(column, to, MODEST, length)?;
    let p99 = figures.iter().find(|figure| figure.name == "p99 us").context("no p99")?;
    ensure!(answered > 0.0, "nothing was answered");
    Ok(p99.value)
}

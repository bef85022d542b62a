//! The loads of our own `probe` program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Process, eventually};

use super::case::Figure;
use super::column::{Column, HTTP_PORT};
use crate::command::{cargo, run};
use crate::paths;

/// Builds the program as the agent was built.
pub fn build(release: bool) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", "undermesh-tests", "--bin", "probe"]);
    if release {
        build.arg("--release");
    }
    run(build)?;
    Ok(paths::programs(release).join("probe"))
}

/// Requests at a fixed rate: the figures, and how many were answered.
pub fn open_loop(column: &Column, to: SocketAddr, rate: u32, length: Duration) -> Result<(Vec<Figure>, f64)> {
    let rate = rate.to_string();
    let figures = ask(column, &["open-loop", "--to", &to.to_string(), "--rate", &rate], length)?;
    let number = |name: &str| figures[name].as_f64().with_context(|| format!("no {name} in {figures}"));
    ensure!(number("refused")? == 0.0, "not every request was answered well: {figures}");
    let read = vec![
        Figure { name: "requests/s", value: number("requests_per_second")? },
        Figure { name: "p50 us", value: number("p50_us")? },
        Figure { name: "p99 us", value: number("p99_us")? },
    ];
    Ok((read, number("count")?))
}

/// Requests at a fixed rate that come from the pod on the client's node and end by themselves.
pub struct Flood(Process);

/// Begins to ask.
pub fn flood(column: &Column, to: SocketAddr, rate: u32, length: Duration) -> Result<Flood> {
    let mut probe = Command::new(&column.probe);
    probe.args(["open-loop", "--to", &to.to_string(), "--rate", &rate.to_string()]);
    probe.args(["--connections", "32", "--seconds", &length.as_secs().to_string()]);
    Ok(Flood(column.near.spawn(probe)?))
}

impl Flood {
    /// Waits for its end, and fails if it was none.
    pub fn end(mut self, length: Duration) -> Result<()> {
        let status = self.0.wait(length + Duration::from_secs(20))?;
        let asked: Value = serde_json::from_str(self.0.output().trim()).context("the flood says nothing")?;
        ensure!(status.success() && asked["refused"].as_u64() > Some(1_000), "that was no flood: {asked}");
        Ok(())
    }
}

/// Connections to the pod outside of the mesh: the figures, and how many there were.
pub fn connect(column: &Column, length: Duration) -> Result<(Vec<Figure>, f64)> {
    let to = SocketAddr::new(column.outside.ip(), HTTP_PORT).to_string();
    let figures = ask(column, &["connect", "--to", &to], length)?;
    let number = |name: &str| figures[name].as_f64().with_context(|| format!("no {name} in {figures}"));
    let read = vec![
        Figure { name: "p50 us", value: number("p50_us")? },
        Figure { name: "p99 us", value: number("p99_us")? },
    ];
    Ok((read, number("count")?))
}

/// Opens idle connections to the server on the other node; they last as long as what is returned.
pub fn hold(column: &Column, connections: usize) -> Result<Process> {
    let to = SocketAddr::new(column.far.ip(), HTTP_PORT).to_string();
    let mut probe = Command::new(&column.probe);
    probe.args(["hold", "--to", &to, "--connections", &connections.to_string()]);
    let mut process = column.client.spawn(probe)?;
    eventually(Duration::from_secs(30), "idle connections stand", || {
        process.check_running()?;
        process.output().contains("holding").then_some(()).context("not yet")
    })?;
    Ok(process)
}

fn ask(column: &Column, args: &[&str], length: Duration) -> Result<Value> {
    let mut probe = Command::new(&column.probe);
    probe.args(args).args(["--seconds", &length.as_secs().to_string()]);
    let printed = column.client.run(probe, length + Duration::from_secs(20))?.success()?;
    serde_json::from_str(&printed).with_context(|| format!("the probe printed {printed:?}"))
}

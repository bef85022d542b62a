//! Certificates that live a minute, under load: renewed, signed by a new root, without their authority, and read by
//! clocks that differ.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Agent, AgentOptions, Pod, binary, run_here};
use undermesh_tests::require;
use undermesh_tests::require::{Feature, library};

use crate::kit::{Mesh, Run, Talk, dial, serve};
use crate::mesh::LIMIT;
use crate::tunnel::{HANDSHAKES, SOON};
use crate::tunnel_identity::TUNNELS_CLOSED;

const RENEWALS: &str = "undermesh_certificate_renewals_total";

/// How often a pod comes that has no tunnel yet: who has one does not shake hands again.
const NEWCOMER_EVERY: Duration = Duration::from_secs(5);

/// A mesh whose certificates live a minute, with clients that dial without a pause and one that talks on and on.
struct Soak {
    running: Vec<Run>,
    talk: Talk,
    newcomers: usize,
    client: Pod,
    far: Pod,
    mesh: Mesh,
}

impl Soak {
    fn begin(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &["--certificate-lifetime", "60s"])?;
        let (client, far) = (mesh.pod(0, "client")?, mesh.pod(1, "far")?);
        std::mem::forget(serve(&far)?);
        mesh.ready()?;
        let running = [far.ip(), far.ip6()].map(|ip| Run::begin(&client, ip, 2));
        let running = running.into_iter().collect::<Result<_>>()?;
        let talk = Talk::begin(&client, far.ip())?;
        Ok(Self { running, talk, newcomers: 0, client, far, mesh })
    }

    /// Lets it run, with a handshake every few seconds.
    fn go_on(&mut self, length: Duration) -> Result<()> {
        let end = Instant::now() + length;
        while Instant::now() < end {
            let next = Instant::now() + NEWCOMER_EVERY;
            self.newcomer()?;
            sleep(next.min(end).saturating_duration_since(Instant::now()));
        }
        Ok(())
    }

    fn newcomer(&mut self) -> Result<()> {
        self.newcomers += 1;
        let newcomer = self.mesh.pod(0, &format!("newcomer-{}", self.newcomers))?;
        self.mesh.ready()?;
        dial(&newcomer, self.far.ip(), 3)?.all_served()?;
        Ok(())
    }

    /// Fails if a single connection did.
    fn end(mut self) -> Result<()> {
        self.talk.goes_on()?;
        self.talk.end()?;
        for run in self.running {
            let ran = run.end()?;
            ensure!(
                ran.failed_in_all == 0,
                "of {} connections {} failed: {:?}",
                ran.made,
                ran.failed_in_all,
                ran.failed
            );
            eprintln!("{} connections, none failed", ran.made);
        }
        let agents = &self.mesh.agents;
        for agent in agents {
            let metrics = agent.metrics()?;
            let failed = metrics.sum(HANDSHAKES, &[("result", "failure")]);
            ensure!(
                failed == 0.0,
                "{failed} handshakes failed on {}:\n{}",
                agent.node().name(),
                metrics.text
            );
            let made = metrics.sum(HANDSHAKES, &[("result", "success")]);
            let lapsed = metrics.sum(TUNNELS_CLOSED, &[("reason", "lapsed")]);
            ensure!(lapsed >= 1.0, "no tunnel was replaced before its certificate expired");
            ensure!(made >= self.newcomers as f64, "only {made} handshakes for {} newcomers", self.newcomers);
        }
        drop(self.client);
        Ok(())
    }
}

fn renewals(agent: &Agent, result: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum(RENEWALS, &[("result", result)]))
}

/// Who signed the certificate of the node's one service account.
fn issuer(agent: &Agent) -> Result<String> {
    let page: Value = serde_json::from_str(&agent.get("/debug/certs")?.ok()?)?;
    let issuer = page["certificates"][0]["issuer"].as_str();
    Ok(issuer.with_context(|| format!("no issuer in {page}"))?.to_owned())
}

fn rotate(ca: &Path, overlap: &str) -> Result<()> {
    let mut rotate = Command::new(binary("undermesh")?);
    rotate.args(["ca", "rotate", "--overlap", overlap, "--ca-dir"]).arg(ca);
    run_here(rotate, LIMIT)?.success().map(drop)
}

#[test]
fn renewal_and_a_new_root_cost_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut soak = Soak::begin("um-e2e-soak-root")?;
    let before = issuer(&soak.mesh.agents[0])?;
    soak.go_on(Duration::from_secs(25))?;
    rotate(&soak.mesh.lab.dir().join("ca"), "15s")?;
    soak.go_on(Duration::from_secs(75))?;
    for agent in &soak.mesh.agents {
        let renewed = renewals(agent, "success")?;
        ensure!(renewed >= 3.0, "{} had {renewed} certificates in 100 s", agent.node().name());
        let now = issuer(agent)?;
        ensure!(now != before, "the new root has signed nothing on {}: {now}", agent.node().name());
    }
    soak.end()
}

#[test]
fn an_authority_that_is_away_costs_no_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut soak = Soak::begin("um-e2e-soak-away")?;
    let (ca, away) = (soak.mesh.lab.dir().join("ca"), soak.mesh.lab.dir().join("ca-away"));
    soak.go_on(Duration::from_secs(15))?;
    let renewed = renewals(&soak.mesh.agents[0], "success")?;
    fs::rename(&ca, &away)?;
    // Longer than half a life, over the moment at which the certificates are to be renewed.
    soak.go_on(Duration::from_secs(35))?;
    for agent in &soak.mesh.agents {
        let unavailable = renewals(agent, "unavailable")?;
        ensure!(unavailable >= 1.0, "{} has not missed its authority", agent.node().name());
        agent.get("/readyz")?.ok().context("an agent whose certificates are valid is ready")?;
    }
    fs::rename(&away, &ca)?;
    soak.go_on(Duration::from_secs(20))?;
    let now = renewals(&soak.mesh.agents[0], "success")?;
    ensure!(now > renewed, "no certificate since the authority is back: {now}");
    soak.end()
}

#[test]
fn clocks_may_differ_by_five_minutes() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Library("faketime/libfaketimeMT.so.1"));
    for (shift, behind) in [("+300", 0), ("-300", 1)] {
        let mut mesh = Mesh::start(&format!("um-e2e-soak-clock-{behind}"), 2, &[])?;
        mesh.agents[1].terminate(SOON)?;
        let (client, far) = (mesh.pod(0, "client")?, mesh.pod(1, "far")?);
        let _servers = [serve(&client)?, serve(&far)?];
        let library = library("faketime/libfaketimeMT.so.1").context("faketime")?;
        let shifted = AgentOptions {
            env: [
                ("LD_PRELOAD", library),
                ("FAKETIME", shift.to_owned()),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec(),
            ..AgentOptions::default()
        };
        mesh.agents[1] = mesh.nodes[1].spawn_agent(shifted)?;
        mesh.ready()?;
        dial(&client, far.ip(), 10)?.all_served()?;
        dial(&far, client.ip(), 10)?.all_served()?;
        let agent = &mesh.agents[behind];
        agent.wait_metrics(SOON, "the skew is told", |m| {
            let skew = m.sum("undermesh_clock_skew_seconds", &[]);
            (290.0..310.0).contains(&skew)
        })?;
        let failed = |agent: &Agent| Ok(agent.metrics()?.sum(HANDSHAKES, &[("result", "failure")]));
        let failed = mesh.agents.iter().map(failed).sum::<Result<f64>>()?;
        ensure!(failed == 0.0, "{failed} handshakes failed");
    }
    Ok(())
}

//! The agent killed, hung and restarted: what its pods find meanwhile, and what the next agent makes of it.

use std::fs::File;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use serde_json::json;
use undermesh_tests::lab::{Agent, Manifest, Pod, PodSpec, Process, binary, eventually, patient};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kernel::{map_entries, programs};
use crate::kit::{Dialled, Mesh, PORT, Run, SHOP, SOON, Talk, dial, serve};

const BYPASSED: &str = "undermesh_bypassed_connections_total";
const REFUSED: &str = "undermesh_kernel_refused_connections_total";
const OPENED: &str = "undermesh_tcp_connections_opened_total";
const CLOSED: &[&str] = &["--on-agent-down", "closed"];

/// A heartbeat is too old after three seconds.
const HUNG_WITHIN: Duration = Duration::from_millis(3500);

/// A client with servers near and far, a strict server, and pods outside of the mesh.
struct Scene {
    mesh: Mesh,
    client: Pod,
    near: Pod,
    far: Pod,
    strict: Pod,
    outsider: Pod,
    _servers: Vec<Process>,
}

impl Scene {
    fn set(name: &str, args: &[&str]) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, args)?;
        let client = mesh.pod(0, "client")?;
        let (near, far) = (mesh.pod(0, "near")?, mesh.pod(1, "far")?);
        let strict = PodSpec::new(SHOP, "strict").annotation("undermesh.io/mtls", "strict");
        let strict = mesh.add(0, strict)?;
        let outsider = mesh.outsider(0, "outsider")?;
        let servers = [&near, &far, &strict, &outsider].map(serve).into_iter().collect::<Result<_>>()?;
        mesh.ready()?;
        // The agent of a client knows the pods of other nodes, too.
        mesh.agents[0].wait_metrics(SOON, "far is known", |_| dial(&client, far.ip(), 1).is_ok())?;
        Ok(Self { mesh, client, near, far, strict, outsider, _servers: servers })
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.mesh.agents[0]
    }

    /// The addresses of the servers that take whoever calls.
    fn open_addresses(&self) -> [IpAddr; 4] {
        [self.near.ip(), self.near.ip6(), self.far.ip(), self.far.ip6()]
    }

    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.agents[0].metrics()?.sum(name, labels))
    }

    /// Fails unless a connection to each address goes through the agent.
    fn is_captured(&self) -> Result<()> {
        let labels = [("reporter", "source"), ("source_workload", "client")];
        let before = self.metric(OPENED, &labels)?;
        for ip in self.open_addresses() {
            dial(&self.client, ip, 1)?.all_served()?;
        }
        let seen = self.metric(OPENED, &labels)? - before;
        // More: a load that has just ended may have left some in the listeners' backlog.
        ensure!(seen >= 4.0, "{seen} of 4 connections went through the agent");
        Ok(())
    }
}

#[test]
fn killed_in_open_mode_it_is_bypassed_at_once_and_reports_it_later() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut scene = Scene::set("um-e2e-kill-open", &[])?;
    scene.is_captured()?;
    let cut = [Talk::begin(&scene.client, scene.near.ip())?, Talk::begin(&scene.client, scene.far.ip6())?];
    scene.agent().kill();

    for ip in scene.open_addresses() {
        dial(&scene.client, ip, 5)?.all_served()?;
    }
    dial(&scene.outsider, scene.near.ip(), 3)?.all_served()?;
    for talk in cut {
        let how = talk.breaks(SOON)?;
        ensure!(how == "ECONNRESET", "a relayed connection ended with {how}");
    }
    let mut bypassing = Talk::begin(&scene.client, scene.far.ip())?;

    scene.mesh.restart(0, &[])?;
    // 4 * 5 and the conversation; on the servers' side 2 * 5 of them and the outsider's.
    let (outbound, inbound) = (
        scene.metric(BYPASSED, &[("reason", "agent_down")])?,
        scene.metric(BYPASSED, &[("reason", "inbound_agent_down")])?,
    );
    ensure!(outbound == 21.0 && inbound == 13.0, "reported: {outbound} outbound, {inbound} inbound");
    scene.is_captured()?;
    bypassing.goes_on()?;
    bypassing.end()
}

#[test]
fn killed_in_closed_mode_connections_are_refused() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut scene = Scene::set("um-e2e-kill-shut", CLOSED)?;
    scene.is_captured()?;
    scene.agent().kill();
    for ip in scene.open_addresses() {
        dial(&scene.client, ip, 3)?.all_failed("ECONNREFUSED")?;
    }
    for ip in [scene.near.ip(), scene.near.ip6()] {
        dial(&scene.outsider, ip, 3)?.all_failed("ECONNREFUSED")?;
    }
    // What is not the mesh's business goes on.
    dial(&scene.client, scene.outsider.ip(), 3)?.all_served()?;
    dial(&scene.near, scene.near.ip(), 3)?.all_served()?;

    scene.mesh.restart(0, CLOSED)?;
    let (outbound, inbound) = (
        scene.metric(REFUSED, &[("reason", "agent_down")])?,
        scene.metric(REFUSED, &[("reason", "inbound_agent_down")])?,
    );
    ensure!(outbound == 12.0 && inbound == 6.0, "reported: {outbound} outbound, {inbound} inbound");
    scene.is_captured()
}

#[test]
fn a_strict_pod_takes_no_plaintext_with_or_without_an_agent() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut scene = Scene::set("um-e2e-strict", &[])?;
    let addresses = [scene.strict.ip(), scene.strict.ip6()];
    for ip in addresses {
        dial(&scene.outsider, ip, 3)?.all_failed("ECONNREFUSED")?;
        dial(&scene.far, ip, 1)?.all_served()?;
        dial(&scene.client, ip, 3)?.all_served()?;
        dial(&scene.strict, ip, 1)?.all_served()?;
    }
    let refused = scene.metric(REFUSED, &[("reason", "plaintext")])?;
    ensure!(refused == 6.0, "{refused} refused connections are counted, not 6");

    // From the first SYN on: clients that dial without a pause never get through, whenever the kill happens.
    let run = Run::begin(&scene.outsider, scene.strict.ip(), 4)?;
    scene.agent().kill();
    for ip in addresses {
        for caller in [&scene.outsider, &scene.far] {
            let dialled = dial(caller, ip, 5)?;
            ensure!(dialled.served.is_empty(), "{} got through to a strict pod: {dialled:?}", caller.name());
        }
        dial(&scene.client, ip, 5)?.all_failed("ECONNREFUSED")?;
        dial(&scene.strict, ip, 1)?.all_served()?;
    }
    scene.mesh.restart(0, &[])?;
    let ran = run.end()?;
    ensure!(ran.made == ran.failed_in_all, "{} of {} got through", ran.made - ran.failed_in_all, ran.made);
    for ip in addresses {
        dial(&scene.client, ip, 3)?.all_served()?;
    }

    // What the annotation says may change while the pod runs.
    scene.strict.update(|manifest| manifest.set_annotation("undermesh.io/mtls", None))?;
    let is_open = |ip| dial(&scene.outsider, ip, 1).and_then(Dialled::all_served);
    eventually(SOON, "the pod takes plaintext", || {
        addresses.into_iter().try_for_each(|ip| is_open(ip).map(drop))
    })
}

#[test]
fn a_pod_that_comes_to_take_plaintext_is_told_of() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-downgrade", 1, &["--mtls", "strict"])?;
    let strict = mesh.pod(0, "strict")?;
    mesh.ready()?;
    let told = |mesh: &Mesh, count: f64, line: &str| {
        mesh.agents[0].wait_metrics(SOON, "the downgrade is counted", |metrics| {
            metrics.sum("undermesh_mtls_downgrades_total", &[]) == count
        })?;
        let log = mesh.agents[0].process().log_tail(200);
        ensure!(log.lines().any(|it| it.contains("WARN") && it.contains(line)), "not told of: {line}\n{log}");
        Ok(())
    };
    let before = mesh.agents[0].metrics()?.sum("undermesh_mtls_downgrades_total", &[]);
    ensure!(before == 0.0, "{before} downgrades before there is one");
    // As a Deployment's template would have it: each of its pods is a new one.
    mesh.add(0, PodSpec::new(SHOP, "open").annotation("undermesh.io/mtls", "permissive"))?;
    told(
        &mesh,
        1.0,
        "the pod takes plaintext, which its namespace, the mesh or the agent's own setting refuses",
    )?;
    strict.update(|pod| pod.set_annotation("undermesh.io/mtls", Some("permissive")))?;
    told(&mesh, 2.0, "the pod takes plaintext, which was refused before")?;

    // While no agent watches: of what a policy had refused, and then of what the agent's own setting had. Of the open pods nothing new
    // is to be told where nobody wants them otherwise.
    mesh.add(0, PodSpec::new(SHOP, "plain"))?;
    let policy = Manifest::new("undermesh.io/v1alpha1", "MeshPolicy", Some(SHOP), "metrics").with(
        "spec",
        json!({
            "selector": { "matchLabels": { "app": "scraped" } },
            "mtls": { "ports": [{ "port": 9090, "mode": "Strict" }] },
        }),
    );
    mesh.lab.apply(&policy)?;
    let scraped = PodSpec::new(SHOP, "scraped").label("app", "scraped");
    mesh.add(0, scraped.annotation("undermesh.io/mtls", "permissive"))?;
    mesh.ready()?;
    mesh.agents[0].kill();
    mesh.lab.delete(&policy)?;
    mesh.restart(0, &["--mtls", "permissive"])?;
    told(&mesh, 2.0, "the pod takes plaintext, which was refused before this agent began")?;
    let log = mesh.agents[0].process().log_tail(200);
    let line = "ports of the pod take plaintext, which was refused before this agent began";
    ensure!(log.lines().any(|it| it.contains(line) && it.contains("9090")), "{log}");
    // Once.
    mesh.agents[0].kill();
    mesh.restart(0, &["--mtls", "permissive"])?;
    let again = mesh.agents[0].metrics()?.sum("undermesh_mtls_downgrades_total", &[]);
    ensure!(again == 0.0, "{again} downgrades although nothing has changed");
    Ok(())
}

#[test]
fn hung_in_open_mode_it_is_bypassed_until_it_is_back() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut scene = Scene::set("um-e2e-hung-open", &[])?;
    let mut stalled = Talk::begin(&scene.client, scene.far.ip())?;
    scene.agent().signal(Signal::SIGSTOP);
    let since = Instant::now();
    for (caller, ip) in [(&scene.client, scene.far.ip()), (&scene.outsider, scene.near.ip6())] {
        eventually(HUNG_WITHIN, "a hung agent is bypassed", || dial_briefly(caller, ip)?.all_served())?;
    }
    let took = since.elapsed();
    ensure!(took < patient(HUNG_WITHIN), "it took {took:?} until connections went past the hung agent");
    dial(&scene.client, scene.near.ip(), 3)?.all_served()?;
    dial(&scene.outsider, scene.strict.ip(), 3)?.all_failed("ECONNREFUSED")?;

    scene.agent().signal(Signal::SIGCONT);
    stalled.goes_on()?;
    eventually(SOON, "capture is back", || scene.is_captured())?;
    let bypassed = scene.metric(BYPASSED, &[("reason", "agent_down")])?;
    ensure!(bypassed >= 4.0, "{bypassed} bypassed connections are reported");
    stalled.end()
}

#[test]
fn hung_in_closed_mode_connections_are_refused_until_it_is_back() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut scene = Scene::set("um-e2e-hung-shut", CLOSED)?;
    scene.agent().signal(Signal::SIGSTOP);
    let since = Instant::now();
    for (caller, ip) in [(&scene.client, scene.far.ip()), (&scene.outsider, scene.near.ip6())] {
        let what = "connections are refused while the agent hangs";
        eventually(HUNG_WITHIN, what, || dial_briefly(caller, ip)?.all_failed("ECONNREFUSED"))?;
    }
    let took = since.elapsed();
    ensure!(took < patient(HUNG_WITHIN), "it took {took:?} until connections were refused");
    for ip in scene.open_addresses() {
        dial(&scene.client, ip, 3)?.all_failed("ECONNREFUSED")?;
    }
    dial(&scene.client, scene.outsider.ip(), 3)?.all_served()?;
    scene.agent().signal(Signal::SIGCONT);
    eventually(SOON, "capture is back", || scene.is_captured())
}

/// One connection that may take 150 ms, so that one into the hung agent's arms costs no more than that.
fn dial_briefly(client: &Pod, to: IpAddr) -> Result<Dialled> {
    let mut command = Command::new(binary("traffic")?);
    command.args(["dial", &std::net::SocketAddr::new(to, PORT).to_string(), "--limit-ms", "150"]);
    crate::kit::last_line(&client.run(command, SOON)?.success()?)
}

/// The claim is held as an agent holds it that takes over and comes to nothing.
#[test]
fn an_agent_ends_in_its_time_though_the_next_one_never_serves_every_pod() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-claimed", 1, &["--drain", "3s"])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let next = mesh.nodes[0].pins().join("next");
    let _claim =
        Flock::lock(File::open(&next)?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    drop(File::open(&next)?);
    eventually(SOON, "the agent lets go", || {
        let said = mesh.agents[0].process().log_tail(20);
        ensure!(said.contains("another agent wants to take over"), "{said}");
        Ok(())
    })?;
    dial(&client, server.ip(), 3)?.all_served()?;
    let began = Instant::now();
    mesh.agents[0].terminate(SOON)?;
    let took = began.elapsed();
    ensure!((Duration::from_secs(3)..patient(Duration::from_secs(6))).contains(&took), "it took {took:?}");
    Ok(())
}

#[test]
fn five_crashes_under_load_fail_only_what_they_cut() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    const CLIENTS: usize = 4;
    let mut scene = Scene::set("um-e2e-crashes", &[])?;
    scene.is_captured()?;
    let node = scene.mesh.nodes[0].clone();
    let before = (programs(&node)?, pinned_pods(&scene)?);
    let descriptors = scene.agent().process().descriptors()?;

    let runs = scene.open_addresses().map(|ip| Run::begin(&scene.client, ip, CLIENTS));
    let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
    let mut crashes = Vec::new();
    for _ in 0..5 {
        let began = monotonic_ns()?;
        scene.agent().kill();
        crashes.push(began..=monotonic_ns()?);
        // Long enough for the clients to dial past the dead agent.
        scene.mesh.restart(0, &[])?;
        let labels = [("source_workload", "client")];
        scene.mesh.agents[0]
            .wait_metrics(SOON, "the load is captured", |m| m.sum(OPENED, &labels) > 200.0)?;
    }
    let (mut made, mut cut) = (0, 0);
    for run in runs {
        let ran = run.end()?;
        for failure in &ran.failed {
            let cut = crashes.iter().any(|c| failure.began_ns <= *c.end() && failure.ended_ns >= *c.start());
            let since =
                crashes.iter().map(|c| (failure.began_ns - c.end()) / 1000).filter(|us| *us >= 0).min();
            ensure!(cut, "{}, begun {since:?} us after a crash, and not cut by one", failure.error);
        }
        made += ran.made;
        cut += ran.failed_in_all;
    }
    eprintln!("5 crashes under {made} connections: {cut} were cut");

    scene.is_captured()?;
    let after = (programs(&node)?, pinned_pods(&scene)?);
    ensure!(before == after, "the kernel holds {after:#?}, before the crashes {before:#?}");
    eventually(SOON, "nothing has leaked", || {
        let now = scene.mesh.agents[0].process().descriptors()?;
        ensure!(now <= descriptors + 4, "{now} descriptors, {descriptors} before the crashes");
        let entries = map_entries(&node)?;
        ensure!(entries["vouched"] == 0 && entries["dials"] == 0, "the maps hold {entries:?}");
        ensure!(entries["pods"] == 3 && entries["listeners"] == 6, "the maps hold {entries:?}");
        Ok(())
    })
}

fn pinned_pods(scene: &Scene) -> Result<Vec<std::ffi::OsString>> {
    let mut pins = std::fs::read_dir(scene.mesh.nodes[0].pins().join("pods"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<Vec<_>>>()?;
    pins.sort();
    Ok(pins)
}

/// The clock of the clients.
fn monotonic_ns() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

//! Between the nodes: mutual TLS on port 15008, and nothing else.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Lab, Metrics, Output, Pod, PodSpec, binary, eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{
    LIMIT, Mesh, OPENED, PORT, REFUSED, SERVICE_PORT, at, listen, names, service_ips, witness,
};

/// The port of the tunnel.
pub const TUNNEL: u16 = 15008;

/// Handshakes by side, result and reason.
pub const HANDSHAKES: &str = "undermesh_tls_handshakes_total";

/// What no packet between the nodes may show.
const MARKER: &str = "plaintext-that-must-not-be-seen";

/// What an outsider says, who has no tunnel.
const CONTROL: &str = "plaintext-of-an-outsider";

const ACTIVE: &str = "undermesh_tcp_connections_active";

const MIB: u64 = 1 << 20;

pub const SOON: Duration = Duration::from_secs(20);

/// A certificate authority for the lab; the arguments that have an agent use it.
pub fn authority(lab: &Lab) -> Result<Vec<String>> {
    let mut init = Command::new(binary("undermesh")?);
    init.args(["ca", "init", "--ca-dir"]).arg(lab.dir().join("ca"));
    run_here(init, LIMIT)?.success()?;
    Ok(authority_args(lab))
}

/// The arguments that have an agent use the lab's authority, whether it is there or not.
pub fn authority_args(lab: &Lab) -> Vec<String> {
    let dir = |name: &str| lab.dir().join(name).display().to_string();
    vec!["--ca-dir".into(), dir("ca"), "--state-dir".into(), dir("state")]
}

/// A mesh whose nodes trust each other, once they know of each other's pods.
pub fn running(name: &str) -> Result<Mesh> {
    let mut mesh = Mesh::create(name)?;
    start_with(&mut mesh, &[])?;
    Ok(mesh)
}

/// Starts the agents with an authority and these arguments.
pub fn start_with(mesh: &mut Mesh, args: &[&str]) -> Result<()> {
    authority(&mesh.lab)?;
    mesh.start(args)
}

#[test]
fn pods_of_two_nodes_talk_through_mutual_tls() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = running("um-e2e-tunnel")?;
    let mut count = 0.0;
    for (number, ip) in [mesh.far.ip(), mesh.far.ip6()].into_iter().enumerate() {
        let service = service_ips(&mesh.far)[number];
        for to in [at(ip, PORT), at(service, SERVICE_PORT)] {
            let seen = names(&mesh.client(&["connect", &to])?)?;
            // The server's socket is of both families.
            let seen = seen.replace(&format!("[::ffff:{ip}]"), &ip.to_string());
            let client = if ip.is_ipv6() { mesh.client.ip6() } else { mesh.client.ip() };
            // The client's address *and port*, which only the tunnel can carry.
            let seen = seen.replace(&format!("[::ffff:{client}]"), &client.to_string());
            let (own, server) = (at_port(client), at(ip, PORT));
            let expected = format!("client {own} sees {to}, server {server} sees {own}, accepted {own}");
            ensure!(seen == expected, "\n     saw: {seen}\nexpected: {expected}");
            count += 1.0;
        }
    }
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("security", "mutual_tls"), ("source_workload", "client")];
        agent.wait_metrics(SOON, reporter, |metrics| metrics.sum(OPENED, &labels) == count)?;
        let plaintext = agent.metrics()?.sum(OPENED, &[("security", "plaintext")]);
        ensure!(plaintext == 0.0, "{plaintext} plaintext connections on {}", agent.node().name());
    }
    Ok(())
}

#[test]
fn packets_between_the_nodes_show_no_payload() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("tcpdump"));
    let mesh = running("um-e2e-tunnel-packets")?;
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    let file = mesh.lab.dir().join("packets");
    let mut tcpdump = Command::new("tcpdump");
    tcpdump.args(["-i", "eth0", "-U", "-s", "0", "-Z", "root", "-w"]).arg(&file);
    let mut tcpdump = mesh.nodes[0].spawn(tcpdump)?;
    eventually(SOON, "packets are captured", || {
        ensure!(file.metadata()?.len() > 0, "not yet");
        Ok(())
    })?;

    let say = |text: &str| format!("hear-line,say:{text},hear:{},shut,hear-end", text.len());
    for ip in [mesh.far.ip(), mesh.far.ip6()] {
        let told = mesh.client(&["connect", &at(ip, PORT), "--script", &say(MARKER)])?;
        ensure!(told.to_string().contains(MARKER), "no echo: {told}");
        // What the capture would show.
        witness(&outsider, &["connect", &at(ip, PORT), "--script", &say(CONTROL)])?;
    }
    let shows = |text: &str| -> Result<usize> {
        let bytes = fs::read(&file)?;
        Ok(bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count())
    };
    eventually(SOON, "the capture is complete", || {
        let control = shows(CONTROL)?;
        ensure!(control == 4, "the plaintext of an outsider is seen {control} times");
        Ok(())
    })?;
    tcpdump.terminate(SOON)?;
    ensure!(shows(MARKER)? == 0, "the payload is in the packets");
    for family in ["ip", "ip6"] {
        // A TLS record of application data, in either direction.
        let offset = if family == "ip" { "tcp[((tcp[12] & 0xf0) >> 2)] = 0x17" } else { "ip6[72] = 0x17" };
        let filter = format!("{family} and port {TUNNEL} and {offset}");
        let mut read = Command::new("tcpdump");
        read.args(["-n", "-r"]).arg(&file).arg(&filter);
        let packets = run_here(read, LIMIT)?.success()?.lines().count();
        ensure!(packets > 4, "{packets} packets are {filter}");
    }
    Ok(())
}

#[test]
fn a_strict_pod_is_reached_through_the_tunnel_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-tunnel-strict")?;
    let strict = PodSpec::new("shop", "strict").annotation("undermesh.io/mtls", "strict");
    let strict = mesh.nodes[1].add_pod(strict)?;
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    let _server = listen(&strict, PORT, &[])?;
    start_with(&mut mesh, &[])?;
    mesh.agents[1].wait_published(&[strict.ip()], SOON)?;
    for ip in [strict.ip(), strict.ip6()] {
        let to = at(ip, PORT);
        names(&mesh.client(&["connect", &to])?)?;
        let refused = witness(&outsider, &["connect", &to])?;
        ensure!(refused[0]["connect"] == "ECONNREFUSED", "plaintext to a strict pod: {refused}");
    }
    Ok(())
}

#[test]
fn a_caller_without_a_certificate_is_refused() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("openssl"));
    let mesh = running("um-e2e-tunnel-nobody")?;
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    for (number, ip) in [(1.0, mesh.far.ip()), (2.0, mesh.far.ip6())] {
        let mut openssl = Command::new("openssl");
        openssl.args(["s_client", "-connect", &at(ip, TUNNEL), "-alpn", "h2", "-tls1_3", "-ign_eof"]);
        let output = outsider.run(openssl, LIMIT)?;
        ensure!(output.success().is_err(), "a caller without a certificate got through");
        let labels = [("reason", "handshake_failed"), ("reporter", "destination")];
        mesh.agents[1].wait_metrics(SOON, "it is counted", |m| m.sum(REFUSED, &labels) == number)?;
        let labels = [("reporter", "destination"), ("result", "failure"), ("reason", "no_certificate")];
        mesh.agents[1].wait_metrics(SOON, "with its reason", |m| m.sum(HANDSHAKES, &labels) == number)?;
        let log = mesh.agents[1].process().output();
        let told: Vec<_> = log.lines().filter(|line| line.contains("handshake of a tunnel failed")).collect();
        let tells = |line: &&str| {
            line.contains("pod=shop/far")
                && line.contains(&format!("peer={}", at_peer(&outsider, ip)))
                && line.contains("reason=\"no_certificate\"")
        };
        let once = told.len() as f64 == number && told.last().is_some_and(tells);
        ensure!(once, "the log tells {told:#?}");
    }
    Ok(())
}

/// Asks a pod for a stream, from another pod and by hand; prints the status of the answer.
pub fn ask(lab: &Lab, from: &Pod, certificate: &Path, to: IpAddr, request: [&str; 2]) -> Result<Output> {
    let script = lab.dir().join("caller.py");
    fs::write(&script, include_str!("caller.py"))?;
    let mut python = Command::new("python3");
    python.arg(&script).arg(to.to_string()).arg("--certificate").arg(certificate).arg("ask").args(request);
    from.run(python, LIMIT)
}

/// How a log begins to name a pod's socket that dials this address.
fn at_peer(pod: &Pod, like: IpAddr) -> String {
    match like {
        IpAddr::V4(_) => format!("{}:", pod.ip()),
        IpAddr::V6(_) => format!("[{}]:", pod.ip6()),
    }
}

/// Readers that take nothing, many more than fill a tunnel's window if each may have a whole stream's.
const SLOW: usize = 24;

#[test]
fn readers_that_take_nothing_hold_up_none_but_their_senders() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = running("um-e2e-tunnel-slow")?;
    let gate = mesh.lab.dir().join("gate");
    let stuff = format!("stuff:1,gate:{},shut,hear-end", gate.display());
    let drain = format!("gate:{},drain-all:1", gate.display());
    let size = 64 * MIB;
    let _servers = [
        listen(&mesh.far, 7001, &["--script", &drain])?,
        listen(&mesh.far, 7002, &["--script", &stuff])?,
        listen(&mesh.far, 7003, &["--script", &format!("exchange:{size}:2:1,hear-end")])?,
    ];
    let neighbour = || -> Result<Duration> {
        let began = Instant::now();
        let script = format!("exchange:{size}:1:2,shut,hear-end");
        let told = mesh.client(&["connect", &at(mesh.far.ip(), 7003), "--script", &script])?;
        let whole = format!("poured {size}, drained {size}");
        ensure!(told[0]["saw"][0] == *whole && told[0]["saw"][2] == "|end", "the neighbour saw {told}");
        Ok(began.elapsed())
    };
    let memory = || -> Result<u64> { mesh.agents.iter().map(|a| a.process().resident_bytes()).sum() };
    let alone = neighbour()?;
    let before = memory()?;

    let mut clients = Vec::new();
    for number in 0..SLOW {
        for (port, script) in [(7001, &stuff), (7002, &drain)] {
            let mut client = Command::new(binary("witness")?);
            client.args(["connect", &at(mesh.far.ip(), port), "--script", script]);
            clients.push(mesh.client.spawn(client)?);
        }
        let all = 2.0 * (number + 1) as f64;
        let open = |metrics: &Metrics| metrics.sum(ACTIVE, &[("reporter", "destination")]) == all;
        mesh.agents[1].wait_metrics(SOON, "they are relayed", open)?;
    }
    let moved = || -> Result<f64> {
        let metrics = mesh.agents[0].metrics()?;
        Ok(metrics.sum("undermesh_tcp_sent_bytes_total", &[])
            + metrics.sum("undermesh_tcp_received_bytes_total", &[]))
    };
    eventually(LIMIT, "the senders stand still", || {
        let before = moved()?;
        std::thread::sleep(Duration::from_secs(1));
        let after = moved()?;
        ensure!(before == after, "{before} bytes, then {after}");
        Ok(())
    })?;
    // Each agent has a tunnel per worker, of 64 MiB, and what its own senders wait to send.
    let held = memory()?.saturating_sub(before);
    ensure!(held < 192 * MIB, "the agents hold {held} bytes for {SLOW} slow readers in each direction");
    let beside = neighbour()?;
    // A stall of its own would last until the gate opens; what is allowed for is a busy machine.
    ensure!(beside < 4 * alone + Duration::from_secs(2), "{alone:?} alone, {beside:?} beside slow readers");

    fs::write(&gate, "")?;
    for client in &mut clients {
        client.wait(LIMIT)?;
        let output = client.output();
        ensure!(!output.contains("wrong") && !output.contains('E'), "a slow connection saw {output}");
    }
    Ok(())
}

/// As [`names`] writes the client's own name.
fn at_port(ip: IpAddr) -> String {
    let address = at(ip, 1);
    format!("{}:PORT", address.strip_suffix(":1").unwrap_or(&address))
}

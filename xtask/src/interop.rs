//! `cargo xtask interop`: a ztunnel at the other end of our tunnel, and applications that talk through both.
//!
//! One node has our agent, the other one a ztunnel. What a cluster would have brought about is done here by hand: the
//! two have a root in common, ztunnel's list of workloads says that our pod takes tunnels, and our agent is told the
//! same of ztunnel's. Checks only look at what applications see, at our metrics and at the wire between the nodes.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use undermesh_tests::lab::{
    Agent, AgentOptions, Lab, Manifest, Metrics, Node, Pod, PodSpec, Process, binary, eventually, run_here,
    sweep_on_signals,
};

use crate::bench::{HTTP_PORT, start_servers};
use crate::build::Build;
use crate::{say, setup, ztunnel};

/// The arguments of `cargo xtask interop`.
#[derive(Args)]
pub struct Interop {
    /// The other proxy, as ztunnel=PATH: a build with its test authority (the feature `testing`).
    #[arg(long, value_name = "ztunnel=PATH", value_parser = ztunnel_path)]
    peer: PathBuf,
    /// The folder that has `root-cert.pem` and `ca-key.pem`, the root that is built into it: `src/tls` of its source.
    #[arg(long, value_name = "DIR")]
    peer_ca: PathBuf,
    /// What ztunnel writes into its log.
    #[arg(long, value_name = "RUST_LOG", default_value = "info")]
    peer_log: String,
}

const LIMIT: Duration = Duration::from_secs(60);

const SOON: Duration = Duration::from_secs(20);

/// The port of the tunnel.
const TUNNEL: u16 = 15008;

const OPENED: &str = "undermesh_tcp_connections_opened_total";

impl Interop {
    /// Tells of each check how it went; fails if one did.
    pub fn run(&self) -> Result<()> {
        setup::for_tests()?;
        Build { release: false }.run()?;
        sweep_on_signals()?;
        let mut pair = Pair::make(self)?;
        let failed = pair.check_all()?;
        if failed > 0 {
            bail!("{failed} checks failed; the last words of both:\n{}", pair.last_words());
        }
        Ok(())
    }
}

/// Two nodes with a pod each, in one mesh made of two.
struct Pair {
    agent: Agent,
    ztunnel: Process,
    tcpdump: Process,
    packets: PathBuf,
    /// A copy of ztunnel's root.
    root: PathBuf,
    servers: Vec<Process>,
    /// The pod behind our agent.
    ours: Pod,
    /// The pod behind ztunnel.
    theirs: Pod,
    // Dropped last: it sweeps what the others live in.
    _lab: Lab,
}

impl Pair {
    fn make(args: &Interop) -> Result<Self> {
        let lab = Lab::create("um-interop")?;
        let nodes = [lab.add_node()?, lab.add_node()?];
        lab.apply(&Manifest::namespace("interop").label("undermesh.io/mesh", "enabled"))?;
        let ours = nodes[0].add_pod(PodSpec::new("interop", "ours"))?;
        let theirs = nodes[1].add_pod(PodSpec::new("interop", "theirs"))?;
        let packets = lab.dir().join("packets");
        let tcpdump = capture(&nodes[0], &packets)?;

        let root = share_root(&lab, &args.peer_ca)?;
        let agent = start_agent(&ours, &root)?;
        let ztunnel = ztunnel::start(&args.peer, &lab, &nodes[1], &[&ours, &theirs], &args.peer_log)?;
        publish(&lab, &agent, &theirs)?;

        let mut servers = Vec::new();
        for pod in [&ours, &theirs] {
            servers.extend(start_servers(&lab, pod)?);
        }
        Ok(Self { agent, ztunnel, tcpdump, packets, root, servers, ours, theirs, _lab: lab })
    }

    /// How many checks failed.
    fn check_all(&mut self) -> Result<usize> {
        let mut failed = 0;
        let mut tell = |what: &str, outcome: Result<String>| match outcome {
            Ok(seen) => println!("ok      {what}: {seen}"),
            Err(error) => {
                failed += 1;
                println!("FAILED  {what}: {error:#}");
            }
        };
        // Where nobody listens a client of ours is reset; ztunnel closes in order.
        let ways = [
            ("Undermesh to ztunnel", &self.ours, &self.theirs, "source", "|ECONNRESET"),
            ("ztunnel to Undermesh", &self.theirs, &self.ours, "destination", "|end"),
        ];
        for (way, from, to, reporter, refused) in ways {
            say::step(way);
            tell("HTTP", http(from, to.ip()));
            tell("HTTP by IPv6", http(from, to.ip6()));
            tell("HTTP, a connection for each request", many_requests(from, to));
            for talk in TALKS {
                tell(talk.what, talk.check(from, to));
            }
            tell("100 connections at one time", crowd(from, to));
            tell("nobody listens there", nobody_listens(from, to, refused));
            tell("our agent's view", self.all_mutual_tls(reporter));
        }
        say::step("idle connections, both ways at one time");
        std::thread::scope(|scope| {
            let idle = ways.map(|(way, from, to, ..)| (way, scope.spawn(|| IDLE.check(from, to))));
            for (way, check) in idle {
                tell(way, check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
        });
        say::step("after a restart of our agent");
        self.agent.terminate(SOON)?;
        self.agent = start_agent(&self.ours, &self.root)?;
        for (way, from, to, ..) in ways {
            tell(way, http(from, to.ip()));
        }
        say::step("between the nodes");
        self.tcpdump.terminate(SOON)?;
        tell("packets", only_the_tunnels_port(&self.packets));
        self.servers.iter_mut().try_for_each(Process::check_running)?;
        self.agent.check_running()?;
        self.ztunnel.check_running()?;
        Ok(failed)
    }

    /// Every connection went through a tunnel, says our agent.
    fn all_mutual_tls(&self, reporter: &str) -> Result<String> {
        let streams =
            |metrics: &Metrics| metrics.sum("undermesh_tunnel_streams_open", &[("reporter", reporter)]);
        let metrics =
            self.agent.wait_metrics(SOON, "no stream is left", |metrics| streams(metrics) == 0.0)?;
        let opened = |security| metrics.sum(OPENED, &[("reporter", reporter), ("security", security)]);
        let (encrypted, plaintext) = (opened("mutual_tls"), opened("plaintext"));
        ensure!(plaintext == 0.0, "{plaintext} connections were plaintext, {encrypted} encrypted");
        ensure!(encrypted > 0.0, "no connection was encrypted");
        let tunnels = metrics.sum("undermesh_tunnels_open", &[("reporter", reporter)]);
        Ok(format!("{encrypted} connections, mutual TLS all of them; {tunnels} tunnels stand"))
    }

    fn last_words(&self) -> String {
        let [agent, ztunnel] = [self.agent.process(), &self.ztunnel].map(|process| process.log_tail(10));
        format!("agent:\n{agent}\n\nztunnel:\n{ztunnel}")
    }
}

/// Our authority's root becomes one that ztunnel's root has signed, so that whoever believes that one believes ours.
/// Its key stays ours: theirs is an RSA one. What is returned is a copy of theirs, for us to believe.
fn share_root(lab: &Lab, peer_ca: &Path) -> Result<PathBuf> {
    let ca = lab.dir().join("ca");
    let mut init = Command::new(binary("undermesh")?);
    init.args(["ca", "init", "--ca-dir"]).arg(&ca);
    run_here(init, LIMIT)?.success()?;

    let extensions = "\
[req]
distinguished_name = subject
x509_extensions = authority
prompt = no
[subject]
O = cluster.local
CN = Undermesh beside ztunnel
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
";
    let config = lab.dir().join("root.conf");
    fs::write(&config, extensions)?;
    let (root, key) = (peer_ca.join("root-cert.pem"), peer_ca.join("ca-key.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-days", "2", "-config"]).arg(&config);
    openssl.arg("-CA").arg(&root).arg("-CAkey").arg(&key).arg("-key").arg(ca.join("root-1.key.pem"));
    let signed = run_here(openssl, LIMIT)?.success()?;
    // Written into the file that is there, which keeps its mode.
    fs::write(ca.join("root-1.pem"), signed)?;
    let copy = lab.dir().join("ztunnel-root.pem");
    fs::copy(&root, &copy).with_context(|| root.display().to_string())?;
    Ok(copy)
}

/// Starts the agent of our pod, which believes ztunnel's root beside its own authority.
fn start_agent(pod: &Pod, root: &Path) -> Result<Agent> {
    let bundle = format!("cluster.local={}", root.display());
    let args = vec!["--trust-bundle".into(), bundle];
    let mut agent = pod.node().spawn_agent(AgentOptions { args, ..AgentOptions::default() })?;
    agent.wait_ready(SOON)?;
    agent.wait_published(&[pod.ip()], SOON)?;
    Ok(agent)
}

/// Tells our agent that the pod takes tunnels, as an agent of the pod's node would.
fn publish(lab: &Lab, agent: &Agent, pod: &Pod) -> Result<()> {
    let node = pod.node().name();
    let statement = json!({
        "node": node,
        "pods": [{ "uid": pod.uid(), "addresses": [pod.ip(), pod.ip6()], "since": 0 }],
    });
    let file = lab.dir().join(format!("state/enrolled-{node}.json"));
    let next = file.with_extension("new");
    fs::write(&next, statement.to_string())?;
    fs::rename(next, file)?;
    eventually(SOON, "our agent knows of ztunnel's pod", || {
        let log = agent.process().output();
        ensure!(log.contains("pods of other nodes that take tunnels"), "its log:\n{log}");
        Ok(())
    })
}

/// Everything that crosses the node's uplink, in a file.
fn capture(node: &Node, file: &Path) -> Result<Process> {
    let mut tcpdump = Command::new("tcpdump");
    tcpdump.args(["-i", "eth0", "-U", "-s", "96", "-Z", "root", "-w"]).arg(file).arg("tcp");
    let tcpdump = node.spawn(tcpdump)?;
    eventually(SOON, "packets are captured", || {
        ensure!(file.metadata()?.len() > 0, "not yet");
        Ok(())
    })?;
    Ok(tcpdump)
}

fn only_the_tunnels_port(file: &Path) -> Result<String> {
    let matching = |filter: &str| -> Result<Vec<String>> {
        let mut read = Command::new("tcpdump");
        read.args(["-n", "-r"]).arg(file).arg(filter);
        Ok(run_here(read, LIMIT)?.success()?.lines().map(str::to_owned).collect())
    };
    let others = matching(&format!("not port {TUNNEL}"))?;
    let first = others.first().map(String::as_str).unwrap_or_default();
    ensure!(others.is_empty(), "{} packets of other ports, the first: {first}", others.len());
    let count = matching(&format!("port {TUNNEL}"))?.len();
    ensure!(count > 0, "nothing at all was seen");
    Ok(format!("{count}, all of port {TUNNEL}"))
}

/// What two applications do with a connection, and what each of them is to see. Steps are those of the program
/// `witness`.
struct Talk {
    what: &'static str,
    port: u16,
    client: &'static str,
    client_sees: &'static [&'static str],
    server: &'static str,
    server_sees: &'static [&'static str],
}

const TALKS: &[Talk] = &[
    Talk {
        what: "the client speaks first",
        port: 7001,
        client: "say:ping,hear:4,shut,hear-end",
        client_sees: &["said", "pong", "shut", "|end"],
        server: "hear:4,say:pong,hear-end",
        server_sees: &["ping", "said", "|end"],
    },
    Talk {
        what: "the server speaks first",
        port: 7002,
        client: "hear:5,say:thanks,shut,hear-end",
        client_sees: &["hello", "said", "shut", "|end"],
        server: "say:hello,hear-end",
        server_sees: &["said", "thanks|end"],
    },
    Talk {
        what: "the client ends its stream and is still answered",
        port: 7003,
        client: "say:early,shut,hear-end",
        client_sees: &["said", "shut", "late|end"],
        server: "hear-end,pause:300,say:late",
        server_sees: &["early|end", "paused", "said"],
    },
    Talk {
        what: "the server ends its stream and is still told",
        port: 7004,
        client: "hear-end,pause:300,say:late",
        client_sees: &["early|end", "paused", "said"],
        server: "say:early,shut,hear-end",
        server_sees: &["said", "shut", "late|end"],
    },
    Talk {
        what: "64 MiB each way at one time",
        port: 7005,
        client: "exchange:67108864:1:2,shut,hear-end",
        client_sees: &["poured 67108864, drained 67108864", "shut", "|end"],
        server: "exchange:67108864:2:1,hear-end",
        server_sees: &["poured 67108864, drained 67108864", "|end"],
    },
    // Resets arrive as orderly ends, be it that ztunnel is told of one or that it has to tell: it takes every error of
    // one side for the end of it, and closes the other.
    Talk {
        what: "the server resets",
        port: 7006,
        client: "say:ping,hear-end",
        client_sees: &["said", "|end"],
        server: "hear:4,reset",
        server_sees: &["ping", "reset"],
    },
    Talk {
        what: "the client resets",
        port: 7007,
        client: "say:ping,hear:4,reset",
        client_sees: &["said", "pong", "reset"],
        server: "hear:4,say:pong,hear-end",
        server_sees: &["ping", "said", "|end"],
    },
];

/// Longer than either waits for the answer to a ping.
const IDLE: Talk = Talk {
    what: "35 seconds of silence",
    port: 7009,
    client: "say:ping,pause:35000,say:pong,hear:4,shut,hear-end",
    client_sees: &["said", "paused", "said", "done", "shut", "|end"],
    server: "hear:4,pause:34500,hear:4,say:done,hear-end",
    server_sees: &["ping", "paused", "pong", "said", "|end"],
};

impl Talk {
    fn check(&self, from: &Pod, to: &Pod) -> Result<String> {
        let server = listen(to, self.port, self.server)?;
        let told = witness(from, &["connect", &at(to, self.port), "--script", self.client])?;
        let client = &told[0];
        ensure!(client["saw"] == json!(self.client_sees), "the client saw {told}");
        let line = eventually(SOON, "the server is done", || {
            Ok(server.output().lines().next().context("no line of the server")?.to_owned())
        })?;
        let server: Value = serde_json::from_str(&line)?;
        let seen = format!("the client saw {}, the server {}", client["saw"], server["saw"]);
        ensure!(server["saw"] == json!(self.server_sees), "{seen}");
        Ok(format!("{seen}, from {}", server["accepted"].as_str().unwrap_or_default()))
    }
}

fn http(from: &Pod, to: IpAddr) -> Result<String> {
    let mut curl = Command::new("curl");
    let url = format!("http://{}/", SocketAddr::new(to, HTTP_PORT));
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "20", &url]);
    let page = from.run(curl, LIMIT)?.success()?;
    ensure!(page.starts_with("undermesh "), "the page was {page:?}");
    Ok(format!("{} bytes", page.len()))
}

/// On 16 connections at one time.
fn many_requests(from: &Pod, to: &Pod) -> Result<String> {
    let mut wrk = Command::new("wrk");
    wrk.args(["-t", "1", "-c", "16", "-d", "2s", "-H", "Connection: close"]);
    wrk.arg(format!("http://{}/", at(to, HTTP_PORT)));
    let page = from.run(wrk, LIMIT)?.success()?;
    let line = |has: &str| page.lines().find(|line| line.contains(has)).map(str::trim);
    for complaint in ["Non-2xx", "Socket errors"] {
        ensure!(line(complaint).is_none(), "wrk says:\n{page}");
    }
    let requests = line("requests in").context("wrk says nothing of requests")?;
    ensure!(!requests.starts_with("0 "), "wrk says:\n{page}");
    Ok(requests.to_owned())
}

fn crowd(from: &Pod, to: &Pod) -> Result<String> {
    const PORT: u16 = 7008;
    let _server = listen(to, PORT, "greet,echo")?;
    let told = witness(from, &["crowd", &at(to, PORT), "--total", "100", "--at-once", "100"])?;
    let whole = told["made"] == 100 && told["most_at_once"] == 100 && told["failed"] == json!({});
    ensure!(whole, "{told}");
    Ok(told.to_string())
}

/// The far end answers with 503.
fn nobody_listens(from: &Pod, to: &Pod, expected: &str) -> Result<String> {
    let told = witness(from, &["connect", &at(to, 7999), "--script", "hear-end"])?;
    ensure!(told[0]["saw"] == json!([expected]), "the client saw {told}");
    Ok(format!("the client saw {}", told[0]["saw"]))
}

fn listen(pod: &Pod, port: u16, script: &str) -> Result<Process> {
    let mut witness = Command::new(binary("witness")?);
    witness.args(["listen", "--port", &port.to_string(), "--script", script]);
    let process = pod.spawn(witness)?;
    pod.wait_listening(port)?;
    Ok(process)
}

fn witness(pod: &Pod, args: &[&str]) -> Result<Value> {
    let mut witness = Command::new(binary("witness")?);
    witness.args(args);
    let told = pod.run(witness, LIMIT)?.success()?;
    serde_json::from_str(&told).with_context(|| format!("a witness told: {told}"))
}

fn at(pod: &Pod, port: u16) -> String {
    SocketAddr::new(pod.ip(), port).to_string()
}

/// A program that can be run from any folder.
fn ztunnel_path(text: &str) -> Result<PathBuf> {
    let path = text.strip_prefix("ztunnel=").context("the peer is given as ztunnel=PATH")?;
    fs::canonicalize(path).with_context(|| format!("no {path}"))
}

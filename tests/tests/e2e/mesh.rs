//! What most tests start from: a client with two servers in the mesh, one on the client's node and one on another.
//!
//! The agents start only when told to, so that a test can first see what its application sees without the mesh.

use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{
    Agent, AgentOptions, Lab, Manifest, Metrics, Node, Pod, PodSpec, Process, binary,
};

/// The longest that a program in a pod may take, unless a test says otherwise.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Every pod of the mesh listens here, greets, and echoes.
pub const PORT: u16 = 7000;

/// The Services' port, which leads to [`PORT`].
pub const SERVICE_PORT: u16 = 80;

pub struct Mesh {
    // In the order in which they are to end.
    pub agents: Vec<Agent>,
    servers: Vec<Process>,
    pub client: Pod,
    /// On the client's node.
    pub near: Pod,
    /// On the other node.
    pub far: Pod,
    pub nodes: [Node; 2],
    pub lab: Lab,
}

impl Mesh {
    /// The pods with their servers, and a Service for each; no agent yet.
    pub fn create(name: &str) -> Result<Self> {
        let lab = Lab::create(name)?;
        let nodes = [lab.add_node()?, lab.add_node()?];
        lab.apply(&Manifest::namespace("shop").label("undermesh.io/mesh", "enabled"))?;
        let pod = |node: &Node, name: &str| node.add_pod(PodSpec::new("shop", name).second_network());
        let (client, near) = (pod(&nodes[0], "client")?, pod(&nodes[0], "near")?);
        let far = pod(&nodes[1], "far")?;
        for server in [&near, &far] {
            let (name, ips) = (server.name(), service_ips(server));
            lab.apply(&Manifest::service("shop", name, &ips, &[(SERVICE_PORT, PORT)], &[("app", name)]))?;
        }
        let mut mesh = Self { agents: Vec::new(), servers: Vec::new(), client, near, far, nodes, lab };
        mesh.servers = [&mesh.client, &mesh.near, &mesh.far]
            .map(|pod| listen(pod, PORT, &[]))
            .into_iter()
            .collect::<Result<_>>()?;
        Ok(mesh)
    }

    /// Starts both agents and waits until every pod is enrolled, and the nodes know of each other's.
    pub fn start(&mut self, args: &[&str]) -> Result<()> {
        self.spawn(args, false)?;
        self.agents[1].wait_published(&[self.far.ip()], Duration::from_secs(20))
    }

    /// As [`Self::start`], but without an authority: between the nodes there is no tunnel.
    pub fn start_plaintext(&mut self, args: &[&str]) -> Result<()> {
        self.spawn(args, true)
    }

    fn spawn(&mut self, args: &[&str], plaintext: bool) -> Result<()> {
        for node in &self.nodes {
            let args = args.iter().map(|arg| (*arg).to_owned()).collect();
            self.agents.push(node.spawn_agent(AgentOptions {
                args,
                plaintext,
                ..AgentOptions::default()
            })?);
        }
        self.agents.iter_mut().try_for_each(|agent| agent.wait_ready(Duration::from_secs(20)))
    }

    /// [`Self::create`] and [`Self::start`].
    pub fn running(name: &str, args: &[&str]) -> Result<Self> {
        let mut mesh = Self::create(name)?;
        mesh.start(args)?;
        Ok(mesh)
    }

    /// The agent of the client's node.
    pub fn agent(&self) -> &Agent {
        &self.agents[0]
    }

    /// Runs a witness in the client's pod.
    pub fn client<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Value> {
        witness(&self.client, args)
    }

    /// The servers' pods.
    pub fn servers(&self) -> [&Pod; 2] {
        [&self.near, &self.far]
    }

    /// Every connection that the agents and their programs have noted, however it ended.
    pub fn noted(&self) -> Result<f64> {
        let mut sum = 0.0;
        for agent in &self.agents {
            let metrics = agent.metrics()?;
            for name in [OPENED, REFUSED, BYPASSED, KERNEL_REFUSED] {
                sum += metrics.sum(name, &[]);
            }
        }
        Ok(sum)
    }
}

pub const OPENED: &str = "undermesh_tcp_connections_opened_total";
pub const REFUSED: &str = "undermesh_tcp_connections_refused_total";
pub const BYPASSED: &str = "undermesh_bypassed_connections_total";
pub const KERNEL_REFUSED: &str = "undermesh_kernel_refused_connections_total";

/// How many connections have this reason, in the agent's eyes.
pub fn counted(metrics: &Metrics, name: &str, reason: &str) -> f64 {
    metrics.sum(name, &[("reason", reason)])
}

/// The cluster IPs of a server's Service: they end like the pod's own addresses.
pub fn service_ips(server: &Pod) -> [IpAddr; 2] {
    let ends = if server.name() == "near" { ["10.96.0.10", "fd96::10"] } else { ["10.96.0.20", "fd96::20"] };
    ends.map(|ip| ip.parse().expect("an address"))
}

/// `address:port`, as a program takes it.
pub fn at(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

/// Starts a scripted server in the pod and waits until it listens.
pub fn listen(pod: &Pod, port: u16, args: &[&str]) -> Result<Process> {
    let mut command = Command::new(binary("witness")?);
    command.args(["listen", "--port", &port.to_string()]).args(args);
    let process = pod.spawn(command)?;
    pod.wait_listening(port)?;
    Ok(process)
}

/// Runs a witness in the pod to its end.
pub fn witness<S: AsRef<OsStr>>(pod: &Pod, args: &[S]) -> Result<Value> {
    witness_within(pod, args, LIMIT)
}

/// As [`witness`], with a limit of its own.
pub fn witness_within<S: AsRef<OsStr>>(pod: &Pod, args: &[S], limit: Duration) -> Result<Value> {
    let mut command = Command::new(binary("witness")?);
    command.args(args);
    let told = pod.run(command, limit)?.success()?;
    serde_json::from_str(&told).with_context(|| format!("a witness told: {told}"))
}

/// Who saw whom on the first connection that a witness made to a greeting server, in one line. The client's own port
/// is written as PORT on both sides; the server may have seen another one.
pub fn names(seen: &Value) -> Result<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let first = &seen[0];
    ensure!(first["connect"] == "ok", "the connect failed: {seen}");
    let greeting = text(&first["saw"][0]);
    let server: Value =
        serde_json::from_str(&greeting).with_context(|| format!("no greeting of the server: {seen}"))?;
    ensure!(
        first["saw"][1] == "ping" || first["saw"][2] == "ping",
        "the server echoed something else: {seen}"
    );
    let (own, peer) = (text(&first["name"]), text(&first["peer"]));
    let (own, port) = own.rsplit_once(':').context("a name without a port")?;
    let caller = |name: &Value| match text(name).rsplit_once(':') {
        Some((address, same)) if same == port => format!("{address}:PORT"),
        Some((address, _)) => format!("{address}:OTHER"),
        None => text(name),
    };
    Ok(format!(
        "client {own}:PORT sees {peer}, server {} sees {}, accepted {}",
        text(&server["name"]),
        caller(&server["peer"]),
        caller(&server["accepted"]),
    ))
}

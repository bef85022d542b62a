//! What the tests of this crate share: meshes that are ready, and the `traffic` program's roles as types.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use undermesh_tests::lab::{
    Agent, AgentOptions, Lab, Manifest, Node, Output, Pod, PodSpec, Process, binary, eventually, patient,
};

/// For whatever takes no time on an idle machine.
pub const SOON: Duration = Duration::from_secs(15);
/// The port of [`serve`].
pub const PORT: u16 = 7000;
/// The namespace of a mesh's pods.
pub const SHOP: &str = "shop";

/// A server whose queue has room for one connection, which takes it and is not accepted: what comes then gets no answer.
pub fn full_server(pod: &Pod, port: u16) -> Result<Process> {
    let script = format!(
        "import socket, time\n\
         server = socket.create_server(('0.0.0.0', {port}), backlog=0)\n\
         waiting = socket.create_connection(('127.0.0.1', {port}))\n\
         print('full', flush=True)\n\
         time.sleep(120)"
    );
    let mut python = Command::new("python3");
    python.args(["-c", &script]);
    let full = pod.spawn(python)?;
    eventually(SOON, "the server is full", || {
        ensure!(full.output().contains("full"), "{}", full.output());
        Ok(())
    })?;
    Ok(full)
}

/// A lab with an agent on each node. The namespace `shop` is enrolled.
pub struct Mesh {
    pub agents: Vec<Agent>,
    pub nodes: Vec<Node>,
    /// The pods of each node that are to be enrolled, by their addresses.
    pods: Vec<RefCell<Vec<IpAddr>>>,
    // Last: everything else has ended when it is swept.
    pub lab: Lab,
}

impl Mesh {
    /// Starts the agents before there is a pod; [`Mesh::ready`] waits for pods that are added.
    pub fn start(name: &str, nodes: usize, agent_args: &[&str]) -> Result<Self> {
        Self::start_as(name, nodes, |_| options(agent_args))
    }

    /// As [`Self::start`], with agents that can be asked from all nodes; where each listens.
    pub fn start_reachable(name: &str, nodes: usize, agent_args: &[&str]) -> Result<(Self, Vec<String>)> {
        let address = |node: &Node| SocketAddr::new(node.addresses()[0], 15020).to_string();
        let mesh = Self::start_as(name, nodes, |node| AgentOptions {
            admin_address: Some(address(node)),
            ..options(agent_args)
        })?;
        let addresses = mesh.nodes.iter().map(address).collect();
        Ok((mesh, addresses))
    }

    fn start_as(name: &str, nodes: usize, options: impl Fn(&Node) -> AgentOptions) -> Result<Self> {
        let lab = Lab::create(name)?;
        lab.apply(&namespace(true))?;
        let nodes = (0..nodes).map(|_| lab.add_node()).collect::<Result<Vec<_>>>()?;
        let pods = nodes.iter().map(|_| RefCell::default()).collect();
        let mut mesh = Self { agents: Vec::new(), nodes, pods, lab };
        for index in 0..mesh.nodes.len() {
            let agent = mesh.nodes[index].spawn_agent(options(&mesh.nodes[index]))?;
            mesh.agents.push(agent);
        }
        mesh.ready()?;
        Ok(mesh)
    }

    /// Adds a pod to the namespace that is enrolled.
    pub fn pod(&self, node: usize, name: &str) -> Result<Pod> {
        self.add(node, PodSpec::new(SHOP, name))
    }

    /// Adds a pod that is to be enrolled.
    pub fn add(&self, node: usize, spec: PodSpec) -> Result<Pod> {
        let pod = self.nodes[node].add_pod(spec)?;
        self.pods[node].borrow_mut().push(pod.ip());
        Ok(pod)
    }

    /// Adds a pod that stays out of the mesh.
    pub fn outsider(&self, node: usize, name: &str) -> Result<Pod> {
        self.nodes[node].add_pod(PodSpec::new("outside", name))
    }

    /// Waits until every agent is ready and has all the pods that were added to be enrolled.
    pub fn ready(&mut self) -> Result<()> {
        for (agent, pods) in self.agents.iter_mut().zip(&self.pods) {
            agent.wait_ready(SOON)?;
            wait_enrolled(agent, pods.borrow().len())?;
        }
        if self.agents.len() > 1 {
            let mut agents = self.agents.iter().zip(&self.pods);
            agents.try_for_each(|(agent, pods)| agent.wait_published(&pods.borrow(), SOON))?;
        }
        Ok(())
    }

    /// Waits until the agent has exactly so many pods enrolled.
    pub fn wait_enrolled(&self, node: usize, count: usize) -> Result<()> {
        wait_enrolled(&self.agents[node], count)
    }

    /// Starts an agent where there is none any more.
    pub fn restart(&mut self, node: usize, agent_args: &[&str]) -> Result<()> {
        self.agents[node] = self.nodes[node].spawn_agent(options(agent_args))?;
        self.ready()
    }
}

pub fn wait_enrolled(agent: &Agent, count: usize) -> Result<()> {
    let what = format!("{count} pods are enrolled");
    agent.wait_metrics(SOON, &what, |m| m.sum("undermesh_pods_enrolled", &[]) == count as f64).map(drop)
}

/// The namespace of a mesh's pods.
pub fn namespace(enrolled: bool) -> Manifest {
    let namespace = Manifest::namespace(SHOP);
    if enrolled { namespace.label("undermesh.io/mesh", "enabled") } else { namespace }
}

pub fn options(args: &[&str]) -> AgentOptions {
    AgentOptions { args: args.iter().map(|arg| (*arg).to_owned()).collect(), ..AgentOptions::default() }
}

/// Starts the server that greets with its pod's name and echoes, and waits until it listens.
pub fn serve(pod: &Pod) -> Result<Process> {
    serve_on(pod, PORT)
}

/// As [`serve`], where that port is taken.
pub fn serve_on(pod: &Pod, port: u16) -> Result<Process> {
    let mut command = Command::new(binary("traffic")?);
    command.args(["serve", "--name", pod.name(), "--port", &port.to_string()]);
    let server = pod.spawn(command)?;
    pod.wait_listening(port)?;
    Ok(server)
}

/// What came of a number of connections.
#[derive(Debug, Default, Deserialize)]
pub struct Dialled {
    /// How many each server has served.
    pub served: BTreeMap<String, usize>,
    /// How many failed, by their errors.
    pub failed: BTreeMap<String, usize>,
}

impl Dialled {
    /// Fails unless every connection was served; how many each server has.
    pub fn all_served(self) -> Result<BTreeMap<String, usize>> {
        ensure!(self.failed.is_empty(), "connections failed: {self:?}");
        Ok(self.served)
    }

    /// Fails unless every connection failed, and in this way.
    pub fn all_failed(&self, how: &str) -> Result<()> {
        let only = self.served.is_empty() && self.failed.keys().eq([how]);
        ensure!(only, "connections were to fail with {how}: {self:?}");
        Ok(())
    }
}

/// Dials the server on [`PORT`] of the address, one connection after the other.
pub fn dial(client: &Pod, to: IpAddr, count: usize) -> Result<Dialled> {
    dial_at_once(client, SocketAddr::new(to, PORT), count, 1)
}

pub fn dial_at_once(client: &Pod, to: SocketAddr, count: usize, at_once: usize) -> Result<Dialled> {
    let mut command = Command::new(binary("traffic")?);
    command.args(["dial", &to.to_string(), "--count", &count.to_string(), "--at-once", &at_once.to_string()]);
    command.args(["--limit-ms", &patient(Duration::from_secs(2)).as_millis().to_string()]);
    last_line(&client.run(command, Duration::from_secs(60))?.success()?)
}

/// A connection that is kept busy.
pub struct Talk {
    process: Process,
}

impl Talk {
    /// Begins it and waits until bytes came back.
    pub fn begin(client: &Pod, to: IpAddr) -> Result<Self> {
        Self::with(client, SocketAddr::new(to, PORT))
    }

    /// As [`Self::begin`], with a server on another port.
    pub fn with(client: &Pod, to: SocketAddr) -> Result<Self> {
        let mut command = Command::new(binary("traffic")?);
        command.args(["talk", &to.to_string()]);
        let mut talk = Self { process: client.spawn(command)? };
        talk.goes_on()?;
        Ok(talk)
    }

    /// Fails unless bytes go on coming back from now on.
    pub fn goes_on(&mut self) -> Result<()> {
        let enough = self.lines() + 3;
        eventually(SOON, "bytes come back", || {
            ensure!(self.lines() >= enough, "{} lines came back", self.lines());
            Ok(())
        })
        .or_else(|error| self.process.check_running().and(Err(error)))
    }

    /// Ends it in order; fails if it does not end so.
    pub fn end(mut self) -> Result<()> {
        let status = self.process.terminate(SOON)?;
        ensure!(status.success(), "the conversation: {}", self.process.log_tail(3));
        Ok(())
    }

    /// Waits until it breaks; says how.
    pub fn breaks(mut self, limit: Duration) -> Result<String> {
        let status = self.process.wait(limit)?;
        ensure!(!status.success(), "it ended in order");
        let last = self.process.log_tail(1);
        Ok(last.strip_prefix("failed: ").unwrap_or(&last).to_owned())
    }

    /// Waits until it is over, however it ended.
    pub fn ends_somehow(mut self, limit: Duration) -> Result<()> {
        self.process.wait(limit).map(drop)
    }

    fn lines(&self) -> usize {
        self.process.output().lines().filter(|line| line.starts_with("ok ")).count()
    }
}

/// Clients that dial without a pause.
pub struct Run {
    process: Process,
}

/// What they found.
#[derive(Debug, Deserialize)]
pub struct Ran {
    pub made: u64,
    pub failed_in_all: u64,
    /// The first ones.
    pub failed: Vec<Failure>,
    /// How long one takes, from its connect to its end in order.
    pub median_ns: u64,
}

#[derive(Debug, Deserialize)]
pub struct Failure {
    /// `CLOCK_MONOTONIC` before the connect.
    pub began_ns: i64,
    pub ended_ns: i64,
    pub error: String,
}

impl Run {
    pub fn begin(client: &Pod, to: IpAddr, clients: usize) -> Result<Self> {
        let mut command = Command::new(binary("traffic")?);
        command.args(["run", &SocketAddr::new(to, PORT).to_string(), "--clients", &clients.to_string()]);
        let process = client.spawn(command)?;
        eventually(SOON, "the clients run", || match process.output().is_empty() {
            true => bail!("no word yet"),
            false => Ok(()),
        })?;
        Ok(Self { process })
    }

    pub fn end(mut self) -> Result<Ran> {
        self.process.terminate(SOON)?;
        last_line(&self.process.output())
    }
}

/// Idle connections.
pub struct Hold {
    process: Process,
}

impl Hold {
    /// Opens them all.
    pub fn begin(client: &Pod, to: IpAddr, count: usize) -> Result<Self> {
        let mut command = Command::new(binary("traffic")?);
        command.args(["hold", &SocketAddr::new(to, PORT).to_string(), "--count", &count.to_string()]);
        let mut process = client.spawn(command)?;
        let held = eventually(Duration::from_secs(60), "the connections are open", || {
            let said = process.output();
            ensure!(!said.is_empty(), "no word yet");
            Ok(said)
        });
        let held = held.or_else(|error| process.check_running().and(Err(error)))?;
        ensure!(held.starts_with("holding"), "{held}");
        Ok(Self { process })
    }

    /// Uses each of them and closes it; fails if one does not work.
    pub fn end(mut self) -> Result<()> {
        let status = self.process.terminate(Duration::from_secs(60))?;
        ensure!(status.success(), "{}", self.process.log_tail(1));
        Ok(())
    }

    /// Kills the client with all of its connections.
    pub fn kill(mut self) {
        self.process.signal(Signal::SIGKILL);
        self.process.kill();
    }
}

/// Runs a command of `undermesh` on the node.
pub fn undermesh(node: &Node, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary("undermesh")?);
    command.args(args);
    node.run(command, SOON)
}

/// Reads what `traffic` says last.
pub fn last_line<T: DeserializeOwned>(output: &str) -> Result<T> {
    let line = output.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("the client said: {output}"))
}

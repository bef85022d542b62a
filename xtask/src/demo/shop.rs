//! The stage: two nodes, the shop's pods and Services, the agents.
//!
//! ```text
//! node1: client (outside of the mesh)   web   catalog-v1
//! node2:                                db    catalog-v2
//! ```

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use undermesh_tests::lab::{Agent, AgentOptions, Lab, Manifest, Node, Pod, PodSpec, Process};

use crate::paths;

pub const NAMESPACE: &str = "shop";

/// Cluster IPs, which nothing but the mesh serves here.
const CATALOG: [&str; 2] = ["10.96.0.10", "fd96::10"];
/// Of one version each, for routes to choose between.
const CATALOGS: [(&str, [&str; 2]); 2] =
    [("catalog-v1", ["10.96.0.11", "fd96::11"]), ("catalog-v2", ["10.96.0.12", "fd96::12"])];
const DB: [&str; 2] = ["10.96.0.20", "fd96::20"];

/// The running shop. Agents come first: they are dropped first, while the pods still are there.
pub struct Shop {
    pub agents: Vec<Agent>,
    pub nodes: Vec<Node>,
    pub client: Pod,
    pub web: Pod,
    pub catalogs: [Pod; 2],
    pub db: Pod,
    processes: Vec<Process>,
}

impl Shop {
    /// Makes the pods, starts agents (or does without), then the shop.
    pub fn open(lab: &Lab, mesh: bool) -> Result<Self> {
        let nodes = vec![lab.add_node()?, lab.add_node()?];
        let namespace = Manifest::namespace(NAMESPACE);
        lab.apply(&if mesh { namespace.label("undermesh.io/mesh", "enabled") } else { namespace })?;
        lab.apply(&service("catalog", CATALOG, (80, 8080), ("app", "catalog")))?;
        for (name, addresses) in CATALOGS {
            lab.apply(&service(name, addresses, (80, 8080), ("version", name)))?;
        }
        lab.apply(&service("db", DB, (5432, 5432), ("app", "db")))?;
        lab.apply(&Manifest::namespace("outside"))?;

        let client = nodes[0].add_pod(PodSpec::new("outside", "client"))?;
        let web = nodes[0].add_pod(PodSpec::new(NAMESPACE, "web"))?;
        let catalog = |name| PodSpec::new(NAMESPACE, name).label("app", "catalog").label("version", name);
        let catalogs = [nodes[0].add_pod(catalog("catalog-v1"))?, nodes[1].add_pod(catalog("catalog-v2"))?];
        let db = nodes[1].add_pod(PodSpec::new(NAMESPACE, "db"))?;

        let mut agents = Vec::new();
        if mesh {
            for node in &nodes {
                let options = AgentOptions { binary: Some(agent_binary()), ..AgentOptions::default() };
                agents.push(node.spawn_agent(options)?);
            }
            for agent in &mut agents {
                agent.wait_ready(Duration::from_secs(30))?;
            }
        }
        let mut shop = Self { agents, nodes, client, web, catalogs, db, processes: Vec::new() };
        shop.start_programs(mesh)?;
        Ok(shop)
    }

    /// The page's address, as a caller outside of the mesh dials it: that of the pod itself.
    pub fn page(&self) -> String {
        format!("http://{}", SocketAddr::new(self.web.ip(), 8080))
    }

    /// All pods.
    pub fn pods(&self) -> [&Pod; 5] {
        [&self.client, &self.web, &self.catalogs[0], &self.catalogs[1], &self.db]
    }

    fn start_programs(&mut self, mesh: bool) -> Result<()> {
        let db = address(if mesh { DB[0].parse()? } else { self.db.ip() }, 5432);
        let (catalog, port) = if mesh { (CATALOG[0].parse()?, 80) } else { (self.catalogs[0].ip(), 8080) };
        let catalog = format!("http://{}", address(catalog, port));

        self.processes.push(self.db.spawn(shop(&["db"]))?);
        self.db.wait_listening(5432)?;
        for (pod, version) in self.catalogs.iter().zip(["v1", "v2"]) {
            self.processes.push(pod.spawn(shop(&["catalog", "--version", version, "--db", &db]))?);
            pod.wait_listening(8080)?;
        }
        self.processes.push(self.web.spawn(shop(&["web", "--catalog", &catalog]))?);
        self.web.wait_listening(8080)?;
        // Two sessions that stay open, so that there is something live to look at: across nodes and on one.
        for pod in [&self.web, &self.catalogs[1]] {
            self.processes.push(pod.spawn(shop(&["watch", "--db", &db]))?);
        }
        Ok(())
    }
}

/// The agent that was built for this run.
pub fn agent_binary() -> std::path::PathBuf {
    paths::programs(false).join("undermesh")
}

/// The shop's own program.
pub fn shop_binary() -> std::path::PathBuf {
    paths::programs(false).join("shop")
}

/// A part of the shop.
pub fn shop(args: &[&str]) -> Command {
    let mut command = Command::new(shop_binary());
    command.args(args);
    command
}

fn service(name: &str, addresses: [&str; 2], port: (u16, u16), selector: (&str, &str)) -> Manifest {
    let addresses = addresses.map(|ip| ip.parse::<IpAddr>().expect("a constant address"));
    Manifest::service(NAMESPACE, name, &addresses, &[port], &[selector])
}

fn address(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

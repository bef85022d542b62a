//! One column of the table: a lab of its own with a client, a server on its node and one on the other, and the
//! mesh under them, if any.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::fairness;
use crate::{envoy, ztunnel};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use undermesh_tests::lab::{Agent, AgentOptions, Lab, Manifest, Metrics, Pod, PodSpec, Process};

/// Where nginx answers.
pub const HTTP_PORT: u16 = 8080;

/// Where nginx answers HTTP/2, and nothing else.
pub const HTTP2_PORT: u16 = 8082;

/// Where calls of gRPC are answered.
pub const GRPC_PORT: u16 = 8083;

/// Where iperf3 listens.
pub const BULK_PORT: u16 = 5201;

const NAMESPACE: &str = "bench";

const OPENED: &str = "undermesh_tcp_connections_opened_total";

const SOON: Duration = Duration::from_secs(20);

/// What lies under the pods.
pub enum Mesh {
    /// Nothing: the pods as they are.
    None,
    /// Agents of ours.
    Undermesh {
        /// The program.
        agent: PathBuf,
        /// Whether they have a certificate authority, and so encrypt between nodes.
        encrypts: bool,
        /// What they make of HTTP.
        http: Http,
    },
    /// A ztunnel on each node.
    Ztunnel(PathBuf),
    /// An Envoy in each pod.
    Envoy(PathBuf),
}

/// What agents make of HTTP.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Http {
    /// Nothing: it is carried as bytes.
    Bytes,
    /// It is carried request by request, without a route.
    Requests,
    /// Each request falls under the last of so many rules of its Service.
    Routes(usize),
    /// The same without a route, and each endpoint takes so many requests a second and no more.
    Limited,
}

/// A process of the mesh, whose CPU time and memory count.
enum Proxy {
    Agent(Agent),
    Other(Process),
}

/// What Envoys lead to.
const ENVOYS: [envoy::Application; 3] = [
    envoy::Application { port: HTTP_PORT, speaks_http2: false },
    envoy::Application { port: HTTP2_PORT, speaks_http2: true },
    envoy::Application { port: GRPC_PORT, speaks_http2: true },
];

/// What clients dial to get to a server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialled {
    /// The server's pod.
    Pods,
    /// Its Service, which has routes.
    Services,
    /// The Envoy in the client's own pod, which knows HTTP alone.
    Envoy,
}

/// A running lab that can be measured.
pub struct Column {
    pub name: String,
    pub client: Pod,
    pub near: Pod,
    pub far: Pod,
    /// A pod on the client's node that is in no mesh.
    pub outside: Pod,
    /// Which program makes the loads that no package makes.
    pub probe: PathBuf,
    dialled: Dialled,
    encrypts: bool,
    proxies: Vec<Proxy>,
    servers: Vec<Process>,
    // Dropped last: it sweeps what the others live in.
    lab: Lab,
}

impl Column {
    /// Makes the pods, puts the mesh under them and starts the servers.
    pub fn make(name: &str, mesh: Mesh, probe: PathBuf) -> Result<Self> {
        let lab = Lab::create(&format!("um-bench-{name}"))?;
        let (node1, node2) = (lab.add_node()?, lab.add_node()?);
        let namespace = Manifest::namespace(NAMESPACE);
        let enrolled = matches!(mesh, Mesh::Undermesh { .. });
        let encrypts = matches!(mesh, Mesh::Undermesh { encrypts: true, .. });
        lab.apply(&if enrolled { namespace.label("undermesh.io/mesh", "enabled") } else { namespace })?;
        let client = node1.add_pod(PodSpec::new(NAMESPACE, "client"))?;
        // Where clients are told apart, it is another one than the client.
        let near = node1.add_pod(PodSpec::new(NAMESPACE, "near").service_account("near"))?;
        let far = node2.add_pod(PodSpec::new(NAMESPACE, "far"))?;
        lab.apply(&Manifest::namespace("outside"))?;
        let outside = node1.add_pod(PodSpec::new("outside", "outside"))?;
        let mut proxies = Vec::new();
        match &mesh {
            // Envoys are started below, one after the other.
            Mesh::None | Mesh::Envoy(_) => {}
            Mesh::Undermesh { agent: binary, encrypts, http } => {
                if let Http::Routes(rules) = http {
                    for name in ["near", "far"] {
                        lab.apply(&service(name))?;
                        for port in [HTTP_PORT, HTTP2_PORT, GRPC_PORT] {
                            lab.apply(&route(name, port, *rules))?;
                        }
                    }
                }
                if *http == Http::Limited {
                    for name in ["near", "far"] {
                        lab.apply(&service(name))?;
                        lab.apply(&limit(name))?;
                    }
                }
                let http = if *http == Http::Bytes { "off" } else { "auto" };
                for (node, pod) in [(&node1, &near), (&node2, &far)] {
                    let binary = Some(binary.clone());
                    let mut agent = node.spawn_agent(AgentOptions {
                        binary,
                        // Not an argument: builds of before do not know it.
                        env: vec![("UNDERMESH_HTTP".to_owned(), http.to_owned())],
                        plaintext: !encrypts,
                        ..AgentOptions::default()
                    })?;
                    agent.wait_ready(Duration::from_secs(30))?;
                    if *encrypts {
                        agent.wait_published(&[pod.ip()], SOON)?;
                    }
                    proxies.push(Proxy::Agent(agent));
                }
            }
            Mesh::Ztunnel(binary) => {
                for node in [&node1, &node2] {
                    // No line per connection: ours writes none in a benchmark either.
                    let ztunnel = ztunnel::start(binary, &lab, node, &[&client, &near, &far], "warn")?;
                    proxies.push(Proxy::Other(ztunnel));
                }
            }
        }
        if let Mesh::Envoy(binary) = &mesh {
            let envoys = envoy::start(binary, &lab, &client, &[&near, &far], &ENVOYS)?;
            proxies.extend(envoys.into_iter().map(Proxy::Other));
        }
        let mut servers = Vec::new();
        for pod in [&near, &far, &outside] {
            servers.extend(start_servers(&lab, pod)?);
            let mut grpc = Command::new(&probe);
            grpc.args(["grpc", "--port", &GRPC_PORT.to_string()]);
            servers.push(pod.spawn(grpc)?);
            pod.wait_listening(GRPC_PORT)?;
        }
        let name = name.to_owned();
        let dialled = match mesh {
            Mesh::Undermesh { http: Http::Routes(_) | Http::Limited, .. } => Dialled::Services,
            Mesh::Envoy(_) => Dialled::Envoy,
            _ => Dialled::Pods,
        };
        Ok(Self { name, client, near, far, outside, probe, dialled, encrypts, proxies, servers, lab })
    }

    /// Where what a load leaves may be.
    pub fn dir(&self) -> &Path {
        self.lab.dir()
    }

    /// Fails where the agents were to encrypt what crosses nodes, and a connection between the nodes went another way.
    pub fn check_encrypted(&self) -> Result<()> {
        let agents = self.proxies.iter().filter_map(|proxy| match proxy {
            Proxy::Agent(agent) if self.encrypts => Some(agent),
            _ => None,
        });
        for agent in agents {
            let metrics = agent.metrics()?;
            let opened = |security| metrics.sum(OPENED, &[("security", security)]);
            let (encrypted, plaintext) = (opened("mutual_tls"), opened("plaintext"));
            ensure!(plaintext == 0.0, "{plaintext} connections of column {} were plaintext", self.name);
            ensure!(encrypted > 0.0, "no connection of column {} was encrypted", self.name);
        }
        Ok(())
    }

    /// What the client dials to get to this port of the server in the pod; nothing where nothing leads there.
    pub fn address(&self, pod: &Pod, port: u16) -> Option<SocketAddr> {
        match self.dialled {
            Dialled::Pods => Some(SocketAddr::new(pod.ip(), port)),
            Dialled::Services => Some(SocketAddr::new(cluster_ip(pod.name()), port)),
            Dialled::Envoy => {
                let index = ENVOYS.iter().position(|application| application.port == port)?;
                Some(envoy::address(usize::from(pod.name() == "far"), index, ENVOYS.len()))
            }
        }
    }

    /// Whether connections go where they would go without a mesh, whatever lies under them.
    pub fn is_captured(&self) -> bool {
        self.dialled != Dialled::Envoy
    }

    /// CPU seconds that the mesh's own processes have used so far.
    pub fn proxy_cpu(&self) -> Result<f64> {
        self.proxies.iter().map(|proxy| proxy.process().cpu_seconds()).sum()
    }

    /// CPU seconds of the mesh's process on the client's node; none without a mesh.
    pub fn near_proxy_cpu(&self) -> Result<f64> {
        self.proxies.first().map_or(Ok(0.0), |proxy| proxy.process().cpu_seconds())
    }

    /// Resident memory of the mesh's processes, in bytes, node1's first; empty without a mesh.
    pub fn proxy_memory(&self) -> Result<Vec<u64>> {
        self.proxies.iter().map(|proxy| proxy.process().resident_bytes()).collect()
    }

    /// Adds idle pods to the client's node and waits until they are in the mesh; false where the mesh would not
    /// hear of them.
    pub fn add_pods(&mut self, count: usize) -> Result<bool> {
        let Some(Proxy::Agent(agent)) = self.proxies.first() else { return Ok(false) };
        for number in 0..count {
            self.client.node().add_pod(PodSpec::new(NAMESPACE, &format!("idle-{number}")))?;
        }
        // Beside the client and the server that were there before.
        let all = (count + 2) as f64;
        let enrolled = |metrics: &Metrics| metrics.sum("undermesh_pods_enrolled", &[]) >= all;
        agent.wait_metrics(Duration::from_secs(60), "all pods are enrolled", enrolled)?;
        Ok(true)
    }

    /// Fails, with its last words, if a server or a process of the mesh has ended.
    pub fn check(&mut self) -> Result<()> {
        self.servers.iter_mut().try_for_each(Process::check_running)?;
        self.proxies.iter_mut().try_for_each(|proxy| match proxy {
            Proxy::Agent(agent) => agent.check_running(),
            Proxy::Other(process) => process.check_running(),
        })
    }

    /// What the agents have to say of a load that failed: connections that did not end well, and their last words.
    pub fn explain(&self) -> String {
        let mut text = String::new();
        for proxy in &self.proxies {
            if let Proxy::Agent(agent) = proxy {
                let metrics = agent.metrics().unwrap_or_default();
                let ended =
                    metrics.samples.iter().filter(|s| s.labels.get("reason").is_some_and(|r| r != "done"));
                for sample in ended.filter(|sample| sample.value > 0.0) {
                    text.push_str(&format!("{} {:?} {}\n", sample.name, sample.labels, sample.value));
                }
            }
            text.push_str(&proxy.process().log_tail(5));
            text.push('\n');
        }
        text
    }
}

impl Proxy {
    fn process(&self) -> &Process {
        match self {
            Self::Agent(agent) => agent.process(),
            Self::Other(process) => process,
        }
    }
}

fn cluster_ip(name: &str) -> IpAddr {
    IpAddr::from([10, 96, 0, if name == "near" { 1 } else { 2 }])
}

fn service(name: &str) -> Manifest {
    // A port of which the name says TCP has no requests that could be limited.
    let ports = [("http", HTTP_PORT), ("http2", HTTP2_PORT), ("grpc", GRPC_PORT), ("tcp", BULK_PORT)]
        .map(|(name, port)| json!({ "name": name, "port": port }));
    let service = Manifest::service(NAMESPACE, name, &[cluster_ip(name)], &[], &[("app", name)]);
    service.with("spec.ports", json!(ports))
}

/// So many rules for a port, of which requests for `/` fall under the last, as those for whatever gRPC method do.
fn route(name: &str, port: u16, rules: usize) -> Manifest {
    let backends = json!([{ "name": name, "port": port }]);
    let rule = |index| {
        let prefix = if index + 1 == rules { "/".to_owned() } else { format!("/part/{index}") };
        json!({ "matches": [{ "path": { "type": "PathPrefix", "value": prefix } }], "backendRefs": backends })
    };
    let parent = json!({ "group": "", "kind": "Service", "name": name, "port": port });
    let spec = json!({ "parentRefs": [parent], "rules": (0..rules).map(rule).collect::<Vec<_>>() });
    let route = format!("{name}-{port}");
    Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(NAMESPACE), &route).with("spec", spec)
}

/// The Service's endpoints take so many requests a second.
fn limit(name: &str) -> Manifest {
    let limit = json!({ "requests": fairness::LIMIT, "per": "1s", "burst": fairness::LIMIT / 10 });
    let target = json!({ "group": "", "kind": "Service", "name": name });
    let spec = json!({ "targetRefs": [target], "rateLimits": [limit] });
    Manifest::new("undermesh.io/v1alpha1", "TrafficPolicy", Some(NAMESPACE), name).with("spec", spec)
}

/// An nginx and an iperf3 in the pod, once they listen.
pub fn start_servers(lab: &Lab, pod: &Pod) -> Result<[Process; 2]> {
    let dir = lab.dir().join(format!("nginx-{}", pod.name()));
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("nginx.conf"), nginx_conf())?;
    let mut nginx = Command::new("/usr/sbin/nginx");
    nginx.arg("-p").arg(&dir).arg("-c").arg(dir.join("nginx.conf")).args(["-e", "stderr"]);
    let mut iperf = Command::new("iperf3");
    iperf.args(["--server", "--port", &BULK_PORT.to_string()]);
    let servers = [pod.spawn(nginx)?, pod.spawn(iperf)?];
    pod.wait_listening(HTTP_PORT).with_context(|| format!("nginx says: {}", servers[0].log_tail(5)))?;
    pod.wait_listening(HTTP2_PORT)?;
    pod.wait_listening(BULK_PORT)?;
    Ok(servers)
}

/// One worker and a body of 96 bytes, from memory.
fn nginx_conf() -> String {
    let body = "undermesh ".repeat(10)[..95].to_owned();
    format!(
        "user root; daemon off; worker_processes 1; worker_rlimit_nofile 8192; pid nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    server {{
        listen {HTTP_PORT} backlog=4096;
        listen [::]:{HTTP_PORT} backlog=4096;
        location / {{ default_type text/plain; return 200 \"{body}\\n\"; }}
    }}
    server {{
        listen {HTTP2_PORT} http2 backlog=4096;
        listen [::]:{HTTP2_PORT} http2 backlog=4096;
        location / {{ default_type text/plain; return 200 \"{body}\\n\"; }}
    }}
}}
"
    )
}

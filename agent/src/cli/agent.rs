//! `undermesh agent`: raw arguments, validated into settings once.

mod http;
mod identity;
mod policy;
mod traces;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::TcpKeepalive;
use tracing::{error, info, warn};

use self::http::HttpArgs;
use self::identity::IdentityArgs;
use self::policy::PolicyArgs;
use self::traces::TraceArgs;
use super::log::{LogFormat, start_log};
use super::time::parse_time;
use crate::agent::{self, AgentSettings, CloseBeforeEnrolment, SourceSettings};
use crate::capture::{CaptureSettings, KubeletSettings, OnAgentDown, OnKubeletUnknown};
use crate::model::{MtlsMode, NodeInfo};
use crate::proxy::ProxySettings;
use crate::proxy::tunnel::UNFINISHED_HANDSHAKES;
use crate::sentence::in_one_sentence;
use crate::telemetry::{AccessLogFormat, AccessLogOutput, AccessLogSettings};

/// Descriptors that the agent needs beside those of its connections: maps, files, the admin endpoints' clients, and
/// callers that may never become connections.
const DESCRIPTORS_APART: u64 = 256 + UNFINISHED_HANDSHAKES as u64;

/// And those that each worker needs: two listeners in each of 110 pods (the kubelet's default limit), two ends of each
/// pipe for bulk.
const DESCRIPTORS_PER_WORKER: u64 = 2 * 110 + 2 * 64;

/// Connections that a node should be able to carry at one time.
const CONNECTIONS_WISHED: u64 = 20_000;

/// Run the agent of one node: capture its enrolled pods and relay what they say.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node, as in `spec.nodeName` of its pods.
    #[arg(long, env = "UNDERMESH_NODE_NAME")]
    node_name: String,
    /// Zone of this node, for Services with a traffic distribution.
    #[arg(long, env = "UNDERMESH_ZONE")]
    zone: Option<String>,
    /// Namespace that the mesh is installed in: policies of it may be for the whole mesh.
    #[arg(long, value_name = "NAME", default_value = "undermesh-system", env = "UNDERMESH_MESH_NAMESPACE")]
    mesh_namespace: String,
    /// Directory of Kubernetes manifests to follow.
    #[arg(
        long,
        value_name = "DIR",
        group = "source",
        required_unless_present = "kubernetes",
        env = "UNDERMESH_CONFIG_DIR"
    )]
    config_dir: Option<PathBuf>,
    /// Follow the Kubernetes API instead: as the pod's service account, or as KUBECONFIG says.
    #[arg(long, group = "source", env = "UNDERMESH_KUBERNETES")]
    kubernetes: bool,
    /// The cgroup2 tree in which the kubelet keeps the pods of this node.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup", env = "UNDERMESH_CGROUP_ROOT")]
    cgroup_root: PathBuf,
    /// Where the container runtime offers NRI, by which a pod is in the mesh before its first container runs.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/var/run/nri/nri.sock",
        requires = "kubernetes",
        env = "UNDERMESH_NRI_SOCKET"
    )]
    nri_socket: PathBuf,
    /// File in which it is kept what the API server said last: an agent that starts while it does not answer begins with that.
    #[arg(long, value_name = "FILE", requires = "kubernetes", env = "UNDERMESH_LAST_KNOWN")]
    last_known: Option<PathBuf>,
    /// The kubelet's cgroup, whose probes pods that take no plaintext are to answer; that of the process `kubelet` unless given.
    #[arg(long, value_name = "DIR", env = "UNDERMESH_KUBELET_CGROUP")]
    kubelet_cgroup: Option<PathBuf>,
    /// Who is let in where pods are probed while the kubelet's cgroup is not to be found.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_ON_KUBELET_UNKNOWN")]
    on_kubelet_unknown: OnKubeletUnknown,
    /// Folder on a bpffs for the pinned maps and links.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/undermesh", env = "UNDERMESH_BPFFS")]
    bpffs: PathBuf,
    /// What new connections of enrolled pods find while no agent runs.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_ON_AGENT_DOWN")]
    on_agent_down: OnAgentDown,
    /// Address of the metrics, health and debug endpoints.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15020", env = "UNDERMESH_ADMIN_ADDRESS")]
    admin_address: SocketAddr,
    /// Threads that relay; one per CPU, at most 8, unless given.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=256),
        env = "UNDERMESH_WORKERS",
    )]
    workers: Option<u16>,
    /// Connections relayed at one time; as many as the limit of open files allows, unless given.
    #[arg(long, value_name = "N", env = "UNDERMESH_MAX_CONNECTIONS")]
    max_connections: Option<usize>,
    /// Seconds that one attempt to connect to an endpoint may take.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=600),
        env = "UNDERMESH_CONNECT_TIMEOUT",
    )]
    connect_timeout: u64,
    /// Idle seconds after which a relayed connection's peer is probed, for peers that vanish.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 180,
        value_parser = clap::value_parser!(u64).range(1..=32767),
        env = "UNDERMESH_KEEPALIVE_TIME",
    )]
    keepalive_time: u64,
    /// Seconds between probes.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 20,
        value_parser = clap::value_parser!(u64).range(1..=32767),
        env = "UNDERMESH_KEEPALIVE_INTERVAL",
    )]
    keepalive_interval: u64,
    /// Unanswered probes after which the peer counts as gone.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 9,
        value_parser = clap::value_parser!(u32).range(1..=127),
        env = "UNDERMESH_KEEPALIVE_PROBES",
    )]
    keepalive_probes: u32,
    /// Take over from an agent that runs on this node, without losing a connection, instead of refusing to start.
    #[arg(long, env = "UNDERMESH_TAKE_OVER")]
    take_over: bool,
    /// How long connections may go on that are open when the agent is to stop: a number with s, m, h or d.
    #[arg(long, value_name = "TIME", value_parser = drain_time, default_value = "0", env = "UNDERMESH_DRAIN")]
    drain: Duration,
    /// When connections are closed that a pod had before it was enrolled, and that go on in plaintext.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_CLOSE_BEFORE_ENROLMENT")]
    close_before_enrolment: CloseBeforeEnrolment,
    #[command(flatten)]
    identity: IdentityArgs,
    /// Format of the agent's own log, on standard error; filtered by the environment variable UNDERMESH_LOG.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_LOG_FORMAT")]
    log_format: LogFormat,
    /// One line per connection on standard output.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_ACCESS_LOG")]
    access_log: AccessLogChoice,
    /// File for the access log instead of standard output.
    #[arg(long, value_name = "FILE", env = "UNDERMESH_ACCESS_LOG_FILE")]
    access_log_file: Option<PathBuf>,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    traces: TraceArgs,
}

/// Flags that cannot be meant as they are, in a sentence that names them.
#[derive(Debug, thiserror::Error)]
enum Mistake {
    #[error(transparent)]
    Identity(#[from] identity::Mistake),
    #[error(transparent)]
    Traces(#[from] traces::Mistake),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum AccessLogChoice {
    #[default]
    Off,
    Text,
    Json,
}

/// Runs the agent until it is told to stop. Exit code 1: it could not start or go on.
pub fn run(args: &AgentArgs) -> ExitCode {
    start_log(args.log_format);
    let settings = match args.settings() {
        Ok(settings) => settings,
        Err(mistake) => {
            error!("{mistake}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(agent::run(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{}", in_one_sentence(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

impl AgentArgs {
    fn settings(&self) -> Result<AgentSettings, Mistake> {
        let tunnel = self.identity.tunnel_settings(self.kubernetes)?;
        let mtls = self.identity.default_mtls();
        if mtls == MtlsMode::Strict && tunnel.is_none() {
            warn!(
                "--mtls strict without an authority (--ca-dir, --ca-address): no other node reaches the pods"
            );
        }
        let workers = self.workers.map_or_else(default_workers, usize::from);
        Ok(AgentSettings {
            node: NodeInfo {
                name: self.node_name.as_str().into(),
                zone: self.zone.as_deref().map(Into::into),
            },
            source: match &self.config_dir {
                Some(directory) => SourceSettings::Directory(directory.clone()),
                None => SourceSettings::Kubernetes {
                    cgroup_root: self.cgroup_root.clone(),
                    nri_socket: self.nri_socket.clone(),
                    last_known: self.last_known.clone(),
                },
            },
            admin_address: self.admin_address,
            capture: CaptureSettings {
                bpffs: self.bpffs.clone(),
                on_agent_down: self.on_agent_down,
                workers,
                take_over: self.take_over,
                kubelet: self.kubelet(),
                same_node: self.identity.same_node(),
            },
            proxy: ProxySettings {
                connect_timeout: Duration::from_secs(self.connect_timeout),
                keepalive: TcpKeepalive::new()
                    .with_time(Duration::from_secs(self.keepalive_time))
                    .with_interval(Duration::from_secs(self.keepalive_interval))
                    .with_retries(self.keepalive_probes),
                max_connections: max_connections(self.max_connections, workers),
                http: self.http.is_looked_at(),
                http_limits: self.http.limits(),
                paths: self.policy.paths(),
                names_policies: self.policy.names_policies(),
            },
            mtls,
            mesh_namespace: self.mesh_namespace.clone(),
            tunnel,
            access_log: self.access_log_settings(),
            audit_log: self.policy.audit_log(),
            traces: self.traces.settings(&self.node_name)?,
            jwks: self.policy.jwks(),
            close_before_enrolment: self.close_before_enrolment,
            drain: self.drain,
        })
    }

    /// In manifests of a directory somebody else may probe, who has to be named.
    fn kubelet(&self) -> Option<KubeletSettings> {
        let netns = if self.kubernetes { "/proc/1/ns/net" } else { "/proc/self/ns/net" };
        (self.kubernetes || self.kubelet_cgroup.is_some()).then(|| KubeletSettings {
            cgroup: self.kubelet_cgroup.clone(),
            tree: self.cgroup_root.clone(),
            netns: netns.into(),
            unknown: self.on_kubelet_unknown,
        })
    }

    fn access_log_settings(&self) -> AccessLogSettings {
        let format = match self.access_log {
            AccessLogChoice::Json => AccessLogFormat::Json,
            AccessLogChoice::Off | AccessLogChoice::Text => AccessLogFormat::Text,
        };
        let output = match (self.access_log, &self.access_log_file) {
            (AccessLogChoice::Off, _) => AccessLogOutput::Off,
            (_, Some(file)) => AccessLogOutput::File(file.clone()),
            (_, None) => AccessLogOutput::Stdout,
        };
        AccessLogSettings { output, format }
    }
}

fn drain_time(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { parse_time(text) }
}

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

/// Raises the limit of open files as far as it goes, and says what it allows for.
fn max_connections(wished: Option<usize>, workers: usize) -> usize {
    let descriptors = raise_descriptor_limit();
    let apart = DESCRIPTORS_APART + DESCRIPTORS_PER_WORKER * workers as u64;
    // One socket to each side.
    let possible = descriptors.saturating_sub(apart) / 2;
    if wished.is_none() && possible < CONNECTIONS_WISHED {
        warn!(
            limit = descriptors,
            connections = possible,
            "the limit of open files allows for fewer than {CONNECTIONS_WISHED} connections; raise it \
             (LimitNOFILE= of the unit, or the container runtime's) to {} or more",
            2 * CONNECTIONS_WISHED + apart
        );
    }
    let connections = wished.unwrap_or_else(|| usize::try_from(possible).unwrap_or(usize::MAX));
    info!(connections, "connections that can be relayed at one time");
    connections
}

fn raise_descriptor_limit() -> u64 {
    /// The kernel's own bound (`fs.nr_open`), which a privileged process may raise its limit to.
    const NR_OPEN: &str = "/proc/sys/fs/nr_open";
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    let most =
        std::fs::read_to_string(NR_OPEN).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
    for limit in [most, hard] {
        if limit > soft && setrlimit(Resource::RLIMIT_NOFILE, limit, limit.max(hard)).is_ok() {
            return limit;
        }
    }
    soft
}

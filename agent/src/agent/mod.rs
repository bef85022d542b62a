//! The wiring of `undermesh agent`: the one place that knows every module.

mod earlier;
mod enrolled;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gate;
mod leaving;
mod life;
mod mesh;
mod report;
mod source;
mod telling;
mod tunnel;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};
use tracing::{error, info};

use crate::admin::Admin;
use crate::balance::AffinityTable;
use crate::capture::{Capture, CaptureSettings};
use crate::config::Defaults;
use crate::discovery::Publication;
use crate::jwks::{Jwks, JwksSettings};
use crate::model::{MtlsMode, NodeInfo};
use crate::proxy::{BackendTlsClients, Proxy, ProxySettings, Workers};
use crate::snapshot::Snapshot;
use crate::telemetry::{
    AccessLog, AccessLogSettings, Logs, Status, Telemetry, TelemetrySettings, TraceSettings, Traces,
};

pub use earlier::CloseBeforeEnrolment;
use earlier::Earlier;
use gate::Gate;
use life::Life;
use mesh::Mesh;
use report::Reporters;
pub use source::SourceSettings;
use source::{Role, Source};
use tunnel::Opened;
pub use tunnel::{AuthoritySettings, TunnelSettings};

/// How long the access log may take to write its last lines, and the traces' collector to take its last spans.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Clients with session affinity that are remembered at one time.
const AFFINITY_CLIENTS: usize = 100_000;

/// Validated settings of the agent.
#[derive(Debug)]
pub struct AgentSettings {
    /// This node.
    pub node: NodeInfo,
    /// Where documents come from.
    pub source: SourceSettings,
    /// Where the admin endpoints listen.
    pub admin_address: SocketAddr,
    /// The kernel side.
    pub capture: CaptureSettings,
    /// The relay.
    pub proxy: ProxySettings,
    /// The mTLS mode of pods that do not choose.
    pub mtls: MtlsMode,
    /// The namespace that the mesh is installed in, of which policies may be for the whole mesh.
    pub mesh_namespace: String,
    /// Mutual TLS between the nodes; none: plaintext.
    pub tunnel: Option<TunnelSettings>,
    /// Where access-log lines go.
    pub access_log: AccessLogSettings,
    /// Where it is written what policies have denied or want to know of.
    pub audit_log: AccessLogSettings,
    /// Where spans of requests go; none: nowhere.
    pub traces: Option<TraceSettings>,
    /// How the keys of whoever makes tokens are fetched.
    pub jwks: JwksSettings,
    /// What becomes of connections that are older than their pod's enrolment.
    pub close_before_enrolment: CloseBeforeEnrolment,
    /// How long connections may go on that are open when the agent is to stop.
    pub drain: Duration,
}

/// Runs until SIGTERM or SIGINT. Enrolled pods stay captured, in their down mode until the next agent takes over.
pub async fn run(settings: AgentSettings) -> anyhow::Result<()> {
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let status = Status::new(settings.node.name.clone(), snapshot.clone());
    let logs = Logs {
        access: AccessLog::start(&settings.access_log).context("starting the access log")?,
        audit: AccessLog::start(&settings.audit_log).context("starting the audit log")?,
    };
    let traces = match &settings.traces {
        Some(traces) => {
            let (traces, exporter) = Traces::new(traces)?;
            // It ends with the runtime: what is left then has been waited for.
            tokio::spawn(exporter.run());
            traces
        }
        None => Traces::off(),
    };
    let telemetry = Telemetry::new(TelemetrySettings::default(), status.clone(), logs, traces);

    // Whatever may fail comes before the kernel is touched, where an agent that runs already may be at work.
    let tunnel = settings.tunnel.as_ref();
    let trust_domain = tunnel.map(|tunnel| tunnel.trust_domain.clone());
    let mesh_namespace = Some(settings.mesh_namespace.as_str().into());
    let defaults = Defaults { mtls: settings.mtls, trust_domain, mesh_namespace };
    let mut admin = Admin::bind(settings.admin_address, telemetry.clone()).await?;
    // An API server that does not answer is waited for, and that is to be seen.
    let source = Source::open(&settings.source, settings.node.clone(), defaults).await?;
    let announcer = source.announcer();
    let on_agent_down = settings.capture.on_agent_down;
    let tunnel = tunnel
        .map(|it| tunnel::open(it, &settings.node.name, on_agent_down, &telemetry, announcer.clone()))
        .transpose()?;
    let (tunnel, members, background) = match tunnel {
        Some(Opened { tunnel, members, radar, background }) => {
            report::certificates(&telemetry, &radar);
            admin = admin.with_certificates(move || radar.view());
            (Some(tunnel), Some(members), Some(background))
        }
        None => (None, None, None),
    };

    let jwks = Jwks::new(&settings.jwks).map_err(|error| anyhow!("--jwks-ca: {error}"))?;
    report::keys_at_scrape(&telemetry, &jwks);
    // It ends with the runtime.
    tokio::spawn({
        let jwks = jwks.clone();
        async move { jwks.run().await }
    });

    let capture = Capture::start(settings.capture)?;
    let of_source = tunnel.clone();
    let proxy = Arc::new(Proxy {
        snapshot: snapshot.clone(),
        codes: capture.code_table(),
        enrolled: capture.enrolled(),
        telemetry: telemetry.clone(),
        affinity: AffinityTable::new(AFFINITY_CLIENTS),
        backend_tls: BackendTlsClients::default(),
        settings: settings.proxy,
        tunnel,
        jwks: jwks.clone(),
        open: AtomicUsize::new(0),
    });
    let workers = Workers::start(capture.workers(), &proxy, &capture)?;
    watch_workers(&capture, &workers)?;
    report::kernel_counters_at_scrape(&telemetry, &capture)?;

    let asked = proxy.clone();
    let (earlier, of_now) = (capture.earlier(), snapshot.clone());
    admin = admin
        .with_explanations(move |query| asked.explain(query))
        .with_before(move || earlier::page(&earlier, &of_now.load()));
    info!(address = %admin.local_address(), "admin endpoints");
    tokio::spawn(admin.serve(std::future::pending()));

    let (tell_mesh, news) = watch::channel(());
    let publish = {
        let (snapshot, status) = (snapshot.clone(), status.clone());
        move |Publication { snapshot: next, rejections }: Publication| {
            report::rejections(&status, &rejections);
            let rules = next.tokens.values();
            jwks.want(rules.flat_map(|rules| rules.addresses()).cloned().collect());
            snapshot.store(next);
            tell_mesh.send_replace(());
        }
    };

    let (applied, gate) = watch::channel(());
    let gate_opens = applied.subscribe();
    let pinned = capture.pinned();
    let gate = Gate {
        snapshot: snapshot.clone(),
        status: status.clone(),
        applied: gate,
        captured_in: Arc::new(move |netns| {
            let captured = pinned.within(netns);
            Box::new(move |pod| captured.has(pod))
        }),
        on_agent_down,
    };
    let reporters = Reporters { status, announcer: announcer.clone() };
    let kernel_side = (capture, workers);
    let earlier = Earlier::new(settings.close_before_enrolment);
    let follows = (members, earlier);
    let mesh = Mesh::new(settings.node, snapshot, reporters, telemetry.clone(), kernel_side, follows);
    let stepped_down = Arc::new(Notify::new());
    let role = Role { announcer, gate, stepped_down: stepped_down.clone() };
    let source = source.follow(publish, of_source, role, telemetry.clone());
    let life = Life { mesh, news, applied, gate_opens, proxy, drain: settings.drain, stepped_down };
    let ended = tokio::select! {
        ended = life.live() => ended,
        error = source => Err(error),
        () = in_background(background) => unreachable!("it runs for ever"),
    };
    for log in telemetry.logs() {
        log.flush(LAST_LINES);
    }
    telemetry.traces().flush(LAST_LINES).await;
    ended
}

async fn in_background(background: Option<tunnel::Background>) {
    match background {
        Some(background) => background.run().await,
        None => std::future::pending().await,
    }
}

/// A thread of its own, so that it tells a hung worker from a hung everything.
fn watch_workers(capture: &Capture, workers: &Workers) -> anyhow::Result<()> {
    /// The kernel programs take the agent for hung after three seconds.
    const BEAT: Duration = Duration::from_millis(500);
    let mut heartbeat = capture.heartbeat()?;
    let pulse = workers.pulse();
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
        loop {
            if let Err(error) = heartbeat.beat(pulse()) {
                error!(%error, "cannot write the heartbeat");
            }
            std::thread::sleep(BEAT);
        }
    })?;
    Ok(())
}

//! The wiring of `undermesh agent`: the one place that knows every module.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::admin::Admin;
use crate::balance::AffinityTable;
use crate::capture::{Capture, CaptureError, CaptureSettings, Counters, Part, PodCounters, PodNet};
use crate::config;
use crate::discovery::directory::{Directory, Publication};
use crate::model::{NodeInfo, Snapshot, Workload, WorkloadUid};
use crate::proxy::{Fate, Proxy, ProxySettings, Workers};
use crate::telemetry::{
    self, AccessLog, AccessLogSettings, KernelCounters, NotEnrolledReason, PodReport, PodState, PodTcp,
    Status, Telemetry, TelemetrySettings,
};

/// How often the agent looks after what ends by itself: codes out of use, pods whose processes are gone.
const HOUSEKEEPING: Duration = Duration::from_secs(2);

/// How soon a pod whose enrolment failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Clients with session affinity that are remembered at one time.
const AFFINITY_CLIENTS: usize = 100_000;

/// Validated settings of the agent.
#[derive(Debug)]
pub struct AgentSettings {
    /// This node.
    pub node: NodeInfo,
    /// The directory of manifests.
    pub config_dir: PathBuf,
    /// Where the admin endpoints listen.
    pub admin_address: SocketAddr,
    /// The kernel side.
    pub capture: CaptureSettings,
    /// The relay.
    pub proxy: ProxySettings,
    /// Where access-log lines go.
    pub access_log: AccessLogSettings,
}

/// Runs until SIGTERM or SIGINT. Enrolled pods stay captured, in their down mode until the next agent takes over.
pub async fn run(settings: AgentSettings) -> anyhow::Result<()> {
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let status = Status::new(settings.node.name.clone(), snapshot.clone());
    let access_log = AccessLog::start(&settings.access_log).context("starting the access log")?;
    let telemetry = Telemetry::new(TelemetrySettings::default(), status.clone(), access_log);

    // Whatever may fail comes before the kernel is touched, where an agent that runs already may be at work.
    let directory = Directory::open(&settings.config_dir, settings.node.clone())?;
    let admin = Admin::bind(settings.admin_address, telemetry.clone()).await?;
    let capture = Capture::start(settings.capture)?;
    let proxy = Arc::new(Proxy {
        snapshot: snapshot.clone(),
        codes: capture.code_table(),
        enrolled: capture.enrolled(),
        telemetry: telemetry.clone(),
        affinity: AffinityTable::new(AFFINITY_CLIENTS),
        settings: settings.proxy,
        open: AtomicUsize::new(0),
    });
    let workers = Workers::start(capture.workers(), &proxy, &capture)?;
    watch_workers(&capture, &workers)?;
    report_kernel_counters(&telemetry, &capture)?;
    info!(address = %admin.local_address(), "admin endpoints");
    tokio::spawn(admin.serve(std::future::pending()));

    let (published, news) = watch::channel(());
    let publish = {
        let (snapshot, status) = (snapshot.clone(), status.clone());
        move |Publication { snapshot: next, rejections }: Publication| {
            report_rejections(&status, &rejections);
            snapshot.store(next);
            published.send_replace(());
        }
    };
    publish(directory.publication());

    let mut mesh =
        Mesh { node: settings.node, snapshot, status, telemetry, capture, workers, failed: HashMap::new() };
    tokio::select! {
        result = mesh.follow(news) => result,
        ended = directory.follow(publish) => {
            let Err(error) = ended;
            Err(error).context("following the directory of manifests")
        }
        () = stop_signal() => {
            info!("stopping; enrolled pods stay in their down mode until the next agent takes over");
            Ok(())
        }
    }
}

/// Keeps the kernel and the workers in step with the snapshot.
struct Mesh {
    node: NodeInfo,
    snapshot: Arc<ArcSwap<Snapshot>>,
    status: Arc<Status>,
    telemetry: Arc<Telemetry>,
    capture: Capture,
    workers: Workers,
    /// When to try these pods again.
    failed: HashMap<WorkloadUid, Instant>,
}

impl Mesh {
    async fn follow(&mut self, mut news: watch::Receiver<()>) -> anyhow::Result<()> {
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        let mut settled = false;
        loop {
            let retry = self.failed.values().min().copied();
            tokio::select! {
                changed = news.changed() => {
                    changed.context("the source of the configuration has ended")?;
                    self.apply().await?;
                    if !settled {
                        settled = true;
                        self.capture.forget_strangers();
                    }
                }
                _ = housekeeping.tick() => self.tidy().await?,
                () = sleep_until(retry), if retry.is_some() => self.apply().await?,
            }
        }
    }

    /// Clients learn of a pod after it is enrolled, and forget it before it is not.
    async fn apply(&mut self) -> anyhow::Result<()> {
        let snapshot = self.snapshot.load_full();
        let wanted = self.wanted(&snapshot);
        if let Err(error) = self.capture.sync_destinations(&snapshot) {
            error!(%error, "the kernel does not take the mesh's addresses");
        }
        for uid in self.capture.enrolled_uids() {
            if !wanted.contains_key(&uid) {
                self.release(&uid, Fate::GoOn).await?;
            }
        }
        self.failed.retain(|uid, _| wanted.contains_key(uid));
        for workload in wanted.values() {
            if self.capture.is_enrolled(&workload.uid) {
                if let Err(error) = self.capture.update(workload) {
                    error!(pod = %workload.pod, %error, "cannot update the pod in the kernel");
                }
            } else if self.failed.get(&workload.uid).is_none_or(|at| *at <= Instant::now()) {
                self.enrol(workload).await?;
            }
        }
        self.telemetry.retain(&snapshot, Instant::now());
        Ok(())
    }

    /// The pods of this node that are to be enrolled and have what it takes.
    fn wanted(&self, snapshot: &Snapshot) -> HashMap<WorkloadUid, Arc<Workload>> {
        let ours = snapshot.workloads.values().filter(|workload| {
            workload.node.as_ref() == Some(&self.node.name)
                && workload.enrolment.is_wanted()
                && !workload.addresses.is_empty()
        });
        ours.map(|workload| (workload.uid.clone(), workload.clone())).collect()
    }

    async fn enrol(&mut self, workload: &Arc<Workload>) -> anyhow::Result<()> {
        let state = match self.capture.enrol(workload) {
            Ok(pod) => {
                info!(pod = %workload.pod, "enrolled");
                self.failed.remove(&workload.uid);
                self.workers.serve(pod).await?;
                PodState::Enrolled { since: SystemTime::now() }
            }
            Err(error) => {
                // The same failure every second would say nothing new.
                if self.failed.insert(workload.uid.clone(), Instant::now() + RETRY).is_none() {
                    warn!(pod = %workload.pod, %error, "cannot enrol the pod; trying again");
                }
                PodState::NotEnrolled { reason: obstacle(&error), detail: error.to_string() }
            }
        };
        self.status.set_pod(workload.uid.clone(), PodReport { pod: workload.pod.clone(), state });
        Ok(())
    }

    async fn release(&mut self, uid: &WorkloadUid, fate: Fate) -> anyhow::Result<()> {
        if let Some(net) = self.capture.unenrol(uid) {
            let net: Arc<PodNet> = net;
            self.workers.release(&net, fate).await?;
            self.status.remove_pod(uid);
            info!(pod = %net.pod, "not enrolled any more");
        }
        Ok(())
    }

    async fn tidy(&mut self) -> anyhow::Result<()> {
        for net in self.capture.deserted() {
            self.workers.release(&net, Fate::BreakOff).await?;
        }
        self.capture.tidy(Instant::now());
        self.telemetry.retain(&self.snapshot.load(), Instant::now());
        Ok(())
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// A thread of its own, so that it tells a hung worker from a hung everything.
fn watch_workers(capture: &Capture, workers: &Workers) -> anyhow::Result<()> {
    const BEAT: Duration = Duration::from_millis(500);
    let mut heartbeat = capture.heartbeat()?;
    let last_tick = workers.last_tick();
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
        loop {
            if let Err(error) = heartbeat.beat(last_tick()) {
                error!(%error, "cannot write the heartbeat");
            }
            std::thread::sleep(BEAT);
        }
    })?;
    Ok(())
}

fn report_kernel_counters(telemetry: &Arc<Telemetry>, capture: &Capture) -> anyhow::Result<()> {
    let counters = capture.counters()?;
    let enrolled = capture.enrolled();
    telemetry.on_scrape(move |telemetry| {
        let pods: HashMap<u64, Arc<PodNet>> =
            enrolled.load().values().map(|net| (net.cookie, net.clone())).collect();
        telemetry.set_kernel_counters(kernel_counters(&counters, pods.values()));
    });
    Ok(())
}

fn kernel_counters<'a>(
    counters: &PodCounters,
    pods: impl Iterator<Item = &'a Arc<PodNet>>,
) -> KernelCounters {
    let total = counters.total();
    KernelCounters {
        bypassed: vec![
            ("agent_down", total.bypassed_agent_down),
            ("inbound_agent_down", total.inbound_bypassed_agent_down),
            ("inner_netns", total.bypassed_inner_netns),
            ("other_interface", total.bypassed_interface),
        ],
        refused: vec![
            ("agent_down", total.refused_agent_down),
            ("inbound_agent_down", total.inbound_refused_agent_down),
            ("inner_netns", total.refused_inner_netns),
            ("plaintext", total.inbound_refused_strict),
            ("listener_dial", total.refused_listener_dial),
        ],
        pods: pods.map(|net| pod_tcp(net, &counters.of(net.cookie))).collect(),
    }
}

fn pod_tcp(net: &PodNet, counters: &Counters) -> PodTcp {
    PodTcp {
        pod: net.pod.clone(),
        retransmits: counters.tcp_retransmits,
        timeouts: counters.tcp_timeouts,
        connected: counters.tcp_active_opens,
        accepted: counters.tcp_passive_opens,
    }
}

fn obstacle(error: &CaptureError) -> NotEnrolledReason {
    match error {
        CaptureError::Step { part: Part::Netns, .. } => NotEnrolledReason::NetnsUnavailable,
        CaptureError::Step { part: Part::Cgroup, .. } => NotEnrolledReason::CgroupUnavailable,
        CaptureError::Step { part: Part::Listeners, .. } => NotEnrolledReason::ListenFailed,
        CaptureError::Step { part: Part::Links, .. } | CaptureError::Load(_) | CaptureError::Map { .. } => {
            NotEnrolledReason::AttachFailed
        }
        CaptureError::Step { part: Part::Workers, .. } | CaptureError::Preflight(_) => {
            NotEnrolledReason::Internal
        }
    }
}

fn report_rejections(status: &Status, rejections: &[config::Rejection]) {
    for rejection in rejections {
        warn!(%rejection, "rejected");
    }
    status.set_rejections(rejections.iter().map(rejection_report).collect());
}

fn rejection_report(rejection: &config::Rejection) -> telemetry::Rejection {
    let field = rejection.field.to_string();
    telemetry::Rejection {
        origin: rejection.file.display().to_string(),
        line: rejection.position.map(|position| position.line.into()),
        object: rejection.object.as_ref().map(ToString::to_string),
        field: (!field.is_empty()).then_some(field),
        message: rejection.message.clone(),
    }
}

async fn stop_signal() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

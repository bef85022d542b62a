//! The wiring of `undermesh agent`: the one place that knows every module.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::admin::{self, AdminState};
use crate::balance::AffinityTable;
use crate::capture::{Capture, CaptureSettings, PodCounters, PodNet};
use crate::config::Rejection;
use crate::discovery::directory;
use crate::model::{Enrolment, NodeInfo, Snapshot, Workload, WorkloadUid};
use crate::proxy::{Fate, Proxy, ProxySettings, Workers};
use crate::telemetry::{
    AccessLog, AccessLogSettings, KernelCounters, NotEnrolledReason, PodReport, PodState, PodTcp, Status,
    Telemetry, TelemetrySettings,
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

    let admin = admin::serve(settings.admin_address, AdminState { snapshot: snapshot.clone(), telemetry: telemetry.clone(), status: status.clone() });
    let admin = admin.await.context("starting the admin endpoints")?;
    info!(address = %admin.address(), "admin endpoints");

    let (published, news) = watch::channel(());
    let publish = {
        let (snapshot, status) = (snapshot.clone(), status.clone());
        move |next: Arc<Snapshot>, rejections: Arc<[Rejection]>| {
            status.set_rejections(rejections.iter().map(Into::into).collect());
            snapshot.store(next);
            let _ = published.send(());
        }
    };
    let _watcher = directory::watch(settings.config_dir, settings.node.clone(), publish)?;

    let mut mesh =
        Mesh { node: settings.node, snapshot, status, telemetry, capture, workers, failed: HashMap::new() };
    tokio::select! {
        result = mesh.follow(news) => result,
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
        self.report_others(&snapshot);
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
                PodState::enrolled_now()
            }
            Err(error) => {
                // The same failure every second would say nothing new.
                if self.failed.insert(workload.uid.clone(), Instant::now() + RETRY).is_none() {
                    warn!(pod = %workload.pod, %error, "cannot enrol the pod; trying again");
                }
                PodState::NotEnrolled { reason: NotEnrolledReason::Failed, detail: error.to_string() }
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

    /// Pods of this node that are not enrolled have a reason.
    fn report_others(&self, snapshot: &Snapshot) {
        for workload in snapshot.workloads.values().filter(|w| w.node.as_ref() == Some(&self.node.name)) {
            if let Enrolment::Impossible(reason) = &workload.enrolment {
                let state =
                    PodState::NotEnrolled { reason: NotEnrolledReason::Impossible, detail: reason.clone() };
                self.status
                    .set_pod(workload.uid.clone(), PodReport { pod: workload.pod.clone(), state });
            }
        }
    }

    async fn tidy(&mut self) -> anyhow::Result<()> {
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

fn kernel_counters<'a>(counters: &PodCounters, pods: impl Iterator<Item = &'a Arc<PodNet>>) -> KernelCounters {
    todo!()
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

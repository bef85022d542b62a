//! Keeps the kernel and the workers in step with the snapshot.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use super::earlier::Earlier;
use super::leaving::{Leaving, Until};
use super::report::{self, Reporters, obstacle};
use super::tunnel::{Members, Notice};
use crate::capture::{Capture, CaptureError, Succession};
use crate::model::{Enrolment, NodeInfo, Workload, WorkloadUid};
use crate::proxy::{Fate, Workers};
use crate::snapshot::Snapshot;
use crate::telemetry::{NotEnrolledReason, PodState, Telemetry};

/// How soon after something has happened, and how often while something is under way, the agent looks after what ends by itself:
/// pods that leave, codes out of use, pods whose processes are gone, pods whose cgroup or network namespace is another one now.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// How often it does so where nothing has happened that it was told of.
const HOUSEKEEPING_ANYWAY: Duration = Duration::from_secs(5);

/// How soon a pod whose enrolment failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long the API server and the machine may differ about a pod, before that is told.
const GRACE: Duration = Duration::from_secs(10);

const SOURCE_ENDED: &str = "the source of the configuration has ended";

/// The pods of this node, as they are to be and as they are.
pub(super) struct Mesh {
    node: NodeInfo,
    snapshot: Arc<ArcSwap<Snapshot>>,
    reporters: Reporters,
    telemetry: Arc<Telemetry>,
    capture: Capture,
    workers: Workers,
    /// Where there are tunnels, those who take them.
    members: Option<Members>,
    earlier: Earlier,
    /// The workloads of the snapshot that was applied last, as a whole.
    applied: OrdMap<WorkloadUid, Arc<Workload>>,
    /// A later one is being applied, or was until [`Mesh::follow`] was dropped.
    is_applying: bool,
    /// Those of this node that are to be enrolled and have what it takes.
    wanted: HashMap<WorkloadUid, Arc<Workload>>,
    /// Those that are not any more, and still enrolled.
    leaving: Leaving,
    /// Of these that are wanted, the ones that could not be enrolled, or updated.
    failures: HashMap<WorkloadUid, Failure>,
}

/// What stands in a pod's way.
struct Failure {
    since: Instant,
    /// When to try again.
    retry: Instant,
    /// Whether the log has it.
    is_told: bool,
}

impl Failure {
    fn new(now: Instant) -> Self {
        Self { since: now, retry: now, is_told: false }
    }
}

impl Mesh {
    pub(super) fn new(
        node: NodeInfo,
        snapshot: Arc<ArcSwap<Snapshot>>,
        reporters: Reporters,
        telemetry: Arc<Telemetry>,
        (capture, workers): (Capture, Workers),
        (members, earlier): (Option<Members>, Earlier),
    ) -> Self {
        Self {
            node,
            snapshot,
            reporters,
            telemetry,
            capture,
            workers,
            members,
            earlier,
            applied: OrdMap::new(),
            is_applying: false,
            wanted: HashMap::new(),
            leaving: Leaving::default(),
            failures: HashMap::new(),
        }
    }

    /// Follows the snapshots for as long as there are any, and says whenever something has come of it. Whoever drops the future loses
    /// nothing: what it was applying is applied by the next one.
    pub(super) async fn follow(
        &mut self,
        news: &mut watch::Receiver<()>,
        applied: &watch::Sender<()>,
    ) -> anyhow::Result<()> {
        let mut housekeeping = Instant::now();
        let mut settled = false;
        if self.is_applying {
            news.mark_changed();
        }
        loop {
            let retry = self.failures.values().map(|failure| failure.retry).min();
            let is_settled = tokio::select! {
                changed = news.changed() => {
                    changed.context(SOURCE_ENDED)?;
                    self.apply().await?;
                    // Of pods that came since what was known last nothing is known: they stay as they are.
                    if !settled && self.reporters.status.as_of().is_none() {
                        settled = true;
                        if let Some(members) = &mut self.members {
                            members.settle(|uid| self.wanted.contains_key(uid));
                        }
                        let wanted = self.wanted.values().map(|workload| &**workload);
                        self.capture.forget_strangers(wanted.chain(self.leaving.workloads()));
                        self.capture.settled();
                    }
                    false
                }
                notice = next(&mut self.members) => {
                    if let Some(notice) = notice {
                        self.others_know(notice);
                    }
                    false
                }
                () = self.capture.stirred() => false,
                () = sleep_until(Some(housekeeping)) => {
                    self.tidy().await?;
                    housekeeping = Instant::now() + HOUSEKEEPING_ANYWAY;
                    self.is_settled()
                }
                () = sleep_until(retry), if retry.is_some() => {
                    self.try_again().await?;
                    false
                }
            };
            if !is_settled {
                housekeeping = housekeeping.min(Instant::now() + HOUSEKEEPING);
            }
            applied.send_replace(());
        }
    }

    /// Watches for an agent that wants this one's place.
    pub(super) fn succession(&self) -> Result<Succession, CaptureError> {
        self.capture.succession()
    }

    /// Lets another agent have the kernel side, and goes on serving what it has not taken yet.
    pub(super) fn let_go(&mut self) {
        self.capture.let_go();
    }

    /// Follows the snapshots as far as what is open goes: connections end that policies do not let in any more. Nothing else comes
    /// of them, for the kernel side and the pods are another agent's.
    pub(super) async fn hold(&self, mut news: watch::Receiver<()>) -> anyhow::Result<()> {
        loop {
            let snapshot = self.snapshot.load_full();
            for net in self.capture.served() {
                if let Some(workload) = snapshot.workloads.get(&net.workload.uid) {
                    net.follow(workload);
                }
            }
            // What was being applied when the other one came may not have got so far.
            self.workers.review().await?;
            news.changed().await.context(SOURCE_ENDED)?;
        }
    }

    /// Goes on as before if the agent that was to take over has died; false if it has not. What it may have changed of a pod
    /// is changed back.
    pub(super) async fn take_back(&mut self) -> anyhow::Result<bool> {
        if !self.capture.take_back()? {
            return Ok(false);
        }
        let mut uids = self.capture.enrolled_uids();
        uids.retain(|uid| self.leaving.until(uid).is_none());
        self.enrol_anew(uids, "the agent that was to take over has left it").await?;
        Ok(true)
    }

    /// Closes the listeners, once what waits in them is taken. What is open goes on.
    pub(super) async fn close(&mut self) -> anyhow::Result<()> {
        let served: Vec<_> = self.capture.served().cloned().collect();
        for net in served {
            self.workers.release(&net, Fate::GoOn).await?;
        }
        Ok(())
    }

    /// Clients learn of a pod after it is enrolled, and forget it before it is not. That they forget is waited for elsewhere: a pod that
    /// comes does not wait for those that go. Costs what has changed, not what there is. Where it was cut short, the next one begins
    /// again with what was applied before.
    async fn apply(&mut self) -> anyhow::Result<()> {
        self.is_applying = true;
        let snapshot = self.snapshot.load_full();
        if let Err(error) = self.capture.forget_destinations(&snapshot) {
            error!(%error, "the kernel does not forget addresses that have left the mesh");
        }
        let (before, after) = (self.applied.clone(), snapshot.workloads.clone());
        let (gone, current): (Vec<_>, Vec<_>) =
            before.diff(&after).partition(|item| matches!(item, DiffItem::Remove(..)));
        let notice = self.members.as_mut().and_then(|members| {
            // All at once: each would have to be told of.
            let leaving = gone.iter().chain(&current).filter_map(|item| match item {
                DiffItem::Remove(uid, _) => Some((*uid).clone()),
                DiffItem::Add(_, workload) | DiffItem::Update { new: (_, workload), .. } => {
                    (!is_wanted(&self.node, workload)).then(|| workload.uid.clone())
                }
            });
            members.withdraw(&leaving.collect::<Vec<_>>())
        });
        for item in gone.into_iter().chain(current) {
            report::opened(&self.telemetry, &item, |workload| is_wanted(&self.node, workload));
            match item {
                DiffItem::Remove(_, workload) => self.deleted(workload),
                DiffItem::Add(_, workload) | DiffItem::Update { new: (_, workload), .. } => {
                    for forerunner in self.leaving.forerunners(workload) {
                        self.leave(&forerunner);
                    }
                    match is_wanted(&self.node, workload) {
                        true => self.want(workload).await?,
                        false => self.unwant(workload, notice),
                    }
                }
            }
        }
        if let Err(error) = self.capture.learn_destinations(&snapshot) {
            error!(%error, "the kernel does not take the mesh's addresses");
        }
        // After the kernel knows of modes: what it still lets in would have to be looked at again.
        self.workers.review().await?;
        // After it, so that what ends by the agent's own hand counts as that.
        self.capture.end_direct();
        self.telemetry.retain(&snapshot, Instant::now());
        self.applied = after.clone();
        self.is_applying = false;
        Ok(())
    }

    /// A workload that is to be in the mesh, and is new or has changed.
    async fn want(&mut self, workload: &Arc<Workload>) -> anyhow::Result<()> {
        let is_back = self.leaving.remove(&workload.uid);
        if workload.paths.is_none() && self.reporters.announcer.is_some() {
            self.miss(workload);
            return Ok(());
        }
        let has_moved = self.capture.has_moved(workload);
        if has_moved {
            // Others go on reaching it, where it is from now on.
            self.capture.unenrol(&workload.uid, Instant::now());
        }
        self.wanted.insert(workload.uid.clone(), workload.clone());
        if self.capture.is_enrolled(&workload.uid) {
            if let Some(members) = self.members.as_mut().filter(|_| is_back) {
                members.enrolled(workload);
            }
            self.update(workload);
            return Ok(());
        }
        self.enrol(workload).await?;
        if has_moved && !self.capture.is_enrolled(&workload.uid) {
            self.lose(std::slice::from_ref(&workload.uid));
        }
        Ok(())
    }

    /// A workload that is not to be in the mesh, and is new or has changed. If it was, it is until others know of the notice.
    fn unwant(&mut self, workload: &Arc<Workload>, notice: Option<Notice>) {
        let uid = &workload.uid;
        self.failures.remove(uid);
        let was_wanted = self.wanted.remove(uid).is_some();
        match (self.leaving.until(uid), notice.filter(|_| self.capture.is_enrolled(uid))) {
            (Some(Until::OthersKnow(_)), _) => {}
            (None, Some(notice)) => self.leaving.stays(workload, Until::OthersKnow(notice)),
            _ => self.leave(uid),
        }
        match &workload.enrolment {
            Enrolment::Impossible(detail) if workload.node.as_ref() == Some(&self.node.name) => {
                self.reporters.impossible(workload, detail);
            }
            Enrolment::NotWanted if was_wanted => self.reporters.left(workload),
            // It is another node's, or has no address for the moment.
            _ => {}
        }
    }

    /// Nobody connects to the pod any more, so nobody has to be told before its time. It may have been deleted by force: what still
    /// runs of it stays in the mesh.
    fn deleted(&mut self, workload: &Arc<Workload>) {
        self.wanted.remove(&workload.uid);
        self.failures.remove(&workload.uid);
        match self.capture.runs(&workload.uid) {
            true => self.leaving.stays(workload, Until::LastProcess),
            false => self.leave(&workload.uid),
        }
    }

    fn others_know(&mut self, notice: Notice) {
        for uid in self.leaving.all(|until| until == Until::OthersKnow(notice)) {
            self.leave(&uid);
        }
    }

    fn update(&mut self, workload: &Arc<Workload>) {
        let now = Instant::now();
        match self.capture.update(workload) {
            Ok(()) => {
                if let Some(members) = &mut self.members {
                    members.updated(workload);
                }
                self.failures.remove(&workload.uid);
            }
            Err(error) => {
                error!(pod = %workload.pod, %error, "cannot update the pod in the kernel; trying again");
                self.failures.entry(workload.uid.clone()).or_insert(Failure::new(now)).retry = now + RETRY;
            }
        }
    }

    /// The API server has the pod, and the machine does not show it: not yet, or never, as with a runtime that keeps its pods
    /// elsewhere.
    fn miss(&mut self, workload: &Arc<Workload>) {
        // What an earlier agent has told of it may be true.
        if self.capture.is_enrolled(&workload.uid) {
            self.lose(std::slice::from_ref(&workload.uid));
        }
        self.let_leave(&workload.uid);
        self.wanted.insert(workload.uid.clone(), workload.clone());
        let detail = "no process of the pod is to be found in the kubelet's cgroups, and the container runtime has not \
                      told of it; runtimes that keep pods elsewhere are not supported";
        self.fail(workload, GRACE, NotEnrolledReason::NetnsUnavailable, detail.into());
    }

    async fn enrol(&mut self, workload: &Arc<Workload>) -> anyhow::Result<()> {
        match self.capture.enrol(workload) {
            Ok(pod) => {
                info!(pod = %workload.pod, "enrolled");
                report::inherited(&self.telemetry, workload, pod.opened.as_ref());
                self.failures.remove(&workload.uid);
                // Its certificate is asked for before the first connection needs it.
                if let Some(members) = &mut self.members {
                    members.enrolled(workload);
                }
                self.workers.serve(pod).await?;
                self.reporters.pod(workload, PodState::Enrolled { since: SystemTime::now() });
            }
            Err(error) => self.fail(workload, RETRY, obstacle(&error), error.to_string()),
        }
        Ok(())
    }

    /// Why the pod is not in the mesh, and when to try again. The API server tells of a pod before the machine shows it, and of
    /// its end after the runtime has begun to take it apart: where that is the source, nothing is said for a while.
    fn fail(&mut self, workload: &Arc<Workload>, retry: Duration, reason: NotEnrolledReason, detail: String) {
        let now = Instant::now();
        let failure = self.failures.entry(workload.uid.clone()).or_insert(Failure::new(now));
        failure.retry = now + retry;
        if self.reporters.announcer.is_some() && now.duration_since(failure.since) < GRACE {
            debug!(pod = %workload.pod, detail, "the pod cannot be enrolled, or is at its end; trying again");
            return self.reporters.pending(workload);
        }
        // The same every second would say nothing new.
        if !std::mem::replace(&mut failure.is_told, true) {
            warn!(pod = %workload.pod, detail, "cannot enrol the pod; trying again");
        }
        self.reporters.pod(workload, PodState::NotEnrolled { reason, detail });
    }

    /// The runtime has taken the pod's network away, and the API server has not heard yet that the pod has ended. (In manifests of
    /// a directory a namespace that is not there is a mistake.)
    fn is_over(&self, workload: &Workload) -> bool {
        let netns = workload.paths.as_ref().map(|paths| &paths.netns);
        self.reporters.announcer.is_some() && netns.is_some_and(|netns| !netns.exists())
    }

    /// The pod is in the mesh no more.
    fn leave(&mut self, uid: &WorkloadUid) {
        self.leaving.remove(uid);
        self.let_leave(uid);
        self.reporters.forget(uid);
    }

    /// These take no tunnels any more where they were, and nowhere else yet: that others know is not waited for.
    fn lose(&mut self, uids: &[WorkloadUid]) {
        if let Some(members) = &mut self.members {
            members.withdraw(uids);
            uids.iter().for_each(|uid| members.left(uid));
        }
    }

    fn let_leave(&mut self, uid: &WorkloadUid) {
        if let Some(members) = &mut self.members {
            members.left(uid);
        }
        if let Some(net) = self.capture.unenrol(uid, Instant::now()) {
            info!(pod = %net.pod, "not enrolled any more");
        }
    }

    async fn try_again(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let due: Vec<_> = self
            .failures
            .iter()
            .filter(|(_, failure)| failure.retry <= now)
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in due {
            if let Some(workload) = self.wanted.get(&uid).cloned() {
                self.want(&workload).await?;
            }
        }
        Ok(())
    }

    /// Enrols anew the pods whose cgroup or network namespace was replaced under its path. Without a look such a pod would
    /// leave the mesh in silence.
    async fn replace(&mut self) -> anyhow::Result<()> {
        let (leaving, displaced): (Vec<_>, Vec<_>) =
            self.capture.displaced().into_iter().partition(|uid| self.leaving.until(uid).is_some());
        leaving.iter().for_each(|uid| self.leave(uid));
        self.enrol_anew(displaced, "its cgroup or network namespace is not the one that it was enrolled in")
            .await
    }

    async fn enrol_anew(&mut self, uids: Vec<WorkloadUid>, why: &str) -> anyhow::Result<()> {
        let mut lost = Vec::new();
        for uid in uids {
            let Some(net) = self.capture.strand(&uid) else { continue };
            let is_over = self.is_over(&net.workload);
            if !is_over {
                warn!(pod = %net.pod, "enrolling the pod anew: {why}");
            }
            if let Some(workload) = self.wanted.get(&uid).cloned() {
                self.enrol(&workload).await?;
            }
            match (self.capture.is_enrolled(&uid), is_over) {
                (true, _) => {}
                (false, false) => lost.push(uid),
                // Nobody connects to it any more, so nobody has to be told before its time.
                (false, true) => {
                    if let Some(members) = &mut self.members {
                        members.left(&uid);
                    }
                }
            }
        }
        self.lose(&lost);
        Ok(())
    }

    fn is_settled(&self) -> bool {
        self.capture.is_settled()
            && self.leaving.all(|until| until == Until::LastProcess).is_empty()
            && self.members.as_ref().is_none_or(Members::is_settled)
    }

    async fn tidy(&mut self) -> anyhow::Result<()> {
        for uid in self.leaving.all(|until| until == Until::LastProcess) {
            if !self.capture.runs(&uid) {
                self.leave(&uid);
            }
        }
        self.replace().await?;
        let dangers = match &mut self.members {
            Some(members) => {
                members.tidy();
                members.dangers()
            }
            None => HashMap::new(),
        };
        let enrolled = self.wanted.values().filter(|workload| self.capture.is_enrolled(&workload.uid));
        self.reporters.dangers(enrolled.map(|workload| &**workload), &dangers, self.capture.probers());
        for net in self.capture.left(Instant::now()) {
            self.workers.release(&net, Fate::GoOn).await?;
        }
        for net in self.capture.deserted() {
            self.workers.release(&net, Fate::BreakOff).await?;
        }
        self.capture.tidy(Instant::now());
        self.earlier.review(&mut self.capture, &self.snapshot.load());
        self.telemetry.plaintext().watches(self.capture.enrolled_workloads(), Instant::now());
        self.telemetry.retain(&self.snapshot.load(), Instant::now());
        Ok(())
    }
}

fn is_wanted(node: &NodeInfo, workload: &Workload) -> bool {
    workload.node.as_ref() == Some(&node.name)
        && workload.enrolment.is_wanted()
        && !workload.addresses.is_empty()
}

async fn next(members: &mut Option<Members>) -> Option<Notice> {
    match members {
        Some(members) => members.next().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

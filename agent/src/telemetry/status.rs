//! How the agent fares: which pods of its node are enrolled, what was rejected, and whether it is ready.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use arc_swap::ArcSwap;

use crate::model::{Enrolment, Name, ObjectRef, Probers, Workload, WorkloadUid};
use crate::snapshot::Snapshot;

/// What the agent reports of itself, beside the snapshot it works from.
#[derive(Debug)]
pub struct Status {
    /// The name of this node.
    pub node: Name,
    /// The snapshot in force.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pods: Mutex<BTreeMap<WorkloadUid, PodReport>>,
    rejections: RwLock<Arc<[Rejection]>>,
    probers: Mutex<Option<Probers>>,
    as_of: Mutex<Option<SystemTime>>,
    also_missing: AlsoMissing,
}

/// Whoever else knows what is missing until the agent is ready.
#[derive(Default)]
struct AlsoMissing(Mutex<Vec<Arc<MissingHook>>>);

/// Tells what is missing, a sentence each.
type MissingHook = dyn Fn() -> Vec<String> + Send + Sync;

/// What became of the wish to enrol one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodReport {
    /// Namespace and name.
    pub pod: ObjectRef,
    /// How far it has come.
    pub state: PodState,
}

/// How far the enrolment of a pod has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// The pod is in the mesh.
    Enrolled {
        /// Since when.
        since: SystemTime,
    },
    /// Work on it is under way.
    Pending,
    /// It cannot be, for now or for good.
    NotEnrolled {
        /// What kind of obstacle, for the metric.
        reason: NotEnrolledReason,
        /// A sentence for the user, with the culprit's name.
        detail: String,
    },
}

/// What stands in the way of an enrolment: a closed set with stable names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NotEnrolledReason {
    /// The pod asks for it but cannot have it: host network, a combination that is not supported.
    Impossible,
    /// Its network namespace is not known or cannot be opened.
    NetnsUnavailable,
    /// Its cgroup is not known or cannot be opened.
    CgroupUnavailable,
    /// The kernel did not take a program, a link or a map entry.
    AttachFailed,
    /// The listeners in the pod could not be opened.
    ListenFailed,
    /// A bug or an exhausted resource of the agent; its log has the error.
    Internal,
}

/// One document that was not taken, or taken only in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Where the document came from: a file, or the API server.
    pub origin: String,
    /// The line, counted from 1, where it is known.
    pub line: Option<u64>,
    /// Kind, namespace and name, where they could be read.
    pub object: Option<String>,
    /// The path of the field, like `spec.ports[0].port`.
    pub field: Option<String>,
    /// What is wrong and what was expected.
    pub message: String,
}

/// What a pod of this node is to be and what it is.
#[derive(Clone, Debug)]
pub struct PodStanding {
    /// The pod, as the snapshot has it; `None` for one that left the snapshot but not yet the mesh.
    pub workload: Option<Arc<Workload>>,
    /// Namespace and name.
    pub pod: ObjectRef,
    /// What was reported of it, or what the snapshot says against it; `None` where nothing was.
    pub state: Option<PodState>,
}

impl Status {
    /// A status that is not ready: no snapshot is in yet (its generation is 0).
    pub fn new(node: impl Into<Name>, snapshot: Arc<ArcSwap<Snapshot>>) -> Arc<Self> {
        let (pods, rejections) = (Mutex::default(), RwLock::new(Arc::from([])));
        let (probers, as_of, also_missing) = (Mutex::default(), Mutex::default(), AlsoMissing::default());
        Arc::new(Self { node: node.into(), snapshot, pods, rejections, probers, as_of, also_missing })
    }

    /// Has [`Status::missing`] tell as well what this does whenever it is asked.
    pub fn on_missing(&self, hook: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        self.also_missing.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(hook));
    }

    /// Reports on one pod of this node, in place of what was reported before.
    pub fn set_pod(&self, uid: WorkloadUid, report: PodReport) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, report);
    }

    /// Forgets a pod that is gone, or that has left the mesh as it wished; what was reported of it last.
    pub fn remove_pod(&self, uid: &str) -> Option<PodReport> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(uid)
    }

    /// What was reported of one pod.
    pub fn pod(&self, uid: &str) -> Option<PodState> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).get(uid).map(|report| report.state.clone())
    }

    /// Every document that is rejected now, in place of those before.
    pub fn set_rejections(&self, rejections: Vec<Rejection>) {
        *self.rejections.write().unwrap_or_else(PoisonError::into_inner) = rejections.into();
    }

    /// Every document that is rejected now.
    pub fn rejections(&self) -> Arc<[Rejection]> {
        self.rejections.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whose connections pass for the kubelet's, in place of what was said before.
    pub fn set_probers(&self, probers: Probers) {
        *self.probers.lock().unwrap_or_else(PoisonError::into_inner) = Some(probers);
    }

    /// Whose connections pass for the kubelet's; none where there is no kubelet.
    pub fn probers(&self) -> Option<Probers> {
        self.probers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is amiss although the agent is ready, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let node = self.probers().filter(|probers| matches!(probers, Probers::Node(_)));
        node.and_then(|probers| probers.trouble()).into_iter().collect()
    }

    /// Of when the configuration is, if its source does not say it now.
    pub fn set_as_of(&self, as_of: Option<SystemTime>) {
        *self.as_of.lock().unwrap_or_else(PoisonError::into_inner) = as_of;
    }

    /// Of when the configuration is, if its source does not say it now: an agent has begun with what was known last.
    pub fn as_of(&self) -> Option<SystemTime> {
        *self.as_of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every pod of this node, and every one that was reported on, ordered by uid.
    pub fn pods(&self) -> Vec<PodStanding> {
        let snapshot = self.snapshot.load();
        let mut reports = self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut pods = Vec::new();
        for (uid, workload) in &snapshot.workloads {
            let report = reports.remove(uid);
            if report.is_some() || workload.node.as_ref() == Some(&self.node) {
                pods.push(PodStanding {
                    pod: workload.pod.clone(),
                    state: report.map(|report| report.state).or_else(|| impossible(workload)),
                    workload: Some(workload.clone()),
                });
            }
        }
        let leftover = reports.into_values().map(|report| PodStanding {
            workload: None,
            pod: report.pod,
            state: Some(report.state),
        });
        pods.extend(leftover);
        pods
    }

    /// What is missing until the agent is ready, a sentence each; empty when it is. Ready means that the first
    /// snapshot is in and that every pod of this node that is to be in the mesh is, or has a reason why not. A pod
    /// without an address is not waited for: it may stay so for ever (an image that cannot be pulled). What the hooks
    /// tell comes after that, and that pods fail their probes.
    pub fn missing(&self) -> Vec<String> {
        if self.snapshot.load().generation == 0 {
            return vec!["no configuration has been read yet".into()];
        }
        let mut missing = self.missing_pods();
        let hooks = self.also_missing.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        missing.extend(hooks.iter().flat_map(|hook| hook()));
        let nobody = self.probers().filter(|probers| matches!(probers, Probers::Nobody(_)));
        missing.extend(nobody.and_then(|probers| probers.trouble()));
        missing
    }

    fn missing_pods(&self) -> Vec<String> {
        self.pods()
            .into_iter()
            .filter_map(|standing| {
                let wanted =
                    standing.workload.is_some_and(|w| w.enrolment.is_wanted() && !w.addresses.is_empty());
                match standing.state {
                    None if wanted => Some(format!("pod {} is not enrolled yet", standing.pod)),
                    Some(PodState::Pending) if wanted => {
                        Some(format!("pod {} is being enrolled", standing.pod))
                    }
                    _ => None,
                }
            })
            .collect()
    }
}

/// A pod that cannot be enrolled needs no report: the snapshot has the reason.
fn impossible(workload: &Workload) -> Option<PodState> {
    match &workload.enrolment {
        Enrolment::Impossible(detail) => {
            Some(PodState::NotEnrolled { reason: NotEnrolledReason::Impossible, detail: detail.clone() })
        }
        Enrolment::Wanted | Enrolment::NotWanted => None,
    }
}

impl NotEnrolledReason {
    /// The stable name in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Impossible => "impossible",
            Self::NetnsUnavailable => "netns_unavailable",
            Self::CgroupUnavailable => "cgroup_unavailable",
            Self::AttachFailed => "attach_failed",
            Self::ListenFailed => "listen_failed",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Debug for AlsoMissing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlsoMissing").finish_non_exhaustive()
    }
}

impl fmt::Display for Rejection {
    /// `FILE:LINE: OBJECT: FIELD: MESSAGE`, without what is not known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        for part in [&self.object, &self.field].into_iter().flatten() {
            write!(f, ": {part}")?;
        }
        write!(f, ": {}", self.message)
    }
}

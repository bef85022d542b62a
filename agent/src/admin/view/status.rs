//! `/debug/status` and `/debug/pods`: how the agent and the pods of its node fare.

use serde::{Deserialize, Serialize};

use super::{time, to_json};
use crate::model::Enrolment;
use crate::telemetry::{PodStanding, PodState, Rejection, Status, Telemetry};

/// The page `/debug/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusView {
    /// The agent's version.
    pub version: String,
    /// This node's name.
    pub node: String,
    /// Counts the configurations taken; 0 before the first.
    pub generation: u64,
    /// What `/readyz` says.
    pub ready: bool,
    /// What is missing until it is ready.
    pub missing: Vec<String>,
    /// What is amiss although it is.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Of when the configuration is (RFC 3339), if the API server has not told of it since the agent began.
    #[serde(default)]
    pub as_of: Option<String>,
    /// The pods of this node.
    pub pods: Vec<PodView>,
    /// The documents that were not taken.
    pub rejections: Vec<RejectionView>,
}

/// One pod of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, while the snapshot has it.
    pub uid: Option<String>,
    /// `enrolled`, `pending`, `not_enrolled`, or `not_wanted` where nobody asked for it.
    pub state: String,
    /// Since when it is enrolled (RFC 3339).
    pub since: Option<String>,
    /// The kind of obstacle.
    pub reason: Option<String>,
    /// The obstacle as a sentence.
    pub detail: Option<String>,
    /// `strict` or `permissive`, while the snapshot has the pod.
    #[serde(default)]
    pub mtls: Option<String>,
    /// The AuthorizationPolicies that its callers are judged by, as NAMESPACE/NAME.
    #[serde(default)]
    pub policies: Vec<String>,
}

/// One document that was not taken, or only in part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RejectionView {
    /// The file, or the API server.
    pub origin: String,
    /// The line, from 1.
    pub line: Option<u64>,
    /// Kind, namespace and name.
    pub object: Option<String>,
    /// The field's path.
    pub field: Option<String>,
    /// What is wrong and what was expected.
    pub message: String,
    /// All of it in one line.
    pub text: String,
}

pub(in super::super) fn status(telemetry: &Telemetry) -> Vec<u8> {
    let status = telemetry.status();
    let missing = status.missing();
    to_json(&StatusView {
        version: env!("CARGO_PKG_VERSION").into(),
        node: status.node.to_string(),
        generation: status.snapshot.load().generation,
        ready: missing.is_empty(),
        missing,
        warnings: status.warnings(),
        as_of: status.as_of().and_then(time),
        pods: pod_views(status),
        rejections: RejectionView::all(status),
    })
}

pub(in super::super) fn pods(telemetry: &Telemetry) -> Vec<u8> {
    #[derive(Serialize)]
    struct Page {
        pods: Vec<PodView>,
    }
    to_json(&Page { pods: pod_views(telemetry.status()) })
}

fn pod_views(status: &Status) -> Vec<PodView> {
    let snapshot = status.snapshot.load();
    let policies = |standing: &PodStanding| -> Vec<String> {
        let access = standing.workload.as_ref().and_then(|workload| snapshot.access.get(&workload.uid));
        let names = access.iter().flat_map(|access| access.policies()).map(|applied| &*applied.policy.name);
        names.map(|name| name.rsplit(' ').next().unwrap_or(name).to_owned()).collect()
    };
    let mut pods: Vec<_> =
        status.pods().iter().map(|standing| PodView::of(standing, policies(standing))).collect();
    pods.sort_unstable_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    pods
}

impl PodView {
    fn of(standing: &PodStanding, policies: Vec<String>) -> Self {
        let wanted = standing.workload.as_ref().is_some_and(|w| w.enrolment != Enrolment::NotWanted);
        let (state, since, reason, detail) = match &standing.state {
            Some(PodState::Enrolled { since }) => ("enrolled", time(*since), None, None),
            Some(PodState::NotEnrolled { reason, detail }) => {
                ("not_enrolled", None, Some(reason.as_str().into()), Some(detail.clone()))
            }
            Some(PodState::Pending) => ("pending", None, None, None),
            None if wanted => ("pending", None, None, None),
            None => ("not_wanted", None, None, None),
        };
        Self {
            namespace: standing.pod.namespace.to_string(),
            name: standing.pod.name.to_string(),
            uid: standing.workload.as_ref().map(|w| w.uid.to_string()),
            state: state.into(),
            since,
            reason,
            detail,
            mtls: standing.workload.as_ref().map(|w| w.mtls.as_str().into()),
            policies,
        }
    }
}

impl RejectionView {
    pub(super) fn all(status: &Status) -> Vec<Self> {
        status.rejections().iter().map(Self::of).collect()
    }

    fn of(rejection: &Rejection) -> Self {
        let Rejection { origin, line, object, field, message } = rejection.clone();
        Self { origin, line, object, field, message, text: rejection.to_string() }
    }
}

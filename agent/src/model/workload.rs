//! A workload: one pod, as the mesh sees it.

use std::net::IpAddr;
use std::path::PathBuf;

use super::{Name, ObjectRef, SpiffeId};

/// `metadata.uid`, or `namespace/name` where a manifest carries none. Two pods of one name, one after the other,
/// differ in it.
pub type WorkloadUid = Name;

/// One pod that has not finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Tells this pod from a later one of the same name.
    pub uid: WorkloadUid,
    /// Namespace and name of the pod.
    pub pod: ObjectRef,
    /// What the pod is a replica of, for telemetry: the Deployment, StatefulSet, Job..., or the pod's own name.
    pub workload: Name,
    /// The pod's service account (`default` where none is named).
    pub service_account: Name,
    /// Who the pod is: its service account, in its trust domain. Made once, for every connection asks for it. None where
    /// the mesh has no authority, or where the names do not fit into an id; those of Kubernetes objects do.
    pub identity: Option<SpiffeId>,
    /// `status.podIPs`: the only addresses that the mesh steers. Empty while the pod has none, and for pods on the
    /// host's network, whose address is the node's.
    pub addresses: Vec<IpAddr>,
    /// `spec.nodeName`.
    pub node: Option<Name>,
    /// Whether the pod is to be in the mesh, and if not, why.
    pub enrolment: Enrolment,
    /// Whether the pod takes plaintext from outside of the mesh.
    pub mtls: MtlsMode,
    /// What the pod gets that dials another pod's address.
    pub dialled_pods: DialledPods,
    /// Where the pod's namespace and cgroup are, if its manifest says so.
    pub paths: Option<PodPaths>,
}

/// A pod that another node's agent has published as enrolled: it takes tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedPod {
    /// The pod.
    pub uid: WorkloadUid,
    /// The node whose agent says so.
    pub node: Name,
    /// While that agent is down, the pod is to be reached past it, in plaintext.
    pub plaintext_when_down: bool,
}

/// Whether a pod is to be in the mesh: a wish, not yet a fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// The pod or its namespace asks for it and nothing speaks against it.
    Wanted,
    /// It does not ask for it.
    NotWanted,
    /// It asks for it but cannot have it: the reason, as a sentence for the user.
    Impossible(String),
}

impl Workload {
    /// What the pod is a replica of, with its namespace.
    pub fn replica_of(&self) -> ObjectRef {
        ObjectRef::new(self.pod.namespace.clone(), self.workload.clone())
    }
}

impl Enrolment {
    /// True for a pod that is to be enrolled.
    pub fn is_wanted(&self) -> bool {
        matches!(self, Self::Wanted)
    }
}

/// The `undermesh.io/mtls` annotation of a pod or its namespace, else what the agent was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MtlsMode {
    /// Plaintext from outside of the mesh is let in.
    #[default]
    Permissive,
    /// Plaintext is refused from the first SYN, also while the agent is down.
    Strict,
}

impl MtlsMode {
    /// As annotations and pages spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

/// The `undermesh.io/dialled-pods` annotation of a pod or its namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DialledPods {
    /// Whoever dials a pod gets that pod.
    #[default]
    Pod,
    /// Whoever dials an endpoint of a Service gets what that Service makes of it, routes and all.
    Service,
}

/// Where a pod of this node lives (annotations `undermesh.io/netns` and `undermesh.io/cgroup`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPaths {
    /// A path that opens the pod's network namespace.
    pub netns: PathBuf,
    /// The pod's directory in the cgroup2 tree.
    pub cgroup: PathBuf,
}

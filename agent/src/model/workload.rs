//! A workload: one pod, as the mesh sees it.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Whether the pod takes plaintext from outside of the mesh. Of pods of other nodes it is what annotations say: their labels,
    /// by which MeshPolicies select, are not known here, and nothing goes by it.
    pub mtls: MtlsMode,
    /// The ports for which it is another mode, ascending.
    pub mtls_ports: Vec<(u16, MtlsMode)>,
    /// Who says so, of the mode first; nobody where it is the agent's own setting.
    pub mtls_by: Vec<MtlsSource>,
    /// What takes plaintext although the pod's namespace, the mesh or the agent's settings say that it is to be refused. Known of pods
    /// of this node.
    pub mtls_opened: Option<Opened>,
    /// Whether policies say who may call it: nobody may while there is no agent to ask them. Known of pods of this node.
    pub guarded: bool,
    /// The ports at which the pod has the kubelet call it, ascending. Known of pods of this node.
    pub probed_ports: Vec<u16>,
    /// Whether policies or tokens are about requests to it: whoever could add some to a connection could pass them by. Known of pods
    /// of this node.
    pub by_request: bool,
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

/// How pods of one node reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNode {
    /// In plaintext, vouched for by the kernel: there are no certificates for anything else.
    Plaintext,
    /// Pods of which policies or tokens are about requests through a tunnel, others as above.
    ByRequest,
    /// Through a tunnel.
    Tunnel,
}

impl SameNode {
    /// Whether the pod is reached through a tunnel from its own node as well.
    pub fn tunnels_to(self, workload: &Workload) -> bool {
        match self {
            Self::Plaintext => false,
            Self::ByRequest => workload.by_request,
            Self::Tunnel => true,
        }
    }
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

impl Workload {
    /// Whether a port takes plaintext.
    pub fn mtls_at(&self, port: u16) -> MtlsMode {
        mode_at((self.mtls, &self.mtls_ports), port)
    }

    /// Whether all of its ports take plaintext.
    pub fn takes_plaintext_everywhere(&self) -> bool {
        let mut modes = self.mtls_ports.iter().map(|(_, mode)| *mode).chain([self.mtls]);
        modes.all(|mode| mode == MtlsMode::Permissive)
    }

    /// Whether it has the kubelet call a port that is not open to everybody.
    pub fn shields_probed_ports(&self) -> bool {
        self.probed_ports.iter().any(|port| self.guarded || self.mtls_at(*port) == MtlsMode::Strict)
    }

    /// What was strict before and takes plaintext now; None if nothing does.
    pub fn opened_since(&self, before: &Self) -> Option<Opened> {
        Opened::between((before.mtls, &before.mtls_ports), (self.mtls, &self.mtls_ports))
    }
}

/// What takes plaintext that did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// Every port for which nobody says otherwise.
    Pod,
    /// These ports.
    Ports(Vec<u16>),
}

/// A mode, and the ports for which it is another.
type Modes<'m> = (MtlsMode, &'m [(u16, MtlsMode)]);

impl Opened {
    /// What the one refuses and the other takes; None if nothing.
    pub fn between(before: Modes<'_>, now: Modes<'_>) -> Option<Self> {
        let opens =
            |before: MtlsMode, now: MtlsMode| before == MtlsMode::Strict && now == MtlsMode::Permissive;
        if opens(before.0, now.0) {
            return Some(Self::Pod);
        }
        let mut ports: Vec<u16> = before.1.iter().chain(now.1).map(|(port, _)| *port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports.retain(|port| opens(mode_at(before, *port), mode_at(now, *port)));
        (!ports.is_empty()).then_some(Self::Ports(ports))
    }
}

fn mode_at((mode, ports): Modes<'_>, port: u16) -> MtlsMode {
    ports.iter().find(|(named, _)| *named == port).map_or(mode, |(_, mode)| *mode)
}

/// Who says whether a pod takes plaintext.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MtlsSource {
    /// A MeshPolicy, as people know it: `MeshPolicy shop/strict`.
    Policy(Name),
    /// The pod's own annotation.
    Pod,
    /// The annotation of its namespace.
    Namespace,
}

impl fmt::Display for MtlsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy(name) => name,
            Self::Pod => "the pod's annotation undermesh.io/mtls",
            Self::Namespace => "the namespace's annotation undermesh.io/mtls",
        })
    }
}

/// Whether plaintext is let in: what MeshPolicies, the `undermesh.io/mtls` annotation of a pod or its namespace, or else the agent's
/// settings say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MtlsMode {
    /// Plaintext from outside of the mesh is let in.
    #[default]
    Permissive,
    /// Plaintext is refused from the first SYN, also while the agent is down.
    Strict,
}

impl MtlsMode {
    /// As the annotation has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permissive => "permissive",
            Self::Strict => "strict",
        }
    }
}

#[cfg(test)]
impl Workload {
    /// For tests: the pod `shop/web-0` of a node, which is to be in the mesh.
    pub(crate) fn example() -> Self {
        Self {
            uid: "uid".into(),
            pod: ObjectRef::new("shop", "web-0"),
            workload: "web".into(),
            service_account: "default".into(),
            identity: None,
            addresses: vec![[10, 0, 0, 1].into()],
            node: Some("node-1".into()),
            enrolment: Enrolment::Wanted,
            mtls: MtlsMode::Permissive,
            mtls_ports: Vec::new(),
            guarded: false,
            probed_ports: Vec::new(),
            by_request: false,
            mtls_by: Vec::new(),
            mtls_opened: None,
            dialled_pods: DialledPods::Pod,
            paths: None,
        }
    }
}

/// The `undermesh.io/dialled-pods` annotation of a pod or its namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

//! Pods.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::super::{FieldPath, Problem};
use super::probes::probed_ports;
use super::{Marks, is_tcp, non_empty, object_id, read_address, read_port};
use crate::model::{Name, ObjectRef, PodPaths, TrustDomain};

const NETNS: &str = "undermesh.io/netns";
const CGROUP: &str = "undermesh.io/cgroup";
const TRUST_DOMAIN: &str = "undermesh.io/trust-domain";
/// Set by the kubelet on the API server's image of a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
const APP: &str = "app.kubernetes.io/name";
/// KubeVirt names the domain of the virtual machine in it.
const KUBEVIRT: &str = "kubevirt.io";
const ZONE: &str = "topology.kubernetes.io/zone";
/// Written by the agent of the pod's node once the pod is enrolled.
pub const ENROLLED: &str = "undermesh.io/enrolled";
const TEMPLATE_HASH: &str = "pod-template-hash";

/// A Pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace and name.
    pub id: ObjectRef,
    /// `metadata.uid`.
    pub uid: Option<Name>,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// What the pod says about its place in the mesh.
    pub marks: Marks,
    /// Why the pod cannot be in the mesh, if it cannot.
    pub obstacle: Option<Cow<'static, str>>,
    /// The name of what it is a replica of.
    pub workload: Name,
    /// `spec.serviceAccountName`, or `default`.
    pub service_account: Name,
    /// Annotation `undermesh.io/trust-domain`: where another authority than the mesh's own vouches for the pod.
    pub trust_domain: Option<TrustDomain>,
    /// `spec.nodeName`.
    pub node: Option<Name>,
    /// Label `topology.kubernetes.io/zone`, which Kubernetes copies from the node.
    pub zone: Option<Name>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// `spec.hostNetwork`: the addresses are the node's.
    pub host_network: bool,
    /// The containers' TCP ports that have a name.
    pub ports: Vec<ContainerPort>,
    /// The ports at which the pod has the kubelet call it, ascending.
    pub probed_ports: Vec<u16>,
    /// The Ready condition.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// It has run to its end (phase Succeeded or Failed) and is no more than a record.
    pub finished: bool,
    /// Where it lives on this node, from its annotations. It is not written down: the machine says it anew.
    #[serde(skip)]
    pub paths: Option<PodPaths>,
    /// Its node's agent says that it is enrolled.
    pub published: Option<Published>,
    /// The condition of the same name, for whoever writes it.
    #[serde(skip)]
    pub condition: Option<EnrolledCondition>,
    /// `metadata.generation`, for the same.
    #[serde(skip)]
    pub generation: Option<i64>,
}

/// The condition `undermesh.io/enrolled` as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolledCondition {
    /// `status` is `True`.
    pub is_true: bool,
    /// `reason`.
    pub reason: String,
    /// `message`.
    pub message: String,
    /// `lastTransitionTime`.
    pub since: Option<Timestamp>,
}

/// What the agent of a pod's node says of it, in the annotation `undermesh.io/enrolled`: the pod takes tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// While that agent is down, the pod is to be reached past it, in plaintext (`open`, else `closed`).
    pub plaintext_when_down: bool,
}

/// A container's named TCP port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPort {
    /// `name`.
    pub name: Name,
    /// `containerPort`.
    pub port: u16,
}

impl Published {
    /// A value that means nothing is no way around a tunnel.
    fn read(meta: &ObjectMeta) -> Option<Self> {
        let value = meta.annotations.as_ref()?.get(ENROLLED)?;
        Some(Self { plaintext_when_down: value == Self::OPEN })
    }

    const OPEN: &str = "open";

    /// The annotation's value.
    pub fn as_str(self) -> &'static str {
        if self.plaintext_when_down { Self::OPEN } else { "closed" }
    }
}

impl EnrolledCondition {
    fn read(status: &core::PodStatus) -> Option<Self> {
        let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == ENROLLED)?;
        Some(Self {
            is_true: condition.status == "True",
            reason: condition.reason.clone().unwrap_or_default(),
            message: condition.message.clone().unwrap_or_default(),
            since: condition.last_transition_time.as_ref().map(|time| time.0),
        })
    }
}

impl Pod {
    pub(super) fn read(object: &core::Pod, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let meta = &object.metadata;
        let id = object_id(meta)?;
        let spec = object.spec.as_ref();
        let status = object.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        let addresses = status.map(|status| addresses(status, problems)).unwrap_or_default();
        Ok(Self {
            uid: non_empty(&meta.uid),
            created: meta.creation_timestamp.as_ref().map(|time| time.0),
            labels: meta.labels.clone().unwrap_or_default(),
            marks: Marks::read(meta, problems),
            obstacle: obstacle(&id, meta, spec).map(Cow::Borrowed),
            workload: workload_name(&id, meta),
            service_account: spec
                .and_then(|spec| non_empty(&spec.service_account_name))
                .unwrap_or_else(|| "default".into()),
            trust_domain: trust_domain(meta, problems),
            node: spec.and_then(|spec| non_empty(&spec.node_name)),
            zone: meta.labels.as_ref().and_then(|labels| labels.get(ZONE)).map(|zone| zone.as_str().into()),
            host_network: spec.is_some_and(|spec| spec.host_network == Some(true)),
            ports: spec.map(|spec| named_ports(spec, problems)).unwrap_or_default(),
            probed_ports: spec.map(|spec| probed_ports(spec, &addresses, problems)).unwrap_or_default(),
            addresses,
            ready: is_ready(status, phase),
            terminating: meta.deletion_timestamp.is_some(),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            paths: paths(meta, problems),
            published: Published::read(meta),
            condition: status.and_then(EnrolledCondition::read),
            generation: meta.generation,
            id,
        })
    }
}

/// Why the pod cannot be captured, as a sentence for its owner.
fn obstacle(id: &ObjectRef, meta: &ObjectMeta, spec: Option<&core::PodSpec>) -> Option<&'static str> {
    let runtime = spec.and_then(|spec| spec.runtime_class_name.as_deref()).unwrap_or_default();
    let os = spec.and_then(|spec| spec.os.as_ref()).map(|os| os.name.as_str());
    let is_static = meta.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(MIRROR));

    if spec.is_some_and(|spec| spec.host_network == Some(true)) {
        Some("the pod uses the host's network and has no network namespace of its own to capture in")
    } else if &*id.namespace == "kube-system" {
        Some("pods in kube-system stay out of the mesh, which needs them in order to work")
    } else if is_static {
        Some("the pod is static: the kubelet runs it from a file, without the API server's say")
    } else if ["gvisor", "runsc", "kata"].iter().any(|own_kernel| runtime.contains(own_kernel)) {
        Some(
            "the pod's runtime class gives it a kernel of its own, where this node's kernel programs do not run",
        )
    } else if os == Some("windows") {
        Some("the pod runs on Windows, which has no eBPF that could capture it")
    } else if meta.labels.as_ref().is_some_and(|labels| labels.get(APP).is_some_and(|app| app == "undermesh"))
    {
        Some("the pod is the mesh's own, which cannot carry itself")
    } else if meta.labels.as_ref().is_some_and(|labels| labels.contains_key(KUBEVIRT)) {
        Some("the pod is a virtual machine of KubeVirt, whose traffic does not come from the pod's sockets")
    } else if let Some(sidecar) = spec.and_then(sidecar) {
        Some(sidecar)
    } else {
        None
    }
}

/// Two meshes in one pod would take each other's connections for the application's.
fn sidecar(spec: &core::PodSpec) -> Option<&'static str> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.map(|container| container.name.as_str()).find_map(|name| match name {
        "istio-proxy" => Some("the pod has a sidecar of Istio (istio-proxy); take it out of that mesh first"),
        "linkerd-proxy" => {
            Some("the pod has a sidecar of Linkerd (linkerd-proxy); take it out of that mesh first")
        }
        _ => None,
    })
}

/// The controller's name, read through the intermediate objects that Kubernetes names after their owners.
fn workload_name(id: &ObjectRef, meta: &ObjectMeta) -> Name {
    let owners = meta.owner_references.as_deref().unwrap_or_default();
    let Some(owner) = owners.iter().find(|owner| owner.controller == Some(true)) else {
        return id.name.clone();
    };
    let parent = match owner.kind.as_str() {
        // Deployment -> ReplicaSet `NAME-HASH`.
        "ReplicaSet" => meta
            .labels
            .as_ref()
            .and_then(|labels| labels.get(TEMPLATE_HASH))
            .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')),
        // CronJob -> Job `NAME-MINUTES`, the scheduled time in minutes since the epoch: eight digits until 2160.
        "Job" => owner.name.rsplit_once('-').and_then(|(name, minutes)| {
            (minutes.len() >= 8 && minutes.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
        }),
        _ => None,
    };
    parent.filter(|name| !name.is_empty()).unwrap_or(&owner.name).into()
}

fn addresses(status: &core::PodStatus, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let mut add = |text: &str, field: FieldPath| {
        // A pod that has no address yet is written with an empty one.
        if text.is_empty() {
            return;
        }
        if let Some(address) = read_address(text, field, problems)
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    };
    match status.pod_ips.as_deref() {
        Some(ips) if !ips.is_empty() => {
            for (index, ip) in ips.iter().enumerate() {
                add(&ip.ip, FieldPath::new(["status", "podIPs"]).index(index).key("ip"));
            }
        }
        _ => {
            if let Some(ip) = &status.pod_ip {
                add(ip, FieldPath::new(["status", "podIP"]));
            }
        }
    }
    addresses
}

/// As Kubernetes looks for a port's name: in the containers and in the init containers that keep running.
fn named_ports(spec: &core::PodSpec, problems: &mut Vec<Problem>) -> Vec<ContainerPort> {
    let containers = spec.containers.iter().enumerate().map(|it| ("containers", it));
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .enumerate()
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|it| ("initContainers", it));

    let mut ports = Vec::new();
    for (list, (container_index, container)) in containers.chain(sidecars) {
        for (index, port) in container.ports.iter().flatten().enumerate() {
            let field = || {
                FieldPath::new(["spec", list])
                    .index(container_index)
                    .key("ports")
                    .index(index)
                    .key("containerPort")
            };
            let Some(number) = read_port(port.container_port, field(), problems) else { continue };
            if let (Some(name), true) = (non_empty(&port.name), is_tcp(&port.protocol)) {
                ports.push(ContainerPort { name, port: number });
            }
        }
    }
    ports
}

/// The Ready condition. Where a pod has no conditions its phase decides, and where it has neither (written by hand,
/// for a host without a kubelet) that it has been written down at all.
fn is_ready(status: Option<&core::PodStatus>, phase: Option<&str>) -> bool {
    match status.and_then(|status| status.conditions.as_deref()) {
        Some(conditions) if !conditions.is_empty() => {
            conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
        }
        _ => phase.is_none_or(|phase| phase == "Running"),
    }
}

/// A value that is none is left out: nobody of another trust domain is taken for the pod then, so that fails closed.
fn trust_domain(meta: &ObjectMeta, problems: &mut Vec<Problem>) -> Option<TrustDomain> {
    let text = meta.annotations.as_ref()?.get(TRUST_DOMAIN)?;
    text.parse()
        .inspect_err(|error| {
            let field = FieldPath::new(["metadata", "annotations", TRUST_DOMAIN]);
            let expected = "expected a trust domain (the mesh's own is in force until then)";
            problems.push(Problem::new(field, format!("{expected}, found {text:?}: {error}")));
        })
        .ok()
}

fn paths(meta: &ObjectMeta, problems: &mut Vec<Problem>) -> Option<PodPaths> {
    let mut path = |key: &str| {
        let text = meta.annotations.as_ref()?.get(key)?;
        if text.starts_with('/') {
            return Some(Some(PathBuf::from(text)));
        }
        let field = FieldPath::new(["metadata", "annotations", key]);
        problems.push(Problem::new(field, format!("expected an absolute path, found {text:?}")));
        Some(None)
    };
    let (lonely, missing) = match (path(NETNS), path(CGROUP)) {
        (Some(Some(netns)), Some(Some(cgroup))) => return Some(PodPaths { netns, cgroup }),
        (Some(_), None) => (NETNS, CGROUP),
        (None, Some(_)) => (CGROUP, NETNS),
        _ => return None,
    };
    let field = FieldPath::new(["metadata", "annotations", lonely]);
    problems.push(Problem::new(field, format!("expected the annotation {missing} beside it")));
    None
}

//! `/debug/config`: the snapshot in force. It has no secrets: keys and certificates are no part of the model.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::status::RejectionView;
use super::to_json;
use crate::model::{
    DialledPods, Endpoint, Enrolment, Name, ObjectRef, Service, ServicePort, SessionAffinity, SpiffeId,
    Standing, TrafficDistribution, TrafficScope, Workload,
};
use crate::snapshot::{Destination, Snapshot};
use crate::telemetry::Telemetry;

/// Parts that grow with the cluster are made while they are written.
#[derive(Serialize)]
struct Page<'a> {
    generation: u64,
    node: &'a str,
    #[serde(serialize_with = "workloads")]
    workloads: &'a Snapshot,
    #[serde(serialize_with = "services")]
    services: &'a Snapshot,
    #[serde(serialize_with = "routes")]
    routes: &'a Snapshot,
    #[serde(serialize_with = "captured")]
    captured: &'a Snapshot,
    rejections: Vec<RejectionView>,
}

pub(in super::super) fn config(telemetry: &Telemetry) -> Vec<u8> {
    let status = telemetry.status();
    let snapshot = status.snapshot.load_full();
    to_json(&Page {
        generation: snapshot.generation,
        node: &status.node,
        workloads: &snapshot,
        services: &snapshot,
        routes: &snapshot,
        captured: &snapshot,
        rejections: RejectionView::all(status),
    })
}

fn workloads<S: Serializer>(snapshot: &Snapshot, serializer: S) -> Result<S::Ok, S::Error> {
    fn view<'a>(snapshot: &'a Snapshot, workload: &'a Workload) -> WorkloadView<'a> {
        let access = snapshot.access.get(&workload.uid).into_iter();
        let policies = access.flat_map(|access| access.policies()).map(|applied| AppliedView {
            policy: &applied.policy.name,
            ports: applied.ports.as_deref(),
            dry_run: applied.policy.dry_run,
            invalid: applied.policy.invalid.as_ref(),
        });
        WorkloadView::of(workload, policies.collect())
    }
    serializer.collect_seq(snapshot.workloads.values().map(|workload| view(snapshot, workload)))
}

fn services<S: Serializer>(snapshot: &Snapshot, serializer: S) -> Result<S::Ok, S::Error> {
    // A Service is filed under each of its addresses.
    let services: BTreeMap<&ObjectRef, &Arc<Service>> = snapshot
        .destinations
        .values()
        .filter_map(|destination| match destination {
            Destination::Service(service) => Some((&service.id, service)),
            Destination::Workload(_) => None,
        })
        .collect();
    serializer.collect_seq(services.values().map(|service| ServiceView::of(service)))
}

fn routes<S: Serializer>(snapshot: &Snapshot, serializer: S) -> Result<S::Ok, S::Error> {
    let routes = snapshot.routes.iter().flat_map(|(service, routes)| {
        routes.ports.iter().map(move |((port, audience), of_port)| RoutesView {
            namespace: &service.namespace,
            service: &service.name,
            port: *port,
            client_namespace: audience.namespace(),
            kind: of_port.kind.as_str(),
            rules: of_port.table.rules().into_iter().map(Arc::as_ptr).collect::<BTreeSet<_>>().len(),
            routes: of_port.table.rules().iter().map(|rule| rule.route.id.to_string()).collect(),
        })
    });
    serializer.collect_seq(routes)
}

fn captured<S: Serializer>(snapshot: &Snapshot, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(snapshot.captured.iter())
}

#[derive(Serialize)]
struct WorkloadView<'a> {
    uid: &'a str,
    namespace: &'a str,
    pod: &'a str,
    workload: &'a str,
    service_account: &'a str,
    identity: Option<&'a str>,
    addresses: &'a [IpAddr],
    node: Option<&'a Name>,
    enrolment: &'static str,
    enrolment_impossible: Option<&'a str>,
    mtls: &'static str,
    /// The ports for which it is another mode.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    mtls_ports: BTreeMap<u16, &'static str>,
    /// Who says so; nobody where it is the agent's own setting.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mtls_by: Vec<String>,
    /// What its callers are judged by, of pods of this node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    policies: Vec<AppliedView<'a>>,
    dialled_pods: &'static str,
    netns: Option<String>,
    cgroup: Option<String>,
}

impl<'a> WorkloadView<'a> {
    fn of(workload: &'a Workload, policies: Vec<AppliedView<'a>>) -> Self {
        let (enrolment, enrolment_impossible) = match &workload.enrolment {
            Enrolment::Wanted => ("wanted", None),
            Enrolment::NotWanted => ("not_wanted", None),
            Enrolment::Impossible(reason) => ("impossible", Some(reason.as_str())),
        };
        Self {
            uid: &workload.uid,
            namespace: &workload.pod.namespace,
            pod: &workload.pod.name,
            workload: &workload.workload,
            service_account: &workload.service_account,
            identity: workload.identity.as_ref().map(SpiffeId::as_str),
            addresses: &workload.addresses,
            node: workload.node.as_ref(),
            enrolment,
            enrolment_impossible,
            mtls: workload.mtls.as_str(),
            mtls_ports: workload.mtls_ports.iter().map(|(port, mode)| (*port, mode.as_str())).collect(),
            mtls_by: workload.mtls_by.iter().map(ToString::to_string).collect(),
            policies,
            dialled_pods: match workload.dialled_pods {
                DialledPods::Pod => "pod",
                DialledPods::Service => "service",
            },
            netns: workload.paths.as_ref().map(|paths| paths.netns.display().to_string()),
            cgroup: workload.paths.as_ref().map(|paths| paths.cgroup.display().to_string()),
        }
    }
}

/// An AuthorizationPolicy that a pod has.
#[derive(Serialize)]
struct AppliedView<'a> {
    policy: &'a str,
    /// Ports of the pod; all of them unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    ports: Option<&'a [u16]>,
    dry_run: bool,
    /// What is wrong with it: it denies everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    invalid: Option<&'a Name>,
}

#[derive(Serialize)]
struct ServiceView<'a> {
    namespace: &'a str,
    name: &'a str,
    addresses: &'a [IpAddr],
    ports: Vec<PortView<'a>>,
    session_affinity_seconds: Option<u64>,
    internal_traffic_policy: &'static str,
    traffic_distribution: Option<&'static str>,
}

impl<'a> ServiceView<'a> {
    fn of(service: &'a Service) -> Self {
        Self {
            namespace: &service.id.namespace,
            name: &service.id.name,
            addresses: &service.addresses,
            ports: service.ports.iter().map(PortView::of).collect(),
            session_affinity_seconds: match service.session_affinity {
                SessionAffinity::None => None,
                SessionAffinity::ClientIp { timeout } => Some(timeout.as_secs()),
            },
            internal_traffic_policy: match service.internal_traffic {
                TrafficScope::Cluster => "Cluster",
                TrafficScope::Local => "Local",
            },
            traffic_distribution: match service.distribution {
                TrafficDistribution::Anywhere => None,
                TrafficDistribution::PreferSameZone => Some("PreferSameZone"),
                TrafficDistribution::PreferSameNode => Some("PreferSameNode"),
            },
        }
    }
}

/// What one port has for one audience.
#[derive(Serialize)]
struct RoutesView<'a> {
    namespace: &'a str,
    service: &'a str,
    port: u16,
    /// Whose requests these are for, if not everybody's.
    client_namespace: Option<&'a Name>,
    kind: &'static str,
    rules: usize,
    routes: BTreeSet<String>,
}

#[derive(Serialize)]
struct PortView<'a> {
    name: &'a str,
    port: u16,
    app_protocol: Option<&'a Name>,
    /// What it goes by; nothing where all is as it is by itself.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    policies: &'a [Name],
    endpoints: Vec<EndpointView<'a>>,
}

impl<'a> PortView<'a> {
    fn of(port: &'a ServicePort) -> Self {
        Self {
            name: &port.name,
            port: port.port,
            app_protocol: port.app_protocol.as_ref(),
            policies: &port.traffic.policies,
            endpoints: port.endpoints.iter().map(EndpointView::of).collect(),
        }
    }
}

#[derive(Serialize)]
struct EndpointView<'a> {
    address: SocketAddr,
    pod: Option<String>,
    ready: bool,
    serving: bool,
    terminating: bool,
    node: Option<&'a Name>,
    zone: Option<&'a Name>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    for_zones: &'a [Name],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    for_nodes: &'a [Name],
    open_connections: u32,
    /// It fails what it is sent, and is left alone for a while.
    ejected: bool,
}

impl<'a> EndpointView<'a> {
    fn of(endpoint: &'a Endpoint) -> Self {
        Self {
            address: endpoint.address,
            pod: endpoint.workload.as_ref().map(|workload| workload.pod.to_string()),
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
            node: endpoint.node.as_ref(),
            zone: endpoint.zone.as_ref(),
            for_zones: &endpoint.for_zones,
            for_nodes: &endpoint.for_nodes,
            open_connections: endpoint.load.open(),
            ejected: endpoint.load.standing() == Standing::Ejected,
        }
    }
}

//! Services.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use super::super::{FieldPath, Problem};
use super::{is_tcp, non_empty, object_id, read_address, read_port};
use crate::model::{Declared, Name, ObjectRef, SessionAffinity, TrafficDistribution, TrafficScope};

/// A Service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub id: ObjectRef,
    /// `spec.clusterIPs`; empty for headless Services and for other names of external hosts.
    pub addresses: Vec<IpAddr>,
    /// The TCP ports, in the order of the manifest.
    pub ports: Vec<ServicePort>,
    /// `spec.selector`; empty where somebody else makes the endpoints.
    pub selector: BTreeMap<String, String>,
    /// Its endpoints are those of its EndpointSlices alone: somebody makes them from what it selects, and pods of other nodes have no
    /// labels here.
    pub is_sliced: bool,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.sessionAffinity` and its timeout.
    pub session_affinity: SessionAffinity,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic: TrafficScope,
    /// `spec.trafficDistribution`.
    pub distribution: TrafficDistribution,
}

/// One TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `name`, or empty.
    pub name: Name,
    /// `port`.
    pub port: u16,
    /// `targetPort`, or `port`.
    pub target: TargetPort,
    /// `appProtocol`.
    pub app_protocol: Option<Name>,
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TargetPort {
    /// A port number.
    Number(u16),
    /// The name of a container's port.
    Named(Name),
}

impl ServicePort {
    /// What it is declared to carry.
    pub fn declared(&self) -> Declared {
        Declared::of(self.app_protocol.as_deref(), &self.name)
    }
}

impl Service {
    pub(super) fn read(object: &core::Service, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let id = object_id(&object.metadata)?;
        let empty = core::ServiceSpec::default();
        let spec = object.spec.as_ref().unwrap_or(&empty);
        Ok(Self {
            id,
            addresses: addresses(spec, problems),
            ports: ports(spec, problems),
            selector: spec.selector.clone().unwrap_or_default(),
            is_sliced: false,
            publish_not_ready: spec.publish_not_ready_addresses == Some(true),
            session_affinity: session_affinity(spec, problems),
            internal_traffic: internal_traffic(spec, problems),
            distribution: distribution(spec, problems),
        })
    }

    /// Whether it is the API server's own, which the mesh keeps away from: without it nothing could be put right.
    pub fn is_api_server(&self) -> bool {
        &*self.id.namespace == "default" && &*self.id.name == "kubernetes"
    }
}

fn addresses(spec: &core::ServiceSpec, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let mut written: Vec<(&str, FieldPath)> = Vec::new();
    match spec.cluster_ips.as_deref() {
        Some(ips) if !ips.is_empty() => {
            let field = |index| FieldPath::new(["spec", "clusterIPs"]).index(index);
            written.extend(ips.iter().enumerate().map(|(index, ip)| (ip.as_str(), field(index))));
        }
        _ => match spec.cluster_ip.as_deref() {
            Some(ip) if !ip.is_empty() => written.push((ip, FieldPath::new(["spec", "clusterIP"]))),
            _ => {
                let field = FieldPath::new(["spec", "clusterIP"]);
                let message =
                    "expected an IP address or None: no API server will assign one to this manifest";
                problems.push(Problem::new(field, message));
            }
        },
    }
    let mut addresses = Vec::new();
    for (text, field) in written.into_iter().filter(|(text, _)| *text != "None") {
        if let Some(address) = read_address(text, field, problems)
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

fn ports(spec: &core::ServiceSpec, problems: &mut Vec<Problem>) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        if !is_tcp(&port.protocol) {
            continue;
        }
        let field = |key: &str| FieldPath::new(["spec", "ports"]).index(index).key(key);
        let Some(number) = read_port(port.port, field("port"), problems) else { continue };
        if ports.iter().any(|other| other.port == number) {
            problems.push(Problem::new(
                field("port"),
                format!("expected each TCP port once, found {number} again"),
            ));
            continue;
        }
        let target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => match read_port(*target, field("targetPort"), problems) {
                Some(target) => TargetPort::Number(target),
                None => continue,
            },
            Some(IntOrString::String(name)) if name.is_empty() => TargetPort::Number(number),
            Some(IntOrString::String(name)) => TargetPort::Named(name.as_str().into()),
        };
        ports.push(ServicePort {
            name: non_empty(&port.name).unwrap_or_default(),
            port: number,
            target,
            app_protocol: non_empty(&port.app_protocol),
        });
    }
    ports
}

fn session_affinity(spec: &core::ServiceSpec, problems: &mut Vec<Problem>) -> SessionAffinity {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => SessionAffinity::None,
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(10_800);
            let seconds = match u64::try_from(seconds) {
                Ok(seconds @ 1..=86_400) => seconds,
                _ => {
                    let field =
                        FieldPath::new(["spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"]);
                    let message = format!("expected 1 to 86400 seconds, found {seconds}");
                    problems.push(Problem::new(field, message));
                    10_800
                }
            };
            SessionAffinity::ClientIp { timeout: Duration::from_secs(seconds) }
        }
        Some(other) => {
            refuse("sessionAffinity", "None or ClientIP", other, problems);
            SessionAffinity::None
        }
    }
}

fn internal_traffic(spec: &core::ServiceSpec, problems: &mut Vec<Problem>) -> TrafficScope {
    match spec.internal_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => TrafficScope::Cluster,
        Some("Local") => TrafficScope::Local,
        Some(other) => {
            refuse("internalTrafficPolicy", "Cluster or Local", other, problems);
            TrafficScope::Cluster
        }
    }
}

fn distribution(spec: &core::ServiceSpec, problems: &mut Vec<Problem>) -> TrafficDistribution {
    match spec.traffic_distribution.as_deref() {
        None | Some("") => TrafficDistribution::Anywhere,
        Some("PreferClose" | "PreferSameZone") => TrafficDistribution::PreferSameZone,
        Some("PreferSameNode") => TrafficDistribution::PreferSameNode,
        Some(other) => {
            refuse("trafficDistribution", "PreferClose, PreferSameZone or PreferSameNode", other, problems);
            TrafficDistribution::Anywhere
        }
    }
}

fn refuse(field: &str, expected: &str, found: &str, problems: &mut Vec<Problem>) {
    let message = format!("expected {expected}, found {found:?}");
    problems.push(Problem::new(FieldPath::new(["spec", field]), message));
}

//! EndpointSlices.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as discovery;
use serde::{Deserialize, Serialize};

use super::super::{FieldPath, Problem};
use super::{is_tcp, non_empty, object_id, read_address, read_port};
use crate::model::{Name, ObjectRef};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub id: ObjectRef,
    /// The Service that it belongs to, by its label; a slice without it belongs to none.
    pub service: Option<ObjectRef>,
    /// The TCP ports that have a number.
    pub ports: Vec<SlicePort>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One TCP port that every endpoint of the slice serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlicePort {
    /// The name of the Service's port, or empty.
    pub name: Name,
    /// The target port.
    pub port: u16,
}

/// One endpoint with its addresses, which Kubernetes calls fungible.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceEndpoint {
    /// `addresses`.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`; unknown means ready.
    pub ready: bool,
    /// `conditions.serving`; unknown means as ready as it is.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Name>,
    /// `zone`.
    pub zone: Option<Name>,
    /// `hints.forZones`.
    pub for_zones: Vec<Name>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<Name>,
    /// `targetRef`, where it is a Pod.
    pub pod: Option<ObjectRef>,
}

impl EndpointSlice {
    pub(super) fn read(
        object: &discovery::EndpointSlice,
        problems: &mut Vec<Problem>,
    ) -> Result<Self, Problem> {
        let id = object_id(&object.metadata)?;
        let labels = object.metadata.labels.as_ref();
        let service = labels.and_then(|labels| labels.get(SERVICE_NAME)).filter(|name| !name.is_empty());
        let by_address = match object.address_type.as_str() {
            "IPv4" | "IPv6" => true,
            // Host names: deprecated, and kube-proxy passes over them too.
            "FQDN" => false,
            other => {
                let message = format!("expected IPv4, IPv6 or FQDN, found {other:?}");
                problems.push(Problem::new(FieldPath::new(["addressType"]), message));
                false
            }
        };
        let endpoints = object.endpoints.iter().enumerate().filter(|_| by_address);
        Ok(Self {
            service: service.map(|name| ObjectRef::new(id.namespace.clone(), name.as_str())),
            ports: ports(object, problems),
            endpoints: endpoints.map(|(index, it)| endpoint(&id, index, it, problems)).collect(),
            id,
        })
    }
}

fn ports(object: &discovery::EndpointSlice, problems: &mut Vec<Problem>) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (index, port) in object.ports.iter().flatten().enumerate().filter(|(_, port)| is_tcp(&port.protocol))
    {
        let field = FieldPath::new(["ports"]).index(index).key("port");
        if let Some(number) = port.port.and_then(|number| read_port(number, field, problems)) {
            ports.push(SlicePort { name: non_empty(&port.name).unwrap_or_default(), port: number });
        }
    }
    ports
}

fn endpoint(
    slice: &ObjectRef,
    index: usize,
    endpoint: &discovery::Endpoint,
    problems: &mut Vec<Problem>,
) -> SliceEndpoint {
    let field = |at| FieldPath::new(["endpoints"]).index(index).key("addresses").index(at);
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let hints = endpoint.hints.clone().unwrap_or_default();
    let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    SliceEndpoint {
        addresses: endpoint
            .addresses
            .iter()
            .enumerate()
            .filter_map(|(at, text)| read_address(text, field(at), problems))
            .collect(),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: non_empty(&endpoint.node_name),
        zone: non_empty(&endpoint.zone),
        for_zones: hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect(),
        for_nodes: hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect(),
        pod: pod.and_then(|target| {
            let namespace = non_empty(&target.namespace).unwrap_or_else(|| slice.namespace.clone());
            Some(ObjectRef { namespace, name: non_empty(&target.name)? })
        }),
    }
}

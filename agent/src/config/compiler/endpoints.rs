//! The endpoints of one Service port: from its EndpointSlices if there are any, else from the pods that it selects.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::claims::Claims;
use super::here::Here;
use super::loads::Loads;
use super::pods::Pods;
use crate::config::document::{self, TargetPort};
use crate::model::{Endpoint, EndpointLoad, Name, NodeInfo, ObjectRef, Workload};

/// What the endpoints are looked up in.
pub(super) struct World<'a> {
    pub(super) node: &'a NodeInfo,
    pub(super) pods: &'a Pods,
    pub(super) claims: &'a Claims,
}

/// One per address, sorted by it.
pub(super) fn endpoints_of(
    service: &document::Service,
    port: &document::ServicePort,
    slices: Option<&BTreeMap<Name, Arc<document::EndpointSlice>>>,
    members: &BTreeSet<Name>,
    world: &World<'_>,
    loads: &mut Loads,
) -> Arc<[Endpoint]> {
    let mut endpoints = BTreeMap::new();
    match slices {
        Some(slices) => {
            for slice in slices.values() {
                from_slice(slice, &port.name, world, &mut endpoints);
            }
        }
        None if service.is_sliced => {}
        None => {
            for name in members {
                let id = ObjectRef { namespace: service.id.namespace.clone(), name: name.clone() };
                if let Some(pod) = world.pods.get(&id) {
                    from_pod(service, port, pod, world, &mut endpoints);
                }
            }
        }
    }
    let finish = |mut endpoint: Endpoint| {
        endpoint.ready |= service.publish_not_ready;
        endpoint.load = loads.acquire(endpoint.address);
        endpoint
    };
    endpoints.into_values().map(finish).collect()
}

fn from_slice(
    slice: &document::EndpointSlice,
    port: &Name,
    world: &World<'_>,
    endpoints: &mut BTreeMap<SocketAddr, Endpoint>,
) {
    for port in slice.ports.iter().filter(|it| it.name == *port) {
        for endpoint in &slice.endpoints {
            for &address in &endpoint.addresses {
                let named = endpoint.pod.as_ref().and_then(|pod| world.pods.workload(pod));
                let workload = named.or_else(|| world.owner(address)).cloned();
                add(
                    endpoints,
                    Endpoint {
                        address: SocketAddr::new(address, port.port),
                        ready: endpoint.ready,
                        serving: endpoint.serving,
                        terminating: endpoint.terminating,
                        node: endpoint.node.clone(),
                        zone: endpoint.zone.clone(),
                        for_zones: endpoint.for_zones.clone(),
                        for_nodes: endpoint.for_nodes.clone(),
                        workload,
                        load: EndpointLoad::default(),
                    },
                );
            }
        }
    }
}

/// As the endpoint controller of Kubernetes makes them (`endpointslice/utils.go`, `podToEndpoint`).
fn from_pod(
    service: &document::Service,
    port: &document::ServicePort,
    pod: &document::Pod,
    world: &World<'_>,
    endpoints: &mut BTreeMap<SocketAddr, Endpoint>,
) {
    let Some(target) = target_of(port, pod).filter(|_| !pod.finished) else { return };
    let is_here = pod.node.as_ref() == Some(&world.node.name);
    for &address in &pod.addresses {
        let is_of_family = service.addresses.iter().any(|it| it.is_ipv4() == address.is_ipv4());
        // Pods on the host's network share its address and claim none.
        let is_its_own = pod.host_network || world.claims.pods(address).next() == Some(&pod.id);
        if is_of_family && is_its_own {
            add(
                endpoints,
                Endpoint {
                    address: SocketAddr::new(address, target),
                    ready: pod.ready && !pod.terminating,
                    serving: pod.ready,
                    terminating: pod.terminating,
                    node: pod.node.clone(),
                    zone: pod.zone.clone().or_else(|| world.node.zone.clone().filter(|_| is_here)),
                    for_zones: Vec::new(),
                    for_nodes: Vec::new(),
                    workload: world.pods.workload(&pod.id).cloned(),
                    load: EndpointLoad::default(),
                },
            );
        }
    }
}

fn target_of(port: &document::ServicePort, pod: &document::Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Named(name) => pod.ports.iter().find(|it| it.name == *name).map(|it| it.port),
    }
}

/// The ports of pods of this node that the Service leads to, of its own namespace alone: with a handwritten EndpointSlice it would
/// else have its policies hold for others' pods. A pod counts as soon as it is selected, before it is an endpoint.
pub(super) fn ports_here(
    service: &document::Service,
    slices: Option<&BTreeMap<Name, Arc<document::EndpointSlice>>>,
    members: &BTreeSet<Name>,
    world: &World<'_>,
    here: &Here,
) -> BTreeMap<ObjectRef, BTreeSet<u16>> {
    let mut found: BTreeMap<ObjectRef, BTreeSet<u16>> = BTreeMap::new();
    let is_own = |pod: &ObjectRef| pod.namespace == service.id.namespace && here.has(pod);
    for name in members {
        let id = ObjectRef { namespace: service.id.namespace.clone(), name: name.clone() };
        if let Some(pod) = world.pods.get(&id).filter(|_| is_own(&id)) {
            let targets = service.ports.iter().filter_map(|port| target_of(port, pod));
            found.entry(id).or_default().extend(targets);
        }
    }
    for slice in slices.into_iter().flat_map(BTreeMap::values) {
        let ports = slice.ports.iter().filter(|it| service.ports.iter().any(|port| port.name == it.name));
        let ports: BTreeSet<u16> = ports.map(|port| port.port).collect();
        for endpoint in &slice.endpoints {
            let owners = endpoint.addresses.iter().filter_map(|address| world.claims.pods(*address).next());
            for pod in endpoint.pod.iter().chain(owners).filter(|pod| is_own(pod)) {
                found.entry(pod.clone()).or_default().extend(&ports);
            }
        }
    }
    found
}

/// While an endpoint moves from one slice to another it is in both: the one that says more for it counts.
fn add(endpoints: &mut BTreeMap<SocketAddr, Endpoint>, endpoint: Endpoint) {
    match endpoints.entry(endpoint.address) {
        Entry::Vacant(entry) => {
            entry.insert(endpoint);
        }
        Entry::Occupied(mut entry) => {
            let worth = |it: &Endpoint| (it.ready, it.serving, !it.terminating);
            if worth(&endpoint) > worth(entry.get()) {
                entry.insert(endpoint);
            }
        }
    }
}

impl World<'_> {
    fn owner(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.claims.pods(address).next().and_then(|pod| self.pods.workload(pod))
    }
}

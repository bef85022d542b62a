//! The Services with what belongs to them: the pods that they select, their EndpointSlices, and who is to be worked
//! out again when one of these changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::endpoints::{World, endpoints_of, ports_here};
use super::here::Here;
use super::loads::Loads;
use super::pods::Pods;
use super::policies::Policies;
use crate::balance::{self, Topology};
use crate::config::document;
use crate::model::{Declared, Endpoint, Name, ObjectRef, Service, ServicePort, TrafficSettings};

/// All Services.
#[derive(Debug, Default)]
pub(super) struct Services {
    entries: HashMap<ObjectRef, Entry>,
    /// Services by the first label of their selector, so that a pod need only ask those that it may belong to.
    by_label: HashMap<Label, BTreeSet<Name>>,
    /// Services with a port that is declared to carry no HTTP.
    opaque: BTreeSet<ObjectRef>,
    /// Slices by their Service, whether that is known or not.
    slices: HashMap<ObjectRef, BTreeMap<Name, Arc<document::EndpointSlice>>>,
    /// The Service of each slice.
    slice_services: HashMap<ObjectRef, ObjectRef>,
    /// Services whose slices name a pod or an address.
    references: HashMap<Reference, HashSet<ObjectRef>>,
}

/// What an endpoint of a slice is known by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reference {
    Pod(ObjectRef),
    Address(IpAddr),
}

/// Namespace, key, value.
type Label = (Name, String, String);

#[derive(Debug, Default)]
struct Entry {
    document: Option<Arc<document::Service>>,
    /// Names of the pods that the selector selects.
    members: BTreeSet<Name>,
    compiled: Option<Arc<Service>>,
    references: HashSet<Reference>,
}

impl Services {
    pub(super) fn put(&mut self, new: Arc<document::Service>, pods: &Pods) {
        let id = new.id.clone();
        let same_selector = self
            .entries
            .get(&id)
            .and_then(|entry| entry.document.as_ref())
            .is_some_and(|old| old.selector == new.selector);
        if !same_selector {
            self.unindex(&id);
            if let Some(label) = index_label(&new) {
                self.by_label.entry(label).or_default().insert(id.name.clone());
            }
        }
        let entry = self.entries.entry(id).or_default();
        if !same_selector {
            entry.members = pods
                .documents_in(&new.id.namespace)
                .filter(|pod| selects(&new, pod))
                .map(|pod| pod.id.name.clone())
                .collect();
        }
        let is_opaque = new.ports.iter().any(|port| port.declared() == Declared::Opaque);
        match is_opaque {
            true => self.opaque.insert(new.id.clone()),
            false => self.opaque.remove(&new.id),
        };
        entry.document = Some(new);
    }

    pub(super) fn remove(&mut self, id: &ObjectRef) {
        self.unindex(id);
        self.opaque.remove(id);
        if let Some(entry) = self.entries.get_mut(id) {
            entry.document = None;
        }
    }

    pub(super) fn documents(&self) -> impl Iterator<Item = &Arc<document::Service>> {
        self.entries.values().filter_map(|entry| entry.document.as_ref())
    }

    pub(super) fn slices(&self) -> impl Iterator<Item = &Arc<document::EndpointSlice>> {
        self.slices.values().flat_map(BTreeMap::values)
    }

    /// Takes the slice in; the Services that this concerns.
    pub(super) fn put_slice(&mut self, new: Arc<document::EndpointSlice>) -> Vec<ObjectRef> {
        let unchanged = |service: &ObjectRef| {
            self.slices
                .get(service)
                .and_then(|slices| slices.get(&new.id.name))
                .is_some_and(|old| *old == new)
        };
        if new.service.as_ref().is_some_and(unchanged) {
            return Vec::new();
        }
        let mut services = self.remove_slice(&new.id);
        if let Some(service) = new.service.clone() {
            self.slice_services.insert(new.id.clone(), service.clone());
            self.slices.entry(service.clone()).or_default().insert(new.id.name.clone(), new);
            services.push(service);
        }
        services
    }

    /// Takes the slice out; the Services that this concerns.
    pub(super) fn remove_slice(&mut self, slice: &ObjectRef) -> Vec<ObjectRef> {
        let Some(service) = self.slice_services.remove(slice) else { return Vec::new() };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.remove(&slice.name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        vec![service]
    }

    /// The Services whose selector selects the pod.
    pub(super) fn selecting(&self, pod: &ObjectRef, pods: &Pods) -> Vec<ObjectRef> {
        let Some(pod) = pods.get(pod) else { return Vec::new() };
        let candidates = pod
            .labels
            .iter()
            .filter_map(|(key, value)| {
                self.by_label.get(&(pod.id.namespace.clone(), key.clone(), value.clone()))
            })
            .flatten();
        candidates
            .map(|name| ObjectRef { namespace: pod.id.namespace.clone(), name: name.clone() })
            .filter(|id| {
                let service = self.entries.get(id).and_then(|entry| entry.document.as_ref());
                service.is_some_and(|service| selects(service, pod))
            })
            .collect()
    }

    /// Makes the pod a member of exactly the Services that select it now; which these are.
    pub(super) fn reselect(&mut self, pod: &ObjectRef, pods: &Pods) -> Vec<ObjectRef> {
        let selecting = self.selecting(pod, pods);
        for id in &selecting {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.members.insert(pod.name.clone());
            }
        }
        selecting
    }

    /// The Services that have the pod as an endpoint, as far as that depends on the pod and not on its address.
    pub(super) fn of_pod(&self, pod: &ObjectRef, pods: &Pods) -> Vec<ObjectRef> {
        let mut services = self.selecting(pod, pods);
        services.extend(self.that_refer_to(&Reference::Pod(pod.clone())));
        services
    }

    pub(super) fn that_refer_to(&self, reference: &Reference) -> impl Iterator<Item = ObjectRef> {
        self.references.get(reference).into_iter().flatten().cloned()
    }

    /// The pods that the Service selects.
    pub(super) fn selected<'a>(
        &'a self,
        id: &'a ObjectRef,
        pods: &'a Pods,
    ) -> impl Iterator<Item = &'a document::Pod> {
        let members = self.entries.get(id).into_iter().flat_map(|entry| &entry.members);
        let pod = |name: &Name| pods.get(&ObjectRef::new(id.namespace.clone(), name.clone()));
        members.filter_map(pod).map(Arc::as_ref)
    }

    /// The Services with a port that is declared to carry no HTTP.
    pub(super) fn opaque(&self) -> impl Iterator<Item = &ObjectRef> {
        self.opaque.iter()
    }

    /// The Service as it is written, with a cluster IP or without.
    pub(super) fn document(&self, id: &ObjectRef) -> Option<&Arc<document::Service>> {
        self.entries.get(id)?.document.as_ref()
    }

    pub(super) fn compiled(&self, id: &ObjectRef) -> Option<&Arc<Service>> {
        self.entries.get(id)?.compiled.as_ref()
    }

    /// The ports of this node's pods that the Service leads to, with a cluster IP or without.
    pub(super) fn ports_here(
        &self,
        id: &ObjectRef,
        world: &World<'_>,
        here: &Here,
    ) -> BTreeMap<ObjectRef, BTreeSet<u16>> {
        let Some(entry) = self.entries.get(id) else { return BTreeMap::new() };
        let Some(document) = &entry.document else { return BTreeMap::new() };
        ports_here(document, self.slices.get(id), &entry.members, world, here)
    }

    /// Works the Service out again: what it was, and what it is. Both are the same `Arc` if nothing changed. Whom one without an
    /// address leads to is of interest only where it `is_policed`.
    pub(super) fn compile(
        &mut self,
        id: &ObjectRef,
        world: &World<'_>,
        loads: &mut Loads,
        policies: &Policies,
        is_policed: bool,
    ) -> (Option<Arc<Service>>, Option<Arc<Service>>) {
        let Some(entry) = self.entries.get_mut(id) else { return (None, None) };
        let old = entry.compiled.take();
        let mut references = HashSet::new();
        let mut new = None;
        let is_asked_for = |document: &&Arc<document::Service>| is_policed || !document.addresses.is_empty();
        if let Some(document) = entry.document.as_ref().filter(is_asked_for) {
            let slices = self.slices.get(id);
            references = slices.into_iter().flat_map(BTreeMap::values).flat_map(|it| refer(it)).collect();
            // A pod that left, or whose labels did, is a member until here.
            let namespace = &document.id.namespace;
            entry.members.retain(|name| {
                let pod = ObjectRef { namespace: namespace.clone(), name: name.clone() };
                world.pods.get(&pod).is_some_and(|pod| selects(document, pod))
            });
            new = (!document.addresses.is_empty()).then(|| {
                service(
                    document,
                    |port| endpoints_of(document, port, slices, &entry.members, world, loads),
                    world,
                    |port| policies.traffic(&document.id, port),
                    old.as_deref(),
                )
            });
        }
        for endpoint in old.iter().flat_map(|old| &old.ports).flat_map(|port| port.endpoints.iter()) {
            loads.release(endpoint.address);
        }
        let new = match (new, &old) {
            (Some(new), Some(old)) if is_same(&new, old) => Some(old.clone()),
            (new, _) => new.map(Arc::new),
        };
        entry.compiled = new.clone();
        let old_references = std::mem::replace(&mut entry.references, references.clone());
        if entry.document.is_none() {
            self.entries.remove(id);
        }
        self.refer_anew(id, &old_references, &references);
        (old, new)
    }

    fn refer_anew(&mut self, id: &ObjectRef, old: &HashSet<Reference>, new: &HashSet<Reference>) {
        for gone in old.difference(new) {
            if let Some(services) = self.references.get_mut(gone) {
                services.remove(id);
                if services.is_empty() {
                    self.references.remove(gone);
                }
            }
        }
        for come in new.difference(old) {
            self.references.entry(come.clone()).or_default().insert(id.clone());
        }
    }

    fn unindex(&mut self, id: &ObjectRef) {
        let document = self.entries.get(id).and_then(|entry| entry.document.as_ref());
        let Some(label) = document.and_then(|document| index_label(document)) else { return };
        if let Some(names) = self.by_label.get_mut(&label) {
            names.remove(&id.name);
            if names.is_empty() {
                self.by_label.remove(&label);
            }
        }
    }
}

fn index_label(service: &document::Service) -> Option<Label> {
    let (key, value) = service.selector.first_key_value()?;
    Some((service.id.namespace.clone(), key.clone(), value.clone()))
}

/// A Service without a selector selects nothing: somebody else makes its endpoints.
fn selects(service: &document::Service, pod: &document::Pod) -> bool {
    !service.selector.is_empty()
        && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
}

fn refer(slice: &document::EndpointSlice) -> impl Iterator<Item = Reference> {
    slice.endpoints.iter().flat_map(|endpoint| {
        let addresses = endpoint.addresses.iter().copied().map(Reference::Address);
        endpoint.pod.clone().map(Reference::Pod).into_iter().chain(addresses)
    })
}

fn service(
    document: &document::Service,
    mut endpoints: impl FnMut(&document::ServicePort) -> Arc<[Endpoint]>,
    world: &World<'_>,
    traffic: impl Fn(u16) -> Arc<TrafficSettings>,
    old: Option<&Service>,
) -> Service {
    let topology =
        Topology { scope: document.internal_traffic, distribution: document.distribution, node: world.node };
    let port = |port: &document::ServicePort| {
        let endpoints = endpoints(port);
        let traffic = traffic(port.port);
        let old = old.and_then(|old| old.port(port.port));
        ServicePort {
            name: port.name.clone(),
            port: port.port,
            app_protocol: port.app_protocol.clone(),
            candidates: balance::candidates(
                &endpoints,
                topology,
                &traffic.balancing,
                old.map(|old| &old.candidates),
            ),
            endpoints,
            traffic,
            load: old.map(|old| old.load.clone()).unwrap_or_default(),
        }
    };
    Service {
        id: document.id.clone(),
        addresses: document.addresses.clone(),
        ports: document.ports.iter().map(port).collect(),
        session_affinity: document.session_affinity,
        internal_traffic: document.internal_traffic,
        distribution: document.distribution,
        load: old.map(|old| old.load.clone()).unwrap_or_default(),
    }
}

fn is_same(a: &Service, b: &Service) -> bool {
    let Service { id, addresses, ports, session_affinity, internal_traffic, distribution, load: _ } = a;
    (id, addresses, session_affinity) == (&b.id, &b.addresses, &b.session_affinity)
        && (internal_traffic, distribution) == (&b.internal_traffic, &b.distribution)
        && ports.len() == b.ports.len()
        && ports.iter().zip(&b.ports).all(|(a, b)| {
            let ServicePort { name, port, app_protocol, endpoints, candidates, traffic, load: _ } = a;
            (name, port, app_protocol) == (&b.name, &b.port, &b.app_protocol)
                && (candidates, traffic) == (&b.candidates, &b.traffic)
                && endpoints.len() == b.endpoints.len()
                && endpoints.iter().zip(b.endpoints.iter()).all(|(a, b)| is_same_endpoint(a, b))
        })
}

fn is_same_endpoint(a: &Endpoint, b: &Endpoint) -> bool {
    let Endpoint {
        address,
        ready,
        serving,
        terminating,
        node,
        zone,
        for_zones,
        for_nodes,
        workload,
        load: _,
    } = a;
    (address, ready, serving, terminating) == (&b.address, &b.ready, &b.serving, &b.terminating)
        && (node, zone, for_zones, for_nodes) == (&b.node, &b.zone, &b.for_zones, &b.for_nodes)
        && match (workload, &b.workload) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        }
}

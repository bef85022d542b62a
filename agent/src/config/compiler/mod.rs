//! Applies changed documents to the snapshot. Only what a change touches is worked out again, and the rest of the
//! snapshot is shared with the one before: the cost of a change does not grow with the cluster.

mod access;
pub(super) mod claims;
mod endpoints;
mod fronts;
mod here;
mod index;
mod last_good;
mod limits;
mod loads;
#[cfg(test)]
mod measure;
mod mesh_policies;
mod pods;
mod policies;
mod routes;
mod services;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;

use self::access::{AccessPolicies, Concerned};
use self::claims::{Claimant, Claims};
use self::fronts::Askers;
use self::here::Here;
use self::loads::Loads;
use self::mesh_policies::MeshPolicies;
use self::pods::{Pods, Surroundings};
use self::policies::Policies;
use self::routes::Routes;
use self::services::{Reference, Services};
use super::Problem;
use super::document::{self, Document, Key, Kind, Marks};
use super::resolve::{ParentStatus, Stated, TargetStatus};
use crate::model::{self, MtlsMode, Name, NodeInfo, ObjectRef, TrustDomain, WorkloadUid};
use crate::route::RouteRef;
use crate::snapshot::{Destination, Snapshot};

/// Holds the documents in force and the snapshot made from them.
#[derive(Debug)]
pub struct Compiler {
    node: NodeInfo,
    defaults: Defaults,
    namespaces: HashMap<Name, Arc<document::Namespace>>,
    pods: Pods,
    services: Services,
    routes: Routes,
    policies: Policies,
    access: AccessPolicies,
    mesh_policies: MeshPolicies,
    here: Here,
    claims: Claims,
    loads: Loads,
    askers: Askers,
    snapshot: Snapshot,
    problems: BTreeMap<Key, Vec<Problem>>,
    restated: BTreeSet<Key>,
    has_new_problems: bool,
}

/// What holds where the documents do not say.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// The mTLS mode of pods.
    pub mtls: MtlsMode,
    /// The trust domain of this mesh; none where no authority vouches for anybody.
    pub trust_domain: Option<TrustDomain>,
    /// The namespace that the mesh is installed in, of which policies may be for the whole mesh; if there is such a one.
    pub mesh_namespace: Option<Name>,
}

/// One document that has come, changed or gone.
#[derive(Clone, Debug)]
pub enum Change {
    /// The object is as this document says.
    Put(Document),
    /// The object is gone.
    Remove(Key),
}

/// What has to be worked out again, in the order of the fields.
#[derive(Default)]
struct Affected {
    pods: BTreeSet<ObjectRef>,
    /// Services of which the policies come to something else.
    policed: BTreeSet<ObjectRef>,
    services: BTreeSet<ObjectRef>,
    /// Pods that may be for other policies of who may do what.
    access: BTreeSet<ObjectRef>,
    routes: BTreeSet<RouteRef>,
    /// Services whose routes are to be put together again.
    routed: BTreeSet<ObjectRef>,
    /// Where the owner may be another one or may have changed.
    addresses: BTreeSet<IpAddr>,
}

impl Compiler {
    /// An empty world, seen from this node.
    pub fn new(node: NodeInfo) -> Self {
        Self {
            node,
            defaults: Defaults::default(),
            namespaces: HashMap::new(),
            pods: Pods::default(),
            services: Services::default(),
            routes: Routes::default(),
            policies: Policies::default(),
            access: AccessPolicies::default(),
            mesh_policies: MeshPolicies::default(),
            here: Here::default(),
            claims: Claims::default(),
            loads: Loads::default(),
            askers: Askers::default(),
            snapshot: Snapshot::default(),
            problems: BTreeMap::new(),
            restated: BTreeSet::new(),
            has_new_problems: false,
        }
    }

    /// Has these hold where the documents do not say.
    #[must_use]
    pub fn with_defaults(mut self, defaults: Defaults) -> Self {
        self.defaults = defaults;
        self
    }

    /// The world as the documents in force describe it; a cheap copy.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.clone()
    }

    /// What is wrong with documents that are well written, in the world as it is: references to what is not there, or what
    /// another has already.
    pub fn problems(&self) -> &BTreeMap<Key, Vec<Problem>> {
        &self.problems
    }

    /// Whether the problems are others than when this was last asked.
    pub fn take_new_problems(&mut self) -> bool {
        std::mem::take(&mut self.has_new_problems)
    }

    /// The routes and policies of which the last [`Self::apply`] may have changed how they stand with their parents and targets.
    pub fn restated(&self) -> &BTreeSet<Key> {
        &self.restated
    }

    /// How the route stands with its parents, for its status. Of one whose latest version cannot be used, how the version before
    /// it does that stays in force; nothing if there is none.
    pub fn route_statuses(&self, route: &RouteRef) -> Vec<ParentStatus> {
        self.routes.statuses(route)
    }

    /// How the policy stands with its targets, for its status; of which version, as with routes.
    pub fn policy_statuses(&self, policy: &Key) -> Vec<TargetStatus> {
        self.policies.statuses(policy)
    }

    /// The ConfigMaps that policies refer to, whether they are there or not: no other is of interest.
    pub fn config_maps(&self) -> BTreeSet<ObjectRef> {
        self.policies.config_maps().cloned().collect()
    }

    /// The documents of Kubernetes' own kinds that are in force.
    pub fn documents(&self) -> impl Iterator<Item = Document> {
        let namespaces = self.namespaces.values().cloned().map(Document::Namespace);
        let services = self.services.documents().cloned().map(Document::Service);
        let pods = self.pods.documents().cloned().map(Document::Pod);
        let slices = self.services.slices().cloned().map(Document::EndpointSlice);
        let config_maps = self.policies.authorities().cloned().map(Document::ConfigMap);
        namespaces.chain(services).chain(pods).chain(slices).chain(config_maps)
    }

    /// How the AuthorizationPolicy or MeshPolicy stands, for its status; of which version, as with routes.
    pub fn stated(&self, policy: &Key) -> Option<Stated> {
        let mesh = self.defaults.mesh_namespace.as_ref();
        match policy.kind {
            Kind::AuthorizationPolicy => self.access.stated(policy, mesh, &self.services, &self.pods),
            Kind::MeshPolicy => self.mesh_policies.stated(policy, &self.pods),
            _ => None,
        }
    }

    /// Applies the changes as one. If the snapshot changed by it, it has the next generation and the answer is true.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> bool {
        // Services go before pods: each pod then finds the Services that select it, which is cheaper than that each
        // Service looks through the pods.
        let mut changes: Vec<Change> = changes.into_iter().collect();
        changes.sort_by_key(Change::kind);

        let mut affected = Affected::default();
        for change in changes {
            self.hold(change, &mut affected);
        }
        let mut changed = false;
        for id in std::mem::take(&mut affected.pods) {
            changed |= self.compile_pod(&id, &mut affected);
        }
        for &address in &affected.addresses {
            // Endpoints carry the pod that owns their address, which may be another one now.
            for id in self.claims.pods(address) {
                affected.services.extend(self.services.of_pod(id, &self.pods));
            }
            affected.services.extend(self.services.that_refer_to(&Reference::Address(address)));
        }
        for id in std::mem::take(&mut affected.policed) {
            if self.policies.settle(&id, self.services.document(&id).map(Arc::as_ref)) {
                affected.services.insert(id);
            }
        }
        for id in std::mem::take(&mut affected.services) {
            changed |= self.compile_service(&id, &mut affected.addresses);
            let world = endpoints::World { node: &self.node, pods: &self.pods, claims: &self.claims };
            let look = |services: &Services| services.ports_here(&id, &world, &self.here);
            affected.access.extend(self.access.look_behind(&id, &self.services, look));
        }
        for id in std::mem::take(&mut affected.access) {
            changed |= self.compile_access(&id, &mut affected.addresses);
        }
        for id in std::mem::take(&mut affected.routes) {
            affected.routed.extend(self.routes.resolve(&id, &self.services));
        }
        for service in std::mem::take(&mut affected.routed) {
            changed |= self.attach_routes(&service, &mut affected.addresses);
        }
        self.say();
        for address in affected.addresses {
            changed |= self.publish_address(address);
        }
        self.loads.sweep();
        self.access.sweep();
        // The first configuration is one however empty it is: an agent on a node without pods is ready, too.
        changed |= self.snapshot.generation == 0;
        if changed {
            self.snapshot.generation += 1;
        }
        changed
    }

    /// Takes the document in and notes who is affected by it.
    fn hold(&mut self, change: Change, affected: &mut Affected) {
        match change {
            Change::Put(Document::Namespace(new)) => {
                let name = new.name.clone();
                if self.namespaces.insert(name.clone(), new.clone()).is_none_or(|old| old != new) {
                    affected.pods.extend(self.pods.in_namespace(&name));
                }
            }
            Change::Put(Document::Service(new)) => {
                let id = new.id.clone();
                affected.services.insert(id.clone());
                self.access.service_changed(&id, self.services.selected(&id, &self.pods));
                if self.services.document(&new.id).is_none_or(|old| !is_same_to_routes(old, &new)) {
                    affected.routes.extend(self.routes.of_service(&new.id));
                    affected.policed.insert(new.id.clone());
                }
                self.services.put(new, &self.pods);
                self.access.service_changed(&id, self.services.selected(&id, &self.pods));
            }
            Change::Put(Document::Pod(new)) => self.hold_pod(&new.id.clone(), Some(new), affected),
            Change::Put(Document::EndpointSlice(new)) => {
                affected.services.extend(self.services.put_slice(new));
            }
            Change::Put(Document::ConfigMap(new)) => {
                affected.policed.extend(self.policies.put_config_map(&new.id.clone(), Some(new)));
            }
            Change::Put(Document::ReferenceGrant(new)) => {
                affected.routes.extend(self.routes.put_grant(&new.id.clone(), Some(new)));
            }
            Change::Put(Document::Route(new)) => {
                let id = new.id.clone();
                if self.routes.put(new) {
                    affected.routes.insert(id);
                }
            }
            Change::Put(Document::Policy(new)) => affected.policed.extend(self.policies.put(new)),
            Change::Put(Document::AuthorizationPolicy(new)) => {
                self.hold_access(&new.key.id(), Some(new), affected);
            }
            Change::Put(Document::MeshPolicy(new)) => {
                let mesh = self.defaults.mesh_namespace.as_ref();
                affected.pods.extend(self.mesh_policies.put(new, mesh, &self.here, &self.pods));
            }
            Change::Remove(key) => match key.kind {
                Kind::Namespace => {
                    if self.namespaces.remove(&key.name).is_some() {
                        affected.pods.extend(self.pods.in_namespace(&key.name));
                    }
                }
                Kind::Service => {
                    affected.services.insert(key.id());
                    self.access.service_changed(&key.id(), self.services.selected(&key.id(), &self.pods));
                    affected.policed.insert(key.id());
                    affected.routes.extend(self.routes.of_service(&key.id()));
                    self.services.remove(&key.id());
                }
                Kind::Pod => self.hold_pod(&key.id(), None, affected),
                Kind::EndpointSlice => affected.services.extend(self.services.remove_slice(&key.id())),
                Kind::ConfigMap => affected.policed.extend(self.policies.put_config_map(&key.id(), None)),
                Kind::ReferenceGrant => affected.routes.extend(self.routes.put_grant(&key.id(), None)),
                Kind::BackendTrafficPolicy | Kind::BackendTlsPolicy | Kind::TrafficPolicy => {
                    affected.policed.extend(self.policies.remove(&key));
                }
                Kind::AuthorizationPolicy => self.hold_access(&key.id(), None, affected),
                Kind::MeshPolicy => {
                    let mesh = self.defaults.mesh_namespace.as_ref();
                    let (here, pods) = (&self.here, &self.pods);
                    affected.pods.extend(self.mesh_policies.remove(&key.id(), mesh, here, pods));
                }
                Kind::HttpRoute | Kind::GrpcRoute | Kind::TlsRoute | Kind::TcpRoute => {
                    if let Some(kind) = key.kind.route() {
                        let route = RouteRef { kind, id: key.id() };
                        self.routes.remove(&route);
                        affected.routes.insert(route);
                    }
                }
            },
        }
    }

    fn hold_pod(&mut self, id: &ObjectRef, new: Option<Arc<document::Pod>>, affected: &mut Affected) {
        // The Services that lose the pod, then those that get it.
        let before = self.services.selecting(id, &self.pods);
        let old = self.pods.get(id).cloned();
        if !self.pods.put(id, new) {
            return;
        }
        let new = self.pods.get(id);
        self.access.pod_changed(&id.namespace, old.as_deref(), new.map(Arc::as_ref));
        self.mesh_policies.pod_changed(&id.namespace, old.as_deref(), new.map(Arc::as_ref));
        affected.services.extend(before);
        affected.services.extend(self.services.reselect(id, &self.pods));
        affected.pods.insert(id.clone());
    }

    fn hold_access(
        &mut self,
        id: &ObjectRef,
        new: Option<Arc<document::AuthorizationPolicy>>,
        affected: &mut Affected,
    ) {
        let mesh = self.defaults.mesh_namespace.as_ref();
        let Concerned { pods, services } = self.access.put(id, new, mesh, &self.here, &self.pods);
        affected.access.extend(pods);
        affected.services.extend(services);
    }

    fn compile_pod(&mut self, id: &ObjectRef, affected: &mut Affected) -> bool {
        let marks = self.namespaces.get(&id.namespace).map_or(Marks::default(), |namespace| namespace.marks);
        let surroundings = Surroundings {
            node: &self.node,
            marks,
            policies: &self.mesh_policies,
            mesh: self.defaults.mesh_namespace.as_ref(),
            mtls: self.defaults.mtls,
            trust_domain: self.defaults.trust_domain.as_ref(),
            taken: &self.snapshot.workloads,
        };
        let (old, new) = self.pods.compile(id, &surroundings);
        let of = |workload: &Option<Arc<model::Workload>>| {
            workload.as_ref().map(|it| it.addresses.clone()).unwrap_or_default()
        };
        let is_here = new.as_ref().is_some_and(|new| new.node.as_ref() == Some(&self.node.name));
        if is_here || self.here.has(id) {
            self.here.note(id, is_here);
            affected.access.insert(id.clone());
        }
        let (old_addresses, new_addresses) = (of(&old), of(&new));
        for &address in old_addresses.iter().filter(|address| !new_addresses.contains(address)) {
            self.claims.release(address, &Claimant::Pod(id.clone()));
        }
        let rank = self.pods.rank(id);
        for &address in &new_addresses {
            self.claims.claim(address, Claimant::Pod(id.clone()), rank);
        }
        // Also where the workload is what it was, an older or terminating pod may have lost its address.
        affected.addresses.extend(old_addresses.into_iter().chain(new_addresses));
        if old == new {
            return false;
        }
        let Snapshot { services, fronts, .. } = &mut self.snapshot;
        self.askers.note(id, new.as_deref(), &self.node, services, fronts);
        affected.services.extend(self.services.of_pod(id, &self.pods));
        if let Some(old) = old.filter(|old| new.as_ref().is_none_or(|new| new.uid != old.uid)) {
            self.snapshot.workloads.remove(&old.uid);
            self.snapshot.access.remove(&old.uid);
            self.snapshot.tokens.remove(&old.uid);
        }
        if let Some(new) = new {
            self.snapshot.workloads.insert(new.uid.clone(), new);
        }
        true
    }

    /// What callers of the pod are judged by. True if that is something else than before.
    fn compile_access(&mut self, id: &ObjectRef, addresses: &mut BTreeSet<IpAddr>) -> bool {
        let Some(uid) = self.pods.workload(id).map(|workload| workload.uid.clone()) else { return false };
        let is_wanted = |workload: &Arc<model::Workload>| workload.enrolment.is_wanted();
        let is_asked = self.here.has(id) && self.pods.workload(id).is_some_and(is_wanted);
        let pod = self.pods.get(id).filter(|_| is_asked);
        let before = self.snapshot.access.get(&uid).map(Arc::as_ref);
        let new = pod.map(|pod| self.access.of_pod(pod, before)).filter(|set| !set.policies().is_empty());
        let mesh = self.defaults.mesh_namespace.as_ref();
        let tokens = pod.and_then(|pod| self.mesh_policies.tokens_of(pod, mesh));
        // What the pod's endpoints have of it stays as it was: nobody asks them.
        let guarded = new.as_ref().is_some_and(|set| set.can_deny()) || tokens.is_some();
        let by_request = new.as_ref().is_some_and(|set| set.is_about_requests()) || tokens.is_some();
        if let Some(workload) = self.pods.guard(id, guarded, by_request) {
            addresses.extend(&workload.addresses);
            self.snapshot.workloads.insert(uid.clone(), workload);
        }
        let Snapshot { access, tokens: of_pods, .. } = &mut self.snapshot;
        let is_other = put(access, &uid, new, Arc::ptr_eq);
        // Policies that say the same of tokens may be others in all else.
        put(of_pods, &uid, tokens, PartialEq::eq) || is_other
    }

    fn compile_service(&mut self, id: &ObjectRef, addresses: &mut BTreeSet<IpAddr>) -> bool {
        let world = endpoints::World { node: &self.node, pods: &self.pods, claims: &self.claims };
        let is_policed = self.access.is_target(id);
        let (old, new) = self.services.compile(id, &world, &mut self.loads, &self.policies, is_policed);
        let of = |service: &Option<Arc<model::Service>>| {
            service.as_ref().map(|it| it.addresses.clone()).unwrap_or_default()
        };
        let unchanged = match (&old, &new) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if unchanged {
            return false;
        }
        let (old_addresses, new_addresses) = (of(&old), of(&new));
        for &address in old_addresses.iter().filter(|address| !new_addresses.contains(address)) {
            self.claims.release(address, &Claimant::Service(id.clone()));
        }
        for &address in &new_addresses {
            self.claims.claim(address, Claimant::Service(id.clone()), Default::default());
        }
        addresses.extend(old_addresses.into_iter().chain(new_addresses));
        limits::update(&mut self.snapshot.limits, &self.node, old.as_deref(), new.as_deref());
        self.askers.update(&mut self.snapshot.fronts, old.as_deref(), new.as_deref());
        match new {
            Some(new) => drop(self.snapshot.services.insert(id.clone(), new)),
            None => drop(self.snapshot.services.remove(id)),
        }
        true
    }

    /// Puts the Service's routes together and into the snapshot. True if that changed it.
    fn attach_routes(&mut self, service: &ObjectRef, addresses: &mut BTreeSet<IpAddr>) -> bool {
        let new = self.routes.attach(service);
        let old = self.snapshot.routes.get(service);
        if old.map(Arc::as_ref) == new.as_ref() {
            return false;
        }
        if old.is_some() != new.is_some() {
            // A route makes a Service known to the mesh.
            addresses.extend(self.services.compiled(service).into_iter().flat_map(|it| &it.addresses));
        }
        match new {
            Some(new) => drop(self.snapshot.routes.insert(service.clone(), Arc::new(new))),
            None => drop(self.snapshot.routes.remove(service)),
        }
        true
    }

    /// Brings what is wrong up to date, of what may stand otherwise than before.
    fn say(&mut self) {
        let routes = self.routes.take_unsaid().into_iter();
        let of_routes = routes.map(|id| (Key::from(&id), self.routes.problems(&id)));
        let policies = self.policies.take_unsaid().into_iter();
        let of_policies = policies.map(|key| {
            let problems = self.policies.problems(&key);
            (key, problems)
        });
        let access = self.access.take_unsaid().into_iter();
        let of_access = access.map(|key| {
            let mesh = self.defaults.mesh_namespace.as_ref();
            let problems = self.access.problems(&key, mesh, &self.services, (&self.here, &self.pods));
            (key, problems)
        });
        let mesh_policies = self.mesh_policies.take_unsaid().into_iter();
        let of_mesh_policies = mesh_policies.map(|key| {
            let problems = self.mesh_policies.problems(&key);
            (key, problems)
        });
        let said = of_routes.chain(of_policies).chain(of_access).chain(of_mesh_policies);
        let said: BTreeMap<Key, Vec<Problem>> = said.collect();
        self.restated = said.keys().cloned().collect();
        for (key, problems) in said {
            let is_new = match problems.is_empty() {
                true => self.problems.remove(&key).is_some(),
                false => self.problems.insert(key, problems.clone()) != Some(problems),
            };
            self.has_new_problems |= is_new;
        }
    }

    /// Puts the address's owner into the snapshot. True if that changed it.
    fn publish_address(&mut self, address: IpAddr) -> bool {
        let destination = self.claims.owner(address).and_then(|owner| match owner {
            Claimant::Pod(id) => self.pods.workload(id).cloned().map(Destination::Workload),
            Claimant::Service(id) => self.services.compiled(id).cloned().map(Destination::Service),
        });
        let Some(destination) = destination else {
            self.snapshot.captured.remove(&address);
            return self.snapshot.destinations.remove(&address).is_some();
        };
        if self.is_captured(&destination) {
            self.snapshot.captured.insert(address);
        } else {
            self.snapshot.captured.remove(&address);
        }
        let same = match (self.snapshot.destinations.get(&address), &destination) {
            (Some(Destination::Workload(old)), Destination::Workload(new)) => Arc::ptr_eq(old, new),
            (Some(Destination::Service(old)), Destination::Service(new)) => Arc::ptr_eq(old, new),
            _ => false,
        };
        if !same {
            self.snapshot.destinations.insert(address, destination);
        }
        !same
    }

    fn is_captured(&self, destination: &Destination) -> bool {
        match destination {
            Destination::Workload(workload) => workload.enrolment.is_wanted(),
            Destination::Service(service) => {
                let is_api_server = &*service.id.namespace == "default" && &*service.id.name == "kubernetes";
                let enrolled = |endpoint: &model::Endpoint| {
                    endpoint.workload.as_ref().is_some_and(|workload| workload.enrolment.is_wanted())
                };
                let is_encrypted = |port: &model::ServicePort| port.traffic.tls.is_some();
                let is_known = self.snapshot.routes.contains_key(&service.id)
                    || service
                        .ports
                        .iter()
                        .any(|port| is_encrypted(port) || port.endpoints.iter().any(enrolled));
                is_known && !is_api_server
            }
        }
    }
}

impl Change {
    fn kind(&self) -> Kind {
        match self {
            Self::Put(document) => document.kind(),
            Self::Remove(key) => key.kind,
        }
    }
}

/// Has the pod have this. True if that is something else than before.
fn put<T>(
    all: &mut OrdMap<WorkloadUid, Arc<T>>,
    pod: &WorkloadUid,
    new: Option<Arc<T>>,
    is_same: impl Fn(&Arc<T>, &Arc<T>) -> bool,
) -> bool {
    match (all.get(pod), new) {
        (None, None) => false,
        (Some(old), Some(new)) if is_same(old, &new) => false,
        (_, Some(new)) => {
            all.insert(pod.clone(), new);
            true
        }
        (_, None) => all.remove(pod).is_some(),
    }
}

/// Whether all is the same that routes and policies ask of a Service.
fn is_same_to_routes(a: &document::Service, b: &document::Service) -> bool {
    let ports = |service: &document::Service| {
        service.ports.iter().map(|port| (port.name.clone(), port.port)).collect::<Vec<_>>()
    };
    a.addresses.is_empty() == b.addresses.is_empty() && ports(a) == ports(b)
}

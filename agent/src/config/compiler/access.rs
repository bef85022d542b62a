//! The AuthorizationPolicies, and what each pod of this node has of them: by its labels, or because a Service leads to it that a
//! policy is for. Pods with the same policies share what they have, and what stays the same is the same.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Weak};

use super::here::{Here, Scope, Selecting};
use super::index::{reindex, take_out};
use super::pods::Pods;
use super::services::Services;
use crate::config::document::{self, Attachment, AuthorizationPolicy};
use crate::config::resolve::{self, Stated};
use crate::config::{FieldPath, Key, Kind, Problem};
use crate::model::{Name, ObjectRef};
use crate::policy::authorization::{Applied, Policy, Set};

/// Ports of a pod.
type Ports = BTreeSet<u16>;

/// All AuthorizationPolicies.
#[derive(Debug, Default)]
pub(super) struct AccessPolicies {
    entries: HashMap<ObjectRef, Arc<AuthorizationPolicy>>,
    /// Those that are for pods of their namespace, all or by labels.
    selecting: Selecting,
    /// Those that are for all pods of the mesh.
    of_mesh: BTreeSet<ObjectRef>,
    by_service: HashMap<ObjectRef, HashSet<ObjectRef>>,
    /// The pods of this node, and which ports of them, that a Service leads to that a policy is for.
    behind: HashMap<ObjectRef, BTreeMap<ObjectRef, Ports>>,
    /// These Services, by pod.
    fronting: HashMap<ObjectRef, BTreeSet<ObjectRef>>,
    /// What pods have, by what it consists of.
    made: HashMap<Vec<Same>, Weak<Set>>,
    /// What is to be said anew.
    unsaid: BTreeSet<Key>,
}

/// A policy at ports, known again by where it lies and not by all that it says.
#[derive(Clone, Debug)]
struct Same(Applied);

/// Whom a change concerns.
#[derive(Debug, Default)]
pub(super) struct Concerned {
    pub(super) pods: Vec<ObjectRef>,
    pub(super) services: Vec<ObjectRef>,
}

impl AccessPolicies {
    /// Takes the policy in, or out.
    pub(super) fn put(
        &mut self,
        id: &ObjectRef,
        new: Option<Arc<AuthorizationPolicy>>,
        mesh: Option<&Name>,
        here: &Here,
        pods: &Pods,
    ) -> Concerned {
        let old = self.entries.remove(id);
        if old == new {
            self.entries.extend(old.map(|old| (id.clone(), old)));
            return Concerned::default();
        }
        self.unsaid.insert(Key::of(Kind::AuthorizationPolicy, id));
        let new = new.map(|new| keep_policy(new, old.as_deref()));
        let mut concerned = Concerned::default();
        for policy in [old.as_deref(), new.as_deref()].into_iter().flatten() {
            match &policy.attached {
                Attachment::Services(targets) => {
                    let services = targets.iter().map(|target| target.service.clone());
                    concerned.services.extend(services);
                }
                attached => {
                    if let Some(scope) = scope(id, attached, mesh) {
                        concerned.pods.extend(here.within(scope, pods));
                    }
                }
            }
        }
        let behind = concerned.services.iter().filter_map(|service| self.behind.get(service));
        concerned.pods.extend(behind.flat_map(BTreeMap::keys).cloned());

        let whole = document::Selector::default();
        let now = new.as_ref().and_then(|new| scope(id, &new.attached, mesh));
        match now {
            Some(Scope::Mesh) => drop(self.of_mesh.insert(id.clone())),
            _ => drop(self.of_mesh.remove(id)),
        }
        self.selecting.put(
            id,
            match now {
                Some(Scope::Namespace(_)) => Some(&whole),
                Some(Scope::Pods(_, selector)) => Some(selector),
                Some(Scope::Mesh) | None => None,
            },
        );
        reindex(&mut self.by_service, id, &services_of(old.as_deref()), &services_of(new.as_deref()));
        self.entries.extend(new.map(|new| (id.clone(), new)));
        concerned
    }

    /// Whether a policy is for the Service.
    pub(super) fn is_target(&self, service: &ObjectRef) -> bool {
        self.by_service.contains_key(service)
    }

    /// The Service has come, changed or gone, or leads to other pods: what is said of the policies that are for it, or for one of the pods,
    /// may be something else.
    pub(super) fn service_changed<'a>(
        &mut self,
        service: &ObjectRef,
        pods: impl Iterator<Item = &'a document::Pod>,
    ) {
        let selecting = pods.flat_map(|pod| self.selecting.of(&pod.id.namespace, &pod.labels));
        let policies = self.by_service.get(service).into_iter().flatten().cloned().chain(selecting);
        let said: Vec<Key> = policies.chain(self.of_all_requests()).map(said).collect();
        self.unsaid.extend(said);
    }

    /// Which pods policies select may be others, and so may the Services that lead to them: the pod had these labels and has those.
    pub(super) fn pod_changed(
        &mut self,
        namespace: &Name,
        before: Option<&document::Pod>,
        now: Option<&document::Pod>,
    ) {
        if before.map(|pod| &pod.labels) == now.map(|pod| &pod.labels) {
            return;
        }
        // No Service leads to what has no labels: for agents that is all but the pods of their nodes.
        let is_led_to = [before, now].into_iter().flatten().any(|pod| !pod.labels.is_empty());
        let of_mesh: Vec<_> = if is_led_to { self.of_all_requests().collect() } else { Vec::new() };
        let [before, now] = self.selecting.of_both(namespace, before, now);
        self.unsaid.extend(before.union(&now).cloned().chain(of_mesh).map(said));
    }

    /// The policies for the whole mesh that ask for requests: of which something is to be said where there are none.
    fn of_all_requests(&self) -> impl Iterator<Item = ObjectRef> {
        let asks = |id: &&ObjectRef| self.entries.get(*id).is_some_and(|it| resolve::asks_for_requests(it));
        self.of_mesh.iter().filter(asks).cloned()
    }

    /// Works out again which pods of this node are behind the Service; those for which that changes something.
    pub(super) fn look_behind(
        &mut self,
        service: &ObjectRef,
        services: &Services,
        look: impl FnOnce(&Services) -> BTreeMap<ObjectRef, Ports>,
    ) -> Vec<ObjectRef> {
        let new = if self.is_target(service) { look(services) } else { BTreeMap::new() };
        let old = self.behind.remove(service).unwrap_or_default();
        for gone in old.keys().filter(|pod| !new.contains_key(*pod)) {
            take_out(&mut self.fronting, gone, |fronts| fronts.remove(service), BTreeSet::is_empty);
        }
        for come in new.keys() {
            self.fronting.entry(come.clone()).or_default().insert(service.clone());
        }
        let all: BTreeSet<&ObjectRef> = old.keys().chain(new.keys()).collect();
        let others = all.into_iter().filter(|pod| old.get(*pod) != new.get(*pod)).cloned().collect();
        if !new.is_empty() {
            self.behind.insert(service.clone(), new);
        }
        others
    }

    /// What the pod has; the same as before, and as others have, where it is the same. Of what it had `before` what is left is not made again.
    pub(super) fn of_pod(&mut self, pod: &document::Pod, before: Option<&Set>) -> Arc<Set> {
        let mut policies: BTreeMap<ObjectRef, Option<Ports>> = BTreeMap::new();
        let selecting = self.selecting.of(&pod.id.namespace, &pod.labels);
        policies.extend(selecting.into_iter().chain(self.of_mesh.iter().cloned()).map(|id| (id, None)));
        for service in self.fronting.get(&pod.id).into_iter().flatten() {
            let ports = self.behind.get(service).and_then(|pods| pods.get(&pod.id));
            for id in self.by_service.get(service).into_iter().flatten() {
                let all = policies.entry(id.clone()).or_insert_with(|| Some(Ports::new()));
                all.get_or_insert_default().extend(ports.into_iter().flatten());
            }
        }
        let applied = policies.into_iter().filter_map(|(id, ports)| {
            let policy = self.entries.get(&id)?.policy.clone();
            Some(Same(Applied { policy, ports: ports.map(|ports| ports.into_iter().collect()) }))
        });
        let key: Vec<Same> = applied.collect();
        if let Some(access) = self.made.get(&key).and_then(Weak::upgrade) {
            return access;
        }
        let all = key.iter().map(|same| same.0.clone()).collect();
        let access = Arc::new(match before {
            Some(before) => before.with(all),
            None => Set::new(all),
        });
        self.made.insert(key, Arc::downgrade(&access));
        access
    }

    /// Forgets what no pod has any more.
    pub(super) fn sweep(&mut self) {
        self.made.retain(|_, access| access.strong_count() > 0);
    }

    /// Whether nothing is left of any policy.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let Self { entries, selecting, of_mesh, by_service, behind, fronting, made, unsaid } = self;
        let has_no_policy = entries.is_empty() && selecting.is_empty() && of_mesh.is_empty();
        has_no_policy
            && by_service.is_empty()
            && behind.is_empty()
            && fronting.is_empty()
            && made.is_empty()
            && unsaid.is_empty()
    }

    /// The policies of which something else may be to be said since this was asked last.
    pub(super) fn take_unsaid(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.unsaid)
    }

    /// What is wrong with the policy in the world as it is, beside what is wrong with how it is written.
    pub(super) fn problems(
        &self,
        key: &Key,
        mesh: Option<&Name>,
        services: &Services,
        (here, pods): (&Here, &Pods),
    ) -> Vec<Problem> {
        let Some(policy) = self.entries.get(&key.id()) else { return Vec::new() };
        let missing = resolve::missing_targets(policy, |id| services.document(id).map(Arc::as_ref));
        let mut problems: Vec<Problem> = missing
            .map(|(target, message)| {
                let field = FieldPath::new(["spec", "targetRefs"]).index(target.index).key("name");
                Problem::new(field, message)
            })
            .collect();
        // Of other nodes' pods their agents tell.
        let of_here = |scope: Scope<'_>| match scope {
            Scope::Mesh => behind_opaque(services, pods, |pod| here.has(pod)),
            scope => here.within(scope, pods),
        };
        let leading = leading_to(policy, mesh, services, pods, of_here);
        let not_enforced = resolve::not_enforced(policy, leading.iter().map(Arc::as_ref));
        let rules = FieldPath::new(["spec", "rules"]);
        problems.extend(not_enforced.map(|refusal| Problem::new(rules, refusal.message)));
        if policy.policy.invalid.is_some() {
            let what = resolve::what_is_denied(policy);
            let message = format!("this version cannot be used: {what}");
            problems.insert(0, Problem::new(FieldPath::default(), message));
        }
        problems
    }

    /// How the policy stands, for its status.
    pub(super) fn stated(
        &self,
        key: &Key,
        mesh: Option<&Name>,
        services: &Services,
        pods: &Pods,
    ) -> Option<Stated> {
        let policy = self.entries.get(&key.id())?;
        let selects_nothing = match scope(&key.id(), &policy.attached, mesh) {
            Some(Scope::Mesh) | None => false,
            Some(scope) => selected(scope, pods).next().is_none(),
        };
        let service = |id: &ObjectRef| services.document(id).map(Arc::as_ref);
        let of_scope = |scope: Scope<'_>| match scope {
            Scope::Mesh => behind_opaque(services, pods, |_| true),
            scope => selected(scope, pods).map(|pod| pod.id.clone()).collect(),
        };
        let leading = leading_to(policy, mesh, services, pods, of_scope);
        Some(resolve::authorization(policy, selects_nothing, service, leading.iter().map(Arc::as_ref)))
    }
}

/// Of each Service with a port that is declared to carry no HTTP, one of these pods that it leads to.
fn behind_opaque(services: &Services, pods: &Pods, is_one: impl Fn(&ObjectRef) -> bool) -> Vec<ObjectRef> {
    let behind = |id| services.selected(id, pods).find(|pod| is_one(&pod.id)).map(|pod| pod.id.clone());
    services.opaque().filter_map(behind).collect()
}

fn said(id: ObjectRef) -> Key {
    Key::of(Kind::AuthorizationPolicy, &id)
}

/// The pods of the scope, wherever they are, where it is less than the whole mesh.
fn selected<'a>(scope: Scope<'a>, pods: &'a Pods) -> impl Iterator<Item = &'a Arc<document::Pod>> {
    let (namespace, selector) = match scope {
        Scope::Mesh => (None, None),
        Scope::Namespace(namespace) => (Some(namespace), None),
        Scope::Pods(namespace, selector) => (Some(namespace), Some(selector)),
    };
    let all = namespace.into_iter().flat_map(|namespace| pods.documents_in(namespace));
    all.filter(move |pod| selector.is_none_or(|selector| selector.matches(&pod.labels)))
}

/// The Services that a policy is for, or that lead to the pods that it is for, where it asks for requests.
fn leading_to(
    policy: &AuthorizationPolicy,
    mesh: Option<&Name>,
    services: &Services,
    pods: &Pods,
    within: impl FnOnce(Scope<'_>) -> Vec<ObjectRef>,
) -> Vec<Arc<document::Service>> {
    if !resolve::asks_for_requests(policy) {
        return Vec::new();
    }
    let ids: BTreeSet<ObjectRef> = match scope(&policy.key.id(), &policy.attached, mesh) {
        Some(scope) => within(scope).iter().flat_map(|pod| services.selecting(pod, pods)).collect(),
        None => services_of(Some(policy)).into_iter().collect(),
    };
    ids.iter().filter_map(|id| services.document(id).cloned()).collect()
}

/// The policy itself is the same while only what is around it changes: whoever has made something of it need not do so again.
fn keep_policy(new: Arc<AuthorizationPolicy>, old: Option<&AuthorizationPolicy>) -> Arc<AuthorizationPolicy> {
    match old {
        Some(old) if old.policy == new.policy => {
            Arc::new(AuthorizationPolicy { policy: old.policy.clone(), ..(*new).clone() })
        }
        _ => new,
    }
}

/// The pods that it is for; None where it is for Services.
fn scope<'a>(id: &'a ObjectRef, attached: &'a Attachment, mesh: Option<&Name>) -> Option<Scope<'a>> {
    match attached {
        Attachment::All if mesh == Some(&id.namespace) => Some(Scope::Mesh),
        Attachment::All => Some(Scope::Namespace(&id.namespace)),
        Attachment::Pods(selector) => Some(Scope::Pods(&id.namespace, selector)),
        Attachment::Services(_) => None,
    }
}

fn services_of(policy: Option<&AuthorizationPolicy>) -> HashSet<ObjectRef> {
    match policy.map(|policy| &policy.attached) {
        Some(Attachment::Services(targets)) => targets.iter().map(|target| target.service.clone()).collect(),
        _ => HashSet::new(),
    }
}

impl PartialEq for Same {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0.policy, &other.0.policy) && self.0.ports == other.0.ports
    }
}

impl Eq for Same {}

impl Hash for Same {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::<Policy>::as_ptr(&self.0.policy).hash(state);
        self.0.ports.hash(state);
    }
}

//! The routes with what belongs to them: the grants, who is to be worked out again when a Service or a grant changes, and
//! what is wrong with them in the world as it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use super::services::Services;
use crate::config::document::{ReferenceGrant, Route, RouteSpec, RuleFilters};
use crate::config::resolve::{self, Conflict, ParentStatus, Resolution, Surroundings};
use crate::config::{FieldPath, Key, Problem};
use crate::model::{Name, ObjectRef};
use crate::route::{RouteKind, RouteRef, ServiceRoutes};

/// All routes and grants.
#[derive(Debug, Default)]
pub(super) struct Routes {
    entries: HashMap<RouteRef, Entry>,
    grants: HashMap<Name, BTreeMap<Name, Arc<ReferenceGrant>>>,
    /// Routes by the Services that they name, as parents, as backends or for mirrors.
    by_service: HashMap<ObjectRef, HashSet<RouteRef>>,
    /// Routes by the namespaces, other than their own, of Services that they refer to.
    by_foreign: HashMap<Name, HashSet<RouteRef>>,
    /// Routes by the Services that take them.
    attached: HashMap<ObjectRef, BTreeSet<RouteRef>>,
    conflicts: HashMap<ObjectRef, Vec<Conflict>>,
    /// What is to be said anew.
    unsaid: BTreeSet<RouteRef>,
    /// What was said anew the last time.
    restated: BTreeSet<RouteRef>,
    problems: BTreeMap<Key, Vec<Problem>>,
}

#[derive(Debug, Default)]
struct Entry {
    /// As it was last well written.
    document: Option<Arc<Route>>,
    /// The version that there is now says something badly.
    is_bad: bool,
    resolution: Option<Resolution>,
}

impl Routes {
    /// Takes the route in. One that says something badly leaves the one before it in force. False if nothing is new.
    pub(super) fn put(&mut self, new: Arc<Route>) -> bool {
        let id = new.id.clone();
        let entry = self.entries.entry(id.clone()).or_default();
        let was_bad = std::mem::replace(&mut entry.is_bad, new.spec.is_none());
        if was_bad != entry.is_bad {
            self.unsaid.insert(id.clone());
        }
        if entry.is_bad || entry.document.as_ref() == Some(&new) {
            return was_bad != entry.is_bad;
        }
        let old = entry.document.replace(new.clone());
        self.index(&id, old.as_deref(), Some(&new));
        true
    }

    /// Takes the route out.
    pub(super) fn remove(&mut self, id: &RouteRef) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        entry.is_bad = false;
        let old = entry.document.take();
        self.unsaid.insert(id.clone());
        self.index(id, old.as_deref(), None);
    }

    /// Takes the grant in, or out; the routes that this concerns.
    pub(super) fn put_grant(&mut self, id: &ObjectRef, new: Option<Arc<ReferenceGrant>>) -> Vec<RouteRef> {
        let grants = self.grants.entry(id.namespace.clone()).or_default();
        let is_same = grants.get(&id.name) == new.as_ref();
        match new {
            Some(new) => drop(grants.insert(id.name.clone(), new)),
            None => drop(grants.remove(&id.name)),
        }
        if grants.is_empty() {
            self.grants.remove(&id.namespace);
        }
        if is_same {
            return Vec::new();
        }
        self.by_foreign.get(&id.namespace).into_iter().flatten().cloned().collect()
    }

    /// The routes that name the Service.
    pub(super) fn of_service(&self, service: &ObjectRef) -> impl Iterator<Item = RouteRef> {
        self.by_service.get(service).into_iter().flatten().cloned()
    }

    /// Works out again what the route comes to. The answer is the Services whose routes are others by that.
    pub(super) fn resolve(&mut self, id: &RouteRef, services: &Services) -> BTreeSet<ObjectRef> {
        let document = self.entries.get(id).and_then(|entry| entry.document.clone());
        let new = document.and_then(|route| {
            let service = |id: &ObjectRef| services.document(id).map(Arc::as_ref);
            let is_granted = |kind: RouteKind, from: &Name, to: &ObjectRef| self.is_granted(kind, from, to);
            resolve::resolve(&route, &Surroundings { service: &service, is_granted: &is_granted })
        });
        let Some(entry) = self.entries.get_mut(id) else { return BTreeSet::new() };
        if entry.resolution == new {
            if entry.document.is_none() && !entry.is_bad {
                self.entries.remove(id);
            }
            return BTreeSet::new();
        }
        let services = |resolution: &Option<Resolution>| -> BTreeSet<ObjectRef> {
            resolution.iter().flat_map(Resolution::services).cloned().collect()
        };
        let (before, now) = (services(&entry.resolution), services(&new));
        entry.resolution = new;
        if entry.document.is_none() && !entry.is_bad {
            self.entries.remove(id);
        }
        for service in before.difference(&now) {
            take_out(&mut self.attached, service, |routes| routes.remove(id), BTreeSet::is_empty);
        }
        for service in now.difference(&before) {
            self.attached.entry(service.clone()).or_default().insert(id.clone());
        }
        self.unsaid.insert(id.clone());
        before.union(&now).cloned().collect()
    }

    /// Puts the routes of the Service together; none if it has no route.
    pub(super) fn attach(&mut self, service: &ObjectRef) -> Option<ServiceRoutes> {
        let routes = self.attached.get(service).into_iter().flatten();
        let resolved = routes.filter_map(|id| Some((id, self.entries.get(id)?.resolution.as_ref()?)));
        let (routes, conflicts) = resolve::attach(service, resolved);
        let before = match conflicts.is_empty() {
            true => self.conflicts.remove(service),
            false => self.conflicts.insert(service.clone(), conflicts.clone()),
        };
        let before = before.unwrap_or_default();
        if before != conflicts {
            self.unsaid.extend(before.into_iter().chain(conflicts).map(|conflict| conflict.route));
        }
        (!routes.ports.is_empty()).then_some(routes)
    }

    /// Brings what is wrong up to date. True if that changed it.
    pub(super) fn say(&mut self) -> bool {
        let mut is_new = false;
        let unsaid = std::mem::take(&mut self.unsaid);
        for id in &unsaid {
            let problems = self.problems_of(id);
            let key = Key::from(id);
            let before = match problems.is_empty() {
                true => self.problems.remove(&key),
                false => self.problems.insert(key.clone(), problems),
            };
            is_new |= before.as_ref() != self.problems.get(&key);
        }
        self.restated = unsaid;
        is_new
    }

    /// The routes that stand otherwise, in one thing or another, than before [`Self::say`] was called last.
    pub(super) fn restated(&self) -> &BTreeSet<RouteRef> {
        &self.restated
    }

    /// What is wrong with routes in the world as it is, beside what is wrong with how they are written.
    pub(super) fn problems(&self) -> &BTreeMap<Key, Vec<Problem>> {
        &self.problems
    }

    /// How the route stands with its parents.
    pub(super) fn statuses(&self, id: &RouteRef) -> Vec<ParentStatus> {
        let resolution = self.entries.get(id).and_then(|entry| entry.resolution.as_ref());
        let conflict = |service: &ObjectRef, port: u16| {
            let conflicts = self.conflicts.get(service)?;
            conflicts.iter().find(|it| it.route == *id && it.port == port).cloned()
        };
        resolution.map(|resolution| resolution.statuses(conflict)).unwrap_or_default()
    }

    fn problems_of(&self, id: &RouteRef) -> Vec<Problem> {
        let Some(entry) = self.entries.get(id) else { return Vec::new() };
        let mut problems = Vec::new();
        if entry.is_bad {
            let message = match entry.document {
                Some(_) => "this version cannot be used, and the last one that could stays in force",
                None => {
                    "this version cannot be used, and there was none before it: the route is not in force"
                }
            };
            problems.push(Problem::new(FieldPath::default(), message));
        }
        let Some(resolution) = &entry.resolution else { return problems };
        problems.extend(resolution.problems.iter().cloned());
        let services: BTreeSet<&ObjectRef> = resolution.services().collect();
        for service in services {
            let of_it = self.conflicts.get(service).into_iter().flatten().filter(|it| it.route == *id);
            problems.extend(of_it.map(|conflict| {
                let field = resolution.parent_field(service, conflict.port);
                Problem::new(field, format!("of the Service {service}, {conflict}"))
            }));
        }
        if entry.is_bad {
            // They are of fields that stand elsewhere now, or nowhere.
            problems.iter_mut().for_each(|problem| problem.field = FieldPath::default());
        }
        problems
    }

    fn is_granted(&self, kind: RouteKind, from: &Name, to: &ObjectRef) -> bool {
        let grants = self.grants.get(&to.namespace).into_iter().flat_map(BTreeMap::values);
        grants.into_iter().any(|grant| grant.allows(kind, from, &to.name))
    }

    fn index(&mut self, id: &RouteRef, old: Option<&Route>, new: Option<&Route>) {
        let services = |route: Option<&Route>| -> HashSet<ObjectRef> {
            let spec = route.and_then(|route| route.spec.as_ref());
            spec.into_iter().flat_map(named_services).cloned().collect()
        };
        let (old, new) = (services(old), services(new));
        let foreign = |services: &HashSet<ObjectRef>| -> HashSet<Name> {
            let namespaces = services.iter().map(|service| service.namespace.clone());
            namespaces.filter(|namespace| *namespace != id.id.namespace).collect()
        };
        reindex(&mut self.by_foreign, id, &foreign(&old), &foreign(&new));
        reindex(&mut self.by_service, id, &old, &new);
    }
}

/// The Services that a route names, some of them several times.
fn named_services(spec: &RouteSpec) -> impl Iterator<Item = &ObjectRef> {
    let of_rules = spec.rules.iter().flat_map(|rule| {
        let backends = rule.backends.iter();
        let of_backends = backends.flat_map(|it| std::iter::once(&it.to.id).chain(mirrored(&it.filters)));
        mirrored(&rule.filters).chain(of_backends)
    });
    spec.parents.iter().map(|parent| &parent.service).chain(of_rules)
}

fn mirrored(filters: &RuleFilters) -> impl Iterator<Item = &ObjectRef> {
    filters.mirrors.iter().map(|(to, _)| &to.id)
}

fn reindex<K: Clone + Eq + Hash>(
    index: &mut HashMap<K, HashSet<RouteRef>>,
    id: &RouteRef,
    old: &HashSet<K>,
    new: &HashSet<K>,
) {
    for gone in old.difference(new) {
        take_out(index, gone, |routes| routes.remove(id), HashSet::is_empty);
    }
    for come in new.difference(old) {
        index.entry(come.clone()).or_default().insert(id.clone());
    }
}

/// Takes something out of a set of an index, and the set with it if it is empty then.
fn take_out<K: Eq + Hash, S>(
    index: &mut HashMap<K, S>,
    key: &K,
    take: impl FnOnce(&mut S) -> bool,
    is_empty: impl FnOnce(&S) -> bool,
) {
    if let Some(set) = index.get_mut(key) {
        take(set);
        if is_empty(set) {
            index.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;

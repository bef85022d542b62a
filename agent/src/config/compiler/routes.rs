//! The routes with what belongs to them: the grants, who is to be worked out again when a Service or a grant changes, and
//! what is wrong with them in the world as it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::index::{reindex, take_out};
use super::last_good::{Brought, LastGood};
use super::services::Services;
use crate::config::Problem;
use crate::config::document::{ReferenceGrant, Route, RouteSpec, RuleFilters};
use crate::config::resolve::{self, Conflict, ParentStatus, Resolution, Surroundings};
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
}

#[derive(Debug, Default)]
struct Entry {
    route: LastGood<Route>,
    resolution: Option<Resolution>,
}

impl Routes {
    /// Takes the route in. One that says something badly leaves the one before it in force. False if nothing is new.
    pub(super) fn put(&mut self, new: Arc<Route>) -> bool {
        let id = new.id.clone();
        let is_good = new.spec.is_some();
        match self.entries.entry(id.clone()).or_default().route.put(&new, is_good) {
            Brought::Nothing => return false,
            Brought::Standing => drop(self.unsaid.insert(id)),
            Brought::Document(old) => {
                self.unsaid.insert(id.clone());
                self.index(&id, old.as_deref(), Some(&new));
            }
        }
        true
    }

    /// Takes the route out.
    pub(super) fn remove(&mut self, id: &RouteRef) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let old = entry.route.remove();
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
        let document = self.entries.get(id).and_then(|entry| entry.route.document().cloned());
        let new = document.and_then(|route| {
            let service = |id: &ObjectRef| services.document(id).map(Arc::as_ref);
            let is_granted = |kind: RouteKind, from: &Name, to: &ObjectRef| self.is_granted(kind, from, to);
            resolve::resolve(&route, &Surroundings { service: &service, is_granted: &is_granted })
        });
        let Some(entry) = self.entries.get_mut(id) else { return BTreeSet::new() };
        if entry.resolution == new {
            if entry.route.is_gone() {
                self.entries.remove(id);
            }
            return BTreeSet::new();
        }
        let services = |resolution: &Option<Resolution>| -> BTreeSet<ObjectRef> {
            resolution.iter().flat_map(Resolution::services).cloned().collect()
        };
        let (before, now) = (services(&entry.resolution), services(&new));
        entry.resolution = new;
        if entry.route.is_gone() {
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

    /// The routes that may stand otherwise, in one thing or another, since this was asked last.
    pub(super) fn take_unsaid(&mut self) -> BTreeSet<RouteRef> {
        std::mem::take(&mut self.unsaid)
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

    /// What is wrong with the route in the world as it is, beside what is wrong with how it is written.
    pub(super) fn problems(&self, id: &RouteRef) -> Vec<Problem> {
        let Some(entry) = self.entries.get(id) else { return Vec::new() };
        let mut problems = Vec::new();
        if let Some(resolution) = &entry.resolution {
            problems.extend(resolution.problems.iter().cloned());
            let services: BTreeSet<&ObjectRef> = resolution.services().collect();
            for service in services {
                let of_it = self.conflicts.get(service).into_iter().flatten().filter(|it| it.route == *id);
                problems.extend(of_it.map(|conflict| {
                    let field = resolution.parent_field(service, conflict.port);
                    Problem::new(field, format!("of the Service {service}, {conflict}"))
                }));
            }
        }
        entry.route.tell("route", &mut problems);
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

#[cfg(test)]
mod tests;

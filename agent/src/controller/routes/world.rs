//! The routes with what is around them, as the API server has told of them; and of which the status is to be looked at.
//!
//! What a route comes to is worked out by the compiler, which is the agents' own. It asks nobody.

use std::collections::{BTreeSet, HashMap, HashSet};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use kube::Resource;
use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use serde_json::Value;

use super::status::{self, Written};
use crate::config::{Change, Compiler, Document, Key, Kind, Problem};
use crate::model::NodeInfo;
use crate::route::RouteRef;

/// All that matters to routes.
pub(super) struct World {
    compiler: Compiler,
    changes: Vec<Change>,
    routes: HashMap<RouteRef, (String, Written)>,
    /// The objects of each kind that is known as a whole, and of one that is being listed those that have come so far.
    known: HashMap<Kind, HashSet<Key>>,
    listing: HashMap<Kind, HashSet<Key>>,
    /// Routes whose status may have to be another one.
    unsaid: BTreeSet<RouteRef>,
}

/// A status that is to be written, onto the route as it was when this was found and no other.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Write {
    pub(super) route: RouteRef,
    pub(super) resource_version: String,
    pub(super) parents: Vec<Value>,
}

/// What is followed. Without one of them a route might seem to refer to what is not there.
const KINDS: [Kind; 4] = [Kind::Service, Kind::ReferenceGrant, Kind::HttpRoute, Kind::GrpcRoute];

impl World {
    pub(super) fn new() -> Self {
        Self {
            // What routes come to is the same on every node.
            compiler: Compiler::new(NodeInfo { name: "".into(), zone: None }),
            changes: Vec::new(),
            routes: HashMap::new(),
            known: HashMap::new(),
            listing: HashMap::new(),
            unsaid: BTreeSet::new(),
        }
    }

    pub(super) fn take_service(&mut self, event: Event<Service>) {
        self.take(Kind::Service, event, |world, mut service| {
            // Which pods are behind it is nothing to a route.
            service.spec.get_or_insert_default().selector = None;
            if let Ok(document) = Document::service(&service, &mut Vec::new()) {
                world.changes.push(Change::Put(document));
            }
        });
    }

    pub(super) fn take_grant(&mut self, event: Event<DynamicObject>) {
        self.take(Kind::ReferenceGrant, event, |world, grant| {
            let grant = serde_json::to_value(grant).unwrap_or_default();
            if let Ok(document) = Document::reference_grant(&grant, &mut Vec::new()) {
                world.changes.push(Change::Put(document));
            }
        });
    }

    pub(super) fn take_http_route(&mut self, event: Event<DynamicObject>) {
        self.take(Kind::HttpRoute, event, |world, route| world.take_route(route, Document::http_route));
    }

    pub(super) fn take_grpc_route(&mut self, event: Event<DynamicObject>) {
        self.take(Kind::GrpcRoute, event, |world, route| world.take_route(route, Document::grpc_route));
    }

    /// Has the status of the route looked at once more.
    pub(super) fn look_again(&mut self, route: RouteRef) {
        self.unsaid.insert(route);
    }

    /// What is to be written, of the routes that are not to be left alone. Nothing as long as not all is known.
    pub(super) fn writes(&mut self, now: Timestamp, is_left_alone: impl Fn(&RouteRef) -> bool) -> Vec<Write> {
        if KINDS.iter().any(|kind| !self.known.contains_key(kind)) {
            return Vec::new();
        }
        self.compiler.apply(std::mem::take(&mut self.changes));
        self.unsaid.extend(self.compiler.restated_routes().iter().cloned());
        let unsaid: BTreeSet<_>;
        (self.unsaid, unsaid) = std::mem::take(&mut self.unsaid).into_iter().partition(is_left_alone);
        let write = |route: RouteRef| {
            let (resource_version, written) = self.routes.get(&route)?;
            let standing = self.compiler.route_statuses(&route);
            let parents = status::next(written, &standing, now)?;
            Some(Write { route, resource_version: resource_version.clone(), parents })
        };
        unsaid.into_iter().filter_map(write).collect()
    }

    fn take<K: Resource>(&mut self, kind: Kind, event: Event<K>, put: impl FnOnce(&mut Self, K)) {
        match event {
            Event::Init => drop(self.listing.insert(kind, HashSet::new())),
            Event::InitDone => {
                let listed = self.listing.remove(&kind).unwrap_or_default();
                let known = self.known.insert(kind, listed.clone()).unwrap_or_default();
                known.difference(&listed).for_each(|gone| self.forget(gone));
            }
            Event::Delete(object) => {
                let key = key(kind, &object);
                if let Some(known) = self.known.get_mut(&kind) {
                    known.remove(&key);
                }
                self.forget(&key);
            }
            Event::InitApply(object) => {
                self.listing.entry(kind).or_default().insert(key(kind, &object));
                put(self, object);
            }
            Event::Apply(object) => {
                if let Some(known) = self.known.get_mut(&kind) {
                    known.insert(key(kind, &object));
                }
                put(self, object);
            }
        }
    }

    fn take_route(
        &mut self,
        object: DynamicObject,
        read: fn(&Value, &mut Vec<Problem>) -> Result<Document, Problem>,
    ) {
        let generation = object.metadata.generation.unwrap_or_default();
        let resource_version = object.metadata.resource_version.clone().unwrap_or_default();
        let object = serde_json::to_value(object).unwrap_or_default();
        let mut problems = Vec::new();
        // What cannot be told from others has no status.
        let Ok(Document::Route(route)) = read(&object, &mut problems) else { return };
        let id = route.id.clone();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let parents = list(&object["spec"]["parentRefs"]).into_iter().enumerate();
        let is_service = |parent: &Value| parent["group"] == "" && parent["kind"] == "Service";
        let written = Written {
            generation,
            parents: parents.filter(|(_, parent)| is_service(parent)).collect(),
            problems,
            status: list(&object["status"]["parents"]),
        };
        self.routes.insert(id.clone(), (resource_version, written));
        self.unsaid.insert(id);
        self.changes.push(Change::Put(Document::Route(route)));
    }

    fn forget(&mut self, key: &Key) {
        if let Some(kind) = key.kind.route() {
            self.routes.remove(&RouteRef { kind, id: key.id() });
        }
        self.changes.push(Change::Remove(key.clone()));
    }
}

fn key<K: Resource>(kind: Kind, object: &K) -> Key {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    Key { kind, namespace: text(&object.meta().namespace), name: text(&object.meta().name) }
}

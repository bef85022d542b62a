//! The routes and policies with what is around them, as the API server has told of them; and of which the status is to be looked at.
//!
//! What they come to is worked out by the compiler, which is the agents' own. It asks nobody.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::{DynamicObject, PartialObjectMeta};
use kube::runtime::watcher::Event;
use serde_json::Value;

use super::status::{self, Form, Standing, Written};
use crate::config::{Change, Compiler, Custom, Defaults, Document, Key, Kind, Problem, Referred, resolve};
use crate::kubernetes::Untold;
use crate::model::{NodeInfo, ObjectRef};
use crate::route::RouteRef;

/// All that matters to routes and policies.
pub(super) struct World {
    compiler: Compiler,
    changes: Vec<Change>,
    /// What has a status.
    held: HashMap<Key, Held>,
    /// The objects of each kind that is known as a whole, and of one that is being listed those that have come so far.
    known: HashMap<Kind, HashSet<Key>>,
    listing: HashMap<Kind, HashSet<Key>>,
    referred: Referred,
    /// Whose status may have to be another one.
    unsaid: BTreeSet<Key>,
}

/// An object that has a status.
struct Held {
    /// That which it was read in: the API server may not have the newest.
    version: &'static str,
    resource_version: String,
    written: Written,
}

/// A status that is to be written, onto the object as it was when this was found and no other.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Write {
    pub(super) key: Key,
    pub(super) version: &'static str,
    pub(super) resource_version: String,
    /// Where in the status the entries stand.
    pub(super) list: &'static str,
    pub(super) entries: Vec<Value>,
}

impl World {
    /// Where the mesh is installed in this namespace.
    pub(super) fn new(mesh_namespace: &str) -> Self {
        let defaults = Defaults { mesh_namespace: Some(mesh_namespace.into()), ..Defaults::default() };
        Self {
            // What they come to is the same on every node.
            compiler: Compiler::new(NodeInfo { name: "".into(), zone: None }).with_defaults(defaults),
            changes: Vec::new(),
            held: HashMap::new(),
            known: HashMap::new(),
            listing: HashMap::new(),
            referred: Referred::default(),
            unsaid: BTreeSet::new(),
        }
    }

    pub(super) fn take_service(&mut self, event: Event<Service>) {
        self.take(Kind::Service, event, |world, service| {
            if let Ok(mut document) = Document::service(&service, &mut Vec::new()) {
                // Which pods it leads to is asked, and what their endpoints are is not.
                if let Document::Service(service) = &mut document {
                    Arc::make_mut(service).is_sliced = true;
                }
                world.changes.push(Change::Put(document));
            }
        });
    }

    pub(super) fn take_pod(&mut self, event: Event<PartialObjectMeta<Pod>>) {
        self.take(Kind::Pod, event, |world, pod| {
            // By their labels policies select them; all else of them is nothing to anybody here.
            let ObjectMeta { name, namespace, labels, .. } = pod.metadata;
            let metadata = ObjectMeta { name, namespace, labels, ..ObjectMeta::default() };
            let pod = Pod { metadata, ..Pod::default() };
            if let Ok(document) = Document::pod(&pod, &mut Vec::new()) {
                world.changes.push(Change::Put(document));
            }
        });
    }

    /// What the API server says of a ConfigMap that something refers to.
    pub(super) fn take_config_map(&mut self, id: ObjectRef, told: Result<Option<ConfigMap>, Untold>) {
        let document = told.map(|it| it.and_then(|it| Document::config_map(&it).ok()));
        self.changes.extend(self.referred.answer(id, document));
    }

    /// The ConfigMaps that something refers to.
    pub(super) fn config_maps(&self) -> &BTreeSet<ObjectRef> {
        self.referred.wanted()
    }

    pub(super) fn take_object(&mut self, custom: &Custom, event: Event<DynamicObject>) {
        let Custom { kind, read, .. } = *custom;
        self.take(kind, event, |world, object| world.put(kind, object, read));
    }

    /// Has this status looked at once more.
    pub(super) fn look_again(&mut self, key: Key) {
        self.unsaid.insert(key);
    }

    /// What is to be written, of the objects that are not to be left alone. Nothing as long as not all is known.
    pub(super) fn writes(&mut self, now: Timestamp, is_left_alone: impl Fn(&Key) -> bool) -> Vec<Write> {
        let mut kinds = Custom::ALL.into_iter().map(|custom| custom.kind).chain([Kind::Service, Kind::Pod]);
        if kinds.any(|kind| !self.known.contains_key(&kind)) {
            return Vec::new();
        }
        self.compiler.apply(std::mem::take(&mut self.changes));
        self.changes = self.referred.refer(&self.compiler);
        // Of what is asked for just now it would be said that it is not there.
        let is_known = self.referred.is_complete();
        let is_left_alone = |key: &Key| is_left_alone(key) || key.kind == Kind::BackendTlsPolicy && !is_known;
        self.unsaid.extend(self.compiler.restated().iter().cloned());
        let unsaid: BTreeSet<_>;
        (self.unsaid, unsaid) = std::mem::take(&mut self.unsaid).into_iter().partition(is_left_alone);
        let write = |key: Key| {
            let Held { version, resource_version, written } = self.held.get(&key)?;
            let standing: Vec<Standing> = match (key.kind, key.kind.route()) {
                (_, Some(kind)) => {
                    let route = RouteRef { kind, id: key.id() };
                    self.compiler.route_statuses(&route).into_iter().map(Standing::from).collect()
                }
                (Kind::AuthorizationPolicy | Kind::MeshPolicy, None) => {
                    self.compiler.stated(&key).into_iter().map(Standing::from).collect()
                }
                (_, None) => self.compiler.policy_statuses(&key).into_iter().map(Standing::from).collect(),
            };
            let entries = status::next(written, &standing, now)?;
            let resource_version = resource_version.clone();
            Some(Write { key, version, resource_version, list: written.form.list, entries })
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

    fn put(
        &mut self,
        kind: Kind,
        object: DynamicObject,
        read: fn(&Value, &mut Vec<Problem>) -> Result<Document, Problem>,
    ) {
        let generation = object.metadata.generation.unwrap_or_default();
        let resource_version = object.metadata.resource_version.clone().unwrap_or_default();
        let api_version = object.types.as_ref().map_or("", |types| &types.api_version);
        let version = api_version.rsplit('/').next().unwrap_or_default();
        let versions = kind.versions();
        let version = versions.iter().find(|known| **known == version).unwrap_or(&versions[0]);
        let object = serde_json::to_value(object).unwrap_or_default();
        let mut problems = Vec::new();
        // What cannot be told from others has no status.
        let Ok(document) = read(&object, &mut problems) else { return };
        if !matches!(document, Document::ReferenceGrant(_)) {
            let form = Form::of(kind);
            let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
            let references = list(&object["spec"][form.references]).into_iter().enumerate();
            let is_service = |it: &Value| it["group"] == "" && it["kind"] == "Service";
            let written = Written {
                form,
                generation,
                references: references.filter(|(_, reference)| is_service(reference)).collect(),
                denies: match &document {
                    Document::AuthorizationPolicy(policy) => Some(resolve::what_is_denied(policy)),
                    Document::Policy(policy) if policy.key.kind == Kind::BackendTlsPolicy => {
                        Some("until then requests to what it is for are answered with an error".into())
                    }
                    _ => None,
                },
                problems,
                status: list(&object["status"][form.list]),
            };
            self.held.insert(document.key(), Held { version, resource_version, written });
            self.unsaid.insert(document.key());
        }
        self.changes.push(Change::Put(document));
    }

    fn forget(&mut self, key: &Key) {
        self.held.remove(key);
        self.changes.push(Change::Remove(key.clone()));
    }
}

fn key<K: Resource>(kind: Kind, object: &K) -> Key {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    Key { kind, namespace: text(&object.meta().namespace), name: text(&object.meta().name) }
}

//! What the API server has told, put together with where this node's pods live. It asks nobody and waits for nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use super::last_known::{self, Record, Remembered};
use super::policies::Policies;
use super::published::Takers;
use super::watch::News;
use super::{ClusterNews, Publication, Told};
use crate::config::document::Pod;
use crate::config::{Change, Compiler, Defaults, Document, Key, Kind, Referred, Rejection};
use crate::discovery::node::{Place, Sighting};
use crate::model::{Name, NodeInfo, ObjectRef, SpiffeId, WorkloadUid};
use crate::snapshot::Snapshot;

/// The documents as they came, and what was made of them.
#[derive(Debug)]
pub(super) struct World {
    node: NodeInfo,
    compiler: Compiler,
    changes: Vec<Change>,
    /// The objects there are, of each kind, and of one that is being listed anew those that have come so far.
    known: HashMap<Kind, HashSet<Key>>,
    listing: HashMap<Kind, HashSet<Key>>,
    complete: HashSet<Kind>,
    /// Of these, the ones that the API server has not told of yet: they are what they were then.
    recalled: HashSet<Kind>,
    as_of: Option<SystemTime>,
    /// What is written in objects of kinds that are not Kubernetes' own.
    written: HashMap<Key, Arc<str>>,
    referred: Referred,
    rejections: BTreeMap<Key, Vec<Rejection>>,
    has_new_rejections: bool,
    policies: Policies,
    /// Others may stand in the way of this node's pods.
    has_new_policies: bool,
    /// What policies do to the pods of this node that are to be in the mesh.
    complaints: Vec<Rejection>,
    /// The pods of this node as the API server has them.
    own: HashMap<ObjectRef, Arc<Pod>>,
    names: HashMap<WorkloadUid, ObjectRef>,
    places: HashMap<WorkloadUid, Place>,
    told: imbl::HashMap<WorkloadUid, Told>,
    /// The pods of other nodes that are published.
    takers: Takers,
    has_new_statements: bool,
    latest: Publication,
    is_published: bool,
}

impl World {
    pub(super) fn new(node: NodeInfo, defaults: Defaults) -> Self {
        Self {
            compiler: Compiler::new(node.clone()).with_defaults(defaults),
            node,
            changes: Vec::new(),
            known: HashMap::new(),
            listing: HashMap::new(),
            complete: HashSet::new(),
            recalled: HashSet::new(),
            as_of: None,
            written: HashMap::new(),
            referred: Referred::default(),
            rejections: BTreeMap::new(),
            has_new_rejections: false,
            policies: Policies::default(),
            has_new_policies: false,
            complaints: Vec::new(),
            own: HashMap::new(),
            names: HashMap::new(),
            places: HashMap::new(),
            told: imbl::HashMap::new(),
            takers: Takers::default(),
            has_new_statements: false,
            latest: Publication { snapshot: Arc::new(Snapshot::default()), rejections: Arc::new([]) },
            is_published: false,
        }
    }

    /// Takes in what a watch tells; in force with the next [`Self::apply`].
    pub(super) fn take(&mut self, news: News) {
        match news {
            News::Policy(policy) => {
                self.policies.put(policy);
                self.has_new_policies = true;
            }
            News::NoPolicy(id) => {
                self.policies.remove(&id);
                self.has_new_policies = true;
            }
            News::Policies(listed) => {
                self.policies.retain(|id| listed.contains(id));
                self.has_new_policies = true;
            }
            News::ConfigMap(id, told) => self.changes.extend(self.referred.answer(id, told)),
            News::Begins(kind) => drop(self.listing.insert(kind, HashSet::new())),
            News::Complete(kind) => {
                let listed = self.listing.remove(&kind).unwrap_or_default();
                let known = self.known.insert(kind, listed.clone()).unwrap_or_default();
                for gone in known.difference(&listed) {
                    self.forget(gone);
                }
                self.complete.insert(kind);
                self.recalled.remove(&kind);
                if self.recalled.is_empty() && self.as_of.take().is_some() {
                    self.has_new_statements = true;
                }
            }
            News::Written(key, text) => drop(self.written.insert(key, text)),
            News::Gone(key) => {
                for objects in [&mut self.known, &mut self.listing] {
                    if let Some(objects) = objects.get_mut(&key.kind) {
                        objects.remove(&key);
                    }
                }
                self.forget(&key);
            }
            News::Object(key, document, problems) => {
                let listing = self.listing.get_mut(&key.kind);
                listing.unwrap_or_else(|| self.known.entry(key.kind).or_default()).insert(key.clone());
                self.note(
                    &key,
                    problems.into_iter().map(|it| Rejection::of_object(key.clone(), it)).collect(),
                );
                match document {
                    Some(Document::Pod(pod)) => self.take_pod(pod),
                    Some(Document::Service(mut service)) => {
                        // Who its endpoints are is in its EndpointSlices, made by Kubernetes.
                        Arc::make_mut(&mut service).is_sliced = true;
                        self.changes.push(Change::Put(Document::Service(service)));
                    }
                    Some(document) => self.changes.push(Change::Put(document)),
                    // Too broken to be told from others: the last good one holds.
                    None => {}
                }
            }
        }
    }

    /// Takes in where a pod of this node lives.
    pub(super) fn sight(&mut self, sighting: Sighting) {
        let uid = match sighting {
            Sighting::Found(uid, place) => {
                self.places.insert(uid.clone(), place);
                uid
            }
            Sighting::Gone(uid) => {
                self.places.remove(&uid);
                uid
            }
        };
        if let Some(pod) = self.names.get(&uid).and_then(|id| self.own.get(id)) {
            self.changes.push(Change::Put(Document::Pod(self.placed(pod))));
        }
    }

    /// What is to be published, if that has changed. Nothing before each kind is known as a whole: pods whose Services or
    /// namespaces are not known yet would be taken for what they are not.
    pub(super) fn apply(&mut self) -> Option<ClusterNews> {
        if last_known::kinds().any(|kind| !self.complete.contains(&kind)) {
            return None;
        }
        let has_new_world = self.compiler.apply(std::mem::take(&mut self.changes));
        if has_new_world {
            self.latest.snapshot = Arc::new(self.compiler.snapshot());
            self.has_new_policies = true;
        }
        self.changes = self.referred.refer(&self.compiler);
        // What is referred to is waited for once, so that an agent that begins refuses nothing that the one before it has not.
        if !self.is_published && !self.referred.is_complete() {
            return None;
        }
        if std::mem::take(&mut self.has_new_policies) {
            self.complain();
        }
        self.has_new_rejections |= self.compiler.take_new_problems();
        let has_new_rejections = std::mem::take(&mut self.has_new_rejections);
        if has_new_rejections {
            let of_compiler = self.compiler.problems().iter().flat_map(|(key, problems)| {
                problems.iter().map(|problem| Rejection::of_object(key.clone(), problem.clone()))
            });
            let rejections = self.rejections.values().flatten().chain(&self.complaints).cloned();
            self.latest.rejections = rejections.chain(of_compiler).collect();
        }
        let has_new_statements = std::mem::take(&mut self.has_new_statements);
        let is_first = !std::mem::replace(&mut self.is_published, true);
        (is_first || has_new_world || has_new_rejections || has_new_statements).then(|| ClusterNews {
            publication: self.latest.clone(),
            published: self.takers.owners().clone(),
            told: self.told.clone(),
            as_of: self.as_of,
        })
    }

    /// Takes what was known once for what is, as far as the API server has not told of it as a whole; in force with the next
    /// [`Self::apply`], and until then.
    pub(super) fn recall(&mut self, remembered: Remembered) {
        let lists = std::mem::take(&mut self.listing);
        for record in remembered.records {
            let text = record.text();
            let (key, document, problems) = record.read();
            if let Some(Document::ConfigMap(_)) = document {
                self.changes.extend(self.referred.recall(key.id(), document));
            } else if !self.complete.contains(&key.kind)
                && !lists.get(&key.kind).is_some_and(|listed| listed.contains(&key))
            {
                self.written.extend(text.map(|text| (key.clone(), text)));
                self.take(News::Object(key, document, problems));
            }
        }
        self.listing = lists;
        self.recalled = last_known::kinds().filter(|kind| !self.complete.contains(kind)).collect();
        self.complete.extend(&self.recalled);
        self.as_of = (!self.recalled.is_empty()).then_some(remembered.as_of);
    }

    /// Whose certificates the pods of this node need in the world as it was.
    pub(super) fn identities(
        node: NodeInfo,
        defaults: Defaults,
        remembered: Remembered,
    ) -> BTreeSet<SpiffeId> {
        let name = node.name.clone();
        let mut world = Self::new(node, defaults);
        world.recall(remembered);
        world.apply();
        let workloads = world.latest.snapshot.workloads.values();
        let own = workloads.filter(|it| it.node.as_ref() == Some(&name) && it.enrolment.is_wanted());
        own.filter_map(|workload| workload.identity.clone()).collect()
    }

    /// All that there is to remember; nothing as long as not all of it is what the API server says.
    pub(super) fn remember(&self) -> Option<Vec<Record>> {
        let is_live = self.is_published && self.as_of.is_none();
        let own = self.compiler.documents().filter_map(Record::of);
        let written = self.written.iter().map(|(key, text)| Record::Custom(key.clone(), text.clone()));
        is_live.then(|| own.chain(written).collect())
    }

    /// Whether anything has been published.
    pub(super) fn is_published(&self) -> bool {
        self.is_published
    }

    /// The ConfigMaps that something refers to.
    pub(super) fn config_maps(&self) -> &BTreeSet<ObjectRef> {
        self.referred.wanted()
    }

    fn complain(&mut self) {
        let workloads = &self.latest.snapshot.workloads;
        let is_wanted = |pod: &&Arc<Pod>| {
            let workload = pod.uid.as_ref().and_then(|uid| workloads.get(uid));
            workload.is_some_and(|workload| workload.enrolment.is_wanted())
        };
        let mut complaints: Vec<_> =
            self.own.values().filter(is_wanted).flat_map(|pod| self.policies.complaints(pod)).collect();
        complaints.sort();
        self.has_new_rejections |= self.complaints != complaints;
        self.complaints = complaints;
    }

    fn take_pod(&mut self, mut pod: Arc<Pod>) {
        // Of the same name may have been another one, on another node.
        self.forget_pod(&pod.id);
        // What is said of a pod changes nothing of the world.
        let (condition, generation) = {
            let pod = Arc::make_mut(&mut pod);
            (pod.condition.take(), pod.generation.take())
        };
        if pod.node.as_ref() != Some(&self.node.name) {
            self.has_new_statements |= self.takers.put(&pod);
            let elsewhere = Arc::make_mut(&mut pod);
            // Whoever may annotate a pod may not say where on a node it lives.
            elsewhere.paths = None;
            // They are for policies, which each node reads for its own pods; of all that is kept of a pod they are the most.
            elsewhere.labels.clear();
            // The kubelet calls pods of its own node alone.
            elsewhere.probed_ports = Vec::new();
            self.changes.push(Change::Put(Document::Pod(pod)));
            return;
        }
        if let Some(uid) = &pod.uid {
            self.names.insert(uid.clone(), pod.id.clone());
            let enrolled = pod.published.map(|published| Name::from(published.as_str()));
            self.has_new_statements = true;
            self.told.insert(uid.clone(), Told { pod: pod.id.clone(), enrolled, condition, generation });
        }
        self.changes.push(Change::Put(Document::Pod(self.placed(&pod))));
        self.own.insert(pod.id.clone(), pod);
    }

    fn forget(&mut self, key: &Key) {
        self.note(key, Vec::new());
        self.written.remove(key);
        if key.kind == Kind::Pod {
            self.forget_pod(&key.id());
        }
        self.changes.push(Change::Remove(key.clone()));
    }

    /// What was known of the pod beside its document.
    fn forget_pod(&mut self, id: &ObjectRef) {
        if let Some(uid) = self.own.remove(id).and_then(|pod| pod.uid.clone()) {
            self.names.remove(&uid);
            self.told.remove(&uid);
            self.has_new_statements = true;
        }
        self.has_new_statements |= self.takers.remove(id);
    }

    fn note(&mut self, key: &Key, rejections: Vec<Rejection>) {
        let before = match rejections.is_empty() {
            true => self.rejections.remove(key).unwrap_or_default(),
            false => self.rejections.insert(key.clone(), rejections.clone()).unwrap_or_default(),
        };
        self.has_new_rejections |= before != rejections;
    }

    /// The pod with what this machine knows of it.
    fn placed(&self, pod: &Pod) -> Arc<Pod> {
        let place = pod.uid.as_ref().and_then(|uid| self.places.get(uid));
        let addresses = match place {
            Some(place) if pod.addresses.is_empty() || is_same_set(&place.addresses, &pod.addresses) => {
                place.addresses.clone()
            }
            _ => pod.addresses.clone(),
        };
        Arc::new(Pod { addresses, paths: place.map(|place| place.paths.clone()), ..pod.clone() })
    }
}

/// In whichever order: a pod is not enrolled anew because its addresses were told in another one.
fn is_same_set(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.len() == b.len() && a.iter().all(|address| b.contains(address))
}

#[cfg(test)]
mod tests;

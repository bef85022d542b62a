//! The MeshPolicies: which of them speak of a pod, and what they come to for it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::here::{Here, Scope, Selecting};
use super::index::take_out;
use super::pods::Pods;
use crate::config::document::{self, MeshPolicy, Mtls};
use crate::config::resolve::{self, Level, Stated, Verdict};
use crate::config::{FieldPath, Key, Kind, Problem};
use crate::model::{MtlsMode, MtlsSource, Name, ObjectRef};
use crate::policy::jwt::Rules;

/// All MeshPolicies.
#[derive(Debug, Default)]
pub(super) struct MeshPolicies {
    entries: BTreeMap<ObjectRef, Entry>,
    selecting: Selecting,
    /// By namespace, those that are for all of its pods, or of the mesh.
    whole: HashMap<Name, BTreeSet<Name>>,
    /// What is to be said anew.
    unsaid: BTreeSet<Key>,
}

/// A policy in its versions.
#[derive(Debug)]
struct Entry {
    /// The last version that could be used; strict at its place if there was none.
    in_force: Arc<MeshPolicy>,
    /// The version that there is now says something badly.
    is_bad: bool,
    /// There was one that could be used.
    was_good: bool,
}

impl MeshPolicies {
    /// Takes a version in. One that is not good leaves the one before it in force. The pods of this node that this concerns.
    pub(super) fn put(
        &mut self,
        new: Arc<MeshPolicy>,
        mesh: Option<&Name>,
        here: &Here,
        pods: &Pods,
    ) -> Vec<ObjectRef> {
        let id = new.key.id();
        let before = self.entries.get(&id);
        let is_bad = new.mtls.is_none();
        let was_good = !is_bad || before.is_some_and(|before| before.was_good);
        let in_force = match before {
            Some(before) if is_bad && before.was_good => before.in_force.clone(),
            Some(before) if !is_bad && before.in_force == new => before.in_force.clone(),
            _ if is_bad => Arc::new(MeshPolicy { mtls: Some(strict()), ..(*new).clone() }),
            _ => new,
        };
        let is_same = before.is_some_and(|before| *before.in_force == *in_force);
        if !is_same || before.is_none_or(|before| before.is_bad != is_bad) {
            self.unsaid.insert(in_force.key.clone());
        }
        let entry = Entry { in_force, is_bad, was_good };
        match is_same {
            true => {
                self.entries.insert(id, entry);
                Vec::new()
            }
            false => self.replace(&id, Some(entry), mesh, here, pods),
        }
    }

    /// Takes the policy out. The pods of this node that this concerns.
    pub(super) fn remove(
        &mut self,
        id: &ObjectRef,
        mesh: Option<&Name>,
        here: &Here,
        pods: &Pods,
    ) -> Vec<ObjectRef> {
        self.unsaid.insert(Key::of(Kind::MeshPolicy, id));
        self.replace(id, None, mesh, here, pods)
    }

    fn replace(
        &mut self,
        id: &ObjectRef,
        new: Option<Entry>,
        mesh: Option<&Name>,
        here: &Here,
        pods: &Pods,
    ) -> Vec<ObjectRef> {
        let selector = new.as_ref().and_then(|new| new.in_force.selector.as_ref());
        self.selecting.put(id, selector);
        match new.is_some() && selector.is_none() {
            true => drop(self.whole.entry(id.namespace.clone()).or_default().insert(id.name.clone())),
            false => {
                take_out(&mut self.whole, &id.namespace, |names| names.remove(&id.name), BTreeSet::is_empty)
            }
        }
        let now = new.as_ref().map(|new| new.in_force.clone());
        let before = match new {
            Some(new) => self.entries.insert(id.clone(), new),
            None => self.entries.remove(id),
        };
        // What is said of those beside it may be something else.
        let first = ObjectRef::new(id.namespace.clone(), "");
        let neighbours = self.entries.range(first..).map(|(other, _)| other);
        let neighbours = neighbours.take_while(|other| other.namespace == id.namespace);
        self.unsaid.extend(neighbours.map(|other| Key::of(Kind::MeshPolicy, other)));
        let versions = before.map(|before| before.in_force).into_iter().chain(now);
        versions.flat_map(|version| here.within(scope(id, &version, mesh), pods)).collect()
    }

    /// Which pods policies select may be others: the pod had these labels and has those.
    pub(super) fn pod_changed(
        &mut self,
        namespace: &Name,
        before: Option<&document::Pod>,
        now: Option<&document::Pod>,
    ) {
        let [before, now] = self.selecting.of_both(namespace, before, now);
        if before != now {
            // Two that select the pod may be at odds, and are no more once it is gone.
            self.unsaid.extend(before.union(&now).map(|id| Key::of(Kind::MeshPolicy, id)));
        }
    }

    /// What all that speak of a pod of this node come to for it; `namespace` is what its namespace's annotation says.
    pub(super) fn of_pod(
        &self,
        pod: &document::Pod,
        namespace: Option<MtlsMode>,
        default: MtlsMode,
        mesh: Option<&Name>,
    ) -> Verdict {
        let own = &pod.id.namespace;
        let selecting = self.selecting.of(own, &pod.labels);
        let levels = [
            self.level(selecting.iter()),
            Level::Annotation(pod.marks.mtls, MtlsSource::Pod),
            self.level(self.whole_of(own).iter().filter(|_| mesh != Some(own))),
            Level::Annotation(namespace, MtlsSource::Namespace),
            self.level(mesh.map(|mesh| self.whole_of(mesh)).unwrap_or_default().iter()),
        ];
        // Of a pod that comes it is known what its namespace and the mesh want.
        resolve::mtls(&levels, default).beside(&resolve::mtls(&levels[2..], default))
    }

    /// What of all that is said of tokens is in force for a pod of this node.
    pub(super) fn tokens_of(&self, pod: &document::Pod, mesh: Option<&Name>) -> Option<Arc<Rules>> {
        let own = &pod.id.namespace;
        let levels = [
            self.selecting.of(own, &pod.labels).into_iter().collect(),
            if mesh == Some(own) { Vec::new() } else { self.whole_of(own) },
            mesh.map(|mesh| self.whole_of(mesh)).unwrap_or_default(),
        ];
        levels.iter().find_map(|ids| {
            let policies = ids.iter().filter_map(|id| Some(&*self.entries.get(id)?.in_force));
            resolve::tokens(policies)?.jwt.clone()
        })
    }

    fn level<'a, 'i>(&'a self, ids: impl Iterator<Item = &'i ObjectRef>) -> Level<'a> {
        let policy = |id: &ObjectRef| {
            let policy = &self.entries.get(id)?.in_force;
            Some((&policy.key, policy.mtls.as_ref()?))
        };
        Level::Policies(ids.filter_map(policy).collect())
    }

    fn whole_of(&self, namespace: &Name) -> Vec<ObjectRef> {
        let names = self.whole.get(namespace).into_iter().flatten();
        names.map(|name| ObjectRef::new(namespace.clone(), name.clone())).collect()
    }

    /// The policies of which something else may be to be said since this was asked last.
    pub(super) fn take_unsaid(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.unsaid)
    }

    /// What is wrong with the policy in the world as it is, beside what is wrong with how it is written.
    pub(super) fn problems(&self, key: &Key) -> Vec<Problem> {
        let Some(entry) = self.entries.get(&key.id()) else { return Vec::new() };
        let of_version = entry.is_bad.then(|| match entry.was_good {
            true => "this version cannot be used, and the last one that could stays in force".to_owned(),
            false => {
                let tokens = match entry.in_force.jwt {
                    Some(_) => ", and no requests, for tokens cannot be checked",
                    None => "",
                };
                format!(
                    "this version cannot be used, and there was none before it: its pods take no plaintext{tokens}"
                )
            }
        });
        // Which pods there are that two of them select, the leader says: of most pods an agent knows no labels.
        let conflict = match entry.in_force.selector {
            None => self.conflict(&entry.in_force, self.whole_of(&key.namespace)),
            Some(_) => None,
        };
        let all = of_version.into_iter().chain(conflict);
        all.map(|message| Problem::new(FieldPath::default(), message)).collect()
    }

    /// How the policy stands, for its status; None while no version of it could be used.
    pub(super) fn stated(&self, key: &Key, pods: &Pods) -> Option<Stated> {
        let policy = &self.entries.get(&key.id()).filter(|entry| entry.was_good)?.in_force;
        let (rivals, selects_nothing) = match &policy.selector {
            None => (self.whole_of(&key.namespace), false),
            Some(selector) => {
                let documents = pods.documents_in(&key.namespace);
                let selected: Vec<_> = documents.filter(|pod| selector.matches(&pod.labels)).collect();
                let rivals: BTreeSet<ObjectRef> =
                    selected.iter().flat_map(|pod| self.selecting.of(&key.namespace, &pod.labels)).collect();
                (rivals.into_iter().collect(), selected.is_empty())
            }
        };
        Some(resolve::mesh_policy(self.conflict(policy, rivals), selects_nothing))
    }

    fn conflict(&self, policy: &MeshPolicy, others: Vec<ObjectRef>) -> Option<String> {
        let others = others.iter().filter_map(|id| Some(&*self.entries.get(id)?.in_force));
        resolve::conflict(policy, others)
    }
}

fn strict() -> Mtls {
    Mtls { mode: Some(MtlsMode::Strict), ..Mtls::default() }
}

fn scope<'a>(id: &'a ObjectRef, policy: &'a MeshPolicy, mesh: Option<&Name>) -> Scope<'a> {
    match &policy.selector {
        Some(selector) => Scope::Pods(&id.namespace, selector),
        None if mesh == Some(&id.namespace) => Scope::Mesh,
        None => Scope::Namespace(&id.namespace),
    }
}

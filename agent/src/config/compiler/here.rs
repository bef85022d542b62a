//! The pods of this node, and which of them somebody selects: few, however large the cluster is. Pods of other nodes have no
//! labels here, and no policy of ours is enforced at them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::index::take_out;
use super::pods::Pods;
use crate::config::document::{self, Selector};
use crate::model::{Name, ObjectRef};

/// The pods of this node, by namespace.
#[derive(Debug, Default)]
pub(super) struct Here(HashMap<Name, BTreeSet<Name>>);

/// For which pods something is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scope<'a> {
    Mesh,
    Namespace(&'a Name),
    Pods(&'a Name, &'a Selector),
}

/// Objects that select pods of their own namespace, found by the labels of a pod: only those are asked that may select it.
#[derive(Debug, Default)]
pub(super) struct Selecting {
    selectors: HashMap<ObjectRef, Selector>,
    /// By namespace and a label that the selector asks for.
    by_label: HashMap<Label, BTreeSet<Name>>,
    /// By namespace, those that ask for no single label.
    others: HashMap<Name, BTreeSet<Name>>,
}

/// Namespace, key, value.
type Label = (Name, String, String);

impl Here {
    /// Notes whether the pod is of this node.
    pub(super) fn note(&mut self, id: &ObjectRef, is_here: bool) {
        match is_here {
            true => drop(self.0.entry(id.namespace.clone()).or_default().insert(id.name.clone())),
            false => take_out(&mut self.0, &id.namespace, |names| names.remove(&id.name), BTreeSet::is_empty),
        }
    }

    pub(super) fn has(&self, id: &ObjectRef) -> bool {
        self.0.get(&id.namespace).is_some_and(|names| names.contains(&id.name))
    }

    /// The pods of the scope.
    pub(super) fn within(&self, scope: Scope<'_>, pods: &Pods) -> Vec<ObjectRef> {
        let of = |namespace: &Name, names: &BTreeSet<Name>| -> Vec<ObjectRef> {
            names.iter().map(|name| ObjectRef::new(namespace.clone(), name.clone())).collect()
        };
        match scope {
            Scope::Mesh => self.0.iter().flat_map(|(namespace, names)| of(namespace, names)).collect(),
            Scope::Namespace(namespace) => {
                self.0.get(namespace).map(|names| of(namespace, names)).unwrap_or_default()
            }
            Scope::Pods(namespace, selector) => {
                let mut ids = self.within(Scope::Namespace(namespace), pods);
                ids.retain(|id| pods.get(id).is_some_and(|pod| selector.matches(&pod.labels)));
                ids
            }
        }
    }
}

impl Selecting {
    /// Notes what the object selects; None: nothing any more.
    pub(super) fn put(&mut self, id: &ObjectRef, selector: Option<&Selector>) {
        if let Some(old) = self.selectors.remove(id) {
            match label(id, &old) {
                Some(label) => {
                    take_out(&mut self.by_label, &label, |names| names.remove(&id.name), BTreeSet::is_empty);
                }
                None => {
                    let names = &mut self.others;
                    take_out(names, &id.namespace, |names| names.remove(&id.name), BTreeSet::is_empty);
                }
            }
        }
        if let Some(new) = selector {
            let names = match label(id, new) {
                Some(label) => self.by_label.entry(label).or_default(),
                None => self.others.entry(id.namespace.clone()).or_default(),
            };
            names.insert(id.name.clone());
            self.selectors.insert(id.clone(), new.clone());
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.selectors.is_empty() && self.by_label.is_empty() && self.others.is_empty()
    }

    /// Those that select the pod as it was, and as it is.
    pub(super) fn of_both(
        &self,
        namespace: &Name,
        before: Option<&document::Pod>,
        now: Option<&document::Pod>,
    ) -> [BTreeSet<ObjectRef>; 2] {
        [before, now].map(|pod| pod.map(|pod| self.of(namespace, &pod.labels)).unwrap_or_default())
    }

    /// Those that select a pod with these labels.
    pub(super) fn of(&self, namespace: &Name, labels: &BTreeMap<String, String>) -> BTreeSet<ObjectRef> {
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(&(namespace.clone(), key.clone(), value.clone())));
        let candidates = by_label.chain(self.others.get(namespace)).flatten();
        let ids = candidates.map(|name| ObjectRef::new(namespace.clone(), name.clone()));
        ids.filter(|id| self.selectors.get(id).is_some_and(|selector| selector.matches(labels))).collect()
    }
}

fn label(id: &ObjectRef, selector: &Selector) -> Option<Label> {
    let (key, value) = selector.label()?;
    Some((id.namespace.clone(), key.into(), value.into()))
}

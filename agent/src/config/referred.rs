//! The ConfigMaps that policies refer to, where an API server is asked for them by name: which ones are wanted, and of which it has
//! said anything.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::document::{ConfigMap, Document, Key, Kind};
use super::{Change, Compiler};
use crate::model::ObjectRef;

/// What is wanted, and what has been answered of it.
#[derive(Debug, Default)]
pub struct Referred {
    wanted: BTreeSet<ObjectRef>,
    answered: BTreeSet<ObjectRef>,
}

impl Referred {
    /// Has those wanted that the compiler's policies refer to. The changes by which the others are forgotten.
    pub fn refer(&mut self, compiler: &Compiler) -> Vec<Change> {
        self.wanted = compiler.config_maps();
        let gone = self.answered.extract_if(.., |id| !self.wanted.contains(id));
        gone.map(|id| Change::Remove(Key::of(Kind::ConfigMap, &id))).collect()
    }

    /// Takes in what the API server says of one: what it is, or that it is not there, or nothing as long as it does not tell. What
    /// that changes.
    pub fn answer<E>(&mut self, id: ObjectRef, told: Result<Option<Document>, E>) -> Option<Change> {
        let is_first = self.answered.insert(id.clone());
        match told {
            Ok(Some(document)) => Some(Change::Put(document)),
            Ok(None) => Some(Change::Remove(Key::of(Kind::ConfigMap, &id))),
            Err(_) if is_first => Some(Change::Put(Document::ConfigMap(Arc::new(ConfigMap::untold(id))))),
            // What is known holds.
            Err(_) => None,
        }
    }

    /// Takes in what was known of one before, unless something has been said of it since. What that changes.
    pub fn recall(&mut self, id: ObjectRef, document: Option<Document>) -> Option<Change> {
        self.answered.insert(id).then(|| document.map(Change::Put)).flatten()
    }

    /// Those that are wanted.
    pub fn wanted(&self) -> &BTreeSet<ObjectRef> {
        &self.wanted
    }

    /// Whether something has been said of each that is wanted.
    pub fn is_complete(&self) -> bool {
        self.wanted.is_subset(&self.answered)
    }
}

//! What several label sets have in common: found by a part of their labels, gone with the last of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Values by their key, each there for as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Shared<K, V>(Mutex<HashMap<K, Weak<V>>>);

impl<K: Clone + Eq + Hash + Ord, V> Shared<K, V> {
    /// The value of the key, made if there is none.
    pub(super) fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut values = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = values.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let value = Arc::new(make());
        values.insert(key, Arc::downgrade(&value));
        value
    }

    /// All of them, ordered by their keys.
    pub(super) fn all(&self) -> Vec<(K, Arc<V>)> {
        let values = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> =
            values.iter().filter_map(|(key, weak)| Some((key.clone(), weak.upgrade()?))).collect();
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Forgets the keys of values that are gone.
    pub(super) fn sweep(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, value| value.strong_count() > 0);
    }
}

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

//! What several label sets have in common: found by a part of their labels, gone with the last of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Values by their key, each there for as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Shared<K, V>(Mutex<HashMap<K, Weak<V>>>);

impl<K: Clone + Eq + Hash + Ord, V> Shared<K, V> {
    /// The value of the key, made if there is none.
    pub(super) fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        get(&mut self.lock(), key, make)
    }

    /// The same; where there is none and these are as many as there may be, the value of the other key, which is not
    /// among those that are to be few.
    pub(super) fn get_bounded(&self, key: K, most: usize, other: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut values = self.lock();
        let fits = values.len() < most || values.contains_key(&key);
        get(&mut values, if fits { key } else { other }, make)
    }

    /// All of them, ordered by their keys.
    pub(super) fn all(&self) -> Vec<(K, Arc<V>)> {
        let values = self.lock();
        let mut all: Vec<_> =
            values.iter().filter_map(|(key, weak)| Some((key.clone(), weak.upgrade()?))).collect();
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Forgets the keys of values that are gone.
    pub(super) fn sweep(&self) {
        self.lock().retain(|_, value| value.strong_count() > 0);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Weak<V>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn get<K: Eq + Hash, V>(values: &mut HashMap<K, Weak<V>>, key: K, make: impl FnOnce() -> V) -> Arc<V> {
    if let Some(value) = values.get(&key).and_then(Weak::upgrade) {
        return value;
    }
    let value = Arc::new(make());
    values.insert(key, Arc::downgrade(&value));
    value
}

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

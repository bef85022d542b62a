//! Who names whom, kept in step.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

/// Takes `id` out of the sets of what it names no more, and into those of what it names now.
pub(super) fn reindex<K: Clone + Eq + Hash, I: Clone + Eq + Hash>(
    index: &mut HashMap<K, HashSet<I>>,
    id: &I,
    old: &HashSet<K>,
    new: &HashSet<K>,
) {
    for gone in old.difference(new) {
        take_out(index, gone, |ids| ids.remove(id), HashSet::is_empty);
    }
    for come in new.difference(old) {
        index.entry(come.clone()).or_default().insert(id.clone());
    }
}

/// Takes something out of a set of an index, and the set with it if it is empty then.
pub(super) fn take_out<K: Eq + Hash, S>(
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

//! The live table: every open connection, for whoever asks, at the price of two uncontended locks per connection.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::connection::Connection;

/// More than cores that a node's proxy would use; a power of two keeps the choice cheap.
const SHARDS: usize = 32;
/// Room that an empty shard may keep for the next connections.
const KEPT_SLOTS: usize = 256;

/// Open connections in shards. A thread inserts into a shard of its own, so threads that accept do not meet; the
/// removal goes to the same shard from whichever thread the connection ended on.
#[derive(Debug, Default)]
pub(super) struct Table {
    shards: [Shard; SHARDS],
}

/// A cache line each, so that two threads' locks do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<Slots>);

#[derive(Debug, Default)]
struct Slots {
    entries: Vec<Option<Arc<Connection>>>,
    free: Vec<u32>,
}

/// Where a connection stands in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    shard: u32,
    index: u32,
}

impl Table {
    pub(super) fn insert(&self, connection: Arc<Connection>) -> Slot {
        let shard = shard_of_this_thread();
        let index = self.shards[shard].lock(|slots| match slots.free.pop() {
            Some(index) => {
                slots.entries[index as usize] = Some(connection);
                index
            }
            None => {
                slots.entries.push(Some(connection));
                (slots.entries.len() - 1) as u32
            }
        });
        Slot { shard: shard as u32, index }
    }

    pub(super) fn remove(&self, slot: Slot) {
        // The value is dropped outside of the lock.
        let _removed = self.shards[slot.shard as usize].lock(|slots| {
            let removed = slots.entries.get_mut(slot.index as usize).and_then(Option::take);
            if removed.is_some() {
                slots.free.push(slot.index);
            }
            if slots.free.len() == slots.entries.len() && slots.entries.capacity() > KEPT_SLOTS {
                // The burst is over: its memory goes back.
                slots.entries = Vec::new();
                slots.free = Vec::new();
            }
            removed
        });
    }

    /// Visits every open connection, a shard at a time, under its lock: `visit` must be short and must not open or
    /// close a connection.
    pub(super) fn for_each(&self, mut visit: impl FnMut(&Arc<Connection>)) {
        for shard in &self.shards {
            shard.lock(|slots| slots.entries.iter().flatten().for_each(&mut visit));
        }
    }
}

impl Shard {
    fn lock<R>(&self, then: impl FnOnce(&mut Slots) -> R) -> R {
        // Nothing in the closures can panic half-way through a change, so a poisoned lock still guards sound data.
        then(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Threads are numbered as they come: neighbours in time get shards of their own.
fn shard_of_this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<Option<usize>> = const { Cell::new(None) };
    }
    MINE.with(|mine| match mine.get() {
        Some(shard) => shard,
        None => {
            let shard = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            mine.set(Some(shard));
            shard
        }
    })
}

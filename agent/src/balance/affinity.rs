//! Session affinity: which endpoint a client was last sent to.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Endpoint, ObjectRef};

/// Enough for the worker threads of a node not to wait for each other.
const SHARDS: usize = 32;

/// Remembers per Service port and client address the endpoint that was last chosen, as kube-proxy does
/// (`sessionAffinity: ClientIP`; every connection counts as a use). Shared by all worker threads.
///
/// It holds at most as many clients as it was made for. Beyond that it forgets the ones that have not come for longest,
/// who are then balanced anew.
#[derive(Debug)]
pub struct AffinityTable {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    /// Per generation of a shard.
    capacity: usize,
}

/// Two generations: whoever is used moves to the young one, and when that is full it becomes the old one, whose
/// entries are forgotten. An approximate least-recently-used order without a list to keep.
#[derive(Debug, Default)]
struct Shard {
    young: HashMap<Client, Entry>,
    old: HashMap<Client, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    service: ObjectRef,
    port: u16,
    address: IpAddr,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    endpoint: SocketAddr,
    used: Instant,
}

impl AffinityTable {
    /// A table for at most this many clients.
    pub fn new(clients: usize) -> Self {
        Self {
            shards: Default::default(),
            hasher: RandomState::new(),
            capacity: (clients / SHARDS / 2).max(1),
        }
    }

    /// Where the client is sent now, by what is told of where it was sent last: nothing if that was longer ago than `timeout`.
    /// Connections of one client are decided one after the other, or the first ones, at the same time on several threads, would go
    /// to several endpoints.
    pub(super) fn send<'s>(
        &self,
        (service, port, address): (&ObjectRef, u16, IpAddr),
        timeout: Duration,
        now: Instant,
        choose: impl FnOnce(Option<SocketAddr>) -> Option<&'s Endpoint>,
    ) -> Option<&'s Endpoint> {
        let client = Client { service: service.clone(), port, address };
        let mut shard = self.shard(&client).lock().unwrap_or_else(PoisonError::into_inner);
        let last = shard.young.get(&client).or_else(|| shard.old.get(&client));
        let last = last.filter(|entry| now.saturating_duration_since(entry.used) <= timeout);
        let chosen = choose(last.map(|entry| entry.endpoint))?;
        if shard.young.len() >= self.capacity && !shard.young.contains_key(&client) {
            shard.old = std::mem::take(&mut shard.young);
        }
        shard.old.remove(&client);
        shard.young.insert(client, Entry { endpoint: chosen.address, used: now });
        Some(chosen)
    }

    /// How many clients it remembers now, those included whose time is over.
    pub fn len(&self) -> usize {
        let count = |shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.young.len() + shard.old.len()
        };
        self.shards.iter().map(count).sum()
    }

    /// Whether it remembers nobody.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, client: &Client) -> &Mutex<Shard> {
        &self.shards[self.hasher.hash_one(client) as usize % SHARDS]
    }
}

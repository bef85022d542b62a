//! The tunnels that one worker thread has open: found by who talks to whom, shared by the connections between the two.
//!
//! The pool knows when a tunnel may be used, not how one is made.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use h2::client::SendRequest;
use http::header::HeaderValue;
use tokio::sync::watch;

use super::health::{Health, Place};
use crate::identity::SpiffeId;
use crate::proxy::tasks::Tasks;
use crate::proxy::upstream::SHARED_FOR;
use crate::telemetry::RefuseReason;

/// Streams on one connection; the next one gets a connection of its own.
const MAX_STREAMS: usize = 100;

/// Who talks to whom. Two pods of one account never share a tunnel: the source address is part of what is proven.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The source pod's network namespace, which tells it from every other pod.
    pub(super) source: u64,
    pub(super) source_id: SpiffeId,
    pub(super) destination: SocketAddr,
    pub(super) destination_id: SpiffeId,
}

/// A tunnel that stands.
#[derive(Clone, Debug)]
pub(super) struct Established {
    pub(super) requests: SendRequest<Bytes>,
    pub(super) health: Arc<Health>,
    /// What every request says of the source pod.
    baggage: Option<HeaderValue>,
    since: Instant,
}

/// A tunnel, and a place in it.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) requests: SendRequest<Bytes>,
    pub(super) place: Place,
    pub(super) baggage: Option<HeaderValue>,
    /// It stood before it was asked for, so it may have died unnoticed.
    pub(super) is_reused: bool,
    /// It is to be replaced.
    is_old: bool,
}

/// One per worker thread.
#[derive(Debug, Default)]
pub(in crate::proxy) struct Pool {
    slots: Mutex<HashMap<Key, Slot>>,
    /// Dials, and the connections that came of them. They end with the worker at the latest.
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Slot {
    tunnels: Vec<Established>,
    dialing: Option<watch::Receiver<Dialled>>,
}

/// What became of a dial; nothing yet.
type Dialled = Option<Result<(), RefuseReason>>;

/// The duty to make a tunnel. Dropped without an outcome it tells those who wait that there is none.
#[derive(Debug)]
pub(super) struct Dial {
    pool: Arc<Pool>,
    pub(super) key: Key,
    outcome: watch::Sender<Dialled>,
}

impl Established {
    pub(super) fn new(
        requests: SendRequest<Bytes>,
        health: Arc<Health>,
        baggage: Option<HeaderValue>,
    ) -> Self {
        Self { requests, health, baggage, since: Instant::now() }
    }

    /// Whether it has been there for so long that new streams are to have another.
    fn is_old(&self) -> bool {
        self.since.elapsed() >= SHARED_FOR
    }
}

impl Pool {
    /// A place in a tunnel made at `not_before` or later: one that stands, or a new one. Whoever asks for the same at
    /// the same time waits for the same handshake. Nobody waits where one that stands has grown old, and is used until it is known
    /// whether there can be another.
    pub(super) async fn claim<F: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        key: &Key,
        not_before: Option<Instant>,
        make: impl Fn(Dial) -> F,
    ) -> Result<Claimed, RefuseReason> {
        let mut is_reused = true;
        loop {
            if let Some(mut claimed) = self.take(key, not_before) {
                claimed.is_reused = is_reused;
                if claimed.is_old {
                    self.dialing(key, &make);
                }
                return Ok(claimed);
            }
            is_reused = false;
            let mut dialing = self.dialing(key, &make);
            let outcome = dialing.wait_for(Option::is_some).await;
            // It stays unsaid only if the task panicked.
            outcome.map_or(Err(RefuseReason::Internal), |outcome| outcome.unwrap_or(Ok(())))?;
        }
    }

    /// Has no new stream sent over a tunnel any more. Its connection ends when its last stream does.
    pub(super) fn discard(&self, key: &Key, health: &Health) {
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(key) {
            slot.tunnels.retain(|tunnel| !std::ptr::eq(&*tunnel.health, health));
            if slot.is_empty() {
                slots.remove(key);
            }
        }
    }

    /// Has those looked after that do not answer. To be called several times a second.
    pub(in crate::proxy) fn look(&self) {
        self.slots().values().flat_map(|slot| &slot.tunnels).for_each(|tunnel| tunnel.health.look());
    }

    /// Forgets the tunnels of a pod that has left.
    pub(in crate::proxy) fn forget(&self, source: u64) {
        self.slots().retain(|key, _| key.source != source);
    }

    fn take(&self, key: &Key, not_before: Option<Instant>) -> Option<Claimed> {
        let slots = self.slots();
        let is_new_enough = |tunnel: &&Established| not_before.is_none_or(|least| tunnel.since >= least);
        let mut usable = slots.get(key)?.tunnels.iter().filter(is_new_enough);
        let tunnel = usable.find(|tunnel| tunnel.health.streams() < MAX_STREAMS)?;
        let (requests, baggage) = (tunnel.requests.clone(), tunnel.baggage.clone());
        let (place, is_old) = (tunnel.health.enter(), tunnel.is_old());
        Some(Claimed { requests, place, baggage, is_reused: true, is_old })
    }

    fn dialing<F: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        key: &Key,
        make: &impl Fn(Dial) -> F,
    ) -> watch::Receiver<Dialled> {
        let mut slots = self.slots();
        let slot = slots.entry(key.clone()).or_default();
        if let Some(dialing) = slot.dialing.as_ref().filter(|dialing| dialing.borrow().is_none()) {
            return dialing.clone();
        }
        let (outcome, dialing) = watch::channel(None);
        slot.dialing = Some(dialing.clone());
        drop(slots);
        self.tasks.spawn(make(Dial { pool: self.clone(), key: key.clone(), outcome }));
        dialing
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Key, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.dialing.is_none()
    }
}

impl Dial {
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// There is a tunnel: for those who wait, and for later ones.
    pub(super) fn succeeded(self, tunnel: Established) {
        self.end(Ok(()), Some(tunnel));
    }

    /// There is none.
    pub(super) fn failed(self, reason: RefuseReason) {
        self.end(Err(reason), None);
    }

    fn end(&self, outcome: Result<(), RefuseReason>, tunnel: Option<Established>) {
        let mut slots = self.pool.slots();
        // Gone if the pod has left meanwhile: then nobody is to find the tunnel, and it ends.
        if let Some(slot) = slots.get_mut(&self.key) {
            slot.dialing = None;
            slot.tunnels.retain(|tunnel| !tunnel.is_old());
            slot.tunnels.extend(tunnel);
            if slot.is_empty() {
                slots.remove(&self.key);
            }
        }
        drop(slots);
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        if self.outcome.borrow().is_none() {
            self.end(Err(RefuseReason::Internal), None);
        }
    }
}

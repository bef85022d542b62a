//! The upstream connections that one worker thread has open for requests: shared by the connections of a pod's clients,
//! and kept warm between requests.
//!
//! The pool knows when a connection may be used, not how one is made or what is sent on it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use tokio::sync::{OnceCell, Semaphore};

use super::body::RequestBody;
use super::mirror;
use crate::proxy::reach::{Assurance, InTheWay};
use crate::proxy::tasks::Tasks;

/// Connections without a request go after this long. Servers close theirs earlier as a rule, which shows at once.
const IDLE_LIMIT: Duration = Duration::from_secs(90);

/// Idle HTTP/1 connections that are kept of one kind.
const MOST_IDLE: usize = 128;

/// How often those that have been idle for too long are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// Which requests may share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The source pod's network namespace, which tells it from every other pod.
    pub(super) source: u64,
    /// The source address that the application has bound.
    pub(super) bound: Option<IpAddr>,
    /// The endpoint.
    pub(super) to: SocketAddr,
}

/// What requests are handed to.
#[derive(Debug)]
pub(super) enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// A connection, lent for one request.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) sender: Sender,
    /// What the connection was made with.
    pub(super) assurance: Assurance,
    /// It stood before it was asked for, so it may have died unnoticed.
    pub(super) is_reused: bool,
}

/// A connection that is lent, with where it belongs.
#[derive(Debug)]
pub(super) struct Loan {
    pool: Arc<Pool>,
    key: Key,
    lease: Lease,
}

impl Loan {
    pub(super) fn new(pool: &Arc<Pool>, key: Key, lease: Lease) -> Self {
        Self { pool: pool.clone(), key, lease }
    }

    /// The request has been answered.
    pub(super) fn give_back(self) {
        self.pool.give_back(self.key, self.lease);
    }
}

/// One per worker thread.
#[derive(Debug)]
pub(in crate::proxy) struct Pool {
    slots: Mutex<Slots>,
    /// What moves the bytes of the connections.
    pub(in crate::proxy) tasks: Tasks,
    /// Places for copies of requests that are under way.
    pub(super) mirrors: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Slots {
    http1: HashMap<Key, Vec<Idle>>,
    http2: HashMap<Key, Arc<Shared>>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    assurance: Assurance,
    since: Instant,
}

/// An HTTP/2 connection: whoever wants it while it is made waits for it.
#[derive(Debug, Default)]
struct Shared {
    made: OnceCell<(http2::SendRequest<RequestBody>, Assurance)>,
    used: Mutex<Option<Instant>>,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            slots: Mutex::default(),
            tasks: Tasks::default(),
            mirrors: Arc::new(Semaphore::new(mirror::MOST)),
        }
    }
}

impl Pool {
    /// An HTTP/1 connection that waits for a request, and relies on just this.
    pub(super) fn take_http1(&self, key: &Key, assurance: &Assurance) -> Option<Lease> {
        let mut slots = self.slots();
        let idle = slots.http1.get_mut(key)?;
        // The one used last is the most likely to live. One that is not ready yet still sends a request's body.
        idle.retain(|idle| !idle.sender.is_closed() && idle.assurance == *assurance);
        let place = idle.iter().rposition(|idle| idle.sender.is_ready())?;
        let Idle { sender, assurance, .. } = idle.remove(place);
        if idle.is_empty() {
            slots.http1.remove(key);
        }
        Some(Lease { sender: Sender::Http1(sender), assurance, is_reused: true })
    }

    /// Takes a connection back whose request has been answered.
    fn give_back(&self, key: Key, lease: Lease) {
        // HTTP/2 connections are here all the time.
        let Lease { sender: Sender::Http1(sender), assurance, .. } = lease else { return };
        if sender.is_closed() {
            return;
        }
        let mut slots = self.slots();
        let idle = slots.http1.entry(key).or_default();
        if idle.len() < MOST_IDLE {
            idle.push(Idle { sender, assurance, since: Instant::now() });
        }
    }

    /// The HTTP/2 connection to the endpoint, made if there is none that relies on just this. At the same time it is made
    /// once.
    pub(super) async fn http2<F>(
        &self,
        key: &Key,
        assurance: &Assurance,
        make: impl FnOnce() -> F,
    ) -> Result<Lease, InTheWay>
    where
        F: Future<Output = Result<(http2::SendRequest<RequestBody>, Assurance), InTheWay>>,
    {
        let shared = {
            let mut slots = self.slots();
            let shared = slots.http2.entry(key.clone()).or_default();
            let is_usable = |(sender, made_with): &(http2::SendRequest<RequestBody>, Assurance)| {
                !sender.is_closed() && made_with == assurance
            };
            if !shared.made.get().is_none_or(is_usable) {
                *shared = Arc::default();
            }
            shared.clone()
        };
        let is_reused = shared.made.initialized();
        let (sender, assurance) = shared.made.get_or_try_init(make).await?.clone();
        *shared.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(Lease { sender: Sender::Http2(sender), assurance, is_reused })
    }

    /// Forgets the connections of a pod that has left. They end with the requests that are on them.
    pub(in crate::proxy) fn forget(&self, source: u64) {
        let mut slots = self.slots();
        slots.http1.retain(|key, _| key.source != source);
        slots.http2.retain(|key, _| key.source != source);
    }

    /// Lets go of what has been idle for too long. To be called often; it is cheap.
    pub(in crate::proxy) fn sweep(&self, now: Instant) {
        let mut slots = self.slots();
        if slots.swept.is_some_and(|swept| now.duration_since(swept) < SWEEP_EVERY) {
            return;
        }
        slots.swept = Some(now);
        let is_fresh = |since: Instant| now.saturating_duration_since(since) < IDLE_LIMIT;
        slots.http1.retain(|_, idle| {
            idle.retain(|idle| !idle.sender.is_closed() && is_fresh(idle.since));
            !idle.is_empty()
        });
        slots.http2.retain(|_, shared| {
            let used = *shared.used.lock().unwrap_or_else(PoisonError::into_inner);
            let lives = shared.made.get().is_some_and(|(sender, _)| !sender.is_closed());
            let is_made = Arc::strong_count(shared) > 1;
            // Requests under way keep their connection, whether new ones find it or not.
            is_made || lives && used.is_some_and(is_fresh)
        });
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

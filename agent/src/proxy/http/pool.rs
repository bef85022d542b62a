//! The upstream connections that one worker thread has open for requests: shared by the connections of a pod's clients,
//! and kept warm between requests.
//!
//! The pool knows when a connection may be used, not how one is made or what is sent on it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::future::Either;
use http::header::HOST;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use tokio::sync::{Notify, OnceCell, Semaphore, watch};

use super::body::{ROOM_FOR_COPIES, RequestBody};
use super::mirror;
use crate::model::{BackendTls, EndpointLoad, PortGuard, PortLoad};
use crate::proxy::reach::{Assurance, InTheWay};
use crate::proxy::tasks::Tasks;
use crate::proxy::upstream::SHARED_FOR;
use crate::snapshot::Snapshot;
use crate::telemetry::RefuseReason;

/// Connections without a request go after this long. Servers close theirs earlier as a rule, which shows at once.
const IDLE_LIMIT: Duration = Duration::from_secs(90);

/// Idle HTTP/1 connections that are kept of one kind.
const MOST_IDLE: usize = 128;

/// How often those that have been idle for too long are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// Streams of an HTTP/2 connection of whose server nothing is known: RFC 9113 (section 6.5.2) recommends that it take no fewer.
pub(super) const USUAL_STREAMS: usize = 100;

/// Which requests may share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The source pod's network namespace, which tells it from every other pod.
    pub(super) source: u64,
    /// The source address that the application has bound.
    pub(super) bound: Option<IpAddr>,
    /// The endpoint.
    pub(super) to: SocketAddr,
    /// Its own agent looks at requests. A connection that was made before it did so would pass that by.
    pub(super) is_limited: bool,
    /// Connections are counted. One that was made before they were is not among them, and is left to its idleness.
    pub(super) is_capped: bool,
    /// How TLS was begun, if it was.
    pub(super) tls: Option<Arc<BackendTls>>,
}

/// What requests are handed to.
#[derive(Debug)]
pub(super) enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// What a connection says that has brought no answer; with the request, if nothing of it was sent.
pub(super) type Unsent = TrySendError<Request<RequestBody>>;

impl Sender {
    /// Waits until the connection takes another request.
    pub(super) async fn ready(&mut self) -> hyper::Result<()> {
        match self {
            Self::Http1(sender) => sender.ready().await,
            Self::Http2(sender) => sender.ready().await,
        }
    }

    /// Hands the request over. Its answer may be waited for while others are handed over.
    pub(super) fn send(
        &mut self,
        mut request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, Unsent>> + use<> {
        match self {
            Self::Http1(sender) => Either::Left(sender.try_send_request(request)),
            Self::Http2(sender) => {
                // There it is the `:authority` that says it (RFC 9113, section 8.3.1).
                request.headers_mut().remove(HOST);
                Either::Right(sender.try_send_request(request))
            }
        }
    }
}

/// A connection, lent for one request.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) sender: Sender,
    /// What the connection was made with.
    pub(super) assurance: Assurance,
    pub(super) terms: Arc<Terms>,
    /// It stood before it was asked for, so it may have died unnoticed.
    pub(super) is_reused: bool,
    /// Its stream, of a connection that has several.
    pub(super) _stream: Option<StreamPlace>,
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

/// What the Service port says of connections that it was made for. Held by the connection itself, by whoever it is lent to and by
/// the pool, so that the pool sees whether it is in use.
#[derive(Debug)]
pub(super) struct Terms {
    /// A place among those that may be open, where there is a cap on that.
    place: Option<Place>,
    /// How long it may be idle.
    idle_limit: Duration,
    /// The endpoint that it leads to; None for a pod that was dialled itself.
    endpoint: Option<EndpointLoad>,
    made: Instant,
}

impl Terms {
    pub(super) fn new(
        place: Option<Place>,
        idle_limit: Option<Duration>,
        endpoint: Option<EndpointLoad>,
    ) -> Arc<Self> {
        let idle_limit = idle_limit.map_or(IDLE_LIMIT, |limit| limit.min(IDLE_LIMIT));
        Arc::new(Self { place, idle_limit, endpoint, made: Instant::now() })
    }

    /// Whether what it leads to, at this address, is no endpoint of a Service any more, or no pod.
    fn lead_nowhere(&self, to: SocketAddr, snapshot: &Snapshot) -> bool {
        match &self.endpoint {
            Some(endpoint) => endpoint.is_gone(),
            None => snapshot.workload(to.ip()).is_none(),
        }
    }

    /// Whether it has been there for so long that further requests are to have another.
    fn are_old(&self) -> bool {
        self.made.elapsed() >= SHARED_FOR
    }

    /// Servers close what has been idle for as long as they like. A limit of ours is there to be the first, so what is past it is
    /// not used; the agent's own is not to be that exact.
    fn are_over(&self, since: Instant) -> bool {
        self.idle_limit < IDLE_LIMIT && since.elapsed() >= self.idle_limit
    }

    fn hold_place_at(&self, port: &PortLoad) -> bool {
        self.place.as_ref().is_some_and(|place| place.guard.is_of(port))
    }
}

/// A place among the connections of a port. Whoever waits for one is told when it is left.
#[derive(Debug)]
pub(super) struct Place {
    // Dropped in this order: whoever is told finds it free.
    guard: PortGuard,
    _left: Left,
}

/// Tells whoever waits when it is dropped.
#[derive(Debug)]
struct Left(Arc<Notify>);

impl Place {
    pub(super) fn new(guard: PortGuard, left: &Arc<Notify>) -> Self {
        Self { guard, _left: Left(left.clone()) }
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        self.0.notify_waiters();
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
    /// Room for what these have not passed on yet, in bytes.
    pub(super) room_for_copies: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Slots {
    http1: HashMap<Key, Vec<Idle>>,
    /// One as a rule, and further ones where servers take fewer requests at a time than there are.
    http2: HashMap<Key, Vec<Arc<Shared>>>,
    /// When, and by the snapshot of which generation.
    swept: Option<(Instant, u64)>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    assurance: Assurance,
    terms: Arc<Terms>,
    since: Instant,
}

/// An HTTP/2 connection: whoever wants it while it is made waits for it.
#[derive(Debug, Default)]
struct Shared {
    made: OnceCell<Made>,
    used: Mutex<Option<Instant>>,
    /// Requests that are on it or wait for it to be made.
    lent: AtomicUsize,
}

/// A place among the streams of an HTTP/2 connection, until it is dropped.
#[derive(Debug)]
pub(super) struct StreamPlace(Arc<Shared>);

/// An HTTP/2 connection, and what it was made with.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) sender: http2::SendRequest<RequestBody>,
    /// How many streams its server takes at a time, once that is known.
    pub(super) most_streams: watch::Receiver<Option<usize>>,
    pub(super) assurance: Assurance,
    pub(super) terms: Arc<Terms>,
}

impl Made {
    fn lent(self, stream: StreamPlace, is_reused: bool) -> Lease {
        *stream.0.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let Self { sender, assurance, terms, .. } = self;
        Lease { sender: Sender::Http2(sender), assurance, terms, is_reused, _stream: Some(stream) }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            slots: Mutex::default(),
            tasks: Tasks::default(),
            mirrors: Arc::new(Semaphore::new(mirror::MOST)),
            room_for_copies: Arc::new(Semaphore::new(ROOM_FOR_COPIES)),
        }
    }
}

impl Pool {
    /// An HTTP/1 connection that waits for a request, and relies on just this.
    pub(super) fn take_http1(&self, key: &Key, assurance: &Assurance) -> Option<Lease> {
        let mut slots = self.slots();
        let idle = slots.http1.get_mut(key)?;
        // The one used last is the most likely to live. One that is not ready yet still sends a request's body.
        idle.retain(|idle| {
            let is_over = idle.terms.are_over(idle.since) || idle.terms.are_old();
            !idle.sender.is_closed() && idle.assurance == *assurance && !is_over
        });
        let place = idle.iter().rposition(|idle| idle.sender.is_ready())?;
        let Idle { sender, assurance, terms, .. } = idle.remove(place);
        if idle.is_empty() {
            slots.http1.remove(key);
        }
        Some(Lease { sender: Sender::Http1(sender), assurance, terms, is_reused: true, _stream: None })
    }

    /// Takes a connection back whose request has been answered.
    fn give_back(&self, key: Key, lease: Lease) {
        // HTTP/2 connections are here all the time.
        let Lease { sender: Sender::Http1(sender), assurance, terms, .. } = lease else { return };
        if sender.is_closed() {
            return;
        }
        let mut slots = self.slots();
        let idle = slots.http1.entry(key).or_default();
        if idle.len() < MOST_IDLE {
            idle.push(Idle { sender, assurance, terms, since: Instant::now() });
        }
    }

    /// An HTTP/2 connection to the endpoint with room for one more stream, made if there is none that relies on just this; another one than
    /// what is `spent`. As many are made at the same time as it takes.
    pub(super) async fn http2<F>(
        &self,
        key: &Key,
        assurance: &Assurance,
        spent: Option<&Weak<Terms>>,
        make: impl Fn() -> F,
    ) -> Result<Lease, InTheWay>
    where
        F: Future<Output = Result<Made, InTheWay>>,
    {
        loop {
            let stream = self.shared(key, assurance, spent);
            let shared = &stream.0;
            let is_reused = shared.made.initialized();
            let made = match shared.made.get_or_try_init(&make).await {
                Ok(made) => made.clone(),
                // No further one may be made. Where there is one, its server's next free stream is waited for there.
                Err(why) if why.reason == RefuseReason::Overloaded => {
                    let (stream, made) = self.least_lent(key, assurance).ok_or(why)?;
                    return Ok(made.lent(stream, true));
                }
                Err(why) => return Err(why),
            };
            // All that have waited for it may be too many.
            if shared.most_streams_known(&made).await < shared.lent.load(Relaxed) {
                continue;
            }
            return Ok(made.lent(stream, is_reused));
        }
    }

    /// A place on the connection to the endpoint that has lent the fewest, however many its server takes.
    fn least_lent(&self, key: &Key, assurance: &Assurance) -> Option<(StreamPlace, Made)> {
        let slots = self.slots();
        let usable = slots.http2.get(key)?.iter().filter_map(|shared| {
            let made =
                shared.made.get().filter(|made| !made.sender.is_closed() && made.assurance == *assurance)?;
            Some((shared, made))
        });
        let (shared, made) = usable.min_by_key(|(shared, _)| shared.lent.load(Relaxed))?;
        shared.lent.fetch_add(1, Relaxed);
        Some((StreamPlace(shared.clone()), made.clone()))
    }

    /// A place on the first connection that has one and may be used. Those that may not are left to who is still on them.
    fn shared(&self, key: &Key, assurance: &Assurance, spent: Option<&Weak<Terms>>) -> StreamPlace {
        let mut slots = self.slots();
        let all = slots.http2.entry(key.clone()).or_default();
        all.retain(|shared| {
            let is_usable = |Made { sender, assurance: made_with, terms, .. }: &Made| {
                let is_spent = spent.is_some_and(|spent| spent.as_ptr() == Arc::as_ptr(terms));
                let is_over = is_spent || shared.is_over(terms) || terms.are_old();
                !sender.is_closed() && made_with == assurance && !is_over
            };
            shared.made.get().is_none_or(is_usable)
        });
        let shared = match all.iter().find(|shared| shared.lent.load(Relaxed) < shared.most_streams()) {
            Some(shared) => shared.clone(),
            None => {
                all.push(Arc::default());
                all[all.len() - 1].clone()
            }
        };
        shared.lent.fetch_add(1, Relaxed);
        StreamPlace(shared)
    }

    /// Forgets the connections of a pod that has left. They end with the requests that are on them.
    pub(in crate::proxy) fn forget(&self, source: u64) {
        let mut slots = self.slots();
        slots.http1.retain(|key, _| key.source != source);
        slots.http2.retain(|key, _| key.source != source);
    }

    /// Lets go of a connection that has a place at the port and is idle, if there is one.
    pub(super) fn let_go(&self, port: &PortLoad) -> bool {
        let mut slots = self.slots();
        for idle in slots.http1.values_mut() {
            if let Some(place) = idle.iter().position(|idle| idle.terms.hold_place_at(port)) {
                idle.remove(place);
                return true;
            }
        }
        let is_idle = |shared: &Shared| {
            let made = shared.made.get();
            made.is_some_and(|made| made.terms.hold_place_at(port) && !is_lent(&made.terms))
        };
        slots.http2.values_mut().any(|all| {
            let place = all.iter().position(|shared| is_idle(shared));
            place.map(|place| all.remove(place)).is_some()
        })
    }

    /// Lets go of what has been idle for too long, or leads to an endpoint that has gone. To be called often; it is cheap.
    pub(in crate::proxy) fn sweep(&self, now: Instant, snapshot: &Snapshot) {
        let mut slots = self.slots();
        let is_swept = |(swept, generation): (Instant, u64)| {
            generation == snapshot.generation && now.saturating_duration_since(swept) < SWEEP_EVERY
        };
        if slots.swept.is_some_and(is_swept) {
            return;
        }
        slots.swept = Some((now, snapshot.generation));
        let is_fresh =
            |since: Instant, terms: &Terms| now.saturating_duration_since(since) < terms.idle_limit;
        slots.http1.retain(|key, idle| {
            idle.retain(|Idle { sender, terms, since, .. }| {
                !sender.is_closed() && is_fresh(*since, terms) && !terms.lead_nowhere(key.to, snapshot)
            });
            !idle.is_empty()
        });
        let lives = |key: &Key, shared: &Arc<Shared>| {
            let used = *shared.used.lock().unwrap_or_else(PoisonError::into_inner);
            // It is idle since the last request has ended, which is later than that began.
            let is_fresh =
                |terms: &Arc<Terms>| is_lent(terms) || used.is_some_and(|used| is_fresh(used, terms));
            let is_made = shared.made.get().is_some_and(|Made { sender, terms, .. }| {
                !sender.is_closed() && is_fresh(terms) && !terms.lead_nowhere(key.to, snapshot)
            });
            // Requests that are under way have it for themselves, but for those that wait for it to be made.
            is_made || (!shared.made.initialized() && shared.lent.load(Relaxed) > 0)
        };
        slots.http2.retain(|key, all| {
            all.retain(|shared| lives(key, shared));
            !all.is_empty()
        });
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Requests that it is to have at a time.
    fn most_streams(&self) -> usize {
        let told = self.made.get().and_then(|made| *made.most_streams.borrow());
        // One that takes none now is no worse than another one to the same server.
        told.unwrap_or(USUAL_STREAMS).max(1)
    }

    /// The same when it is known, for which a request that is alone there need not wait.
    async fn most_streams_known(&self, made: &Made) -> usize {
        if made.most_streams.borrow().is_none() && self.lent.load(Relaxed) > 1 {
            // Where the connection has ended meanwhile, that shows soon enough.
            _ = made.most_streams.clone().wait_for(Option::is_some).await;
        }
        self.most_streams()
    }

    /// Whether it has been idle for longer than its terms allow.
    fn is_over(&self, terms: &Arc<Terms>) -> bool {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        !is_lent(terms) && used.is_some_and(|used| terms.are_over(used))
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.lent.fetch_sub(1, Relaxed);
    }
}

/// Whether anybody has the connection but itself and the pool.
fn is_lent(terms: &Arc<Terms>) -> bool {
    Arc::strong_count(terms) > 2
}

#[cfg(test)]
mod tests;

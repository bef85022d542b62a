//! What the requests of one client connection have in common: who asks, and the way to upstream connections.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use super::connect;
use super::io::{Counted, Io, Stream};
use super::pool::{Key, Lease, Made, Place, Sender, Terms};
use super::quiet::Quiet;
use crate::balance::Carries;
use crate::balance::caps::{self, Full};
use crate::model::{ObjectRef, ServicePort, UnderWay};
use crate::proxy::Proxy;
use crate::proxy::admission::Entry;
use crate::proxy::captured::Captured;
use crate::proxy::let_in::Standing;
use crate::proxy::reach::{self, Assurance, Dialled, InTheWay};
use crate::proxy::worker::{Fate, Here};
use crate::snapshot::Snapshot;
use crate::telemetry::{ConnectionFacts, HttpCounters, RefuseReason, Security, Telemetry};

/// One client connection.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) proxy: Arc<Proxy>,
    pub(super) here: Arc<Here>,
    pub(super) captured: Captured,
    fate: watch::Receiver<Fate>,
    /// Where the dialled port has clients' connections end that are idle.
    pub(super) quiet: Option<Arc<Quiet>>,
    /// Who was talked to so far, for telemetry, as the snapshot of this generation has it: a handful, and most requests go where one went
    /// before.
    told: Mutex<Vec<(u64, Arc<Told>)>>,
}

/// What telemetry is told of requests to one endpoint.
#[derive(Debug)]
pub(super) struct Told {
    to: SocketAddr,
    assurance: Assurance,
    pub(super) facts: Arc<ConnectionFacts>,
    /// For each side that reports.
    pub(super) counters: Vec<HttpCounters>,
}

/// The protocol of an upstream connection: the one that the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Http1,
    Http2,
}

impl Told {
    /// `all` are the facts for each side that reports, one at least; the log has the first.
    pub(super) fn new(
        telemetry: &Telemetry,
        to: SocketAddr,
        assurance: Assurance,
        all: Vec<ConnectionFacts>,
    ) -> Self {
        let counters = all.iter().map(|facts| telemetry.http_counters(facts)).collect();
        let Some(facts) = all.into_iter().next() else { unreachable!("somebody reports every connection") };
        Self { to, assurance, facts: Arc::new(facts), counters }
    }

    /// Whether it tells of requests to this endpoint for that Service, as the one or the other snapshot has them.
    fn is_of(&self, to: SocketAddr, service: Option<&ObjectRef>, assurance: &Assurance) -> bool {
        self.to == to && self.facts.service.as_ref() == service && self.assurance == *assurance
    }

    /// How the connection is protected.
    pub(super) fn security(&self) -> Security {
        self.assurance.security
    }
}

impl Talk {
    pub(super) fn new(
        proxy: Arc<Proxy>,
        here: Arc<Here>,
        captured: Captured,
        fate: watch::Receiver<Fate>,
    ) -> Self {
        let limit = || {
            let snapshot = proxy.snapshot.load();
            captured.service(&snapshot)?.port(captured.port())?.traffic.timeouts.idle
        };
        let quiet = limit().map(|limit| Arc::new(Quiet::new(limit)));
        Self { proxy, here, captured, fate, quiet, told: Mutex::default() }
    }

    /// Returns when the client's connection has been idle for longer than it may be.
    pub(super) async fn idle_for_too_long(&self) {
        match &self.quiet {
            // On the heap: nearly all do without.
            Some(quiet) => Box::pin(quiet.for_too_long()).await,
            None => std::future::pending().await,
        }
    }

    /// Whether the pod's next connections are somebody else's: then this one is not to be used for much longer.
    pub(super) fn is_leaving(&self) -> bool {
        *self.fate.borrow() != Fate::Serve
    }

    /// Which connections may carry this client's requests to the endpoint.
    pub(super) fn key(&self, to: SocketAddr, port: Option<&ServicePort>) -> Key {
        let traffic = port.map(|port| &*port.traffic);
        Key {
            source: self.captured.net.cookie,
            bound: self.captured.bound,
            to,
            is_limited: traffic.is_some_and(|traffic| !traffic.rate_limits.is_empty()),
            is_capped: traffic.is_some_and(|traffic| traffic.caps.connections.is_some()),
            tls: traffic.and_then(|traffic| traffic.tls.as_ref()?.as_ref().ok().cloned()),
        }
    }

    /// A connection to the endpoint for one request: one that stands, unless one has proved to be spent, else a new one, as the port
    /// wants them.
    pub(super) async fn lease(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        service: Option<&ObjectRef>,
        (to, port): (SocketAddr, Option<&ServicePort>),
        dialect: Dialect,
        spent: Option<&Weak<Terms>>,
    ) -> Result<Lease, InTheWay> {
        if let Some(Err(why)) = port.and_then(|port| port.traffic.tls.as_ref()) {
            return Err(InTheWay::new(RefuseReason::InvalidBackend, Assurance::NONE).because(&**why));
        }
        let key = self.key(to, port);
        let (pool, limits) = (&self.here.upstreams, &self.proxy.settings.http_limits);
        // What stands was made by what held then; what is asked for is what holds now.
        let wanted = reach::assurance(&self.proxy, snapshot, &self.captured, to);
        match dialect {
            Dialect::Http1 => {
                if spent.is_none()
                    && let Some(lease) = pool.take_http1(&key, &wanted)
                {
                    return Ok(lease);
                }
                let (io, assurance, terms, let_in) =
                    self.connect(snapshot, service, (to, port), dialect).await?;
                let made = connect::http1(limits, io).await;
                let (sender, connection) = made.map_err(|error| refused(&error, &assurance))?;
                self.keep(connection, let_in);
                Ok(Lease { sender: Sender::Http1(sender), assurance, terms, is_reused: false, _stream: None })
            }
            Dialect::Http2 => {
                let make = || async {
                    let (io, assurance, terms, let_in) =
                        self.connect(snapshot, service, (to, port), dialect).await?;
                    let made = connect::http2_shared(limits, io).await;
                    let (sender, most_streams, connection) =
                        made.map_err(|error| refused(&error, &assurance))?;
                    self.keep(connection, let_in);
                    Ok(Made { sender, most_streams, assurance, terms })
                };
                pool.http2(&key, &wanted, spent, make).await
            }
        }
    }

    async fn connect(
        &self,
        snapshot: &Snapshot,
        service: Option<&ObjectRef>,
        (to, port): (SocketAddr, Option<&ServicePort>),
        dialect: Dialect,
    ) -> Result<(Io, Assurance, Arc<Terms>, Option<Standing>), InTheWay> {
        let Self { proxy, here, captured, .. } = self;
        let place = match port {
            Some(port) => self.place(port).await?,
            None => None,
        };
        let endpoint = port.and_then(|port| port.endpoint(to)).map(|endpoint| endpoint.load.clone());
        let terms = Terms::new(place, port.and_then(|port| port.traffic.timeouts.idle), endpoint);
        // Whoever asked may go while others wait for the same: whether a client is still there is its own task's to see.
        let gone = std::future::pending();
        let Dialled { upstream, assurance, entered } =
            reach::dial(proxy, here, snapshot, captured, (to, port), Carries::Request, gone).await?;
        let meter = reach::record(proxy, snapshot, captured, to, service, &assurance);
        let stream = Stream::new(upstream, &here.upstreams.tasks);
        let let_in = entered.map(|(door, entry)| {
            // Each of its requests is asked about, and again where policies wanted to see it.
            let entry = Entry { by_request: true, ..entry };
            let standing = Standing::new(door, captured.caller(), assurance.security, entry);
            Standing { carries: Carries::Request, keeps_all: false, ..standing }
        });
        let io = Counted::new(stream, meter, Some(terms.clone()));
        let io = match self.key(to, port).tls {
            None => Io::Left(io),
            Some(tls) => {
                let within = reach::patience(proxy, port);
                let encrypted = proxy.backend_tls.begin(&tls, dialect, io, within).await;
                Io::Right(encrypted.map_err(|failed| failed.in_the_way(assurance.clone()))?)
            }
        };
        Ok((io, assurance, terms, let_in))
    }

    /// Whether the endpoint's policies have begun to want to see requests since one was asked about that goes by this snapshot, and whose
    /// head was not kept.
    pub(super) fn wants_its_head(&self, snapshot: &Snapshot, to: SocketAddr) -> bool {
        let now = self.proxy.snapshot.load();
        let is_wanted = || {
            let (door, _) = reach::door(&self.proxy, &now, &self.captured, to)?;
            Some(door.policies(&now)?.needs_requests(to.port()))
        };
        !std::ptr::eq(&**now, snapshot) && is_wanted() == Some(true)
    }

    /// Drives the connection; to an endpoint of this node for as long as policies let it stand.
    fn keep(&self, connection: impl Future<Output = ()> + Send + 'static, let_in: Option<Standing>) {
        let tasks = &self.here.upstreams.tasks;
        match let_in {
            None => tasks.spawn(connection),
            Some(standing) => {
                let (proxy, here) = (self.proxy.clone(), self.here.clone());
                tasks.spawn(async move {
                    let carried = here.let_in.enter(&proxy, standing).carry(connection);
                    _ = carried.await;
                });
            }
        }
    }

    /// A place among the connections of the port, where there is a cap on those: if need be, that of one that nobody uses now, on
    /// whichever thread.
    async fn place(&self, port: &ServicePort) -> Result<Option<Place>, InTheWay> {
        let mut is_let_go = false;
        for look in 0..LOOKS {
            if let Ok(place) = self.enter(port) {
                return Ok(place);
            }
            // Once more than once: somebody else may have been faster, or is about to have what was let go for others.
            is_let_go |= self.here.all_upstreams.iter().any(|pool| pool.let_go(&port.load));
            if look > 0 && !is_let_go {
                break;
            }
            // It is closed by the thread that has it.
            if let Ok(place) = timeout(LOOK_EVERY, self.entered(port)).await {
                return Ok(place);
            }
        }
        Err(InTheWay::new(RefuseReason::Overloaded, Assurance::NONE))
    }

    /// The next place that is left.
    async fn entered(&self, port: &ServicePort) -> Option<Place> {
        loop {
            let mut left = pin!(self.here.place_left.notified());
            // From here on nothing is missed.
            left.as_mut().enable();
            if let Ok(place) = self.enter(port) {
                return place;
            }
            left.await;
        }
    }

    fn enter(&self, port: &ServicePort) -> Result<Option<Place>, Full> {
        let guard = caps::enter(port, UnderWay::Connections)?;
        Ok(guard.map(|guard| Place::new(guard, &self.here.place_left)))
    }

    /// With whom requests are counted that have reached no endpoint: the Service as such.
    pub(super) fn told_of_service(&self, service: Option<&ObjectRef>) -> Arc<Told> {
        self.told(&self.proxy.snapshot.load(), service, self.captured.dialled, &Assurance::NONE)
    }

    /// With whom requests to the endpoint are counted.
    pub(super) fn told(
        &self,
        snapshot: &Snapshot,
        service: Option<&ObjectRef>,
        to: SocketAddr,
        assurance: &Assurance,
    ) -> Arc<Told> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let place = told.iter().position(|(_, told)| told.is_of(to, service, assurance));
        // An address may have become another pod's.
        if let Some((generation, known)) = place.map(|place| &told[place])
            && *generation == snapshot.generation
        {
            return known.clone();
        }
        let facts = |reporter: &_| {
            let (proxy, captured) = (&self.proxy, &self.captured);
            reach::facts(proxy, snapshot, captured, to, service, assurance, *reporter)
        };
        let all: Vec<ConnectionFacts> = reach::reporters(assurance).iter().map(facts).collect();
        let new = Arc::new(Told::new(&self.proxy.telemetry, to, assurance.clone(), all));
        let entry = (snapshot.generation, new.clone());
        match place {
            Some(place) => told[place] = entry,
            None => {
                if told.len() == MOST_TOLD {
                    told.remove(0);
                }
                told.push(entry);
            }
        }
        new
    }
}

/// How long closing a connection may take that nobody uses, before another one is closed as well; and how often that is done.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const LOOKS: u32 = 20;

/// Endpoints that a connection remembers.
const MOST_TOLD: usize = 16;

fn refused(error: &hyper::Error, assurance: &Assurance) -> InTheWay {
    debug!(%error, "an upstream does not begin to speak HTTP");
    InTheWay::new(RefuseReason::ConnectFailed, assurance.clone())
}

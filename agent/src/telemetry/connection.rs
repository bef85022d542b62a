//! One relayed connection: the facts it was opened with, and the bytes counted while it lives.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use super::access_log::AuditRecord;
use super::series::Series;
use super::{CloseReason, Ruling, RulingOf, Telemetry};
use crate::model::{Name, ObjectRef, Workload};

/// What is known of a connection when its upstream has been chosen, or when it is refused.
#[derive(Clone, Debug)]
pub struct ConnectionFacts {
    /// On whose behalf this agent saw it.
    pub reporter: Reporter,
    /// Who called.
    pub source: Peer,
    /// Who was chosen to answer; for a refused connection what the client dialled.
    pub destination: Peer,
    /// The Service that the client dialled; `None` where it dialled a pod.
    pub service: Option<ObjectRef>,
    /// How the bytes travel between the two.
    pub security: Security,
    /// The address and port that the client asked for.
    pub dialled: SocketAddr,
    /// The other end of the socket that the agent accepted.
    pub client: SocketAddr,
    /// Where the agent connected to; `None` until it has.
    pub upstream: Option<SocketAddr>,
    /// What policies have said of it, where there are some.
    pub ruling: RulingOf,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The pod, if the address is that of a known one.
    pub workload: Option<Arc<Workload>>,
    /// Its SPIFFE id, where that is proven: by its certificate, or because this agent knows its own pods.
    pub identity: Option<Name>,
    /// Its own address, whatever stands in between.
    pub address: SocketAddr,
}

/// The side of the connection that the agent stands on. A connection between two pods of one node is reported once
/// for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The client's.
    Source,
    /// The server's.
    Destination,
}

/// What protects the bytes between the two pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Security {
    /// They never leave the node's kernel.
    SameNode,
    /// Nothing.
    Plaintext,
    /// Mutual TLS with the identities of both pods.
    MutualTls,
}

impl Reporter {
    /// Both, in the order of the declaration.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Security {
    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SameNode => "same_node",
            Self::Plaintext => "plaintext",
            Self::MutualTls => "mutual_tls",
        }
    }
}

/// The relay's handle on an open connection: it counts bytes, and says at the end why it ended. Dropped without
/// [`close`](Self::close) it counts as [`CloseReason::Cancelled`].
#[derive(Debug)]
#[must_use = "dropping it closes the connection in the metrics"]
pub struct OpenConnection {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) connection: Arc<Connection>,
    pub(super) slot: super::table::Slot,
    pub(super) reason: CloseReason,
}

impl OpenConnection {
    /// Counts bytes that went from the client to the server.
    #[inline]
    pub fn add_sent(&self, bytes: u64) {
        self.connection.bytes.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that went from the server to the client.
    #[inline]
    pub fn add_received(&self, bytes: u64) {
        self.connection.bytes.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that it has carried, both ways.
    pub fn moved(&self) -> u64 {
        self.connection.sent().wrapping_add(self.connection.received())
    }

    /// Records what policies say of it, once that is known of what it carries.
    pub fn rule(&self, ruling: Arc<Ruling>) {
        let facts = ConnectionFacts { ruling: Some(ruling.clone()), ..self.connection.facts.clone() };
        self.telemetry.ruled(&facts.ruling, || AuditRecord::Connection(Box::new(facts.clone())));
        // Whoever asks twice is told the same.
        let _ = self.connection.ruling.set(ruling);
    }

    /// On whose behalf it is reported.
    pub fn reporter(&self) -> Reporter {
        self.connection.facts.reporter
    }

    /// Ends the connection in the metrics, the table and the access log.
    pub fn close(mut self, reason: CloseReason) {
        self.reason = reason;
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.telemetry.connection_closed(self.slot, &self.connection, self.reason);
    }
}

/// What the table and the access log share of one connection.
#[derive(Debug)]
pub struct Connection {
    /// What it was opened with.
    pub facts: ConnectionFacts,
    /// When it was opened, for people.
    pub opened: SystemTime,
    since: Instant,
    /// What policies have said of it since.
    ruling: OnceLock<Arc<Ruling>>,
    bytes: Bytes,
    pub(super) series: Arc<Series>,
}

/// What has moved. The relay's thread writes it for every chunk; what lies next to it in memory is that thread's, too.
#[derive(Debug, Default)]
struct Bytes {
    sent: AtomicU64,
    received: AtomicU64,
    /// How much of each has reached the metrics.
    sent_counted: AtomicU64,
    received_counted: AtomicU64,
}

impl Connection {
    pub(super) fn new(facts: ConnectionFacts, series: Arc<Series>) -> Self {
        Self {
            facts,
            opened: SystemTime::now(),
            since: Instant::now(),
            ruling: OnceLock::new(),
            bytes: Bytes::default(),
            series,
        }
    }

    /// Bytes from the client to the server so far.
    pub fn sent(&self) -> u64 {
        self.bytes.sent.load(Ordering::Relaxed)
    }

    /// Bytes from the server to the client so far.
    pub fn received(&self) -> u64 {
        self.bytes.received.load(Ordering::Relaxed)
    }

    /// How long it has been open.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// What policies have said of it.
    pub fn ruling(&self) -> Option<&Ruling> {
        self.ruling.get().or(self.facts.ruling.as_ref()).map(Arc::as_ref)
    }

    /// Adds to the metrics what has moved since the last call. Scrapes and the end may call it at once: `fetch_max`
    /// hands every byte to exactly one of them.
    pub(super) fn count_bytes(&self) {
        let uncounted = |total: &AtomicU64, counted: &AtomicU64| {
            let now = total.load(Ordering::Relaxed);
            now.saturating_sub(counted.fetch_max(now, Ordering::Relaxed))
        };
        let sent = uncounted(&self.bytes.sent, &self.bytes.sent_counted);
        let received = uncounted(&self.bytes.received, &self.bytes.received_counted);
        if sent > 0 {
            self.series.sent.fetch_add(sent, Ordering::Relaxed);
        }
        if received > 0 {
            self.series.received.fetch_add(received, Ordering::Relaxed);
        }
    }
}

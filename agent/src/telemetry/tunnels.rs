//! The tunnels between nodes: how their handshakes went, what was refused inside them, what is open and why it ended.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::Reporter;

/// The `reason` of a handshake that did not fail.
const NO_REASON: &str = "none";

/// Counts of this agent's tunnels, in sum over its pods.
#[derive(Debug, Default)]
pub struct Tunnels {
    handshakes: Mutex<BTreeMap<Handshake, u64>>,
    refused_requests: Mutex<BTreeMap<RefusedRequest, u64>>,
    sides: [Side; Reporter::ALL.len()],
    bypassed: AtomicU64,
}

/// How a handshake went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Handshake {
    pub(super) reporter: Reporter,
    pub(super) result: &'static str,
    pub(super) reason: &'static str,
}

/// What was answered to a CONNECT that led nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RefusedRequest {
    pub(super) status: u16,
    pub(super) reason: &'static str,
}

/// The tunnels on whose one side this agent stands.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub(super) open: AtomicU64,
    pub(super) streams: AtomicU64,
    pub(super) closed: [AtomicU64; TunnelEnd::ALL.len()],
}

/// Why a tunnel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Nobody used it.
    Idle,
    /// In order: the other side wanted it, or the pod has left the mesh.
    Closed,
    /// The peer's certificate expired or its root is not believed any more; what was in it came to its end.
    Lapsed,
    /// The peer's certificate was revoked, or its trust domain is not believed any more; what was in it was broken off.
    Withdrawn,
    /// The other side did not answer any more.
    Silent,
    /// The connection under it broke, or what came over it made no sense.
    Broken,
    /// The agent gave it up, with the pod or with itself.
    Cancelled,
}

/// A tunnel that stands, until it is dropped.
#[derive(Debug)]
pub struct OpenTunnel {
    tunnels: Arc<Tunnels>,
    reporter: Reporter,
    end: OnceLock<TunnelEnd>,
}

impl Tunnels {
    /// Counts a handshake after which both sides trust each other.
    pub fn handshake_succeeded(&self, reporter: Reporter) {
        self.count_handshake(Handshake { reporter, result: "success", reason: NO_REASON });
    }

    /// Counts one that failed, for a reason with a stable name.
    pub fn handshake_failed(&self, reporter: Reporter, reason: &'static str) {
        self.count_handshake(Handshake { reporter, result: "failure", reason });
    }

    /// Counts a CONNECT of a peer that led nowhere: what it was answered, and for what reason.
    pub fn request_refused(&self, status: u16, reason: &'static str) {
        let mut refused = self.refused_requests.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry(RefusedRequest { status, reason }).or_default() += 1;
    }

    /// Counts a connection that went in plaintext past the destination's agent, which was down; how many there are now.
    pub fn bypassed(&self) -> u64 {
        self.bypassed.fetch_add(1, Relaxed) + 1
    }

    /// Counts a tunnel for as long as it stands.
    pub fn opened(self: &Arc<Self>, reporter: Reporter) -> OpenTunnel {
        self.side(reporter).open.fetch_add(1, Relaxed);
        OpenTunnel { tunnels: self.clone(), reporter, end: OnceLock::new() }
    }

    pub(super) fn handshakes(&self) -> BTreeMap<Handshake, u64> {
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn refused_requests(&self) -> BTreeMap<RefusedRequest, u64> {
        self.refused_requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn bypasses(&self) -> u64 {
        self.bypassed.load(Relaxed)
    }

    pub(super) fn side(&self, reporter: Reporter) -> &Side {
        &self.sides[reporter as usize]
    }

    fn count_handshake(&self, handshake: Handshake) {
        // Each costs a thousand times what the lock does.
        let mut handshakes = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        *handshakes.entry(handshake).or_default() += 1;
    }
}

impl OpenTunnel {
    /// Counts a stream in it.
    pub fn stream_opened(&self) {
        self.tunnels.side(self.reporter).streams.fetch_add(1, Relaxed);
    }

    /// The stream is over.
    pub fn stream_closed(&self) {
        self.tunnels.side(self.reporter).streams.fetch_sub(1, Relaxed);
    }

    /// Says why the tunnel ends. The first word counts: what follows from it is no news.
    pub fn ends(&self, end: TunnelEnd) {
        let _ = self.end.set(end);
    }
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        let side = self.tunnels.side(self.reporter);
        let end = self.end.get().copied().unwrap_or(TunnelEnd::Cancelled);
        side.closed[end as usize].fetch_add(1, Relaxed);
        side.open.fetch_sub(1, Relaxed);
    }
}

impl TunnelEnd {
    /// Every end, in the order of the declaration.
    pub const ALL: [Self; 7] = [
        Self::Idle,
        Self::Closed,
        Self::Lapsed,
        Self::Withdrawn,
        Self::Silent,
        Self::Broken,
        Self::Cancelled,
    ];

    /// The stable name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Closed => "closed",
            Self::Lapsed => "lapsed",
            Self::Withdrawn => "withdrawn",
            Self::Silent => "silent",
            Self::Broken => "broken",
            Self::Cancelled => "cancelled",
        }
    }
}

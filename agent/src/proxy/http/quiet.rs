//! Whether a client's connection is idle: no request is under way on it, and it says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::proxy::idle::unmoved;

/// What shows it, of a connection that is to end when it has been idle for some time.
#[derive(Debug)]
pub(super) struct Quiet {
    limit: Duration,
    under_way: AtomicU32,
    /// Reads with bytes, and requests that have ended.
    moved: AtomicU64,
}

/// A request that has not ended, all of its answer included.
#[derive(Debug)]
pub(super) struct Noise(Arc<Quiet>);

impl Quiet {
    /// It may be idle for so long.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, under_way: AtomicU32::default(), moved: AtomicU64::default() }
    }

    /// A request has begun, and lasts for as long as what is returned.
    pub(super) fn begun(self: &Arc<Self>) -> Noise {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        Noise(self.clone())
    }

    /// The client has said something.
    pub(super) fn said(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns when it has been idle for too long.
    pub(super) async fn for_too_long(&self) {
        unmoved(self.limit, || {
            let is_busy = self.under_way.load(Ordering::Relaxed) > 0;
            (!is_busy).then(|| self.moved.load(Ordering::Relaxed))
        })
        .await;
    }
}

impl Noise {
    /// How long its connection may be idle.
    pub(super) fn limit(&self) -> Duration {
        self.0.limit
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.0.said();
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

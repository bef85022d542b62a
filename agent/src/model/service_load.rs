//! What this node has seen of a Service: figures that all snapshots share, and that go with it.
//!
//! They are only kept here. What follows from them is for `balance` to decide.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What is known of a Service as a destination of this node. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ServiceLoad(Arc<ServiceFigures>);

#[derive(Debug, Default)]
struct ServiceFigures {
    answered: AtomicU64,
    retries: Mutex<Option<RetryTokens>>,
    counts: [AtomicU64; ServiceEvent::ALL.len()],
}

/// What is left for retries, as of a moment.
#[derive(Clone, Copy, Debug)]
pub struct RetryTokens {
    /// Retries that may be made at once.
    pub left: f64,
    /// At most so many are saved up.
    pub most: f64,
    /// When that was worked out.
    pub at: Instant,
    /// Since when the answers are counted that `most` is worked out from.
    pub counting_since: Instant,
    /// How many there were since then.
    pub counted: u64,
}

/// What is counted of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceEvent {
    /// A request was sent again.
    Retried,
    /// It would have been, but there were too many already.
    RetryBudgetSpent,
    /// It would have been, but somebody else has retried it or will.
    RetriedElsewhere,
    /// It would have been, but the upstream wants to be left alone for too long.
    RetryAfterTooLong,
    /// It would have been, but as many were being sent again as may.
    RetriesCapped,
    /// An endpoint was ejected for answers of the kind 5xx in a row.
    EjectedForServerErrors,
    /// For gateway errors or failed connections in a row.
    EjectedForGatewayFailures,
    /// For nobody listened.
    EjectedForRefusal,
    /// For it failed again when its time was over.
    EjectedForFailedProbe,
    /// For it answered well less often than the others.
    EjectedForSuccessRate,
    /// A copy of a request was sent to it as a mirror, and answered.
    Mirrored,
    /// There was none, or not all of it: too many were under way, it fell behind, or the client of what it is a copy of left.
    MirrorDropped,
    /// It brought no answer.
    MirrorFailed,
}

impl ServiceLoad {
    /// Counts a request that was answered.
    pub fn count_answer(&self) {
        self.0.answered.fetch_add(1, Relaxed);
    }

    /// How many were counted since this was asked last.
    pub fn take_answers(&self) -> u64 {
        self.0.answered.swap(0, Relaxed)
    }

    /// Changes what is left for retries. None: nobody has asked for one yet.
    pub fn change_retries<T>(&self, change: impl FnOnce(&mut Option<RetryTokens>) -> T) -> T {
        change(&mut self.0.retries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts it.
    pub fn count(&self, event: ServiceEvent) {
        self.0.counts[event as usize].fetch_add(1, Relaxed);
    }

    /// How often it was counted.
    pub fn counted(&self, event: ServiceEvent) -> u64 {
        self.0.counts[event as usize].load(Relaxed)
    }
}

impl ServiceEvent {
    /// Every event, in the order of the declaration.
    pub const ALL: [Self; 13] = [
        Self::Retried,
        Self::RetryBudgetSpent,
        Self::RetriedElsewhere,
        Self::RetryAfterTooLong,
        Self::RetriesCapped,
        Self::EjectedForServerErrors,
        Self::EjectedForGatewayFailures,
        Self::EjectedForRefusal,
        Self::EjectedForFailedProbe,
        Self::EjectedForSuccessRate,
        Self::Mirrored,
        Self::MirrorDropped,
        Self::MirrorFailed,
    ];
}

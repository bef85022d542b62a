//! Callers of the tunnel's port that have not shown yet who they are.
//!
//! Whoever reaches the port may open connections and never finish a handshake, so there is room for a number of them
//! only, beside the connections that count. When it is full, the one that has waited longest makes room: a peer of the
//! mesh is done within milliseconds, whoever waits is not one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Callers of one agent that may be shaking hands at one time.
pub const UNFINISHED_HANDSHAKES: usize = 512;

/// Those whose handshakes are under way, in the order in which they came.
#[derive(Debug)]
pub struct Strangers {
    room: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    callers: VecDeque<(u64, Arc<Notify>)>,
}

/// A place among them.
#[derive(Debug)]
pub(super) struct Stranger<'a> {
    strangers: &'a Strangers,
    number: u64,
    displaced: Arc<Notify>,
}

impl Default for Strangers {
    fn default() -> Self {
        Self::new(UNFINISHED_HANDSHAKES)
    }
}

impl Strangers {
    fn new(room: usize) -> Self {
        Self { room, waiting: Mutex::default() }
    }

    /// A place for one more. If there is none, the oldest is told to go.
    pub(super) fn enter(&self) -> Stranger<'_> {
        let mut waiting = self.waiting();
        let (number, displaced) = (waiting.next, Arc::new(Notify::new()));
        waiting.next += 1;
        waiting.callers.push_back((number, displaced.clone()));
        if waiting.callers.len() > self.room
            && let Some((_, oldest)) = waiting.callers.pop_front()
        {
            oldest.notify_one();
        }
        Stranger { strangers: self, number, displaced }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stranger<'_> {
    /// Returns when somebody newer needs the place.
    pub(super) async fn displaced(&self) {
        self.displaced.notified().await;
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        let mut waiting = self.strangers.waiting();
        if let Ok(index) = waiting.callers.binary_search_by_key(&self.number, |(number, _)| *number) {
            waiting.callers.remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn is_displaced(stranger: &Stranger<'_>) -> bool {
        stranger.displaced().now_or_never().is_some()
    }

    #[test]
    fn the_one_that_has_waited_longest_makes_room() {
        let strangers = Strangers::new(2);
        let (first, second) = (strangers.enter(), strangers.enter());
        assert!(!is_displaced(&first) && !is_displaced(&second));
        let third = strangers.enter();
        assert!(is_displaced(&first) && !is_displaced(&second) && !is_displaced(&third));
        // Its going makes no further room, and hurts nobody else's place.
        drop(first);
        let fourth = strangers.enter();
        assert!(is_displaced(&second) && !is_displaced(&third) && !is_displaced(&fourth));
    }

    #[test]
    fn whoever_is_done_leaves_its_place() {
        let strangers = Strangers::new(2);
        let first = strangers.enter();
        for _ in 0..10 {
            drop(strangers.enter());
        }
        assert!(!is_displaced(&first));
        drop(first);
        assert!(strangers.waiting().callers.is_empty());
    }
}

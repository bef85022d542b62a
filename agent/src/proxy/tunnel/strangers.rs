//! Callers of the tunnel's port that have not shown yet who they are.
//!
//! Whoever reaches the port may open connections and never finish a handshake, so there is room for a number of them
//! only, beside the connections that count. When it is full, whoever takes the most places of all addresses gives up the
//! one that has waited longest: a peer of the mesh is done within milliseconds, and is not who holds the most.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
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
    callers: VecDeque<Caller>,
}

#[derive(Debug)]
struct Caller {
    number: u64,
    address: IpAddr,
    displaced: Arc<Notify>,
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

    /// A place for one more. If there is none, one that has waited long is told to go.
    pub(super) fn enter(&self, address: IpAddr) -> Stranger<'_> {
        let mut waiting = self.waiting();
        let (number, displaced) = (waiting.next, Arc::new(Notify::new()));
        waiting.next += 1;
        waiting.callers.push_back(Caller { number, address, displaced: displaced.clone() });
        if waiting.callers.len() > self.room
            && let Some(one) = waiting.oldest_of_the_greediest()
        {
            one.displaced.notify_one();
        }
        Stranger { strangers: self, number, displaced }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Costs a look at each: it is bounded, and only who is flooded pays it.
    fn oldest_of_the_greediest(&mut self) -> Option<Caller> {
        let mut places: HashMap<IpAddr, usize> = HashMap::new();
        for caller in &self.callers {
            *places.entry(caller.address).or_default() += 1;
        }
        let most = places.values().copied().max()?;
        let index = self.callers.iter().position(|caller| places[&caller.address] == most)?;
        self.callers.remove(index)
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
        if let Ok(index) = waiting.callers.binary_search_by_key(&self.number, |caller| caller.number) {
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

    fn address(last: u8) -> IpAddr {
        [10, 77, 1, last].into()
    }

    #[test]
    fn the_one_that_has_waited_longest_makes_room() {
        let strangers = Strangers::new(2);
        let enter = || strangers.enter(address(1));
        let (first, second) = (enter(), enter());
        assert!(!is_displaced(&first) && !is_displaced(&second));
        let third = enter();
        assert!(is_displaced(&first) && !is_displaced(&second) && !is_displaced(&third));
        // Its going makes no further room, and hurts nobody else's place.
        drop(first);
        let fourth = enter();
        assert!(is_displaced(&second) && !is_displaced(&third) && !is_displaced(&fourth));
    }

    #[test]
    fn a_flood_displaces_its_own() {
        let strangers = Strangers::new(4);
        let peer = strangers.enter(address(1));
        let mut flood: Vec<_> = (0..3).map(|_| strangers.enter(address(2))).collect();
        for _ in 0..100 {
            flood.push(strangers.enter(address(2)));
        }
        let late_peer = strangers.enter(address(3));
        assert!(!is_displaced(&peer) && !is_displaced(&late_peer));
        assert_eq!(flood.iter().filter(|stranger| is_displaced(stranger)).count(), 101);
    }

    #[test]
    fn whoever_is_done_leaves_its_place() {
        let strangers = Strangers::new(2);
        let first = strangers.enter(address(1));
        for _ in 0..10 {
            drop(strangers.enter(address(1)));
        }
        assert!(!is_displaced(&first));
        drop(first);
        assert!(strangers.waiting().callers.is_empty());
    }
}

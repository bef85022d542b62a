//! Callers of the tunnel's port that have not shown yet who they are.
//!
//! Whoever reaches the port may open connections and never finish a handshake, so there is room for a number of them
//! only, beside the connections that count. When it is full, whoever takes the most places of all addresses gives up the
//! one that has waited longest: a peer of the mesh is done within milliseconds, and is not who holds the most. Whoever
//! comes too often waits for its turn ([`Pace`]), in its place.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::pace::Pace;

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
    pace: Pace,
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
    /// None if it is now.
    turn: Option<Instant>,
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

    /// A place for one more, unless its address has had too many. If there is none, one that has waited long is told to
    /// go.
    pub(super) fn enter(&self, address: IpAddr, now: Instant) -> Option<Stranger<'_>> {
        let mut waiting = self.waiting();
        let turn = Some(waiting.pace.turn(address, now)?).filter(|turn| *turn > now);
        let (number, displaced) = (waiting.next, Arc::new(Notify::new()));
        waiting.next += 1;
        waiting.callers.push_back(Caller { number, address, displaced: displaced.clone() });
        if waiting.callers.len() > self.room
            && let Some(one) = waiting.oldest_of_the_greediest()
        {
            one.displaced.notify_one();
        }
        Some(Stranger { strangers: self, number, displaced, turn })
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
    /// Returns when its handshake may begin.
    pub(super) async fn turn(&self) {
        if let Some(turn) = self.turn {
            sleep_until(turn.into()).await;
        }
    }

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

    fn enter(strangers: &Strangers, last: u8) -> Stranger<'_> {
        strangers.enter([10, 77, 1, last].into(), Instant::now()).unwrap()
    }

    #[test]
    fn the_one_that_has_waited_longest_makes_room() {
        let strangers = Strangers::new(2);
        let enter = || enter(&strangers, 1);
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
        let peer = enter(&strangers, 1);
        let mut flood: Vec<_> = (0..3).map(|_| enter(&strangers, 2)).collect();
        for _ in 0..100 {
            flood.push(enter(&strangers, 2));
        }
        let late_peer = enter(&strangers, 3);
        assert!(!is_displaced(&peer) && !is_displaced(&late_peer));
        assert_eq!(flood.iter().filter(|stranger| is_displaced(stranger)).count(), 101);
    }

    #[test]
    fn whoever_is_done_leaves_its_place() {
        let strangers = Strangers::new(2);
        let first = enter(&strangers, 1);
        for _ in 0..10 {
            drop(enter(&strangers, 1));
        }
        assert!(!is_displaced(&first));
        drop(first);
        assert!(strangers.waiting().callers.is_empty());
    }
}

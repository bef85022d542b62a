//! What this node has under way to a Service port, and whose turn it is there: figures that all snapshots share, and that go with it.
//!
//! They are only kept here. What follows from them is for `balance` to decide.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Instant;

use super::Outcomes;

/// What is known of a Service port as a destination of this node. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct PortLoad(Arc<PortFigures>);

#[derive(Debug, Default)]
struct PortFigures {
    under_way: [AtomicU32; UnderWay::ALL.len()],
    /// Who had the last turn, of IPv4 and of IPv6.
    last: [Mutex<Option<SocketAddr>>; 2],
    is_wary: AtomicBool,
    looked: Mutex<Option<Looked>>,
}

/// What is counted while it is under way, where there is a cap on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnderWay {
    /// Connections.
    Connections,
    /// Requests, to the end of their answer.
    Requests,
    /// Requests that are being sent again.
    Retries,
}

/// A place among those that a cap allows; see [`PortLoad::enter`].
#[derive(Debug)]
pub struct PortGuard(Arc<PortFigures>, UnderWay);

/// How the endpoints had done when they were compared last.
#[derive(Clone, Debug)]
pub struct Looked {
    /// When that was.
    pub at: Instant,
    /// What each had answered by then.
    pub outcomes: HashMap<SocketAddr, Outcomes>,
}

impl PortLoad {
    /// A place for one more, for as long as the guard lives, if there are fewer than this. Of several threads that ask for the last
    /// place, one gets it.
    pub fn enter(&self, what: UnderWay, most: u32) -> Option<PortGuard> {
        let more = |count: u32| (count < most).then(|| count + 1);
        self.0.under_way[what as usize].try_update(Relaxed, Relaxed, more).ok()?;
        Some(PortGuard(self.0.clone(), what))
    }

    /// How many have a place.
    pub fn under_way(&self, what: UnderWay) -> u32 {
        self.0.under_way[what as usize].load(Relaxed)
    }

    /// Gives somebody a turn: told of who had the last one, and leaves who has this one. One after the other, on all threads.
    pub fn take_turn<T>(&self, is_ipv4: bool, choose: impl FnOnce(&mut Option<SocketAddr>) -> T) -> T {
        choose(&mut self.0.last[usize::from(!is_ipv4)].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether an endpoint may be ejected: if not, nobody need look at all of them.
    pub fn is_wary(&self) -> bool {
        self.0.is_wary.load(Relaxed)
    }

    /// An endpoint has been seen that is ejected; or none is.
    pub fn set_wary(&self, is_wary: bool) {
        self.0.is_wary.store(is_wary, Relaxed);
    }

    /// Changes what is known of the last comparison; None where somebody else does just now.
    pub fn look<T>(&self, change: impl FnOnce(&mut Option<Looked>) -> T) -> Option<T> {
        match self.0.looked.try_lock() {
            Ok(mut looked) => Some(change(&mut looked)),
            Err(TryLockError::Poisoned(poisoned)) => Some(change(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl UnderWay {
    /// All of them, in the order of the declaration.
    pub const ALL: [Self; 3] = [Self::Connections, Self::Requests, Self::Retries];
}

impl PortGuard {
    /// Whether it is a place at this port.
    pub fn is_of(&self, port: &PortLoad) -> bool {
        Arc::ptr_eq(&self.0, &port.0)
    }
}

impl Drop for PortGuard {
    fn drop(&mut self) {
        self.0.under_way[self.1 as usize].fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cap_is_kept_by_all_threads_and_places_come_back() {
        let port = PortLoad::default();
        let (most, threads) = (5, 4);
        let seen: Vec<u32> = std::thread::scope(|scope| {
            let work = || {
                let mut seen = 0;
                for _ in 0..10_000 {
                    let place = port.enter(UnderWay::Requests, most);
                    seen = seen.max(port.under_way(UnderWay::Requests));
                    drop(place);
                }
                seen
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(seen.iter().all(|seen| *seen <= most), "{seen:?}");
        assert_eq!(port.under_way(UnderWay::Requests), 0);
        let all: Vec<_> = (0..most).map_while(|_| port.enter(UnderWay::Retries, most)).collect();
        assert_eq!((all.len(), port.enter(UnderWay::Retries, most).is_some()), (5, false));
        assert!(port.enter(UnderWay::Requests, most).is_some(), "each has its own cap");
        drop(all);
        assert!(port.enter(UnderWay::Retries, most).is_some());
        assert!(port.enter(UnderWay::Retries, 0).is_none());
    }
}

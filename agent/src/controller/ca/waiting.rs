//! Requests that wait for a pod, counted by node: one that asks for pods that will never be takes only its own places.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Half of the pods that a node has by default, all of which would have to be new at one time.
const PLACES: u32 = 64;

/// Who waits.
#[derive(Debug, Default)]
pub(super) struct WaitingRoom(Mutex<HashMap<String, u32>>);

/// A place, given back when dropped.
#[derive(Debug)]
pub(super) struct Seat<'a> {
    room: &'a WaitingRoom,
    node: &'a str,
}

impl WaitingRoom {
    /// A place for a request of this node; none when all of its own are taken.
    pub(super) fn seat<'a>(&'a self, node: &'a str) -> Option<Seat<'a>> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(node.to_owned()).or_default();
        if *count == PLACES {
            return None;
        }
        *count += 1;
        Some(Seat { room: self, node })
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut taken = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(self.node) {
            *count -= 1;
            if *count == 0 {
                taken.remove(self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_node_does_not_take_anothers_places() {
        let room = WaitingRoom::default();
        let mut seats: Vec<_> = (0..PLACES).map(|_| room.seat("n1").unwrap()).collect();
        assert!(room.seat("n1").is_none() && room.seat("n2").is_some());
        seats.pop();
        assert!(room.seat("n1").is_some());
        drop(seats);
        assert!(room.0.lock().unwrap().is_empty());
    }
}

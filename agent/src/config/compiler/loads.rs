//! What this node has seen of endpoints, which outlives every snapshot.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::model::EndpointLoad;

/// One entry per endpoint address, for as long as a Service has the endpoint or a connection to it is open.
#[derive(Debug, Default)]
pub(super) struct Loads {
    counters: HashMap<SocketAddr, Counter>,
    /// Without a Service, but perhaps with connections.
    retired: Vec<SocketAddr>,
}

#[derive(Debug, Default)]
struct Counter {
    load: EndpointLoad,
    /// How many endpoints of compiled Services share it.
    users: usize,
}

impl Loads {
    pub(super) fn acquire(&mut self, address: SocketAddr) -> EndpointLoad {
        let counter = self.counters.entry(address).or_default();
        counter.users += 1;
        counter.load.set_gone(false);
        counter.load.clone()
    }

    pub(super) fn release(&mut self, address: SocketAddr) {
        if let Some(counter) = self.counters.get_mut(&address) {
            counter.users -= 1;
            if counter.users == 0 {
                self.retired.push(address);
            }
        }
    }

    /// Says of endpoints that no Service has that they are gone, and drops the counters that nobody uses.
    pub(super) fn sweep(&mut self) {
        self.retired.retain(|address| match self.counters.get(address) {
            None => false,
            Some(counter) if counter.users > 0 => false,
            Some(counter) => {
                counter.load.set_gone(true);
                let is_in_use = counter.load.open() > 0;
                if !is_in_use {
                    self.counters.remove(address);
                }
                is_in_use
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_gone_when_the_last_service_has_lost_it_until_one_has_it_again() {
        let (mut loads, address) = (Loads::default(), SocketAddr::from(([10, 1, 0, 1], 80)));
        let load = loads.acquire(address);
        // Another Service's, and the first one's next version.
        loads.acquire(address);
        loads.acquire(address);
        loads.release(address);
        loads.release(address);
        loads.sweep();
        assert!(!load.is_gone());
        let request = load.enter();
        loads.release(address);
        assert!(!load.is_gone(), "its Service may be about to have it again");
        loads.sweep();
        assert!(load.is_gone());
        assert!(!loads.acquire(address).is_gone() && !load.is_gone());
        loads.release(address);
        drop(request);
        loads.sweep();
        assert!(load.is_gone() && loads.counters.is_empty() && loads.retired.is_empty());
    }
}

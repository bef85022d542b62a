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

    /// Drops the counters that nobody uses.
    pub(super) fn sweep(&mut self) {
        self.retired.retain(|address| match self.counters.get(address) {
            Some(counter) if counter.users > 0 => false,
            Some(counter) if counter.load.open() > 0 => true,
            _ => {
                self.counters.remove(address);
                false
            }
        });
    }
}

//! What the kernel programs counted without the agent seeing it.

use aya::maps::{MapData, PerCpuHashMap};
use undermesh_common::maps::Counters;

use super::CaptureError;
use super::programs::Programs;

/// Reads the per-CPU counters.
pub struct PodCounters {
    map: PerCpuHashMap<MapData, u64, Counters>,
}

impl PodCounters {
    pub(super) fn open(programs: &Programs) -> Result<Self, CaptureError> {
        Ok(Self { map: programs.counters()? })
    }

    /// The counters of one namespace, summed over the CPUs. A namespace without an entry has counted nothing.
    pub fn of(&self, netns_cookie: u64) -> Counters {
        self.map.get(&netns_cookie, 0).map_or_else(|_| Counters::default(), |per_cpu| per_cpu.iter().sum())
    }

    /// What was counted for all pods of this node, those that have left and namespaces of the applications' own
    /// included. It goes on counting when the agent restarts.
    pub fn total(&self) -> Counters {
        let mut total = Counters::default();
        for (_, per_cpu) in self.map.iter().filter_map(Result::ok) {
            total += per_cpu.iter().sum();
        }
        total
    }
}

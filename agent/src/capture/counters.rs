//! What the kernel programs counted without the agent seeing it.

use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{MapData, PerCpuHashMap};
use undermesh_common::maps::Counters;

use super::programs::Programs;
use super::{CaptureError, map_error};

/// Reads the per-CPU counters.
pub struct PodCounters {
    map: PerCpuHashMap<MapData, u64, Counters>,
    retired: Arc<Mutex<Counters>>,
}

impl PodCounters {
    pub(super) fn open(programs: &Programs, retired: Arc<Mutex<Counters>>) -> Result<Self, CaptureError> {
        let map = programs.open_map("counters")?;
        Ok(Self { map: PerCpuHashMap::try_from(map).map_err(map_error("counters"))?, retired })
    }

    /// The counters of one namespace, summed over the CPUs. A namespace without an entry has counted nothing.
    pub fn of(&self, netns_cookie: u64) -> Counters {
        self.map.get(&netns_cookie, 0).map_or_else(|_| Counters::default(), |per_cpu| per_cpu.iter().sum())
    }

    /// What was counted for all pods of this node, those that have left and namespaces of the applications' own
    /// included.
    pub fn total(&self) -> Counters {
        let mut total = *self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, per_cpu) in self.map.iter().filter_map(Result::ok) {
            total += per_cpu.iter().sum();
        }
        total
    }
}

//! What the kernel programs counted without the agent seeing it.

use aya::maps::{MapData, PerCpuHashMap};
use undermesh_common::maps::Counters;

use super::programs::Programs;
use super::{CaptureError, map_error};

/// Reads the per-CPU counters.
pub struct PodCounters {
    map: PerCpuHashMap<MapData, u64, Counters>,
}

impl PodCounters {
    pub(super) fn open(programs: &Programs) -> Result<Self, CaptureError> {
        let map = programs.open_map("counters")?;
        Ok(Self { map: PerCpuHashMap::try_from(map).map_err(map_error("counters"))? })
    }

    /// The counters of one namespace, summed over the CPUs; cookie 0 stands for namespaces of the applications' own.
    /// A namespace without an entry has counted nothing.
    pub fn of(&self, netns_cookie: u64) -> Counters {
        self.map.get(&netns_cookie, 0).map_or_else(|_| Counters::default(), |per_cpu| per_cpu.iter().sum())
    }
}

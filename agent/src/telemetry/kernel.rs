//! What the kernel programs have counted, as the wiring reads it from their maps for each scrape.

use crate::model::ObjectRef;

/// Absolute values since the maps were made; they outlive the agent, so the counters survive its restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCounters {
    /// Connections to mesh destinations that went past the agent, by the reason's stable name.
    pub bypassed: Vec<(&'static str, u64)>,
    /// Connections that the kernel programs refused by themselves, by the reason's stable name.
    pub refused: Vec<(&'static str, u64)>,
    /// TCP health of each enrolled pod. A pod that is missing here is gone from the metrics.
    pub pods: Vec<PodTcp>,
}

/// TCP health of the sockets in one pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodTcp {
    /// The pod.
    pub pod: ObjectRef,
    /// Segments sent again.
    pub retransmits: u64,
    /// Retransmission time-outs: the other side answered nothing for that long.
    pub timeouts: u64,
    /// Connections that the pod opened.
    pub connected: u64,
    /// Connections that the pod accepted.
    pub accepted: u64,
    /// Connections that are open now and were before the pod was enrolled.
    pub before_enrolment: u64,
}

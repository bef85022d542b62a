//! The maps, pinned by the agent and shared by all programs. `bpftool map dump` prints them with field names.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuHashMap, SockHash};
use aya_ebpf::helpers::{bpf_map_lookup_elem, bpf_sk_release};
use aya_ebpf::macros::btf_map;
use undermesh_common::maps::{Agent, Counters, Destination, Listener, Pod, Voucher};
use undermesh_common::{Address, Endpoint, Tuple};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// The agent of this node: one entry.
#[btf_map(name = "agents")]
pub static AGENTS: Array<Agent, 1> = Array::new();

/// Addresses known to the mesh.
#[btf_map(name = "destinations")]
pub static DESTINATIONS: HashMap<Address, Destination, 262_144, NO_PREALLOC> = HashMap::new();

/// What each code stands for: the inverse of `destinations`, kept while a connection still shows it.
#[btf_map(name = "codes")]
pub static CODES: HashMap<u32, Address, 262_144, NO_PREALLOC> = HashMap::new();

/// Enrolled pods by the cookie of their network namespace.
#[btf_map(name = "pods")]
pub static PODS: HashMap<u64, Pod, 4096, NO_PREALLOC> = HashMap::new();

/// The agent's listeners in the pods. Entries vanish with their sockets, hence with the agent.
#[btf_map(name = "listeners")]
pub static LISTENERS: SockHash<Listener, 8192> = SockHash::new();

/// Dials that the agent is about to make, by socket cookie: on whose behalf.
#[btf_map(name = "dials")]
pub static DIALS: HashMap<u64, Endpoint, 65_536, NO_PREALLOC> = HashMap::new();

/// Connections that the agent vouches for, and the client that each one stands for.
#[btf_map(name = "vouched")]
pub static VOUCHED: HashMap<Tuple, Voucher, 262_144, NO_PREALLOC> = HashMap::new();

/// What happened without the agent seeing it.
#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuHashMap<u64, Counters, 4096, NO_PREALLOC> = PerCpuHashMap::new();

/// The agent's word on itself. Absent only before the agent has written it, when no pod is enrolled yet.
#[inline(always)]
pub fn agent() -> Agent {
    AGENTS.get(0).copied().unwrap_or_default()
}

/// Counts in the entry of a namespace. A missing entry (the pod is being un-enrolled) costs the count, nothing else.
#[inline(always)]
pub fn count(netns_cookie: u64, bump: impl FnOnce(&mut Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(netns_cookie) {
        // SAFETY: per-CPU entry, and programs are not preempted by others that write it on this CPU, short of an
        // interrupt that may lose one increment.
        bump(unsafe { &mut *counters });
    }
}

/// Whether the agent's listener is there.
#[inline(always)]
pub fn listens(key: &Listener) -> bool {
    let map = core::ptr::from_ref(&LISTENERS).cast_mut().cast();
    // SAFETY: the map and key are of the types that the helper wants; a socket that it returns is released at once.
    unsafe {
        let socket = bpf_map_lookup_elem(map, core::ptr::from_ref(key).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}

//! Makes instances of the kernel programs, one for each pod's network namespace. It attaches nothing.

use std::path::Path;

use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};

use super::CaptureError;
use crate::sentence::in_one_sentence;

const MAPS: [&str; 9] = [
    "agents",
    "destinations",
    "codes",
    "pods",
    "listeners",
    "dials",
    "vouched",
    "counters",
    // aya-log's ring buffer; one for all instances of the programs.
    "AYA_LOGS",
];

/// The kernel programs as `cargo xtask build` made them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("UNDERMESH_EBPF_OBJECT"));

/// The network namespace that an instance is for.
const NETNS_COOKIE: &str = "NETNS_COOKIE";

/// Of no network namespace.
static NO_NETNS: u64 = 0;
static FALSE_AND_TRUE: [u32; 2] = [0, 1];
/// From off to trace.
static LOG_LEVELS: [u8; 6] = [0, 1, 2, 3, 4, 5];

/// Makes instances. aya's loader reads the whole of the kernel's type information when it is made, before it can be told that no
/// program needs it: some 20 ms and 20 MiB. So one serves for all.
#[derive(Debug)]
pub(super) struct Loader(EbpfLoader<'static>);

impl Loader {
    /// One whose instances have the pinned maps of this folder.
    pub(super) fn new(maps: &Path) -> Result<Self, CaptureError> {
        if OBJECT.is_empty() {
            return Err(CaptureError::Load(
                "this build has no eBPF object; build it with `cargo xtask build`".into(),
            ));
        }
        map_large_blocks();
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for name in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        // bpf_sk_lookup.ingress_ifindex (kernel commit f89315650ba3).
        let has_ingress = KernelVersion::current().is_ok_and(|v| v >= KernelVersion::new(5, 17, 0));
        // What would be thrown away need not be sent.
        let log_level = (log::max_level() as usize).min(LOG_LEVELS.len() - 1);
        loader
            .override_global("HAS_INGRESS", &FALSE_AND_TRUE[usize::from(has_ingress)], true)
            .override_global(aya_log::LEVEL, &LOG_LEVELS[log_level], false);
        give_memory_back();
        Ok(Self(loader))
    }

    /// An instance for this network namespace, or for none: 0.
    pub(super) fn load(&mut self, netns_cookie: u64) -> Result<Ebpf, CaptureError> {
        // SAFETY: aya asks for a reference that lives as long as the loader, and reads it in `load` alone. It is replaced below,
        // before what it refers to is gone; a panic in between would leave it in a loader that is given another one before
        // it loads again.
        let for_now: &'static u64 = unsafe { &*std::ptr::from_ref(&netns_cookie) };
        let loaded = self.0.override_global(NETNS_COOKIE, for_now, true).load(OBJECT);
        self.0.override_global(NETNS_COOKIE, &NO_NETNS, true);
        loaded.map_err(|error| CaptureError::Load(explain(&in_one_sentence(&error))))
    }
}

/// Large blocks of the loader go back to the kernel as soon as they are free. Left to itself the allocator takes them
/// from its heap from the second time on, where a small neighbour that stays keeps 9 MiB resident.
fn map_large_blocks() {
    const LARGE: libc::c_int = 256 * 1024;
    // SAFETY: the call takes no pointers; it sets a parameter of the allocator, which may refuse it.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

/// What the type information took the allocator would keep for ever.
fn give_memory_back() {
    // SAFETY: the call has no precondition; it returns free pages to the kernel.
    unsafe { libc::malloc_trim(0) };
}

/// Adds what to do to the kernel's terse answers.
pub(super) fn explain(error: &str) -> String {
    let hint = if error.contains("Operation not permitted") {
        "; the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
    } else if error.contains("Invalid argument") {
        "; the kernel may lack CONFIG_CGROUP_BPF or CONFIG_BPF_STREAM_PARSER, or be older than 5.15"
    } else if error.contains("Cannot allocate memory") {
        "; the memory cgroup of the agent is too small for the maps"
    } else {
        ""
    };
    format!("{error}{hint}")
}

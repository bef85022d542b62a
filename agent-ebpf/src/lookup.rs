//! `sk_lookup`: which socket in a pod gets an inbound connection.
//!
//! One instance per pod: the program cannot ask for its namespace's cookie, so it carries it.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup, sk_action};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use undermesh_common::lookup::{Down, Inbound, Steer, when_down};
use undermesh_common::maps::{INBOUND, Listener, OUTBOUND};
use undermesh_common::{Endpoint, Tuple};

use crate::NETNS_COOKIE;
use crate::context::address;
use crate::maps::{LISTENERS, PODS, VOUCHED, agent, count};

const PASS: u32 = sk_action::SK_PASS;
/// The kernel answers with a reset: the client finds ECONNREFUSED.
const DROP: u32 = sk_action::SK_DROP;
const IPPROTO_TCP: u32 = 6;
/// The index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// 1: the kernel tells which interface a packet came over; set by the loader.
#[unsafe(no_mangle)]
static HAS_INGRESS: Global<u32> = Global::new(0);

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    // SAFETY: the kernel hands out a valid context.
    let lookup = unsafe { &*ctx.lookup };
    if lookup.protocol != IPPROTO_TCP {
        return PASS;
    }
    let cookie = NETNS_COOKIE.load();
    // No entry: the pod is being un-enrolled, this program is about to go, and nothing is steered any more.
    // SAFETY: the entry is only read, before anything could remove it.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else { return PASS };
    let (local, remote) = ends(ctx.lookup);
    let interface = interface(ctx.lookup);
    let inbound =
        Inbound { pod, local: &local.address, local_port: local.port, remote: &remote.address, interface };
    match inbound.steer() {
        Steer::Pass => PASS,
        Steer::RefuseListenerDial => {
            count(cookie, |c| c.refused_listener_dial += 1);
            DROP
        }
        Steer::Refuse => DROP,
        // The route to the IPv6 codes would let neighbours of the pod dial them, in the pod's name.
        Steer::Outbound if interface != 0 && interface != LOOPBACK => {
            count(cookie, |c| c.refused_listener_dial += 1);
            DROP
        }
        // SK_PASS without a socket would lead to the application's own wildcard listener.
        Steer::Outbound => assign(&ctx, cookie, OUTBOUND).map_or(DROP, |()| PASS),
        // SAFETY: the entry is not read.
        Steer::Dialled if unsafe { VOUCHED.get(Tuple::new(remote, local)) }.is_some() => PASS,
        // Whoever forges its address over IPv6, where the kernel does not look at that.
        Steer::Dialled => {
            count(cookie, |c| c.refused_listener_dial += 1);
            DROP
        }
        steer @ (Steer::Inbound | Steer::Strict) => {
            // SAFETY: the entry is copied out at once.
            let voucher = unsafe { VOUCHED.get(Tuple::new(remote, local)) }.copied();
            match voucher {
                Some(voucher) if voucher.holds(pod, local.port) => PASS,
                _ if steer == Steer::Inbound => to_agent(&ctx, cookie, local.port, pod.guarded != 0),
                Some(voucher) if voucher.kubelet != 0 => {
                    count(cookie, |c| c.inbound_refused_unprobed += 1);
                    DROP
                }
                _ => {
                    count(cookie, |c| c.inbound_refused_strict += 1);
                    DROP
                }
            }
        }
    }
}

#[inline(always)]
fn to_agent(ctx: &SkLookupContext, cookie: u64, port: u16, guarded: bool) -> u32 {
    let agent = agent();
    // SAFETY: no argument to get wrong.
    let hung = agent.is_hung(unsafe { bpf_ktime_get_ns() });
    if !hung && assign(ctx, cookie, INBOUND).is_ok() {
        return PASS;
    }
    match when_down(guarded || agent.closed_when_down != 0, port) {
        Down::Pass => {
            count(cookie, |c| c.inbound_bypassed_agent_down += 1);
            PASS
        }
        Down::Refuse => {
            count(cookie, |c| c.inbound_refused_agent_down += 1);
            DROP
        }
    }
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, cookie: u64, direction: u32) -> Result<(), i32> {
    // Replacing: the instance that a restarted agent attaches meets the one before it, for a moment.
    LISTENERS.redirect_sk_lookup(ctx, Listener::new(cookie, direction), u64::from(BPF_SK_LOOKUP_F_REPLACE))
}

/// The interface that the packet came over. The context has told since Linux 5.17; before, it is 0, and of packets for codes only the
/// agent checks where they come from, by the source address.
#[inline(always)]
fn interface(lookup: *const bpf_sk_lookup) -> u32 {
    // The verifier leaves the read out where the loader says that it cannot be made.
    if HAS_INGRESS.load() == 0 {
        return 0;
    }
    // SAFETY: the kernel hands out a valid context.
    unsafe { (&raw const (*lookup).ingress_ifindex).read_volatile() }
}

#[inline(always)]
fn ends(lookup: *const bpf_sk_lookup) -> (Endpoint, Endpoint) {
    // SAFETY: the kernel hands out a valid context.
    let (local_port, remote_port) = unsafe {
        (
            (&raw const (*lookup).local_port).read_volatile(),
            (&raw const (*lookup).remote_port).read_volatile(),
        )
    };
    (
        Endpoint::new(address!(lookup, local_ip4, local_ip6), local_port as u16),
        Endpoint::new(address!(lookup, remote_ip4, remote_ip6), u16::from_be(remote_port)),
    )
}

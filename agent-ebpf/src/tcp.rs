//! `vouch_dial` on the agent's own cgroup, `watch_tcp` on each pod's: who is on whose behalf, and how TCP is doing.
//!
//! A dial is vouched for from the moment before its SYN leaves until the server's socket is gone, so that whoever
//! receives it can trust the 4-tuple, and `getpeername` shows the true client as long as anybody can ask.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB,
    BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use undermesh_common::{Endpoint, Tuple};

use crate::context::address;
use crate::maps::{DIALS, VOUCHED, count};

const DONE: u32 = 1;
const WATCHED: i32 = (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG) as i32;

/// Vouches for the agent's dials: at the last moment before the SYN, when the kernel has chosen the source port.
#[sock_ops]
pub fn vouch_dial(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            // SAFETY: the helper takes any sock_ops context.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
            // SAFETY: the entry is copied out before it is removed.
            if let Some(origin) = unsafe { DIALS.get(cookie) }.copied() {
                // A full map leaves the dial without a voucher: a permissive server relays it once more, a strict
                // one refuses it. The agent reports the map's fill level.
                let _ = VOUCHED.insert(dialled(&ctx), origin, 0);
                let _ = DIALS.remove(cookie);
                let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            }
        }
        // Nobody answered: there is no server's socket that could clean up.
        BPF_SOCK_OPS_STATE_CB if ctx.arg(0) == BPF_TCP_SYN_SENT => {
            if ctx.arg(1) == BPF_TCP_CLOSE {
                let _ = VOUCHED.remove(dialled(&ctx));
            } else {
                let _ = ctx.set_cb_flags(0);
            }
        }
        _ => {}
    }
    DONE
}

/// Counts a pod's connections and drops the voucher of each one that ends.
#[sock_ops]
pub fn watch_tcp(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            count(netns(&ctx), |c| c.tcp_active_opens += 1);
            let _ = ctx.set_cb_flags(WATCHED);
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            count(netns(&ctx), |c| c.tcp_passive_opens += 1);
            let _ = ctx.set_cb_flags(WATCHED);
        }
        BPF_SOCK_OPS_RTO_CB => count(netns(&ctx), |c| c.tcp_timeouts += 1),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => {
            // SAFETY: the kernel hands out a valid context.
            let retransmits = unsafe { (*ctx.ops).total_retrans };
            if retransmits != 0 {
                count(netns(&ctx), |c| c.tcp_retransmits += u64::from(retransmits));
            }
            let _ = VOUCHED.remove(accepted(&ctx));
        }
        _ => {}
    }
    DONE
}

#[inline(always)]
fn netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes any sock_ops context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The connection as its server sees it, from the client's socket.
#[inline(always)]
fn dialled(ctx: &SockOpsContext) -> Tuple {
    Tuple::new(local(ctx), remote(ctx))
}

/// The connection as its server sees it, from the server's socket.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) -> Tuple {
    Tuple::new(remote(ctx), local(ctx))
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Endpoint {
    // SAFETY: the kernel hands out a valid context.
    let port = unsafe { (&raw const (*ctx.ops).local_port).read_volatile() };
    Endpoint::new(address!(ctx.ops, local_ip4, local_ip6), port as u16)
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Endpoint {
    // Network order in 32 bits here, unlike the local port.
    // SAFETY: as in `local`.
    let port = u32::from_be(unsafe { (&raw const (*ctx.ops).remote_port).read_volatile() });
    Endpoint::new(address!(ctx.ops, remote_ip4, remote_ip6), port as u16)
}

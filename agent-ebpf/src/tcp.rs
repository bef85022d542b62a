//! `vouch_dial` on the agent's own cgroup, `vouch_probe` on the kubelet's (else on the whole tree), `watch_tcp` on each pod's: who is
//! on whose behalf, and how TCP is doing.
//!
//! A dial is vouched for from the moment before its SYN leaves until the server's socket is gone, so that whoever
//! receives it can trust the 4-tuple, and `getpeername` shows the true client as long as anybody can ask.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB,
    BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_TCP_CLOSE,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_getsockopt, bpf_setsockopt};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use undermesh_common::maps::Voucher;
use undermesh_common::{Address, Endpoint, Tuple, code, source};

use crate::NETNS_COOKIE;
use crate::context::address;
use crate::maps::{DESTINATIONS, DIALS, PODS, VOUCHED, count};

const DONE: u32 = 1;
const IPPROTO_TCP: i32 = 6;
const TCP_CONGESTION: i32 = 13;
const WATCHED: i32 = (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG) as i32;

/// Vouches for the agent's dials: at the last moment before the SYN, when the kernel has chosen the source port.
#[sock_ops]
pub fn vouch_dial(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            // SAFETY: the helper takes any sock_ops context.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
            // SAFETY: the entry is copied out before it is removed.
            if let Some(client) = unsafe { DIALS.get(cookie) }.copied() {
                let _ = DIALS.remove(cookie);
                vouch(&ctx, client);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => forget_unaccepted(&ctx),
        _ => {}
    }
    DONE
}

/// Vouches for the kubelet's probes, each by its exact 4-tuple. The client that they stand for is the kubelet itself. At which ports
/// that counts is for the pod that is called to say, where the connection arrives.
///
/// An instance for the node's network namespace is attached where the kubelet's cgroup is not known, and lets only that be told: what
/// is made there, and so neither a pod's own nor forwarded by the node.
#[sock_ops]
pub fn vouch_probe(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            let tuple = dialled(&ctx);
            // What the kubelet says to others, the API server first of all, is nobody's business.
            // SAFETY: the entry is not read.
            if unsafe { DESTINATIONS.get(tuple.destination) }.is_some()
                && is_of_instance(&ctx)
                && VOUCHED.insert(tuple, Voucher { client: local(&ctx), accepted: 0, kubelet: 1 }, 0).is_ok()
            {
                add_cb_flags(&ctx, BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => forget_unaccepted(&ctx),
        _ => {}
    }
    DONE
}

/// Whether the socket is in the network namespace that this instance is for; one that is for none is for all.
#[inline(always)]
fn is_of_instance(ctx: &SockOpsContext) -> bool {
    let cookie = NETNS_COOKIE.load();
    cookie == 0 || cookie == netns(ctx)
}

/// As long as the server's side has no socket for it, nobody else would remove the voucher: nobody answered, or the
/// connection was reset before it was accepted.
#[inline(always)]
fn forget_unaccepted(ctx: &SockOpsContext) {
    let tuple = dialled(ctx);
    // SAFETY: the entry is copied out at once.
    if unsafe { VOUCHED.get(tuple) }.is_some_and(|voucher| voucher.accepted == 0) {
        let _ = VOUCHED.remove(tuple);
    }
}

/// Only for a source that is the dialling pod's own, or one for what stays in it: by routes or addresses of its making a pod could
/// have the kernel choose another's.
#[inline(always)]
fn vouch(ctx: &SockOpsContext, client: Endpoint) {
    let tuple = dialled(ctx);
    let own = if source::is(&tuple.source) { &tuple.destination } else { &tuple.source };
    if !owns(ctx, own) {
        return;
    }
    // A full map leaves the dial without a voucher: a permissive server relays it once more, a strict one refuses it.
    if VOUCHED.insert(tuple, Voucher { client, accepted: 0, kubelet: 0 }, 0).is_ok() {
        add_cb_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG as i32);
    }
}

/// Counts a pod's connections and drops the voucher of each one that ends.
#[sock_ops]
pub fn watch_tcp(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            count(netns(&ctx), |c| c.tcp_active_opens += 1);
            add_cb_flags(&ctx, WATCHED);
            if code::of(&remote(&ctx).address).is_some() {
                do_not_pace(&ctx);
            }
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            count(netns(&ctx), |c| c.tcp_passive_opens += 1);
            add_cb_flags(&ctx, WATCHED);
            let tuple = accepted(&ctx);
            if let Some(voucher) = VOUCHED.get_ptr_mut(tuple)
                && owns(&ctx, &tuple.destination)
            {
                // SAFETY: one aligned word of an entry that lives at least as long as this program runs.
                unsafe { (*voucher).accepted = 1 };
                do_not_pace(&ctx);
            }
        }
        BPF_SOCK_OPS_RTO_CB => count(netns(&ctx), |c| c.tcp_timeouts += 1),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => {
            // SAFETY: the kernel hands out a valid context.
            let retransmits = unsafe { (*ctx.ops).total_retrans };
            if retransmits != 0 {
                count(netns(&ctx), |c| c.tcp_retransmits += u64::from(retransmits));
            }
            let tuple = accepted(&ctx);
            // A pod could give itself another's address and play the other's connections.
            if owns(&ctx, &tuple.destination) {
                let _ = VOUCHED.remove(tuple);
            }
        }
        _ => {}
    }
    DONE
}

/// For the application's end of a connection to the agent, between which nothing can be congested. BBR, the default of
/// many nodes, would set a timer of high resolution for every few segments, which costs more than their transport. What
/// does not pace is left as it is.
#[inline(always)]
fn do_not_pace(ctx: &SockOpsContext) {
    let mut name = [0u8; 16];
    let (ops, at, len) = (ctx.ops.cast(), name.as_mut_ptr().cast(), name.len() as i32);
    // SAFETY: the helper takes any sock_ops context, and writes no more than it is given.
    if unsafe { bpf_getsockopt(ops, IPPROTO_TCP, TCP_CONGESTION, at, len) } != 0 || !name.starts_with(b"bbr")
    {
        return;
    }
    let mut cubic = *b"cubic\0";
    // SAFETY: as above, and it only reads. A kernel without this one keeps what the socket has.
    unsafe {
        bpf_setsockopt(ops, IPPROTO_TCP, TCP_CONGESTION, cubic.as_mut_ptr().cast(), cubic.len() as i32)
    };
}

/// Whether the address is the own one of the pod whose namespace the socket is in.
#[inline(always)]
fn owns(ctx: &SockOpsContext, address: &Address) -> bool {
    // SAFETY: the entry is only read, before anything could remove it.
    unsafe { PODS.get(netns(ctx)) }.is_some_and(|pod| pod.owns(address))
}

/// Asks for callbacks, and takes away none that another program has asked for.
#[inline(always)]
fn add_cb_flags(ctx: &SockOpsContext, flags: i32) {
    let _ = ctx.set_cb_flags(ctx.cb_flags() as i32 | flags);
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

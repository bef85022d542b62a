//! `getpeername4/6`, `getsockname4/6`: the application sees the addresses that it would see without the mesh.
//!
//! They answer always and change nothing that they do not know: a missing entry shows the wire's own address.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use undermesh_common::connect::sockname;
use undermesh_common::{Address, Endpoint, Tuple, code};

use crate::context::{address, set_user_ip6, user_ip6};
use crate::maps::{CODES, PODS, VOUCHED};

const PROCEED: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel hands out a valid context; so below.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if let Some(peer) = true_peer(sock_addr, Address::from_ip4(sock_addr.user_ip4))
        && let Some(ip4) = peer.address.as_ip4()
    {
        sock_addr.user_ip4 = ip4;
        sock_addr.user_port = u32::from(peer.port.to_be());
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    // SAFETY: as in `getpeername4`.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if let Some(peer) = true_peer(sock_addr, user_ip6(sock_addr)) {
        set_user_ip6(sock_addr, &peer.address);
        sock_addr.user_port = u32::from(peer.port.to_be());
    }
    PROCEED
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    // SAFETY: as in `getpeername4`.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if let Some(own) = true_name(&ctx, Address::from_ip4(sock_addr.user_ip4))
        && let Some(ip4) = own.as_ip4()
    {
        sock_addr.user_ip4 = ip4;
    }
    PROCEED
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    // SAFETY: as in `getpeername4`.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if let Some(own) = true_name(&ctx, user_ip6(sock_addr)) {
        set_user_ip6(sock_addr, &own);
    }
    PROCEED
}

/// A client's peer is the destination that it dialled, not the code; a server's is the client that called, not the
/// agent that dialled on its behalf.
#[inline(always)]
fn true_peer(sock_addr: &bpf_sock_addr, shown: Address) -> Option<Endpoint> {
    let port = u16::from_be(sock_addr.user_port as u16);
    if let Some(code) = code::of(&shown) {
        // SAFETY: the entry is copied out at once; so below.
        let address = unsafe { CODES.get(code) }.copied()?;
        return Some(Endpoint::new(address, port));
    }
    let socket = socket(sock_addr)?;
    let tuple = Tuple::new(Endpoint::new(shown, port), local(socket));
    // SAFETY: as above.
    unsafe { VOUCHED.get(tuple) }.map(|voucher| voucher.client)
}

/// A captured client's own address is its pod's, not the loopback address that it got on the way to the code.
#[inline(always)]
fn true_name(ctx: &SockAddrContext, shown: Address) -> Option<Address> {
    // SAFETY: as in `getpeername4`.
    let socket = socket(unsafe { &*ctx.sock_addr })?;
    let peer = remote(socket);
    code::of(&peer)?;
    // SAFETY: the helper takes any sock_addr context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is only read, before anything could remove it.
    let pod = unsafe { PODS.get(cookie) }?;
    sockname(pod, &shown, &peer)
}

#[inline(always)]
fn socket(sock_addr: &bpf_sock_addr) -> Option<&bpf_sock> {
    // SAFETY: the context's socket, if there is one, is valid for the run of the program.
    unsafe { sock_addr.__bindgen_anon_1.sk.as_ref() }
}

#[inline(always)]
fn local(socket: &bpf_sock) -> Endpoint {
    let socket = core::ptr::from_ref(socket);
    // SAFETY: the caller's reference is valid.
    let port = unsafe { (&raw const (*socket).src_port).read_volatile() };
    Endpoint::new(address!(socket, src_ip4, src_ip6), port as u16)
}

#[inline(always)]
fn remote(socket: &bpf_sock) -> Address {
    address!(core::ptr::from_ref(socket), dst_ip4, dst_ip6)
}

//! `connect4`, `connect6`: a connect to a mesh address goes to that address's code.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_setsockopt};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use undermesh_common::connect::{Connect, ConnectVerdict};
use undermesh_common::maps::{Destination, Listener, OUTBOUND};
use undermesh_common::{Address, code};

use crate::context::{set_user_ip6, user_ip6};
use crate::maps::{DESTINATIONS, PODS, agent, count, listens};

const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel hands out a valid context; so for all reads and writes of its fields below.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if sock_addr.protocol != IPPROTO_TCP {
        return PROCEED;
    }
    let destination = Address::from_ip4(sock_addr.user_ip4);
    let Some(entry) = known(&destination) else { return PROCEED };
    match verdict(&ctx, &destination, entry) {
        Ok(code) => {
            sock_addr.user_ip4 = code::ip4(code);
            PROCEED
        }
        Err(answer) => answer,
    }
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    // SAFETY: as in `connect4`.
    let sock_addr = unsafe { &mut *ctx.sock_addr };
    if sock_addr.protocol != IPPROTO_TCP {
        return PROCEED;
    }
    let destination = user_ip6(sock_addr);
    let Some(entry) = known(&destination) else { return PROCEED };
    match verdict(&ctx, &destination, entry) {
        Ok(code) => {
            // A dual-stack socket that dials a v4-mapped address gets a v4-mapped code: its source is IPv4.
            let code = if destination.as_ip4().is_some() {
                Address::from_ip4(code::ip4(code))
            } else {
                Address::from_ip6(code::ip6(code))
            };
            set_user_ip6(sock_addr, &code);
            PROCEED
        }
        Err(answer) => answer,
    }
}

/// The one look-up that a connect to a non-mesh address pays for.
#[inline(always)]
fn known(destination: &Address) -> Option<Destination> {
    // SAFETY: the entry is copied out at once.
    unsafe { DESTINATIONS.get(destination) }.copied()
}

/// The code to go to; otherwise the program's answer.
#[inline(always)]
fn verdict(ctx: &SockAddrContext, destination: &Address, entry: Destination) -> Result<u32, i32> {
    // SAFETY: the helper takes any sock_addr context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is only read, before anything could remove it.
    let pod = unsafe { PODS.get(cookie) };
    let interface = bound_interface(ctx);
    let agent = agent();
    // SAFETY: no argument to get wrong.
    let hung = agent.is_hung(unsafe { bpf_ktime_get_ns() });
    let connect = Connect {
        destination,
        pod,
        interface,
        agent_up: !hung && listens(&Listener::new(cookie, OUTBOUND)),
        closed: agent.closed_when_down != 0,
    };
    match connect.decide() {
        ConnectVerdict::Capture => {
            if interface != 0 && !unbind_interface(ctx) {
                // At the code it would only time out.
                if agent.closed_when_down != 0 {
                    count(cookie, |c| c.refused_interface += 1);
                    return Err(REFUSE);
                }
                count(cookie, |c| c.bypassed_interface += 1);
                return Err(PROCEED);
            }
            count(cookie, |c| c.captured += 1);
            Ok(entry.code)
        }
        ConnectVerdict::PassOwn => Err(PROCEED),
        ConnectVerdict::PassInterface => {
            count(cookie, |c| c.bypassed_interface += 1);
            Err(PROCEED)
        }
        ConnectVerdict::PassInnerNetns => {
            count(0, |c| c.bypassed_inner_netns += 1);
            debug!(ctx, "connect from network namespace {} of a pod's own passes uncaptured", cookie);
            Err(PROCEED)
        }
        ConnectVerdict::RefuseInnerNetns => {
            count(0, |c| c.refused_inner_netns += 1);
            debug!(ctx, "connect from network namespace {} of a pod's own refused", cookie);
            Err(REFUSE)
        }
        ConnectVerdict::PassAgentDown => {
            count(cookie, |c| c.bypassed_agent_down += 1);
            Err(PROCEED)
        }
        ConnectVerdict::RefuseAgentDown => {
            count(cookie, |c| c.refused_agent_down += 1);
            // A socket bound to an interface reaches no code: it would time out instead.
            if interface == 0 { Ok(code::REFUSED) } else { Err(REFUSE) }
        }
    }
}

/// `SO_BINDTODEVICE` of the socket, 0 for none.
#[inline(always)]
fn bound_interface(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context's socket is valid for the run of the program.
    unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if socket.is_null() { 0 } else { (*socket).bound_dev_if }
    }
}

/// A socket bound to an interface cannot reach a loopback address; the agent's own dial leaves by the same interface.
/// The kernel lets only a task with CAP_NET_RAW take the binding back, also from here.
#[inline(always)]
fn unbind_interface(ctx: &SockAddrContext) -> bool {
    let mut none = [0u8; 4];
    // SAFETY: the option's value is four bytes of ours.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, none.as_mut_ptr().cast(), 4) == 0 }
}

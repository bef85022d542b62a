//! Reads of context fields, in the one form that the verifier takes.
//!
//! A context may only be read at constant offsets. Left to itself the optimiser merges "the IPv4 field or the IPv6
//! field" into one read at a computed offset; volatile reads of both, and a choice between the values, it leaves alone.

use undermesh_common::Address;

const AF_INET: u32 = 2;

/// The address in a context that has a field for each family.
macro_rules! address {
    ($ctx:expr, $ip4:ident, $ip6:ident) => {{
        let ctx = $ctx;
        // SAFETY: the kernel hands out a valid context, and all of these fields may be read.
        unsafe {
            let family = (&raw const (*ctx).family).read_volatile();
            let ip4 = (&raw const (*ctx).$ip4).read_volatile();
            let a = (&raw const (*ctx).$ip6[0]).read_volatile();
            let b = (&raw const (*ctx).$ip6[1]).read_volatile();
            let c = (&raw const (*ctx).$ip6[2]).read_volatile();
            let d = (&raw const (*ctx).$ip6[3]).read_volatile();
            crate::context::of_family(family, ip4, [a, b, c, d])
        }
    }};
}
pub(crate) use address;

/// The address that is the meaningful one for the family.
#[inline(always)]
pub fn of_family(family: u32, ip4: u32, ip6: [u32; 4]) -> Address {
    if family == AF_INET { Address::from_ip4(ip4) } else { Address::from_ip6(ip6) }
}

/// `user_ip6` of a socket-address context.
#[inline(always)]
pub fn user_ip6(ctx: *const aya_ebpf::bindings::bpf_sock_addr) -> Address {
    // SAFETY: the kernel hands out a valid context.
    unsafe {
        let a = (&raw const (*ctx).user_ip6[0]).read_volatile();
        let b = (&raw const (*ctx).user_ip6[1]).read_volatile();
        let c = (&raw const (*ctx).user_ip6[2]).read_volatile();
        let d = (&raw const (*ctx).user_ip6[3]).read_volatile();
        Address::from_ip6([a, b, c, d])
    }
}

/// Sets `user_ip6` of a socket-address context.
#[inline(always)]
pub fn set_user_ip6(ctx: *mut aya_ebpf::bindings::bpf_sock_addr, address: &Address) {
    let [a, b, c, d] = address.words();
    // SAFETY: the kernel hands out a valid context, and the hooks that call this may write the field.
    unsafe {
        (&raw mut (*ctx).user_ip6[0]).write_volatile(a);
        (&raw mut (*ctx).user_ip6[1]).write_volatile(b);
        (&raw mut (*ctx).user_ip6[2]).write_volatile(c);
        (&raw mut (*ctx).user_ip6[3]).write_volatile(d);
    }
}

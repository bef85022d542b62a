//! Codes: the loopback addresses that stand for mesh destinations inside a pod.
//!
//! A captured connect is rewritten to its destination's code, the port kept. The accepted socket's own address then
//! tells the agent the original destination, every destination keeps its own space of source ports, and no table
//! per connection is needed. IPv4 codes are in 127.128.0.0/9; IPv6 codes in [`PREFIX6`], which the agent routes to
//! `lo` in every enrolled pod.

use crate::Address;

/// The /64 that holds the IPv6 codes: a unique local prefix (RFC 4193) that is never routed outside of a pod.
pub const PREFIX6: [u8; 8] = [0xfd, 0x75, 0x6d, 0x65, 0x73, 0x68, 0x00, 0x01];

/// Codes below this one stand for no destination: the agent's own listeners are bound to them, and whoever dials one
/// directly is refused.
pub const FIRST: u32 = 16;

/// Where connects go that are to be refused: `steer` answers with a reset, so that the application finds ECONNREFUSED,
/// where a refusal from the connect hook itself would be EPERM.
pub const REFUSED: u32 = 3;

/// Codes are below this one: 23 bits fit beneath 127.128.0.0/9.
pub const LIMIT: u32 = 1 << 23;

/// Where the agent's outbound listener in a pod is bound.
pub const OUTBOUND_LISTENER: u32 = 1;

/// Where the agent's inbound listener in a pod is bound.
pub const INBOUND_LISTENER: u32 = 2;

const NETWORK4: u32 = 0x7f80_0000;
const MASK4: u32 = 0xff80_0000;

/// The IPv4 address of a code, network order.
#[inline(always)]
pub const fn ip4(code: u32) -> u32 {
    (NETWORK4 | code).to_be()
}

/// The IPv6 address of a code, four words in network order.
#[inline(always)]
pub const fn ip6(code: u32) -> [u32; 4] {
    let p = PREFIX6;
    [
        u32::from_ne_bytes([p[0], p[1], p[2], p[3]]),
        u32::from_ne_bytes([p[4], p[5], p[6], p[7]]),
        0,
        code.to_be(),
    ]
}

/// The code that an address stands for; reserved ones included, see [`FIRST`].
#[inline(always)]
pub const fn of(address: &Address) -> Option<u32> {
    if let Some(network_order) = address.as_ip4() {
        let host_order = u32::from_be(network_order);
        return if host_order & MASK4 == NETWORK4 { Some(host_order & !MASK4) } else { None };
    }
    let [a, b, c, d] = address.words();
    let prefix = ip6(0);
    if a == prefix[0] && b == prefix[1] && c == 0 && u32::from_be(d) < LIMIT {
        Some(u32::from_be(d))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn code_of(text: &str) -> Option<u32> {
        of(&text.parse::<IpAddr>().unwrap().into())
    }

    #[test]
    fn a_code_survives_the_way_through_an_address() {
        for code in [0, 1, FIRST, 4711, LIMIT - 1] {
            assert_eq!(of(&Address::from_ip4(ip4(code))), Some(code));
            assert_eq!(of(&Address::from_ip6(ip6(code))), Some(code));
        }
    }

    #[test]
    fn only_addresses_of_the_code_space_are_codes() {
        for (text, expected) in [
            ("127.128.0.16", Some(16)),
            ("127.255.255.255", Some(LIMIT - 1)),
            ("::ffff:127.128.0.16", Some(16)),
            ("fd75:6d65:7368:1::10", Some(16)),
            ("fd75:6d65:7368:1::80:0", None),
            ("fd75:6d65:7368:1:0:1:0:10", None),
            ("fd75:6d65:7368:2::10", None),
            ("127.0.0.1", None),
            ("127.127.255.255", None),
            ("128.128.0.16", None),
            ("10.0.0.1", None),
            ("::1", None),
        ] {
            assert_eq!(code_of(text), expected, "{text}");
        }
    }
}

//! Sources: the addresses from which the agent dials a pod's application inside of the pod.
//!
//! From the pod's own address all clients of a port would share one space of source ports, of which each connection that its client
//! ends first keeps one in TIME_WAIT for a minute: 28,000 connections a minute, and at one time, would be all. The agent routes these
//! addresses to `lo` in every enrolled pod. They are none of 127.0.0.0/8, which would let TIME_WAIT pass: applications trust that,
//! and whoever does not ask for the client's name by way of the programs is shown what is here.

use crate::{Address, code};

/// How many there are, in each family.
pub const COUNT: u32 = 1 << (32 - LENGTH4);

/// 192.0.0.64/26: of what is set apart for protocols of the IETF (RFC 6890, section 2.1) and routed by nobody, a part that none has.
pub const NETWORK4: u32 = 0xc000_0040;

/// The length of [`NETWORK4`]'s prefix.
pub const LENGTH4: u8 = 26;

/// The word that tells them from codes, beneath [`code::PREFIX6`].
const WORD6: u32 = 1;

/// An IPv4 one, network order. The number is below [`COUNT`].
pub const fn ip4(number: u32) -> u32 {
    (NETWORK4 | number).to_be()
}

/// An IPv6 one, four words in network order. The number is below [`COUNT`].
pub const fn ip6(number: u32) -> [u32; 4] {
    let [a, b, ..] = code::ip6(0);
    [a, b, WORD6.to_be(), number.to_be()]
}

/// Whether the address is one.
#[inline(always)]
pub const fn is(address: &Address) -> bool {
    if let Some(network_order) = address.as_ip4() {
        return u32::from_be(network_order) & !(COUNT - 1) == NETWORK4;
    }
    let [a, b, c, d] = address.words();
    let [first, second, third, _] = ip6(0);
    a == first && b == second && c == third && u32::from_be(d) < COUNT
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn only_addresses_of_the_two_networks_are_sources() {
        for (text, expected) in [
            ("192.0.0.64", true),
            ("192.0.0.127", true),
            ("::ffff:192.0.0.100", true),
            ("192.0.0.63", false),
            ("192.0.0.128", false),
            ("fd75:6d65:7368:1:0:1::", true),
            ("fd75:6d65:7368:1:0:1:0:3f", true),
            ("fd75:6d65:7368:1:0:1:0:40", false),
            ("fd75:6d65:7368:1::10", false),
            ("127.0.0.1", false),
            ("10.0.0.5", false),
        ] {
            assert_eq!(is(&text.parse::<IpAddr>().unwrap().into()), expected, "{text}");
        }
    }

    #[test]
    fn all_that_are_made_are_sources_and_no_codes() {
        for number in [0, 1, COUNT - 1] {
            for address in [Address::from_ip4(ip4(number)), Address::from_ip6(ip6(number))] {
                assert!(is(&address) && code::of(&address).is_none(), "{number}: {address:?}");
            }
        }
    }
}

//! Addresses as the maps hold them: 16 octets in network order, IPv4 in its v4-mapped form.

/// An IPv4 or IPv6 address. IPv4 is kept v4-mapped (`::ffff:a.b.c.d`, RFC 4291), so that a dual-stack socket and a
/// plain one find the same entry.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    /// Network order.
    pub octets: [u8; 16],
}

impl Address {
    /// From an IPv4 address in network order, as the kernel's contexts hold it.
    #[inline(always)]
    pub const fn from_ip4(network_order: u32) -> Self {
        Self::from_ip6([0, 0, 0xffff_u32.to_be(), network_order])
    }

    /// From the four network-order words of an IPv6 address.
    #[inline(always)]
    pub const fn from_ip6(words: [u32; 4]) -> Self {
        // SAFETY: both are 16 bytes without padding or invalid values.
        Self { octets: unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) } }
    }

    /// The four words in network order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: both are 16 bytes without padding or invalid values.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.octets) }
    }

    /// The IPv4 address in network order, if it is one.
    #[inline(always)]
    pub const fn as_ip4(&self) -> Option<u32> {
        let [a, b, c, d] = self.words();
        if a == 0 && b == 0 && c == 0xffff_u32.to_be() { Some(d) } else { None }
    }

    /// 127.0.0.0/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        match self.as_ip4() {
            Some(ip4) => u32::from_be(ip4) >> 24 == 127,
            None => {
                let [a, b, c, d] = self.words();
                a == 0 && b == 0 && c == 0 && d == 1_u32.to_be()
            }
        }
    }

    /// fe80::/10, which every interface gives itself.
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.words()[0]) >> 22 == 0xfe80 >> 6
    }

    /// Word-wise equality; the derived one becomes a call to `memcmp`, which the kernel does not have.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// Host order.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

impl Endpoint {
    /// Pairs the two.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, padding: 0 }
    }
}

/// One TCP connection as the server's side sees it: who sent the SYN, and to where.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Sender of the SYN.
    pub source: Address,
    /// Receiver of the SYN.
    pub destination: Address,
    /// Host order.
    pub source_port: u16,
    /// Host order.
    pub destination_port: u16,
}

impl Tuple {
    /// The connection from one endpoint to the other.
    #[inline(always)]
    pub const fn new(source: Endpoint, destination: Endpoint) -> Self {
        Self {
            source: source.address,
            destination: destination.address,
            source_port: source.port,
            destination_port: destination.port,
        }
    }
}

#[cfg(any(test, feature = "user"))]
mod user {
    use core::net::{IpAddr, SocketAddr};

    use super::{Address, Endpoint};

    impl From<IpAddr> for Address {
        fn from(ip: IpAddr) -> Self {
            let octets = match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            Self { octets }
        }
    }

    impl From<Address> for IpAddr {
        fn from(address: Address) -> Self {
            IpAddr::from(address.octets).to_canonical()
        }
    }

    impl From<SocketAddr> for Endpoint {
        fn from(address: SocketAddr) -> Self {
            Self::new(address.ip().into(), address.port())
        }
    }

    impl From<Endpoint> for SocketAddr {
        fn from(endpoint: Endpoint) -> Self {
            Self::new(endpoint.address.into(), endpoint.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_spellings_of_an_ipv4_address_are_one() {
        assert_eq!(address("10.1.2.3"), address("::ffff:10.1.2.3"));
        assert_eq!(address("10.1.2.3"), Address::from_ip4(u32::from_ne_bytes([10, 1, 2, 3])));
        assert_eq!(IpAddr::from(address("::ffff:10.1.2.3")), "10.1.2.3".parse::<IpAddr>().unwrap());
        assert!(address("10.1.2.3").same(&address("::ffff:10.1.2.3")));
    }

    #[test]
    fn loopback_is_the_whole_of_127_and_one_ipv6_address() {
        for (text, expected) in [
            ("127.0.0.1", true),
            ("127.255.0.9", true),
            ("::1", true),
            ("128.0.0.1", false),
            ("::", false),
            ("::2", false),
            ("fd00::1", false),
        ] {
            assert_eq!(address(text).is_loopback(), expected, "{text}");
        }
    }
}

//! What the maps hold. Field names are for the reader of `bpftool map dump`.

use crate::{Address, Endpoint};

/// Counts the layouts of the structs in this module; a pinned map of another layout is never adopted.
pub const LAYOUT: u32 = 4;

/// An agent whose heartbeat is older than this, in nanoseconds, is taken for hung.
pub const HEARTBEAT_LIMIT_NS: u64 = 3_000_000_000;

/// `agents[0]`: how the agent of this node is doing and what is to happen when it is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    /// `CLOCK_MONOTONIC` in nanoseconds when every worker of the agent was last seen working.
    pub heartbeat_ns: u64,
    /// [`LAYOUT`] of the agent that wrote this.
    pub layout: u32,
    /// 1: without an agent, connections are refused (`--on-agent-down closed`); 0: they go their direct way.
    pub closed_when_down: u32,
}

/// `destinations[address]`: an address known to the mesh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The code that stands for the address; see [`crate::code`].
    pub code: u32,
}

/// How many addresses of one pod are steered: `status.podIPs` holds at most one of each family.
pub const POD_ADDRESSES: usize = 2;

/// How many ports of a pod may have another mTLS mode than the pod.
pub const MODE_EXCEPTIONS: usize = 16;

/// How many ports of a pod the kubelet may have business at.
pub const PROBED_PORTS: usize = 16;

/// `pods[network namespace cookie]`: an enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `status.podIPs`; unused ones are `::`.
    pub addresses: [Address; POD_ADDRESSES],
    /// The interface that has these addresses.
    pub interface: u32,
    /// 1: plaintext is refused from the first SYN.
    pub strict: u32,
    /// 1: policies say who may call. Without an agent that knows them nobody may, whatever else is to happen then.
    pub guarded: u32,
    /// 1: other pods reach it through a tunnel alone. Nothing else that the agent vouches for is let in.
    pub tunnelled: u32,
    /// Ports that are strict where the pod is not, or not where it is; host order, unused ones are 0.
    pub mode_exceptions: [u16; MODE_EXCEPTIONS],
    /// Ports that the pod has the kubelet call, by its probes and hooks; host order, unused ones are 0.
    pub probed_ports: [u16; PROBED_PORTS],
}

impl Pod {
    /// Whether the address is one of the pod's own.
    #[inline(always)]
    pub const fn owns(&self, address: &Address) -> bool {
        self.addresses[0].same(address) || self.addresses[1].same(address)
    }

    /// Whether plaintext to this port is refused.
    #[inline(always)]
    pub const fn is_strict(&self, port: u16) -> bool {
        let mut i = 0;
        while i < MODE_EXCEPTIONS {
            // Left at once: a flag that is carried on would have the verifier follow two paths from each of them.
            if self.mode_exceptions[i] == port {
                return self.strict == 0;
            }
            i += 1;
        }
        self.strict != 0
    }

    /// Whether the pod has the kubelet call this port.
    #[inline(always)]
    pub const fn is_probed(&self, port: u16) -> bool {
        let mut i = 0;
        while i < PROBED_PORTS {
            // Left at once, as above. Port 0 is what an unused one is.
            if self.probed_ports[i] == port {
                return port != 0;
            }
            i += 1;
        }
        false
    }

    /// The pod's address of the family of `like`.
    #[inline(always)]
    pub const fn address_like(&self, like: &Address) -> Option<Address> {
        let v4 = like.as_ip4().is_some();
        let [a, b] = self.addresses;
        if !a.same(&UNSPECIFIED) && a.as_ip4().is_some() == v4 {
            Some(a)
        } else if !b.same(&UNSPECIFIED) && b.as_ip4().is_some() == v4 {
            Some(b)
        } else {
            None
        }
    }
}

const UNSPECIFIED: Address = Address::from_ip6([0; 4]);

/// Key of `listeners`: the agent's listening sockets in the pods.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Listener {
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u32,
    /// Zero.
    pub padding: u32,
}

/// [`Listener::direction`] of connections that the pod makes.
pub const OUTBOUND: u32 = 0;
/// [`Listener::direction`] of connections that the pod receives.
pub const INBOUND: u32 = 1;

impl Listener {
    /// The listener of one direction in one pod.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, direction: u32) -> Self {
        Self { netns_cookie, direction, padding: 0 }
    }
}

/// `vouched[4-tuple]`: a connection that is vouched for: one of the agent's, or one of the kubelet's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Voucher {
    /// The client that it stands for.
    pub client: Endpoint,
    /// 1: the server's side has a socket for it, which removes the entry when it goes; until then the dialling one does.
    pub accepted: u32,
    /// 1: it is the kubelet's, whom whoever may write Pods can have call any pod: it counts only where the pod that is called
    /// wants it.
    pub kubelet: u32,
}

impl Voucher {
    /// Whether it counts for a connection to this port of the pod.
    #[inline(always)]
    pub const fn holds(&self, pod: &Pod, port: u16) -> bool {
        match self.kubelet {
            0 => pod.tunnelled == 0,
            // It has no way but this one.
            _ => pod.is_probed(port),
        }
    }
}

/// Key of [`Counters`] for pods that have left.
pub const DEPARTED: u64 = u64::MAX;

/// `counters[network namespace cookie]`, per CPU: what the kernel programs did without the agent seeing it. Cookie 0
/// stands for namespaces that are no pod's, [`DEPARTED`] for pods that have left.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connects rewritten to a code.
    pub captured: u64,
    /// Connects that went their direct way because the agent was gone or hung.
    pub bypassed_agent_down: u64,
    /// Connects refused because the agent was gone or hung.
    pub refused_agent_down: u64,
    /// Connects from a network namespace of the application's own that went their direct way.
    pub bypassed_inner_netns: u64,
    /// Connects from a network namespace of the application's own that were refused.
    pub refused_inner_netns: u64,
    /// Connects over an interface that is not the mesh's (`SO_BINDTODEVICE`).
    pub bypassed_interface: u64,
    /// Connects refused in closed mode because their socket is bound to an interface and its task may not unbind it.
    pub refused_interface: u64,
    /// Inbound connections that went straight to the application because the agent was gone or hung.
    pub inbound_bypassed_agent_down: u64,
    /// Inbound connections refused because the agent was gone or hung.
    pub inbound_refused_agent_down: u64,
    /// Inbound plaintext connections refused by a strict pod.
    pub inbound_refused_strict: u64,
    /// Connections of the kubelet refused by a strict pod at a port that no probe of it names.
    pub inbound_refused_unprobed: u64,
    /// Direct dials of the agent's own listeners, refused.
    pub refused_listener_dial: u64,
    /// TCP connections that the pod's sockets made.
    pub tcp_active_opens: u64,
    /// TCP connections that the pod's sockets accepted.
    pub tcp_passive_opens: u64,
    /// Segments that the pod's sockets sent again, counted when a connection ends.
    pub tcp_retransmits: u64,
    /// Retransmission time-outs of the pod's sockets: the other side answered nothing for that long.
    pub tcp_timeouts: u64,
}

#[cfg(feature = "user")]
mod user {
    use core::iter::Sum;
    use core::ops::AddAssign;

    use super::*;
    use crate::Tuple;

    impl AddAssign for Counters {
        fn add_assign(&mut self, more: Self) {
            self.captured += more.captured;
            self.bypassed_agent_down += more.bypassed_agent_down;
            self.refused_agent_down += more.refused_agent_down;
            self.bypassed_inner_netns += more.bypassed_inner_netns;
            self.refused_inner_netns += more.refused_inner_netns;
            self.bypassed_interface += more.bypassed_interface;
            self.refused_interface += more.refused_interface;
            self.inbound_bypassed_agent_down += more.inbound_bypassed_agent_down;
            self.inbound_refused_agent_down += more.inbound_refused_agent_down;
            self.inbound_refused_strict += more.inbound_refused_strict;
            self.inbound_refused_unprobed += more.inbound_refused_unprobed;
            self.refused_listener_dial += more.refused_listener_dial;
            self.tcp_active_opens += more.tcp_active_opens;
            self.tcp_passive_opens += more.tcp_passive_opens;
            self.tcp_retransmits += more.tcp_retransmits;
            self.tcp_timeouts += more.tcp_timeouts;
        }
    }

    impl<'a> Sum<&'a Counters> for Counters {
        fn sum<I: Iterator<Item = &'a Counters>>(counters: I) -> Self {
            counters.fold(Self::default(), |mut sum, more| {
                sum += *more;
                sum
            })
        }
    }

    /// Lets user space read and write the type in a map.
    macro_rules! map_type {
        ($($name:ident),+) => {
            $(
                // SAFETY: `repr(C)`, integers only, without implicit padding: the sizes are checked below.
                unsafe impl aya::Pod for $name {}
            )+
        };
    }

    map_type!(Agent, Destination, Pod, Listener, Voucher, Counters, Address, Endpoint, Tuple);
}

const _: () = {
    use crate::Tuple;
    assert!(size_of::<Agent>() == 8 + 4 + 4);
    assert!(size_of::<Voucher>() == 20 + 2 * 4);
    assert!(size_of::<Pod>() == 2 * 16 + 4 * 4 + 2 * (MODE_EXCEPTIONS + PROBED_PORTS));
    assert!(size_of::<Listener>() == 8 + 4 + 4);
    assert!(size_of::<Counters>() == 16 * 8);
    assert!(size_of::<Endpoint>() == 16 + 2 + 2);
    assert!(size_of::<Tuple>() == 16 + 16 + 2 + 2);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelet_is_vouched_for_where_the_pod_is_probed() {
        let mut pod = Pod::default();
        let holds = |pod: &Pod, port| {
            [0, 1].map(|kubelet| Voucher { kubelet, ..Voucher::default() }.holds(pod, port))
        };
        for port in [0, 80, u16::MAX] {
            assert_eq!(holds(&pod, port), [true, false], "{port} of a pod without probes");
        }
        pod.probed_ports = core::array::from_fn(|i| 9000 + i as u16);
        for (port, expected) in [(0, false), (8999, false), (9000, true), (9015, true), (9016, false)] {
            assert_eq!(holds(&pod, port), [true, expected], "{port}");
        }
        pod.tunnelled = 1;
        assert_eq!([8999, 9000].map(|port| holds(&pod, port)), [[false, false], [false, true]]);
    }
}

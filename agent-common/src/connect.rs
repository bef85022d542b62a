//! What becomes of a connect() in an enrolled pod's cgroup, and of the names of its sockets.

use crate::maps::{Agent, HEARTBEAT_LIMIT_NS, Pod};
use crate::{Address, code};

/// What is known of a connect to a mesh address.
#[derive(Clone, Copy, Debug)]
pub struct Connect<'a> {
    /// Where to, as the application said.
    pub destination: &'a Address,
    /// The pod whose network namespace the socket is in; none in a namespace of the application's own.
    pub pod: Option<&'a Pod>,
    /// `SO_BINDTODEVICE` of the socket, 0 for none.
    pub interface: u32,
    /// Whether the agent's listener is there and the agent is not hung.
    pub agent_up: bool,
    /// `--on-agent-down closed`.
    pub closed: bool,
}

/// The verdict on a connect to a mesh address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectVerdict {
    /// To the code of the destination.
    Capture,
    /// To the pod itself: the application's own business.
    PassOwn,
    /// The direct way: the application chose an interface that is not the mesh's.
    PassInterface,
    /// The direct way: the socket is in a namespace that the agent does not know, where a code leads nowhere.
    PassInnerNetns,
    /// Not at all: as above, in closed mode.
    RefuseInnerNetns,
    /// The direct way: nobody would answer at the code.
    PassAgentDown,
    /// Not at all: as above, in closed mode.
    RefuseAgentDown,
}

impl Connect<'_> {
    /// Decides. Fails open or closed as the user chose, never by accident.
    #[inline(always)]
    pub fn decide(&self) -> ConnectVerdict {
        let Some(pod) = self.pod else {
            return if self.closed {
                ConnectVerdict::RefuseInnerNetns
            } else {
                ConnectVerdict::PassInnerNetns
            };
        };
        if pod.owns(self.destination) {
            ConnectVerdict::PassOwn
        } else if self.interface != 0 && self.interface != pod.interface {
            ConnectVerdict::PassInterface
        } else if self.agent_up {
            ConnectVerdict::Capture
        } else if self.closed {
            ConnectVerdict::RefuseAgentDown
        } else {
            ConnectVerdict::PassAgentDown
        }
    }
}

impl Agent {
    /// Whether the agent showed no sign of life for too long.
    #[inline(always)]
    pub const fn is_hung(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.heartbeat_ns) > HEARTBEAT_LIMIT_NS
    }
}

/// The address that `getsockname` shows in place of `local`, for a client socket whose peer is a code: the pod's own,
/// unless the application had bound another.
#[inline(always)]
pub fn sockname(pod: &Pod, local: &Address, peer: &Address) -> Option<Address> {
    if code::of(peer).is_none() || !is_of_the_way(local) {
        return None;
    }
    pod.address_like(peer)
}

/// Whether the kernel chose this source address on the way to a code. Any other one was bound by the application, or
/// is still unspecified: a connect that failed leaves its destination in the socket, but takes the source back.
#[inline(always)]
pub fn is_of_the_way(source: &Address) -> bool {
    source.is_loopback() || code::of(source).is_some()
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn pod() -> Pod {
        Pod { addresses: [address("10.0.0.5"), address("fd00::5")], interface: 2, ..Pod::default() }
    }

    #[test]
    fn connects_are_captured_unless_something_speaks_against_it() {
        use ConnectVerdict::*;
        let pod = pod();
        let base = Connect {
            destination: &address("10.96.0.1"),
            pod: Some(&pod),
            interface: 0,
            agent_up: true,
            closed: false,
        };
        let down = Connect { agent_up: false, ..base };
        let inner = Connect { pod: None, ..base };
        for (name, connect, expected) in [
            ("plain", base, Capture),
            ("to itself", Connect { destination: &address("10.0.0.5"), ..base }, PassOwn),
            ("to itself, v6, agent down", Connect { destination: &address("fd00::5"), ..down }, PassOwn),
            ("bound to the mesh's interface", Connect { interface: 2, ..base }, Capture),
            ("bound to another interface", Connect { interface: 3, ..base }, PassInterface),
            ("agent down, open", down, PassAgentDown),
            ("agent down, closed", Connect { closed: true, ..down }, RefuseAgentDown),
            ("inner netns, open", inner, PassInnerNetns),
            ("inner netns, closed", Connect { closed: true, ..inner }, RefuseInnerNetns),
        ] {
            assert_eq!(connect.decide(), expected, "{name}");
        }
    }

    #[test]
    fn an_agent_is_hung_after_three_seconds_and_never_by_a_clock_that_lags() {
        let agent = Agent { heartbeat_ns: 10_000_000_000, ..Agent::default() };
        assert!(!agent.is_hung(0));
        assert!(!agent.is_hung(13_000_000_000));
        assert!(agent.is_hung(13_000_000_001));
    }

    #[test]
    fn a_captured_client_sees_the_address_of_its_pod() {
        let pod = pod();
        for (local, peer, expected) in [
            ("127.0.0.1", "127.128.0.16", Some("10.0.0.5")),
            ("fd75:6d65:7368:1::10", "fd75:6d65:7368:1::10", Some("fd00::5")),
            ("10.0.0.5", "127.128.0.16", None),
            ("192.168.7.5", "127.128.0.16", None),
            ("0.0.0.0", "127.128.0.16", None),
            ("::", "fd75:6d65:7368:1::10", None),
            ("127.0.0.1", "127.0.0.1", None),
            ("10.0.0.5", "10.0.0.9", None),
        ] {
            let seen = sockname(&pod, &address(local), &address(peer));
            assert_eq!(seen, expected.map(address), "{local} -> {peer}");
        }
        let v4_only = Pod { addresses: [address("10.0.0.5"), Address::default()], ..pod };
        assert_eq!(sockname(&v4_only, &address("::1"), &address("fd75:6d65:7368:1::10")), None);
    }
}

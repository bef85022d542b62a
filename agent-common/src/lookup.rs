//! Which socket in an enrolled pod gets an inbound connection.

use crate::maps::Pod;
use crate::{Address, code};

/// The port of the tunnel between nodes (HBONE), on every enrolled pod's own addresses.
pub const TUNNEL_PORT: u16 = 15008;

/// What the first packet of a connection says.
#[derive(Clone, Copy, Debug)]
pub struct Inbound<'a> {
    /// The pod that it arrived in.
    pub pod: &'a Pod,
    /// Where it goes.
    pub local: &'a Address,
    /// Where it goes, host order.
    pub local_port: u16,
    /// Where it comes from.
    pub remote: &'a Address,
}

/// Where a connection is to be steered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// To whoever listens there, as without the mesh.
    Pass,
    /// A code that stands for nothing: refused.
    RefuseListenerDial,
    /// Sent here to be refused; counted where it was sent from.
    Refuse,
    /// To the agent's outbound listener; refused if that is gone, since the application's own wildcard listener would
    /// get it otherwise.
    Outbound,
    /// To the agent's inbound listener unless the connection is vouched for.
    Inbound,
    /// Refused unless the connection is vouched for.
    Strict,
}

impl Inbound<'_> {
    /// Decides, short of the maps that only the kernel can ask.
    #[inline(always)]
    pub fn steer(&self) -> Steer {
        if let Some(code) = code::of(self.local) {
            return match code {
                code::REFUSED => Steer::Refuse,
                0..code::FIRST => Steer::RefuseListenerDial,
                _ => Steer::Outbound,
            };
        }
        // The interface does not tell local from remote (a pod's call to its own address reports the interface that
        // owns the address), so the addresses must.
        if !self.pod.owns(self.local) || self.pod.owns(self.remote) || self.remote.is_loopback() {
            return Steer::Pass;
        }
        if self.local_port != TUNNEL_PORT && self.pod.is_strict(self.local_port) {
            Steer::Strict
        } else {
            Steer::Inbound
        }
    }
}

/// What to do with a connection for the inbound listener when the agent does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Straight to the application.
    Pass,
    /// Refused.
    Refuse,
}

/// Decides for a gone or hung agent. The tunnel's port is the agent's alone: a plain listener of the application must
/// not get what was meant for it.
#[inline(always)]
pub fn when_down(closed: bool, local_port: u16) -> Down {
    if closed || local_port == TUNNEL_PORT { Down::Refuse } else { Down::Pass }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn check(strict: u32, remote: &str, local: &str, port: u16) -> Steer {
        let mut pod = Pod { addresses: [address("10.0.0.5"), address("fd00::5")], strict, ..Pod::default() };
        pod.mode_exceptions[..2].copy_from_slice(&[8080, TUNNEL_PORT]);
        Inbound { pod: &pod, local: &address(local), local_port: port, remote: &address(remote) }.steer()
    }

    #[test]
    fn connections_are_steered_by_their_addresses() {
        use Steer::*;
        for (strict, remote, local, port, expected) in [
            (0, "10.0.0.9", "10.0.0.5", 80, Inbound),
            (0, "fd00::9", "fd00::5", 80, Inbound),
            (0, "10.0.0.9", "192.168.7.5", 80, Pass),
            (0, "10.0.0.5", "10.0.0.5", 80, Pass),
            (0, "127.0.0.1", "10.0.0.5", 80, Pass),
            (0, "127.0.0.1", "127.0.0.1", 80, Pass),
            (0, "127.0.0.1", "127.128.0.16", 80, Outbound),
            (0, "10.0.0.5", "127.128.0.16", 80, Outbound),
            (0, "fd00::5", "fd75:6d65:7368:1::10", 80, Outbound),
            (0, "127.0.0.1", "127.128.0.1", 40000, RefuseListenerDial),
            (0, "127.0.0.1", "127.128.0.3", 80, Refuse),
            (0, "fd00::5", "fd75:6d65:7368:1::3", 80, Refuse),
            (1, "10.0.0.9", "10.0.0.5", 80, Strict),
            (1, "10.0.0.9", "10.0.0.5", TUNNEL_PORT, Inbound),
            (0, "10.0.0.9", "10.0.0.5", TUNNEL_PORT, Inbound),
            (0, "10.0.0.9", "10.0.0.5", 8080, Strict),
            (1, "10.0.0.9", "10.0.0.5", 8080, Inbound),
            (1, "10.0.0.5", "10.0.0.5", 80, Pass),
            (1, "10.0.0.9", "192.168.7.5", 80, Pass),
            (1, "127.0.0.1", "127.128.0.16", 80, Outbound),
        ] {
            assert_eq!(
                check(strict, remote, local, port),
                expected,
                "{remote} -> {local}:{port} strict={strict}"
            );
        }
    }

    #[test]
    fn without_an_agent_the_tunnel_port_stays_shut() {
        assert_eq!(when_down(false, 80), Down::Pass);
        assert_eq!(when_down(true, 80), Down::Refuse);
        assert_eq!(when_down(false, TUNNEL_PORT), Down::Refuse);
    }
}

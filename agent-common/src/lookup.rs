//! Which socket in an enrolled pod gets an inbound connection.

use crate::maps::Pod;
use crate::{Address, code, source};

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
    /// The interface that it came over, or that has the address where it comes from the pod itself; 0 where the kernel does
    /// not tell (before Linux 5.17).
    pub interface: u32,
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
    /// To the agent's inbound listener unless the connection is vouched for, and the pod takes such ones.
    Inbound,
    /// Refused unless the connection is vouched for, and the pod takes such ones.
    Strict,
    /// As from the agent, which has decided: refused unless the connection is vouched for.
    Dialled,
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
        if self.pod.owns(self.remote) || self.remote.same(self.local) || self.remote.is_loopback() {
            return Steer::Pass;
        }
        if source::is(self.remote) {
            return Steer::Dialled;
        }
        let is_strict = self.pod.is_strict(self.local_port);
        if !self.pod.owns(self.local) {
            let is_shut = self.is_over_the_mesh() && (is_strict || self.pod.guarded != 0);
            return if is_shut { Steer::Strict } else { Steer::Pass };
        }
        if self.local_port != TUNNEL_PORT && is_strict { Steer::Strict } else { Steer::Inbound }
    }

    /// Whether it comes by the network that the pod's addresses are of. The interface has others: a link-local one, and what
    /// neighbours may advertise to it (RFC 4862). The agent is not asked there, so what it would have to decide is refused.
    #[inline(always)]
    fn is_over_the_mesh(&self) -> bool {
        match self.interface {
            0 => self.local.is_link_local(),
            interface => interface == self.pod.interface,
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
        let addresses = [address("10.0.0.5"), address("fd00::5")];
        let mut pod = Pod { addresses, strict, interface: 3, ..Pod::default() };
        pod.mode_exceptions[..2].copy_from_slice(&[8080, TUNNEL_PORT]);
        let (local, remote) = (&address(local), &address(remote));
        Inbound { pod: &pod, local, local_port: port, remote, interface: 2 }.steer()
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
            (1, "192.0.0.64", "10.0.0.5", 80, Dialled),
            (0, "fd75:6d65:7368:1:0:1:0:3f", "fd00::5", 80, Dialled),
            (0, "192.0.0.64", "127.128.0.1", 40000, RefuseListenerDial),
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
    fn where_nobody_is_asked_only_what_takes_everybody_is_open() {
        use Steer::{Pass, Strict};
        let open =
            Pod { addresses: [address("10.0.0.5"), address("fd00::5")], interface: 2, ..Pod::default() };
        let (strict, guarded) = (Pod { strict: 1, ..open }, Pod { guarded: 1, ..open });
        for (pod, interface, remote, local, expected) in [
            (&open, 2, "fe80::9", "fe80::5", Pass),
            (&strict, 2, "fe80::9", "fe80::5", Strict),
            (&guarded, 2, "fe80::9", "fe80::5", Strict),
            (&strict, 2, "2001:db8::9", "2001:db8::5", Strict),
            (&guarded, 2, "10.0.0.9", "169.254.7.5", Strict),
            (&strict, 3, "fe80::9", "fe80::5", Pass),
            (&strict, 3, "192.168.7.9", "192.168.7.5", Pass),
            (&strict, 2, "fe80::5", "fe80::5", Pass),
            (&strict, 2, "fd00::5", "fe80::5", Pass),
            (&strict, 0, "fe80::9", "fe80::5", Strict),
            (&guarded, 0, "fe80::9", "fe80::5", Strict),
            (&open, 0, "fe80::9", "fe80::5", Pass),
            (&strict, 0, "fe80::5", "fe80::5", Pass),
            (&strict, 0, "192.168.7.9", "192.168.7.5", Pass),
        ] {
            let (near, far) = (&address(local), &address(remote));
            let found = Inbound { pod, local: near, local_port: 80, remote: far, interface }.steer();
            assert_eq!(found, expected, "{remote} -> {local} over {interface}: {pod:?}");
        }
    }

    #[test]
    fn without_an_agent_the_tunnel_port_stays_shut() {
        assert_eq!(when_down(false, 80), Down::Pass);
        assert_eq!(when_down(true, 80), Down::Refuse);
        assert_eq!(when_down(false, TUNNEL_PORT), Down::Refuse);
    }
}

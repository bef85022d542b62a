//! The agent's listeners inside a pod.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use undermesh_common::code;

use super::{Netns, sockopt};

/// Connections that wait to be accepted, per listener; the namespace's `net.core.somaxconn` may be lower.
const BACKLOG: i32 = 4096;

/// One worker's listeners in one pod. Each is one of a SO_REUSEPORT group in which the kernel spreads connections.
#[derive(Debug)]
pub struct PodListeners {
    /// Gets what the pod dials.
    pub outbound: TcpListener,
    /// Gets what dials the pod.
    pub inbound: TcpListener,
}

/// Opens `workers` sets of listeners. They are bound to reserved codes, so nothing of the application's reaches them or
/// collides with them but for one ephemeral port, and `sk_lookup` steers connections of both families to them. A process
/// in the pod with the agent's own user ID (root without a user namespace) could join their SO_REUSEPORT group; it would
/// take its own pod's connections away from the agent, and nobody else's.
pub fn open(netns: &Netns, workers: usize) -> io::Result<Vec<PodListeners>> {
    netns.run(|| {
        let family = Family::of_this_namespace();
        let mut sets: Vec<PodListeners> = Vec::with_capacity(workers);
        let mut port = 0;
        for _ in 0..workers {
            let outbound = listen(family.bind_address(code::OUTBOUND_LISTENER, port))?;
            // What the pod dials comes from the pod; what dials the pod may come from far away.
            sockopt::set_local(&outbound)?;
            port = local_port(&outbound)?;
            let inbound = listen(family.bind_address(code::INBOUND_LISTENER, port))?;
            sets.push(PodListeners { outbound: outbound.into(), inbound: inbound.into() });
        }
        Ok(sets)
    })?
}

#[derive(Clone, Copy)]
enum Family {
    /// One socket for both families: `sk_lookup` may give an IPv4 connection to a dual-stack IPv6 socket.
    Dual,
    /// The namespace has no IPv6.
    V4,
}

impl Family {
    fn of_this_namespace() -> Self {
        let probe = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
        if TcpListener::bind(probe).is_ok() { Self::Dual } else { Self::V4 }
    }

    fn bind_address(self, code: u32, port: u16) -> SocketAddr {
        let code = Ipv4Addr::from(u32::from_be(code::ip4(code)));
        match self {
            // An address that is not IPv4's would make the socket IPv6-only.
            Self::Dual => (code.to_ipv6_mapped(), port).into(),
            Self::V4 => (code, port).into(),
        }
    }
}

fn local_port(socket: &Socket) -> io::Result<u16> {
    let address = socket.local_addr()?.as_socket();
    address.map(|address| address.port()).ok_or_else(|| io::Error::other("a TCP socket without a port"))
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_port(true)?;
    // Accepted sockets inherit these. Theirs are the ports of the pod's servers: without SO_REUSEADDR a server that
    // restarts could not bind its own port while the agent still holds a connection to it.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    // An agent that is killed must not make a stream that it cuts look as if it had ended: unless the relay ends a
    // connection in order, its close is a reset.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

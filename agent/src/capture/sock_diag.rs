//! The TCP sockets of a network namespace, as the kernel lists them (sock_diag(7)), and their end at its hands.
//!
//! Of the namespace that the calling thread is in. Whose sockets they are is told by their cgroups alone.

use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    Nla as _,
};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, IPPROTO_TCP, SockDiagDestroy, SockDiagMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

/// `INET_DIAG_CGROUP_ID` (Linux 5.9).
const CGROUP_ID: u16 = 21;

/// A socket.
#[derive(Clone, Debug)]
pub(super) struct TcpSocket {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
    /// The cgroup of who made it; of an accepted one that of who listens.
    pub(super) cgroup: Option<u64>,
    /// What nothing but this very socket is known by.
    pub(super) id: TcpSocketId,
}

/// A socket, for as long as it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TcpSocketId {
    family: u8,
    id: SocketId,
}

/// The connections that stand.
pub(super) fn established() -> io::Result<Vec<TcpSocket>> {
    in_state(&StateFlags::ESTABLISHED)
}

/// What listens.
pub(super) fn listening() -> io::Result<Vec<TcpSocket>> {
    in_state(&StateFlags::LISTEN)
}

/// The connections on which data is still taken, and those that are about to stand.
pub(super) fn receiving() -> io::Result<Vec<TcpSocket>> {
    let half_closed = StateFlags::FIN_WAIT1 | StateFlags::FIN_WAIT2;
    in_state(&(StateFlags::SYN_RECV | StateFlags::ESTABLISHED | half_closed))
}

/// Ends a connection: its owner finds ECONNABORTED, and the other side a reset.
///
/// # Errors
/// `NotFound` if it is gone, `Unsupported` where the kernel does not do that (`CONFIG_INET_DIAG_DESTROY`).
fn destroy(TcpSocketId { family, id }: &TcpSocketId) -> io::Result<()> {
    let request = InetRequest {
        family: *family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: id.clone(),
    };
    let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
    ask(NLM_F_REQUEST | NLM_F_ACK, NetlinkPayload::InnerMessage(request), |_| {}).map_err(|error| match error
        .raw_os_error()
    {
        Some(libc::EOPNOTSUPP) => io::ErrorKind::Unsupported.into(),
        _ => error,
    })
}

/// Ends those that are still there; how many these were.
///
/// # Errors
/// As [`destroy`].
pub(super) fn destroy_all(ids: &[TcpSocketId]) -> io::Result<usize> {
    let mut ended = 0;
    for id in ids {
        match destroy(id) {
            Ok(()) => ended += 1,
            // It has ended by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

fn in_state(states: &StateFlags) -> io::Result<Vec<TcpSocket>> {
    let mut all = Vec::new();
    for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id,
        };
        let request = NetlinkPayload::InnerMessage(SockDiagMessage::InetRequest(request));
        ask(NLM_F_REQUEST | NLM_F_DUMP, request, |response| all.push(TcpSocket::of(response)))?;
    }
    Ok(all)
}

/// Asks, and listens until all has been said.
fn ask<M: NetlinkSerializable>(
    flags: u16,
    payload: NetlinkPayload<M>,
    mut each: impl FnMut(&InetResponse),
) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut request = NetlinkMessage::new(header, payload);
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => each(&response),
                NetlinkPayload::Done(_) => return Ok(()),
                // One without a code is the acknowledgement.
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            // Messages begin at multiples of four.
            let length = (message.header.length as usize).next_multiple_of(4).clamp(4, rest.len());
            rest = &rest[length..];
        }
    }
}

impl TcpSocket {
    fn of(response: &InetResponse) -> Self {
        let header = &response.header;
        let id = &header.socket_id;
        let canonical = |address: std::net::IpAddr, port| SocketAddr::new(address.to_canonical(), port);
        Self {
            local: canonical(id.source_address, id.source_port),
            peer: canonical(id.destination_address, id.destination_port),
            cgroup: response.nlas.iter().find_map(cgroup_id),
            id: TcpSocketId { family: header.family, id: id.clone() },
        }
    }
}

fn cgroup_id(attribute: &Nla) -> Option<u64> {
    let Nla::Other(other) = attribute else { return None };
    if other.kind() != CGROUP_ID || other.value_len() != size_of::<u64>() {
        return None;
    }
    let mut value = [0; size_of::<u64>()];
    other.emit_value(&mut value);
    Some(u64::from_ne_bytes(value))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn sockets_are_listed_with_their_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let client = TcpStream::connect(server).unwrap();
        let own = client.local_addr().unwrap();
        let established = established().unwrap();
        let ends: Vec<_> = established.iter().map(|socket| (socket.local, socket.peer)).collect();
        assert!(ends.contains(&(own, server)) && ends.contains(&(server, own)), "{ends:?}");
        assert!(established.iter().all(|socket| socket.cgroup.is_some()), "{established:?}");
        assert!(listening().unwrap().iter().any(|socket| socket.local == server));
    }
}

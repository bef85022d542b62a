//! Datagrams, which no mesh of ours touches.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::socket::errno;

/// The arguments of `witness udp`.
#[derive(Args)]
pub struct Udp {
    /// Where to.
    to: SocketAddr,
    /// connect() first, so that the socket has a peer.
    #[arg(long)]
    connected: bool,
}

impl Udp {
    /// What came back, and the socket's names.
    pub fn run(&self) -> Result<Value> {
        let any: SocketAddr = match self.to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let sent = match self.connected {
            true => socket.connect(self.to).and_then(|()| socket.send(b"ping")),
            false => socket.send_to(b"ping", self.to),
        };
        let mut answer = [0; 128];
        let answered = sent.and_then(|_| socket.recv_from(&mut answer));
        let peer = socket.peer_addr().map_or_else(|error| errno(&error), |peer| peer.to_string());
        let (answer, from) = match answered {
            Ok((count, from)) => (String::from_utf8_lossy(&answer[..count]).into_owned(), from.to_string()),
            Err(error) => (errno(&error), String::new()),
        };
        Ok(json!({ "answer": answer, "from": from, "name": socket.local_addr()?.to_string(), "peer": peer }))
    }
}

/// The arguments of `witness udp-listen`.
#[derive(Args)]
pub struct UdpListen {
    /// The port, of IPv4 and IPv6.
    #[arg(long)]
    port: u16,
}

impl UdpListen {
    /// Serves for ever.
    pub fn run(&self) -> Result<Value> {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
        socket.set_only_v6(false)?;
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port));
        socket.bind(&address.into()).with_context(|| format!("port {}", self.port))?;
        let socket = UdpSocket::from(socket);
        println!("answering");
        loop {
            let (_, from) = socket.recv_from(&mut [0; 128])?;
            socket.send_to(from.to_string().as_bytes(), from)?;
        }
    }
}

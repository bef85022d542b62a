//! A server that follows a script with each connection.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::script::Script;
use crate::socket::{own_name, peer_name, set_option};

/// The arguments of `witness listen`.
#[derive(Args)]
pub struct Listen {
    /// The port, of IPv4 and IPv6.
    #[arg(long)]
    port: u16,
    /// The address, with a socket of its family alone; all of both families unless given.
    #[arg(long, default_value_t = Ipv6Addr::UNSPECIFIED.into())]
    at: IpAddr,
    /// By an MPTCP socket.
    #[arg(long)]
    mptcp: bool,
    /// Take data in the SYN (TCP_FASTOPEN).
    #[arg(long)]
    fast_open: bool,
    /// What to do with each connection.
    #[arg(long, default_value = "greet,echo")]
    script: Script,
}

impl Listen {
    /// Serves for ever. Each connection's line is printed when its script has ended.
    pub fn run(&self) -> Result<Value> {
        let protocol = if self.mptcp { Protocol::MPTCP } else { Protocol::TCP };
        let at = SocketAddr::new(self.at, self.port);
        let listener = Socket::new(Domain::for_address(at), Type::STREAM, Some(protocol))?;
        if at.is_ipv6() {
            listener.set_only_v6(false)?;
        }
        listener.set_reuse_address(true)?;
        if self.fast_open {
            set_option(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)?;
        }
        listener.bind(&at.into()).with_context(|| at.to_string())?;
        listener.listen(4096)?;
        let script = Arc::new(self.script.clone());
        loop {
            let (socket, accepted) = listener.accept()?;
            let accepted = accepted.as_socket().map(|peer| peer.to_string());
            let seen = json!({ "accepted": accepted, "peer": peer_name(&socket), "name": own_name(&socket) });
            let script = script.clone();
            std::thread::spawn(move || {
                let mut seen = seen;
                let greeting = seen.to_string();
                seen["saw"] = script.follow(socket.into(), &greeting).into();
                println!("{seen}");
            });
        }
    }
}

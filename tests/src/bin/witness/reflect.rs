//! An echo server for very many connections, on one thread.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::socket::raise_descriptor_limit;

/// The arguments of `witness reflect`.
#[derive(Args)]
pub struct Reflect {
    /// The port, of IPv4 and IPv6.
    #[arg(long)]
    port: u16,
}

const LISTENER: u64 = u64::MAX;

impl Reflect {
    /// Serves for ever.
    pub fn run(&self) -> Result<Value> {
        raise_descriptor_limit()?;
        let listener = listen(self.port)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let mut open: HashMap<u64, TcpStream> = HashMap::new();
        let mut events = vec![EpollEvent::empty(); 1024];
        loop {
            let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
            for event in &events[..count] {
                if event.data() != LISTENER {
                    let over = open.get_mut(&event.data()).is_some_and(|stream| !echo(stream));
                    if over {
                        // Closing the descriptor takes it out of the epoll set.
                        open.remove(&event.data());
                    }
                    continue;
                }
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    let key = stream.as_raw_fd() as u64;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                    open.insert(key, stream);
                }
            }
        }
    }
}

fn listen(port: u16) -> Result<TcpListener> {
    let listener = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    listener.set_only_v6(false)?;
    listener.set_reuse_address(true)?;
    listener.set_nonblocking(true)?;
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    listener.bind(&address.into()).with_context(|| format!("port {port}"))?;
    listener.listen(4096)?;
    Ok(listener.into())
}

/// Sends back what is there; false when the connection is over. So few bytes are always taken.
fn echo(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; 64];
    match stream.read(&mut bytes) {
        Ok(0) => false,
        Ok(count) => stream.write_all(&bytes[..count]).is_ok(),
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

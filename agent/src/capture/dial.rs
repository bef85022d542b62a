//! Dials from inside a pod.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{HashMap as BpfHashMap, MapData};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use undermesh_common::{Address, Endpoint, source};

use super::programs::Programs;
use super::{CaptureError, PodNet, sockopt};

/// Makes connections from inside pods, and vouches for them where asked. One per worker thread: dialling moves the
/// thread into the pod's namespace.
#[derive(Debug)]
pub struct Dialer {
    dials: Mutex<BpfHashMap<MapData, u64, Endpoint>>,
    /// How many have been made to the pod that they are made from.
    inside: AtomicU32,
}

/// A connection to be made.
#[derive(Clone, Debug)]
pub struct Dial<'a> {
    /// The pod to dial from.
    pub from: &'a PodNet,
    /// Where to.
    pub to: SocketAddr,
    /// The source address, where the application had bound one; else the kernel chooses, as it would have for the
    /// application, or, within the pod, the agent does.
    pub source: Option<IpAddr>,
    /// The client that the connection stands for: makes the receiving pod trust the connection and its application
    /// see this address. Only for destinations on this node.
    pub on_behalf_of: Option<SocketAddr>,
    /// It stays on this node.
    pub is_local: bool,
    /// TCP keep-alive, so that a peer that vanished is noticed.
    pub keepalive: Option<&'a TcpKeepalive>,
}

impl Dialer {
    pub(super) fn new(programs: &Programs) -> Result<Self, CaptureError> {
        Ok(Self { dials: Mutex::new(programs.hash_map("dials")?), inside: AtomicU32::new(0) })
    }

    /// Connects. The caller bounds the time.
    pub async fn dial(&self, dial: Dial<'_>) -> io::Result<TcpStream> {
        let socket = self.socket(&dial)?;
        let cookie = match dial.on_behalf_of {
            Some(client) => Some(self.announce(&socket, client)?),
            None => None,
        };
        let connected = socket.connect(dial.to).await;
        if let (Some(cookie), Err(_)) = (cookie, &connected) {
            self.withdraw(cookie);
        }
        connected
    }

    fn socket(&self, dial: &Dial<'_>) -> io::Result<TcpSocket> {
        dial.from.netns.enter()?;
        let socket =
            Socket::new(Domain::for_address(dial.to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        // As for accepted connections: only an end in order is to look like one.
        socket.set_linger(Some(Duration::ZERO))?;
        if let Some(keepalive) = dial.keepalive {
            socket.set_tcp_keepalive(keepalive)?;
        }
        if dial.is_local || dial.on_behalf_of.is_some() {
            sockopt::set_local(&socket)?;
        }
        let to = dial.to.ip();
        if let Some(source) = dial.source {
            bind(&socket, source)?;
        } else if dial.on_behalf_of.is_some() && dial.from.addresses.contains(&to) {
            if to.is_ipv6() {
                // A route alone does not make the address one that can be bound.
                socket.set_freebind_v6(true)?;
            }
            bind(&socket, self.source_like(to))?;
        }
        // SAFETY: the descriptor is a TCP socket that nothing else owns any more.
        Ok(unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) })
    }

    /// Each in turn, so that each has its share of the ports.
    fn source_like(&self, like: IpAddr) -> IpAddr {
        let number = self.inside.fetch_add(1, Ordering::Relaxed) % source::COUNT;
        IpAddr::from(match like {
            IpAddr::V4(_) => Address::from_ip4(source::ip4(number)),
            IpAddr::V6(_) => Address::from_ip6(source::ip6(number)),
        })
    }

    /// The kernel vouches for the connection when it has chosen the source port, right before the SYN.
    fn announce(&self, socket: &TcpSocket, client: SocketAddr) -> io::Result<u64> {
        let cookie = SockRef::from(socket).cookie()?;
        let mut dials = self.dials.lock().unwrap_or_else(PoisonError::into_inner);
        dials.insert(cookie, Endpoint::from(client), 0).map_err(io::Error::other)?;
        Ok(cookie)
    }

    /// A connect that failed before its SYN left its announcement behind; after it, there is nothing to remove.
    fn withdraw(&self, cookie: u64) {
        let _ = self.dials.lock().unwrap_or_else(PoisonError::into_inner).remove(&cookie);
    }
}

/// The kernel chooses the port at connect(), among those that are free for the destination.
fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    sockopt::set_bind_address_no_port(socket)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

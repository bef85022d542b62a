//! A connection that a pod made to a mesh address, as it was captured.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;

use super::{Proxy, admission, identity};
use crate::capture::{Code, PodNet, bound_source};
use crate::model::Name;

/// A captured connection, with what its application knows of it.
#[derive(Debug)]
pub(super) struct Captured {
    pub(super) net: Arc<PodNet>,
    /// Keeps the code's meaning while the application may ask for its peer's name.
    _code: Arc<Code>,
    /// What the application dialled.
    pub(super) dialled: SocketAddr,
    /// The application's end as it sees it itself.
    pub(super) client: SocketAddr,
    /// The source address that the application had bound.
    pub(super) bound: Option<IpAddr>,
}

impl Captured {
    /// What stands behind the socket's own address; nothing where that is no code that means something (any more).
    pub(super) fn of(proxy: &Proxy, net: &Arc<PodNet>, stream: &TcpStream, peer: SocketAddr) -> Option<Self> {
        let local = stream.local_addr().ok()?;
        let code = proxy.codes.destination(local.ip())?;
        let peer_ip = peer.ip().to_canonical();
        let bound = bound_source(peer_ip);
        // A captured socket never changes the family, so this one came in by the route to the IPv6 codes.
        if bound.is_some_and(|source| source.is_ipv4() != code.address.is_ipv4()) {
            return None;
        }
        let client_ip = bound.or_else(|| net.address_like(code.address)).unwrap_or(peer_ip);
        Some(Self {
            net: net.clone(),
            dialled: SocketAddr::new(code.address, local.port()),
            _code: code,
            client: SocketAddr::new(client_ip, peer.port()),
            bound,
        })
    }

    /// What its pod is held to limits as: the identity that it would prove, else its address.
    pub(super) fn source(&self) -> Name {
        identity(&self.net.workload).unwrap_or_else(|| admission::unproven(self.client.ip()))
    }
}

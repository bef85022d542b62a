//! A connection that a pod made to a mesh address, as it was captured.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;

use super::Proxy;
use super::admission::Caller;
use crate::capture::{Code, PodNet, bound_source};
use crate::model::{DialledPods, Front, Service};
use crate::snapshot::Snapshot;

/// A captured connection, with what its application knows of it.
#[derive(Debug)]
pub(super) struct Captured {
    pub(super) net: Arc<PodNet>,
    /// Kept for as long as the connection: the application may ask for its peer's name, which is the code's meaning.
    pub(super) code: Arc<Code>,
    /// What the application dialled.
    pub(super) dialled: SocketAddr,
    /// The application's end as it sees it itself.
    pub(super) client: SocketAddr,
    /// The source address that the application had bound.
    pub(super) bound: Option<IpAddr>,
    /// The Service that the application means by the pod that it dialled, where its own pod says that it means one.
    front: Option<Box<Front>>,
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
        let dialled = SocketAddr::new(code.address, local.port());
        Some(Self {
            net: net.clone(),
            dialled,
            code,
            client: SocketAddr::new(client_ip, peer.port()),
            bound,
            front: front(&proxy.snapshot.load(), net, dialled),
        })
    }

    /// The Service that the connection is for; none where it is for the pod that was dialled.
    pub(super) fn service<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Service> {
        match &self.front {
            // What has lost the port since is not it any more.
            Some(front) => snapshot
                .services
                .get(&front.service)
                .map(Arc::as_ref)
                .filter(|it| it.port(front.port).is_some()),
            None => snapshot.service(self.dialled.ip()),
        }
    }

    /// The port of that Service.
    pub(super) fn port(&self) -> u16 {
        self.front.as_ref().map_or(self.dialled.port(), |front| front.port)
    }

    /// Who its pod is to another one of this node: what it would prove to those of others.
    pub(super) fn caller(&self) -> Caller {
        Caller { identity: self.net.workload.identity.clone(), address: self.client.ip() }
    }
}

/// Found out once: a client that keeps its connection stays with the Service when the pod that it dialled has gone.
pub(super) fn front(snapshot: &Snapshot, net: &PodNet, dialled: SocketAddr) -> Option<Box<Front>> {
    if snapshot.fronts.is_empty() || snapshot.service(dialled.ip()).is_some() {
        return None;
    }
    // As the pod is marked now, and not when it was enrolled.
    let client = snapshot.workloads.get(&net.workload.uid)?;
    let wants_services = client.dialled_pods == DialledPods::Service;
    snapshot.front(dialled).filter(|_| wants_services).cloned().map(Box::new)
}

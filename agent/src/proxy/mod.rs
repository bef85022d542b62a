//! The proxy: what becomes of a captured connection.
//!
//! captured -> the destination behind the code -> what is spoken -> an endpoint -> upstream -> relay, or HTTP request by request.
//! Runs on worker threads, one
//! single-threaded runtime each, that share nothing but immutable snapshots and counters. It does not know where
//! configuration comes from nor how capture works; it never buffers without bound and never waits without a limit on
//! anything but the two applications.

mod admission;
mod captured;
mod carriage;
mod detect;
pub mod explain;
#[cfg(fuzzing)]
pub mod fuzzing;
mod http;
mod idle;
mod inbound;
mod let_in;
mod outbound;
mod reach;
mod relay;
mod splice;
mod tasks;
#[cfg(test)]
mod testkit;
pub mod tunnel;
mod upstream;
mod worker;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use socket2::TcpKeepalive;

use crate::balance::AffinityTable;
use crate::capture::{CodeTable, EnrolledPods, PodNet};
use crate::jwks::Jwks;
use crate::model::{Name, SpiffeId, Workload};
use crate::policy::authorization::PathNormalisation;
use crate::snapshot::Snapshot;
use crate::telemetry::{Peer, Telemetry};

pub use http::{BackendTlsClients, HttpLimits};
use tunnel::Tunnel;
pub use worker::{Fate, Workers, WorkersGone};

/// What the user may set.
#[derive(Clone, Debug)]
pub struct ProxySettings {
    /// How long one attempt to connect to an endpoint may take.
    pub connect_timeout: Duration,
    /// TCP keep-alive of the agent's connections, so that a peer that vanished is noticed.
    pub keepalive: TcpKeepalive,
    /// Connections relayed at one time; more are refused.
    pub max_connections: usize,
    /// Whether requests are told of where no route needs to know of them.
    pub http: bool,
    /// What heads may be, and how many requests there may be at a time.
    pub http_limits: HttpLimits,
    /// How paths are made comparable before policies see them.
    pub paths: PathNormalisation,
    /// Whether who is denied something is told by which policy.
    pub names_policies: bool,
}

/// What all connections share.
#[derive(Debug)]
pub struct Proxy {
    /// The newest configuration.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// What stands behind each code.
    pub codes: CodeTable,
    /// The pods of this node that are in the mesh.
    pub enrolled: EnrolledPods,
    /// Where connections are counted and logged.
    pub telemetry: Arc<Telemetry>,
    /// Which endpoint each client of a Service with session affinity has.
    pub affinity: AffinityTable,
    /// TLS with endpoints that want it.
    pub backend_tls: BackendTlsClients,
    /// What the user set.
    pub settings: ProxySettings,
    /// Mutual TLS between the nodes; none where it is not set up.
    pub tunnel: Option<Arc<Tunnel>>,
    /// Keys of whoever makes tokens.
    pub jwks: Arc<Jwks>,
    /// Connections relayed now.
    pub open: AtomicUsize,
}

/// A place among [`ProxySettings::max_connections`].
#[derive(Debug)]
struct Place(Arc<Proxy>);

impl Proxy {
    /// A place for one more connection, if there is one.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        let place = Place(self.clone());
        (before < self.settings.max_connections).then_some(place)
    }

    /// The peer behind an address, with its pod if it is one. An address proves no identity.
    fn peer(&self, snapshot: &Snapshot, address: SocketAddr) -> Peer {
        Peer { workload: self.workload(snapshot, address.ip()), identity: None, address }
    }

    /// A pod of this node, whose identity the agent knows for itself.
    fn own_peer(&self, net: &PodNet, address: SocketAddr) -> Peer {
        Peer { workload: Some(net.workload.clone()), identity: identity(&net.workload), address }
    }

    fn workload(&self, snapshot: &Snapshot, address: IpAddr) -> Option<Arc<Workload>> {
        snapshot.workload(address).cloned()
    }
}

/// Who the workload is, as telemetry writes it.
fn identity(workload: &Workload) -> Option<Name> {
    workload.identity.as_ref().map(SpiffeId::to_name)
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

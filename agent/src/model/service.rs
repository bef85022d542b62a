//! A Service and the endpoints behind it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{EndpointLoad, Name, ObjectRef, PortLoad, ServiceLoad, TrafficSettings, Workload};

/// A Kubernetes Service with at least one cluster IP. Headless Services have no address of their own: a client
/// dials a pod, and the dialled pod is what it gets.
#[derive(Clone, Debug)]
pub struct Service {
    /// Namespace and name.
    pub id: ObjectRef,
    /// `spec.clusterIPs`.
    pub addresses: Vec<IpAddr>,
    /// The TCP ports, in the order of the manifest.
    pub ports: Vec<ServicePort>,
    /// `spec.sessionAffinity`.
    pub session_affinity: SessionAffinity,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic: TrafficScope,
    /// `spec.trafficDistribution`.
    pub distribution: TrafficDistribution,
    /// What this node has seen of it; the same in every snapshot.
    pub load: ServiceLoad,
}

impl Service {
    /// The port that clients dial as `port`, if the Service has it.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
    }
}

/// One TCP port of a Service.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// `name`; empty where the only port has none.
    pub name: Name,
    /// The port that clients dial.
    pub port: u16,
    /// `appProtocol`.
    pub app_protocol: Option<Name>,
    /// Every endpoint of this port, of both address families, fit to be used or not: one per address, sorted by it.
    pub endpoints: Arc<[Endpoint]>,
    /// Those of them that a connection from this node may go to (`balance::candidates` computes it).
    pub candidates: Candidates,
    /// How its connections and requests are treated.
    pub traffic: Arc<TrafficSettings>,
    /// What this node has under way there; the same in every snapshot.
    pub load: PortLoad,
}

/// What a Service says is spoken on one of its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    /// HTTP, of whatever version.
    Http,
    /// Something else, TLS included.
    Opaque,
    /// It does not say.
    Nothing,
}

impl Declared {
    /// What is said by a port's `appProtocol` (KEP-3726 has the names of Kubernetes' own), else by the first word of its name, as
    /// Istio has users name ports.
    pub fn of(app_protocol: Option<&str>, name: &str) -> Self {
        if let Some(protocol) = app_protocol {
            return match protocol.to_ascii_lowercase().as_str() {
                "http" | "http2" | "grpc" | "grpc-web" | "kubernetes.io/h2c" | "kubernetes.io/ws" => {
                    Self::Http
                }
                _ => Self::Opaque,
            };
        }
        match name.split('-').next().unwrap_or_default() {
            "http" | "http2" | "grpc" => Self::Http,
            "tcp" | "tls" | "https" | "mongo" | "mysql" | "redis" => Self::Opaque,
            _ => Self::Nothing,
        }
    }
}

impl ServicePort {
    /// What is spoken on the port, as far as it is said.
    pub fn declared(&self) -> Declared {
        Declared::of(self.app_protocol.as_deref(), &self.name)
    }

    /// The endpoint with this address, fit to be used or not.
    pub fn endpoint(&self, address: SocketAddr) -> Option<&Endpoint> {
        let place = self.endpoints.binary_search_by_key(&address, |endpoint| endpoint.address);
        Some(&self.endpoints[place.ok()?])
    }

    /// The endpoint with this address, if a connection from this node may go to it.
    pub fn candidate(&self, address: SocketAddr) -> Option<&Endpoint> {
        let candidates = self.candidates.like(address.ip()).all();
        let place =
            candidates.binary_search_by_key(&address, |&index| self.endpoints[index as usize].address);
        Some(&self.endpoints[candidates[place.ok()?] as usize])
    }
}

/// The endpoints of one port that a connection may go to, per address family. Worked out once per change, so
/// that a connection need not look at every endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// For clients that dialled an IPv4 address.
    pub v4: Reachable,
    /// For clients that dialled an IPv6 address.
    pub v6: Reachable,
}

/// The endpoints of one port and address family that a connection may go to, as ascending indices into
/// [`ServicePort::endpoints`], hence in the order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reachable {
    /// Those that it goes to while enough of them are fit.
    pub near: Box<[u32]>,
    /// Those that it goes to else, where there are others and the port wants them used.
    pub spill: Option<Spill>,
    /// Which of `near` a hash leads to, where the port goes by hashes.
    pub table: Option<HashTable>,
}

/// Endpoints that are further away, and when they are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spill {
    /// Near and far.
    pub all: Box<[u32]>,
    /// With fewer of the near ones fit than this.
    pub least: usize,
}

/// Leads from a hash to an endpoint (`balance` makes it). Clones share it.
#[derive(Clone, Debug)]
pub struct HashTable {
    /// The endpoints that it was made for.
    pub of: Arc<[SocketAddr]>,
    /// For each remainder of a hash a place in `of`.
    pub slots: Arc<[u16]>,
}

/// It follows from the endpoints alone.
impl PartialEq for HashTable {
    fn eq(&self, other: &Self) -> bool {
        self.of == other.of
    }
}

impl Eq for HashTable {}

impl Candidates {
    /// Those of the address's family.
    pub fn like(&self, address: IpAddr) -> &Reachable {
        if address.to_canonical().is_ipv4() { &self.v4 } else { &self.v6 }
    }
}

impl Reachable {
    /// All that a connection may ever go to.
    pub fn all(&self) -> &[u32] {
        self.spill.as_ref().map_or(&self.near, |spill| &spill.all)
    }
}

impl<T: Into<Box<[u32]>>> From<T> for Reachable {
    /// Just these.
    fn from(near: T) -> Self {
        Self { near: near.into(), spill: None, table: None }
    }
}

/// One address that may serve a Service port, with what Kubernetes says of it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Pod address and target port.
    pub address: SocketAddr,
    /// `conditions.ready` (always true where the Service publishes addresses that are not ready).
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// The node it runs on.
    pub node: Option<Name>,
    /// The zone it runs in.
    pub zone: Option<Name>,
    /// `hints.forZones`.
    pub for_zones: Vec<Name>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<Name>,
    /// The pod behind the address, where it is known.
    pub workload: Option<Arc<Workload>>,
    /// What this node has seen of this address; the same in every snapshot.
    pub load: EndpointLoad,
}

/// `spec.sessionAffinity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionAffinity {
    /// Each connection is balanced on its own.
    None,
    /// Connections of one client address go to one endpoint until none was made for this long.
    ClientIp {
        /// `sessionAffinityConfig.clientIP.timeoutSeconds`, 10,800 s unless given.
        timeout: Duration,
    },
}

/// `spec.internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficScope {
    /// All endpoints of the cluster.
    Cluster,
    /// Only those of the client's node; none there means none at all.
    Local,
}

/// `spec.trafficDistribution` (KEP-4444, KEP-3015).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficDistribution {
    /// No preference.
    Anywhere,
    /// `PreferSameZone`, also spelt `PreferClose`.
    PreferSameZone,
    /// `PreferSameNode`, then the same zone.
    PreferSameNode,
}

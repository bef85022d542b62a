//! The choice of one endpoint among the candidates.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::{AffinityTable, latency, outlier};
use crate::model::{Endpoint, ObjectRef, Service, ServicePort, SessionAffinity, Standing, TrafficScope};

/// Requests from this node that wait at an endpoint for their answer to begin. Answers that have begun, streams and what has become
/// another protocol are not among them: they may stand for hours, and many of them are no sign of anything.
pub const MOST_WAITING: u32 = 1_024;

/// A connection or a request that needs an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The client pod's address, which session affinity goes by.
    pub client: IpAddr,
    /// The cluster IP and port that the client dialled: the endpoint is of the same address family.
    pub dialled: SocketAddr,
    /// Endpoints that have been tried for this connection and failed.
    pub excluding: &'a [SocketAddr],
    /// What is to be sent there.
    pub carries: Carries,
}

/// What is sent to an endpoint, and hence what endpoints are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// A connection, of whatever protocol: by how many are open.
    Connection,
    /// An HTTP request: by how long the answers take, too.
    Request,
}

/// There is no endpoint for the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{service}:{port}: {reason}")]
pub struct NoEndpoint {
    /// The dialled Service.
    pub service: ObjectRef,
    /// The dialled port.
    pub port: u16,
    /// Why.
    pub reason: NoEndpointReason,
}

/// Why there is no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpointReason {
    /// The Service has no such port.
    #[error("the Service has no such TCP port")]
    NoSuchPort,
    /// The port has no endpoint of the dialled address family, ready or not.
    #[error("the Service has no endpoints of the dialled address family")]
    NoEndpoints,
    /// There are ready ones, but `internalTrafficPolicy: Local` rules them out.
    #[error("internalTrafficPolicy is Local and no endpoint of this node is ready")]
    NoneOnThisNode,
    /// No endpoint is ready.
    #[error("no endpoint is ready")]
    NoneReady,
    /// Each has been tried.
    #[error("every endpoint has been tried")]
    AllTried,
    /// As many requests wait for each as may.
    #[error("too many requests wait for every endpoint")]
    AllFull,
}

/// Chooses an endpoint: the one of the client's session if the Service keeps sessions, else of two random candidates
/// the one with fewer open connections, or for requests the one that answers sooner (power of two choices). Endpoints that are ejected are passed over, and sessions leave
/// them, but for the one connection or request that tries one again whose time is over.
///
/// `random` is 64 fresh random bits. The choice is entered into `affinity` where the Service keeps sessions.
pub fn select<'s>(
    service: &'s Service,
    request: &Request<'_>,
    affinity: &AffinityTable,
    now: Instant,
    random: u64,
) -> Result<&'s Endpoint, NoEndpoint> {
    let dialled = request.dialled;
    let refuse = |reason| NoEndpoint { service: service.id.clone(), port: dialled.port(), reason };
    let port = service.port(dialled.port()).ok_or_else(|| refuse(NoEndpointReason::NoSuchPort))?;
    let candidates = Choice::new(port, dialled.ip(), request, now);
    if candidates.indices.is_empty() {
        return Err(refuse(why_empty(service, port, dialled.ip())));
    }

    let SessionAffinity::ClientIp { timeout } = service.session_affinity else {
        return candidates.of_two(random).ok_or_else(|| refuse(candidates.why_none()));
    };
    let client = request.client.to_canonical();
    let choose = |last: Option<SocketAddr>| {
        last.and_then(|address| candidates.kept(address)).or_else(|| candidates.of_two(random))
    };
    affinity
        .send((&service.id, port.port, client), timeout, now, choose)
        .ok_or_else(|| refuse(candidates.why_none()))
}

/// The endpoint with this address, where a session is with it: as long as it may be used.
pub fn kept(port: &ServicePort, address: SocketAddr, carries: Carries, now: Instant) -> Option<&Endpoint> {
    let request = &Request { client: address.ip(), dialled: address, excluding: &[], carries };
    Choice::new(port, address.ip(), request, now).kept(address)
}

/// The candidates of one port and family, without those that were tried.
struct Choice<'s, 'r> {
    endpoints: &'s [Endpoint],
    /// Ascending, hence in the order of the addresses.
    indices: &'s [u32],
    excluding: &'r [SocketAddr],
    carries: Carries,
    now: Instant,
}

impl<'s, 'r> Choice<'s, 'r> {
    fn new(port: &'s ServicePort, dialled: IpAddr, request: &Request<'r>, now: Instant) -> Self {
        let Request { excluding, carries, .. } = *request;
        Self { endpoints: &port.endpoints, indices: port.candidates.like(dialled), excluding, carries, now }
    }

    /// The candidate with this address, unless it is ejected.
    fn kept(&self, address: SocketAddr) -> Option<&'s Endpoint> {
        let place =
            self.indices.binary_search_by_key(&address, |&index| self.endpoints[index as usize].address);
        let endpoint = self.allowed(place.ok()?)?;
        (!is_ejected(endpoint) || self.is_panic()).then_some(endpoint)
    }

    /// Power of two choices.
    fn of_two(&self, random: u64) -> Option<&'s Endpoint> {
        let count = self.indices.len();
        let first = scale(random as u32, count);
        // Another one than the first, each as likely as the next.
        let second = (first + 1 + scale((random >> 32) as u32, count - 1)) % count;
        let usable = |place| self.allowed(place).filter(|endpoint| !is_ejected(endpoint));
        match (usable(first), usable(second)) {
            (Some(first), Some(second)) => Some(self.better(first, second, random)),
            _ => self.of_those_left(random, first),
        }
    }

    /// The same where some have failed or are ejected: rare enough to look at each.
    fn of_those_left(&self, random: u64, first: usize) -> Option<&'s Endpoint> {
        let allowed = || (0..self.indices.len()).filter_map(|place| self.allowed(place));
        let mut ejected = allowed().filter(|endpoint| is_ejected(endpoint));
        if let Some(endpoint) = ejected.find(|endpoint| outlier::is_to_probe(&endpoint.load, self.now)) {
            return Some(endpoint);
        }
        let all_count = self.is_panic();
        let usable = || allowed().filter(|endpoint| all_count || !is_ejected(endpoint));
        let count = usable().count();
        if count == 0 {
            // The others have failed this very request: it loses nothing by one that is ejected.
            let count = self.indices.len();
            return (0..count).find_map(|step| self.allowed((first + step) % count));
        }
        let one = scale(random as u32, count);
        let other = (one + 1 + scale((random >> 32) as u32, count - 1)) % count;
        Some(self.better(usable().nth(one)?, usable().nth(other)?, random))
    }

    /// What is in the way of all.
    fn why_none(&self) -> NoEndpointReason {
        let mut addresses = self.indices.iter().map(|&index| self.endpoints[index as usize].address);
        match addresses.all(|address| self.excluding.contains(&address)) {
            true => NoEndpointReason::AllTried,
            false => NoEndpointReason::AllFull,
        }
    }

    /// The first if they are equal.
    fn better(&self, first: &'s Endpoint, second: &'s Endpoint, random: u64) -> &'s Endpoint {
        match self.carries {
            Carries::Connection if second.load.open() < first.load.open() => second,
            Carries::Connection => first,
            // Bits that depend on all of them, for the choice of the two has used them up.
            Carries::Request => {
                let bits = (random ^ random >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                latency::better(first, second, self.now, bits as u32)
            }
        }
    }

    fn is_panic(&self) -> bool {
        let ejected = self.indices.iter().filter(|&&index| is_ejected(&self.endpoints[index as usize]));
        outlier::is_panic(ejected.count(), self.indices.len())
    }

    fn allowed(&self, place: usize) -> Option<&'s Endpoint> {
        let endpoint = &self.endpoints[self.indices[place] as usize];
        let is_full = self.carries == Carries::Request && endpoint.load.waiting() >= MOST_WAITING;
        (!is_full && !self.excluding.contains(&endpoint.address)).then_some(endpoint)
    }
}

fn is_ejected(endpoint: &Endpoint) -> bool {
    endpoint.load.standing() == Standing::Ejected
}

/// A number below `count` (0 where that is 0) from 32 random bits, without the division of a remainder (Lemire).
fn scale(random: u32, count: usize) -> usize {
    ((u64::from(random) * count as u64) >> 32) as usize
}

fn why_empty(service: &Service, port: &ServicePort, dialled: IpAddr) -> NoEndpointReason {
    let is_ipv4 = dialled.to_canonical().is_ipv4();
    let mut endpoints = port.endpoints.iter().filter(|it| it.address.is_ipv4() == is_ipv4).peekable();
    if endpoints.peek().is_none() {
        NoEndpointReason::NoEndpoints
    } else if service.internal_traffic == TrafficScope::Local && endpoints.any(|it| it.ready) {
        NoEndpointReason::NoneOnThisNode
    } else {
        NoEndpointReason::NoneReady
    }
}

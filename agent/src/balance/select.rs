//! The choice of one endpoint among the candidates.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::slow_start::{gives_way, weight};
use super::{AffinityTable, hashing, latency, outlier};
use crate::model::{
    Algorithm, Endpoint, HashTable, ObjectRef, Reachable, Service, ServicePort, SessionAffinity, Standing,
    TrafficScope,
};

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
    /// The hash of what its port goes by, where that goes by hashes, and it has any of these.
    pub hash: Option<u64>,
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

/// Chooses an endpoint: the one of the client's session if the Service keeps sessions, else the one that the port's algorithm gives.
/// Endpoints that are ejected are passed over, and sessions leave them, but for the one connection or request that tries one again
/// whose time is over.
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
    let choice = Choice::new(port, dialled.ip(), request, now);
    if choice.indices.is_empty() {
        return Err(refuse(why_empty(service, port, dialled.ip())));
    }

    let SessionAffinity::ClientIp { timeout } = service.session_affinity else {
        return choice.by_algorithm(random).ok_or_else(|| refuse(choice.why_none()));
    };
    let client = request.client.to_canonical();
    let choose = |last: Option<SocketAddr>| {
        last.and_then(|address| choice.kept(address)).or_else(|| choice.by_algorithm(random))
    };
    affinity
        .send((&service.id, port.port, client), timeout, now, choose)
        .ok_or_else(|| refuse(choice.why_none()))
}

/// The endpoint with this address, where a session is with it: as long as it may be used.
pub fn kept(port: &ServicePort, address: SocketAddr, carries: Carries, now: Instant) -> Option<&Endpoint> {
    let request = &Request { client: address.ip(), dialled: address, excluding: &[], carries, hash: None };
    Choice::new(port, address.ip(), request, now).kept(address)
}

/// The candidates of one port and family, without those that were tried.
struct Choice<'s, 'r> {
    port: &'s ServicePort,
    reachable: &'s Reachable,
    /// Those of them that count now, ascending, hence in the order of the addresses.
    indices: &'s [u32],
    request: &'r Request<'r>,
    now: Instant,
}

impl<'s, 'r> Choice<'s, 'r> {
    fn new(port: &'s ServicePort, dialled: IpAddr, request: &'r Request<'r>, now: Instant) -> Self {
        let reachable = port.candidates.like(dialled);
        let indices = match &reachable.spill {
            Some(spill) if port.load.is_wary() && is_short(port, reachable, spill.least) => &spill.all,
            _ => &reachable.near,
        };
        Self { port, reachable, indices, request, now }
    }

    /// The endpoint with this address, unless it is ejected. However far away: what is there already stays.
    fn kept(&self, address: SocketAddr) -> Option<&'s Endpoint> {
        let endpoint = self.port.candidate(address).filter(|endpoint| self.is_allowed(endpoint))?;
        (!self.is_out(endpoint) || self.is_panic()).then_some(endpoint)
    }

    fn by_algorithm(&self, random: u64) -> Option<&'s Endpoint> {
        match (&self.port.traffic.balancing.algorithm, &self.reachable.table, self.request.hash) {
            (Algorithm::RoundRobin, ..) => self.in_turn(random),
            (Algorithm::ConsistentHash(_), Some(table), Some(hash)) => self.hashed(table, hash),
            _ => self.of_two(random),
        }
    }

    /// Power of two choices.
    fn of_two(&self, random: u64) -> Option<&'s Endpoint> {
        let count = self.indices.len();
        let first = scale(random as u32, count);
        // Another one than the first, each as likely as the next.
        let second = (first + 1 + scale((random >> 32) as u32, count - 1)) % count;
        let usable = |place| self.allowed(place).filter(|endpoint| !self.is_out(endpoint));
        match (usable(first), usable(second)) {
            (Some(first), Some(second)) => Some(self.better(first, second, random)),
            _ => self.of_those_left(random, first),
        }
    }

    /// The same where some have failed or are ejected: rare enough to look at each.
    fn of_those_left(&self, random: u64, first: usize) -> Option<&'s Endpoint> {
        let allowed = || (0..self.indices.len()).filter_map(|place| self.allowed(place));
        let mut ejected = allowed().filter(|endpoint| self.is_out(endpoint));
        if let Some(endpoint) = ejected.find(|endpoint| outlier::is_to_probe(&endpoint.load, self.now)) {
            return Some(endpoint);
        }
        let all_count = self.is_panic();
        let usable = || allowed().filter(|endpoint| all_count || !self.is_out(endpoint));
        let count = usable().count();
        if count == 0 {
            return self.rather_than_none(first);
        }
        let one = scale(random as u32, count);
        let other = (one + 1 + scale((random >> 32) as u32, count - 1)) % count;
        Some(self.better(usable().nth(one)?, usable().nth(other)?, random))
    }

    /// The first if they are equal.
    fn better(&self, first: &'s Endpoint, second: &'s Endpoint, random: u64) -> &'s Endpoint {
        // Bits that depend on all of them, for the choice of the two has used them up.
        let bits = ((random ^ random >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        let balancing = &self.port.traffic.balancing;
        let (slow_start, now) = (balancing.slow_start, self.now);
        let is_second = match (&balancing.algorithm, self.request.carries) {
            (Algorithm::PeakEwma, Carries::Connection) => second.load.open() < first.load.open(),
            (Algorithm::PeakEwma, Carries::Request) => {
                return latency::better(first, second, slow_start, now, bits);
            }
            (Algorithm::LeastRequest, _) => {
                let [first, second] = [first, second].map(|endpoint| {
                    f64::from(endpoint.load.open() + 1) / weight(&endpoint.load, slow_start, now)
                });
                second < first
            }
            _ => gives_way(first, second, slow_start, now, bits),
        };
        if is_second { second } else { first }
    }

    /// The next one after who had the last turn, whoever has come or gone since.
    fn in_turn(&self, random: u64) -> Option<&'s Endpoint> {
        let count = self.indices.len();
        let is_ipv4 = std::ptr::eq(self.reachable, &self.port.candidates.v4);
        self.port.load.take_turn(is_ipv4, |last| {
            let next = match *last {
                Some(last) => self.indices.partition_point(|&index| self.at(index).address <= last) % count,
                // Not all nodes begin with the same one.
                None => scale(random as u32, count),
            };
            let chosen = self.from(next, (random >> 32) as u32).or_else(|| self.rather_than_none(next));
            *last = chosen.map(|endpoint| endpoint.address).or(*last);
            chosen
        })
    }

    /// The first from this place on that is fit, or the one after that where it gives way as one that is new.
    fn from(&self, next: usize, random: u32) -> Option<&'s Endpoint> {
        let count = self.indices.len();
        let mut places = (next..count).chain(0..next);
        let first = places.find_map(|place| self.fit(place))?;
        // One that is tried again is so now, or its chance is lost.
        if self.is_out(first) {
            return Some(first);
        }
        let usable = |place| self.allowed(place).filter(|endpoint| !self.is_out(endpoint));
        let second = places.clone().find_map(usable);
        let slow_start = self.port.traffic.balancing.slow_start;
        if second.is_some_and(|second| gives_way(first, second, slow_start, self.now, random)) {
            // Before that second one there may be one that is to be tried again.
            return places.find_map(|place| self.fit(place));
        }
        Some(first)
    }

    /// The one that the hash leads to, or where that is not fit, the one that it is the most for of the others: so that what leads
    /// to one that fails is shared out among all, and nothing else moves.
    fn hashed(&self, table: &HashTable, hash: u64) -> Option<&'s Endpoint> {
        let first = hashing::place(table, hash);
        let endpoint = self.at(self.reachable.near[first]);
        if self.is_fit(endpoint) {
            return Some(endpoint);
        }
        let allowed = || (0..self.indices.len()).filter_map(|place| self.allowed(place));
        let of = |endpoint: &&Endpoint| hashing::rank(hash, endpoint.address);
        let usable = allowed().filter(|endpoint| !self.is_out(endpoint)).max_by_key(of);
        usable.or_else(|| allowed().max_by_key(of))
    }

    /// The endpoint at this place, if it is as good as any, or for this request to try again.
    fn fit(&self, place: usize) -> Option<&'s Endpoint> {
        Some(self.at(self.indices[place])).filter(|endpoint| self.is_fit(endpoint))
    }

    fn is_fit(&self, endpoint: &Endpoint) -> bool {
        self.is_allowed(endpoint)
            && (!self.is_out(endpoint) || outlier::is_to_probe(&endpoint.load, self.now) || self.is_panic())
    }

    /// The others have failed this very request: it loses nothing by one that is ejected.
    fn rather_than_none(&self, first: usize) -> Option<&'s Endpoint> {
        let count = self.indices.len();
        (first..count).chain(0..first).find_map(|place| self.allowed(place))
    }

    /// What is in the way of all.
    fn why_none(&self) -> NoEndpointReason {
        let mut addresses = self.indices.iter().map(|&index| self.at(index).address);
        match addresses.all(|address| self.request.excluding.contains(&address)) {
            true => NoEndpointReason::AllTried,
            false => NoEndpointReason::AllFull,
        }
    }

    fn is_panic(&self) -> bool {
        let ejected = self.indices.iter().filter(|&&index| is_ejected(self.at(index)));
        outlier::is_panic(&self.port.traffic.outliers, ejected.count(), self.indices.len())
    }

    /// Whether the endpoint is ejected. The port learns of it here, where another one that shares the endpoint has done it.
    fn is_out(&self, endpoint: &Endpoint) -> bool {
        let is_out = is_ejected(endpoint);
        if is_out && !self.port.load.is_wary() {
            self.port.load.set_wary(true);
        }
        is_out
    }

    fn allowed(&self, place: usize) -> Option<&'s Endpoint> {
        Some(self.at(self.indices[place])).filter(|endpoint| self.is_allowed(endpoint))
    }

    /// Whether the request may go there: it is not full, and has not failed it.
    fn is_allowed(&self, endpoint: &Endpoint) -> bool {
        let is_full = || {
            let most = self.port.traffic.caps.pending;
            most.is_some_and(|most| endpoint.load.waiting() >= most)
        };
        let Request { carries, excluding, .. } = self.request;
        (*carries == Carries::Connection || !is_full()) && !excluding.contains(&endpoint.address)
    }

    fn at(&self, index: u32) -> &'s Endpoint {
        &self.port.endpoints[index as usize]
    }
}

/// Whether so few of the near endpoints are fit that others are to help out.
fn is_short(port: &ServicePort, reachable: &Reachable, least: usize) -> bool {
    let ejected =
        reachable.all().iter().filter(|&&index| is_ejected(&port.endpoints[index as usize])).count();
    if ejected == 0 {
        port.load.set_wary(false);
        return false;
    }
    let fit = reachable.near.iter().filter(|&&index| !is_ejected(&port.endpoints[index as usize]));
    fit.count() < least
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

#[cfg(test)]
mod tests;

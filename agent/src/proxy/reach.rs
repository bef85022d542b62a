//! From a Service to an endpoint that answers: which ones are tried, and which way leads there.
//!
//! It ends with a connection that stands. What travels on it is for others to know.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tracing::{info, warn};

use super::admission::{Door, Entry, Refused};
use super::captured::Captured;
use super::relay::Meter;
use super::tunnel::client::Wanted;
use super::tunnel::stream::Ends;
use super::tunnel::{self, Tunnel};
use super::upstream::{self, Target, is_the_endpoints, is_worth_another};
use super::worker::Here;
use super::{Proxy, identity};
use crate::balance::latency;
use crate::balance::outlier::{self, Change, EjectionReason, Verdict};
use crate::balance::success_rate;
use crate::balance::{self, Carries, NoEndpoint, NoEndpointReason, Request};
use crate::capture::PodNet;
use crate::model::{
    Algorithm, Endpoint, HashKey, LoadGuard, Name, ObjectRef, Service, ServiceEvent, ServicePort, WaitGuard,
    Workload, WorkloadUid,
};
use crate::snapshot::Snapshot;
use crate::telemetry::{ConnectionFacts, Peer, RefuseReason, Reporter, Security};

/// Endpoints tried for one connection or request.
const ATTEMPTS: usize = 3;

/// The way to an endpoint, as far as the connection.
#[derive(Debug)]
pub(super) enum Upstream {
    Socket(TcpStream),
    Tunnel(Ends),
}

/// What a connection has to rely on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assurance {
    pub(super) security: Security,
    /// Who the other end is, where nobody else is let be it.
    pub(super) identity: Option<Name>,
}

impl Assurance {
    pub(super) const NONE: Self = Self { security: Security::Plaintext, identity: None };
}

/// What is in the way of an endpoint, and what a connection to it would have had to rely on.
#[derive(Debug)]
pub(super) struct InTheWay {
    pub(super) reason: RefuseReason,
    /// More than the reason says.
    pub(super) detail: Option<Box<str>>,
    pub(super) assurance: Assurance,
}

impl InTheWay {
    pub(super) fn new(reason: RefuseReason, assurance: Assurance) -> Self {
        Self { reason, detail: None, assurance }
    }

    /// Has this told beside the reason.
    pub(super) fn because(self, detail: impl Into<Box<str>>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }
}

/// No endpoint answered.
#[derive(Debug)]
pub(super) struct Unreached {
    pub(super) reason: RefuseReason,
    /// More than the reason says.
    pub(super) detail: Option<Box<str>>,
    /// The endpoint that was tried last.
    pub(super) tried: Option<SocketAddr>,
    pub(super) assurance: Assurance,
}

/// The endpoints of a Service that are tried for one connection or request, one after the other.
#[derive(Debug)]
pub(super) struct Attempts<'a> {
    proxy: &'a Proxy,
    service: &'a Service,
    client: IpAddr,
    dialled: SocketAddr,
    tried: Vec<SocketAddr>,
    /// The one that is being tried, until it is known how that went.
    current: Option<&'a Endpoint>,
    carries: Carries,
    /// Of what the port goes by, where that goes by hashes.
    hash: Option<u64>,
    /// Too many requests wait for those that are left.
    is_full: bool,
    waiting: Option<WaitGuard>,
    /// Why the last one failed.
    last: Option<InTheWay>,
    /// Rather than none, one that has been tried.
    may_repeat: bool,
}

impl<'a> Attempts<'a> {
    /// For a connection; none has been tried yet. `dialled` is the port of the Service, at an address of the family that is wanted.
    pub(super) fn new(proxy: &'a Proxy, service: &'a Service, client: IpAddr, dialled: SocketAddr) -> Self {
        Self {
            proxy,
            service,
            client,
            dialled,
            tried: Vec::new(),
            current: None,
            carries: Carries::Connection,
            hash: service.port(dialled.port()).and_then(|port| hash_of_address(port, client)),
            is_full: false,
            waiting: None,
            last: None,
            may_repeat: false,
        }
    }

    /// For a request, with the hash of what its port goes by.
    pub(super) fn for_request(
        proxy: &'a Proxy,
        service: &'a Service,
        client: IpAddr,
        dialled: SocketAddr,
        hash: Option<u64>,
    ) -> Self {
        Self { carries: Carries::Request, hash, ..Self::new(proxy, service, client, dialled) }
    }

    /// The endpoint to try, and its part of the load; else why none is left.
    pub(super) fn next(&mut self) -> Result<(SocketAddr, LoadGuard), Unreached> {
        if self.tried.len() == ATTEMPTS
            || self.last.as_ref().is_some_and(|last| !is_worth_another(last.reason))
        {
            return Err(self.unreached(RefuseReason::NoEndpoints));
        }
        let chosen = match self.select() {
            Err(none) if none.reason == NoEndpointReason::AllTried && self.may_repeat => {
                self.tried.clear();
                self.select()
            }
            chosen => chosen,
        };
        match chosen {
            Ok(endpoint) => Ok(self.enter(endpoint)),
            Err(none) => {
                self.is_full = none.reason == NoEndpointReason::AllFull;
                Err(self.unreached(refusal(none.reason)))
            }
        }
    }

    fn select(&self) -> Result<&'a Endpoint, NoEndpoint> {
        let Self { client, dialled, ref tried, carries, hash, .. } = *self;
        let request = Request { client, dialled, excluding: tried, carries, hash };
        balance::select(self.service, &request, &self.proxy.affinity, Instant::now(), fastrand::u64(..))
    }

    /// Just this endpoint, which a session is with, if it may be used.
    pub(super) fn kept(&mut self, address: SocketAddr) -> Option<(SocketAddr, LoadGuard)> {
        balance::kept(self.port()?, address, self.carries, Instant::now())
            .map(|endpoint| self.enter(endpoint))
    }

    fn enter(&mut self, endpoint: &'a Endpoint) -> (SocketAddr, LoadGuard) {
        self.current = Some(endpoint);
        self.waiting = (self.carries == Carries::Request).then(|| endpoint.load.wait());
        (endpoint.address, endpoint.load.enter())
    }

    /// Whether there is none for too many requests wait for each.
    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }

    /// Says how long the endpoint took to answer that is being tried.
    pub(super) fn took(&self, time: Duration) {
        if let Some(endpoint) = self.current {
            latency::observe(&endpoint.load, time, Instant::now());
        }
    }

    /// Nobody waits any more for the endpoint that is being tried, which has not answered for so long.
    pub(super) fn gave_up(&mut self, after: Duration) {
        if let Some(endpoint) = self.current {
            latency::observe_at_least(&endpoint.load, after, Instant::now());
        }
        self.no_verdict();
    }

    /// What became of it says nothing of the endpoint.
    pub(super) fn no_verdict(&mut self) {
        (self.current, self.waiting) = (None, None);
    }

    /// Says how the endpoint did that is being tried.
    pub(super) fn judge(&mut self, verdict: Verdict) {
        self.waiting = None;
        let Some((endpoint, port)) = self.current.take().zip(self.port()) else { return };
        let now = Instant::now();
        if let Some(change) = outlier::judge(port, endpoint, verdict, now, fastrand::f64()) {
            self.tell(endpoint.address, change);
        }
        for (address, change) in success_rate::compare(port, now, fastrand::f64) {
            self.tell(address, change);
        }
    }

    fn tell(&self, address: SocketAddr, change: Change) {
        let service = &self.service.id;
        match change {
            Change::Returned => info!(%service, endpoint = %address, "an endpoint answers again"),
            Change::Ejected { reason, lasts } => {
                self.service.load.count(match reason {
                    EjectionReason::ConsecutiveServerErrors => ServiceEvent::EjectedForServerErrors,
                    EjectionReason::ConsecutiveGatewayFailures => ServiceEvent::EjectedForGatewayFailures,
                    EjectionReason::Refused => ServiceEvent::EjectedForRefusal,
                    EjectionReason::FailedProbe => ServiceEvent::EjectedForFailedProbe,
                    EjectionReason::LowSuccessRate => ServiceEvent::EjectedForSuccessRate,
                });
                let seconds = lasts.as_secs_f64();
                info!(%service, endpoint = %address, ?reason, seconds, "an endpoint is left alone for a while");
            }
        }
    }

    /// The Service that they are of.
    pub(super) fn service(&self) -> &'a Service {
        self.service
    }

    /// The port of it, if it has that.
    pub(super) fn port(&self) -> Option<&'a ServicePort> {
        self.service.port(self.dialled.port())
    }

    /// Begins anew with another one than this, if there is another.
    pub(super) fn avoid(&mut self, endpoint: SocketAddr) {
        self.tried = vec![endpoint];
        self.last = None;
        self.may_repeat = true;
    }

    /// The endpoint took the connection, which is all that one without requests can be judged by.
    pub(super) fn connected(&mut self) {
        self.judge(Verdict::Connected);
    }

    /// Has another one be tried, where that may do better.
    pub(super) fn failed(&mut self, endpoint: SocketAddr, why: InTheWay) {
        if is_the_endpoints(why.reason) {
            if self.carries == Carries::Request {
                self.took(latency::OVERLOADED);
            }
            self.judge(match why.reason {
                RefuseReason::ConnectRefused => Verdict::Refused,
                _ => Verdict::GatewayFailure,
            });
        }
        (self.current, self.waiting) = (None, None);
        self.tried.push(endpoint);
        self.last = Some(why);
    }

    /// What was tried last says more than that nothing is left.
    fn unreached(&mut self, reason: RefuseReason) -> Unreached {
        let last = self.last.take().unwrap_or(InTheWay::new(reason, Assurance::NONE));
        let InTheWay { reason, detail, assurance } = last;
        Unreached { reason, detail, tried: self.tried.last().copied(), assurance }
    }
}

/// Of a connection nothing is known but its client's address.
fn hash_of_address(port: &ServicePort, client: IpAddr) -> Option<u64> {
    let Algorithm::ConsistentHash(keys) = &port.traffic.balancing.algorithm else { return None };
    keys.contains(&HashKey::SourceAddress).then(|| balance::hash_address(client))
}

/// A connection that was made.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) upstream: Upstream,
    pub(super) assurance: Assurance,
    /// An endpoint of this node, and what it lets the connection in by.
    pub(super) entered: Option<(Door, Entry)>,
}

/// The connection, or what was in its way; in both cases with what there is to rely on. Made within the time
/// that the port gives, or else the agent's settings; given up when `gone` says so.
pub(super) async fn dial(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    snapshot: &Snapshot,
    captured: &Captured,
    (to, port): (SocketAddr, Option<&ServicePort>),
    carries: Carries,
    gone: impl Future<Output = ()>,
) -> Result<Dialled, InTheWay> {
    let given = port.and_then(|port| port.traffic.timeouts.connect);
    let within = patience(proxy, port);
    let (way, mut assurance) = way(proxy, snapshot, captured, to);
    let mut gone = std::pin::pin!(gone);
    let mut entered = None;
    let connected = match way {
        Way::Tunnel { tunnel, destination, is_near } => {
            let (from, client) = (&captured.net, captured.client);
            let wanted = Wanted { from, client, to, destination, within, carries };
            let connecting = tunnel::client::connect(proxy, tunnel, here, wanted);
            // A tunnel that is yet to be made takes the agent's own time.
            let too_slow = async {
                match given {
                    Some(limit) => tokio::time::sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            let connected = tokio::select! {
                biased;
                connected = connecting => connected.map(Upstream::Tunnel),
                () = &mut gone => Err(RefuseReason::ClientGone),
                () = too_slow => Err(RefuseReason::ConnectTimeout),
            };
            match connected {
                // As the destination's agent has told while it ran (`--on-agent-down`). This node's own runs, whoever says otherwise.
                Err(RefuseReason::AgentDown)
                    if !is_near && tunnel.takes_plaintext_when_down(destination, to.ip()) =>
                {
                    let count = proxy.telemetry.tunnels().bypassed();
                    // Fewer and fewer lines: an agent that is down for long, or a firewall, makes many of these.
                    if count.is_power_of_two() {
                        warn!(
                            pod = %captured.net.pod, %to, count,
                            "nothing takes tunnels at the destination; going there in plaintext, as its agent has chosen"
                        );
                    }
                    assurance = Assurance::NONE;
                    dial_socket(proxy, here, captured, (to, within), gone, None).await
                }
                connected => connected,
            }
        }
        Way::SameNode(door) => match door.enter(snapshot, &captured.caller()) {
            Ok(entry) => {
                let client = Some(captured.client);
                let connected = dial_socket(proxy, here, captured, (to, within), gone, client).await;
                entered = Some((door, entry));
                connected
            }
            Err(Refused { reason, ruling }) => {
                // For the server's side, which nobody else of this node speaks for.
                let reporter = Reporter::Destination;
                let facts = facts(proxy, snapshot, captured, to, None, &assurance, reporter);
                proxy.telemetry.connection_refused(ConnectionFacts { ruling, ..facts }, reason);
                Err(reason)
            }
        },
        Way::Plaintext => dial_socket(proxy, here, captured, (to, within), gone, None).await,
    };
    match connected {
        Ok(upstream) => Ok(Dialled { upstream, assurance, entered }),
        Err(reason) => Err(InTheWay::new(reason, assurance)),
    }
}

/// How long the making of a connection to the port may take.
pub(super) fn patience(proxy: &Proxy, port: Option<&ServicePort>) -> Duration {
    port.and_then(|port| port.traffic.timeouts.connect).unwrap_or(proxy.settings.connect_timeout)
}

async fn dial_socket(
    proxy: &Proxy,
    here: &Here,
    captured: &Captured,
    (to, within): (SocketAddr, Duration),
    gone: impl Future<Output = ()>,
    on_behalf_of: Option<SocketAddr>,
) -> Result<Upstream, RefuseReason> {
    // The application's bound address, unless the endpoint is of the other family.
    let source = captured.bound.filter(|source| source.is_ipv4() == to.is_ipv4());
    let target = Target { from: &captured.net, to, source, on_behalf_of };
    upstream::connect_within(within, proxy, &here.dialer, gone, target).await.map(Upstream::Socket)
}

/// The door of the endpoint, if it is one of this node that a connection would get to vouched for.
pub(super) fn door(
    proxy: &Proxy,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
) -> Option<(Door, Assurance)> {
    match way(proxy, snapshot, captured, to) {
        (Way::SameNode(door), assurance) => Some((door, assurance)),
        _ => None,
    }
}

/// What a connection to the endpoint would rely on if it were made now.
pub(super) fn assurance(
    proxy: &Proxy,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
) -> Assurance {
    way(proxy, snapshot, captured, to).1
}

/// What a connection of any enrolled pod of this node to the endpoint would rely on if it were made now.
pub(super) fn assurance_of_pods(proxy: &Proxy, snapshot: &Snapshot, to: SocketAddr) -> Assurance {
    way_of_pods(proxy, snapshot, None, to).1
}

/// How a connection gets to an endpoint.
enum Way<'a> {
    /// To a pod of another node that takes tunnels, or to one of this node that takes nothing else.
    Tunnel {
        tunnel: &'a Arc<Tunnel>,
        destination: &'a Workload,
        is_near: bool,
    },
    /// To a pod of this node, vouched for.
    SameNode(Door),
    Plaintext,
}

fn way<'a>(
    proxy: &'a Proxy,
    snapshot: &'a Snapshot,
    captured: &Captured,
    to: SocketAddr,
) -> (Way<'a>, Assurance) {
    // Nobody vouches for an address that is not the pod's own, whatever the pod has given itself.
    if captured.bound.is_some_and(|source| !captured.net.addresses.contains(&source)) {
        return (Way::Plaintext, Assurance::NONE);
    }
    way_of_pods(proxy, snapshot, Some(captured.client.ip()), to)
}

/// The way of whatever an enrolled pod says from an address of its own: this one, if it is known which.
fn way_of_pods<'a>(
    proxy: &'a Proxy,
    snapshot: &'a Snapshot,
    from: Option<IpAddr>,
    to: SocketAddr,
) -> (Way<'a>, Assurance) {
    // Who had the address before may still be enrolled for a moment.
    let is_owner = |uid: &WorkloadUid| snapshot.workload(to.ip()).is_none_or(|owner| owner.uid == *uid);
    let enrolled = proxy.enrolled.load();
    let near = enrolled.get(&to.ip()).filter(|near| is_owner(&near.workload.uid));
    let wants_tunnel = |near: &PodNet| from.map_or(near.is_tunnelled(), |from| near.wants_tunnel_from(from));
    if let Some(near) = near.filter(|near| !wants_tunnel(near)) {
        let identity = identity(&near.workload);
        let door = Door { pod: near.workload.uid.clone(), address: to };
        return (Way::SameNode(door), Assurance { security: Security::SameNode, identity });
    }
    let is_near = near.is_some();
    match tunnel_to(proxy, snapshot, is_near, to) {
        Some((tunnel, destination)) => {
            let assurance = Assurance { security: Security::MutualTls, identity: identity(destination) };
            (Way::Tunnel { tunnel, destination, is_near }, assurance)
        }
        None => (Way::Plaintext, Assurance::NONE),
    }
}

/// The way to a pod of another node that takes tunnels, or to one of this node, which does as long as it is enrolled.
fn tunnel_to<'a>(
    proxy: &'a Proxy,
    snapshot: &'a Snapshot,
    is_near: bool,
    to: SocketAddr,
) -> Option<(&'a Arc<Tunnel>, &'a Workload)> {
    let tunnel = proxy.tunnel.as_ref()?;
    let workload = snapshot.workload(to.ip())?;
    (is_near || tunnel.reaches(workload, to.ip())).then_some((tunnel, workload))
}

/// Counts the connection from here on. On one node this agent stands on both sides of it, and reports it for both.
pub(super) fn record(
    proxy: &Arc<Proxy>,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
    service: Option<&ObjectRef>,
    assurance: &Assurance,
) -> Meter {
    let all = all_facts(proxy, snapshot, captured, to, service, assurance);
    Meter::new(all.map(|facts| proxy.telemetry.connection_opened(facts)))
}

/// What telemetry is told of a connection that stands, on behalf of each side that this agent sees it for.
pub(super) fn all_facts(
    proxy: &Proxy,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
    service: Option<&ObjectRef>,
    assurance: &Assurance,
) -> impl Iterator<Item = ConnectionFacts> {
    reporters(assurance).iter().map(move |reporter| {
        let facts = facts(proxy, snapshot, captured, to, service, assurance, *reporter);
        ConnectionFacts { upstream: Some(to), ..facts }
    })
}

/// On whose behalf this agent sees a connection.
pub(super) fn reporters(assurance: &Assurance) -> &'static [Reporter] {
    match assurance.security {
        Security::SameNode => &[Reporter::Source, Reporter::Destination],
        Security::Plaintext | Security::MutualTls => &[Reporter::Source],
    }
}

/// What telemetry is told of a connection to `destination`.
pub(super) fn facts(
    proxy: &Proxy,
    snapshot: &Snapshot,
    captured: &Captured,
    destination: SocketAddr,
    service: Option<&ObjectRef>,
    Assurance { security, identity }: &Assurance,
    reporter: Reporter,
) -> ConnectionFacts {
    ConnectionFacts {
        reporter,
        source: proxy.own_peer(&captured.net, captured.client),
        destination: Peer { identity: identity.clone(), ..proxy.peer(snapshot, destination) },
        service: service.cloned(),
        security: *security,
        dialled: captured.dialled,
        client: captured.client,
        upstream: None,
        ruling: None,
    }
}

fn refusal(reason: NoEndpointReason) -> RefuseReason {
    match reason {
        NoEndpointReason::NoSuchPort => RefuseReason::UnknownPort,
        _ => RefuseReason::NoEndpoints,
    }
}

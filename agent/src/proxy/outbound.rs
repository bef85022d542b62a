//! The client's side: a connection that a pod made to a mesh address.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;
use tracing::warn;

use super::relay::{Meter, relay};
use super::tunnel::client::Wanted;
use super::tunnel::stream::{self, Ends};
use super::tunnel::{self, Tunnel};
use super::upstream::{self, Target};
use super::worker::Here;
use super::{Proxy, identity};
use crate::balance::{self, NoEndpointReason, Request};
use crate::capture::{Code, PodNet, bound_source};
use crate::model::{LoadGuard, Name, ObjectRef, Workload, WorkloadUid};
use crate::snapshot::{Destination, Snapshot};
use crate::telemetry::{ConnectionFacts, Peer, RefuseReason, Reporter, Security};

/// Endpoints tried for one connection.
const ATTEMPTS: usize = 3;

/// Carries one captured connection to where its application wanted it to go.
pub(super) async fn serve(
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    client: TcpStream,
    client_socket: SocketAddr,
) {
    let Some((captured, place)) = accept(&proxy, &net, &client, client_socket).zip(proxy.enter()) else {
        return refuse_unknown(&proxy, &net, &client, client_socket);
    };
    let snapshot = proxy.snapshot.load_full();
    // On the heap, so that a connection that stands does not carry the room for finding its way.
    match Box::pin(reach(&proxy, &here, &snapshot, &captured, &client)).await {
        Ok(reached) => {
            let meter = record(&proxy, &snapshot, &captured, &reached);
            let reason = match reached.stream {
                Upstream::Socket(upstream) => relay(client, upstream, &meter).await,
                Upstream::Tunnel(ends) => stream::relay(client, stream::Side::Client, ends, &meter).await,
            };
            meter.close(reason);
        }
        Err(failed) => {
            let Failed { reason, towards, service, assurance } = failed;
            let facts = facts(&proxy, &snapshot, &captured, towards, service, assurance, Reporter::Source);
            proxy.telemetry.connection_refused(facts, reason);
        }
    }
    drop(place);
}

/// A captured connection, with what its application knows of it.
struct Captured {
    net: Arc<PodNet>,
    /// Keeps the code's meaning while the application may ask for its peer's name.
    _code: Arc<Code>,
    /// What the application dialled.
    dialled: SocketAddr,
    /// The application's end as it sees it itself.
    client: SocketAddr,
    /// The source address that the application had bound.
    bound: Option<IpAddr>,
}

fn accept(proxy: &Proxy, net: &Arc<PodNet>, stream: &TcpStream, peer: SocketAddr) -> Option<Captured> {
    let local = stream.local_addr().ok()?;
    let code = proxy.codes.destination(local.ip())?;
    let peer_ip = peer.ip().to_canonical();
    let bound = bound_source(peer_ip);
    // A captured socket never changes the family, so this one came in by the route to the IPv6 codes.
    if bound.is_some_and(|source| source.is_ipv4() != code.address.is_ipv4()) {
        return None;
    }
    let client_ip = bound.or_else(|| net.address_like(code.address)).unwrap_or(peer_ip);
    Some(Captured {
        net: net.clone(),
        dialled: SocketAddr::new(code.address, local.port()),
        _code: code,
        client: SocketAddr::new(client_ip, peer.port()),
        bound,
    })
}

/// An upstream that answered.
struct Reached {
    stream: Upstream,
    address: SocketAddr,
    assurance: Assurance,
    service: Option<ObjectRef>,
    _load: Option<LoadGuard>,
}

/// The way to it.
enum Upstream {
    Socket(TcpStream),
    Tunnel(Ends),
}

/// No upstream answered.
struct Failed {
    reason: RefuseReason,
    /// The endpoint that was tried last, or what was dialled.
    towards: SocketAddr,
    service: Option<ObjectRef>,
    /// What the connection would have had.
    assurance: Assurance,
}

/// What a connection has to rely on.
#[derive(Clone, Debug)]
struct Assurance {
    security: Security,
    /// Who the other end is, where nobody else is let be it.
    identity: Option<Name>,
}

impl Assurance {
    const NONE: Self = Self { security: Security::Plaintext, identity: None };
}

async fn reach(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    snapshot: &Snapshot,
    captured: &Captured,
    client: &TcpStream,
) -> Result<Reached, Failed> {
    let service = match snapshot.destination(captured.dialled.ip()) {
        Some(Destination::Service(service)) => service,
        // A pod's own address: that pod and no other, ready or not.
        _ => {
            let dialled = dial(proxy, here, snapshot, captured, captured.dialled, client).await;
            return dialled
                .map(|(stream, assurance)| Reached {
                    stream,
                    address: captured.dialled,
                    assurance,
                    service: None,
                    _load: None,
                })
                .map_err(|(reason, assurance)| Failed {
                    reason,
                    towards: captured.dialled,
                    service: None,
                    assurance,
                });
        }
    };
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = None;
    while tried.len() < ATTEMPTS {
        let request = Request { client: captured.client.ip(), dialled: captured.dialled, excluding: &tried };
        let chosen = balance::select(service, &request, &proxy.affinity, Instant::now(), fastrand::u64(..));
        let endpoint = match chosen {
            Ok(endpoint) => endpoint,
            Err(none) => {
                let (reason, assurance) = last.unwrap_or((refusal(none.reason), Assurance::NONE));
                let towards = tried.last().copied().unwrap_or(captured.dialled);
                return Err(Failed { reason, towards, service: Some(service.id.clone()), assurance });
            }
        };
        let load = endpoint.load.enter();
        match dial(proxy, here, snapshot, captured, endpoint.address, client).await {
            Ok((stream, assurance)) => {
                let (address, service) = (endpoint.address, Some(service.id.clone()));
                return Ok(Reached { stream, address, assurance, service, _load: Some(load) });
            }
            Err((reason, assurance)) => {
                tried.push(endpoint.address);
                last = Some((reason, assurance));
                if !upstream::is_worth_another(reason) {
                    break;
                }
            }
        }
    }
    let towards = tried.last().copied().unwrap_or(captured.dialled);
    let (reason, assurance) = last.unwrap_or((RefuseReason::NoEndpoints, Assurance::NONE));
    Err(Failed { reason, towards, service: Some(service.id.clone()), assurance })
}

/// The connection, or what was in its way; in both cases with what there is to rely on.
async fn dial(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
    client: &TcpStream,
) -> Result<(Upstream, Assurance), (RefuseReason, Assurance)> {
    let (way, mut assurance) = way(proxy, snapshot, captured, to);
    let connected = match way {
        Way::Tunnel(tunnel, destination) => {
            let wanted = Wanted { from: &captured.net, client: captured.client, to, destination };
            let connected = tokio::select! {
                biased;
                connected = tunnel::client::connect(proxy, tunnel, here, wanted) => connected.map(Upstream::Tunnel),
                () = upstream::gone(client) => Err(RefuseReason::ClientGone),
            };
            match connected {
                // As the destination's agent has told while it ran (`--on-agent-down`).
                Err(RefuseReason::AgentDown) if tunnel.takes_plaintext_when_down(destination, to.ip()) => {
                    let count = proxy.telemetry.tunnels().bypassed();
                    // Fewer and fewer lines: an agent that is down for long, or a firewall, makes many of these.
                    if count.is_power_of_two() {
                        warn!(
                            pod = %captured.net.pod, %to, count,
                            "nothing takes tunnels at the destination; going there in plaintext, as its agent has chosen"
                        );
                    }
                    assurance = Assurance::NONE;
                    dial_socket(proxy, here, captured, to, client, None).await
                }
                connected => connected,
            }
        }
        Way::SameNode => dial_socket(proxy, here, captured, to, client, Some(captured.client)).await,
        Way::Plaintext => dial_socket(proxy, here, captured, to, client, None).await,
    };
    match connected {
        Ok(upstream) => Ok((upstream, assurance)),
        Err(reason) => Err((reason, assurance)),
    }
}

async fn dial_socket(
    proxy: &Proxy,
    here: &Here,
    captured: &Captured,
    to: SocketAddr,
    client: &TcpStream,
    on_behalf_of: Option<SocketAddr>,
) -> Result<Upstream, RefuseReason> {
    // The application's bound address, unless the endpoint is of the other family.
    let source = captured.bound.filter(|source| source.is_ipv4() == to.is_ipv4());
    let target = Target { from: &captured.net, to, source, on_behalf_of };
    upstream::connect(proxy, &here.dialer, upstream::gone(client), target).await.map(Upstream::Socket)
}

/// How a connection gets to an endpoint.
enum Way<'a> {
    /// To a pod of another node that takes tunnels.
    Tunnel(&'a Arc<Tunnel>, &'a Workload),
    /// To a pod of this node, vouched for.
    SameNode,
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
    // Who had the address before may still be enrolled for a moment.
    let is_owner = |uid: &WorkloadUid| snapshot.workload(to.ip()).is_none_or(|owner| owner.uid == *uid);
    if let Some(near) = proxy.enrolled.load().get(&to.ip()).filter(|near| is_owner(&near.workload.uid)) {
        let identity = identity(&near.workload);
        return (Way::SameNode, Assurance { security: Security::SameNode, identity });
    }
    match tunnel_to(proxy, snapshot, to) {
        Some((tunnel, destination)) => {
            let identity = identity(destination);
            (Way::Tunnel(tunnel, destination), Assurance { security: Security::MutualTls, identity })
        }
        None => (Way::Plaintext, Assurance::NONE),
    }
}

/// The way to a pod of another node that takes tunnels.
fn tunnel_to<'a>(
    proxy: &'a Proxy,
    snapshot: &'a Snapshot,
    to: SocketAddr,
) -> Option<(&'a Arc<Tunnel>, &'a Workload)> {
    let tunnel = proxy.tunnel.as_ref()?;
    let workload = snapshot.workload(to.ip())?;
    tunnel.reaches(workload, to.ip()).then_some((tunnel, workload))
}

/// On one node this agent stands on both sides of the connection, and reports it for both.
fn record(proxy: &Arc<Proxy>, snapshot: &Snapshot, captured: &Captured, reached: &Reached) -> Meter {
    let reporters: &[Reporter] = match reached.assurance.security {
        Security::SameNode => &[Reporter::Source, Reporter::Destination],
        Security::Plaintext | Security::MutualTls => &[Reporter::Source],
    };
    let open = |reporter: &Reporter| {
        let Reached { address, service, assurance, .. } = reached;
        let (service, assurance) = (service.clone(), assurance.clone());
        let mut facts = facts(proxy, snapshot, captured, *address, service, assurance, *reporter);
        facts.upstream = Some(*address);
        proxy.telemetry.connection_opened(facts)
    };
    Meter::new(reporters.iter().map(open).collect())
}

fn facts(
    proxy: &Proxy,
    snapshot: &Snapshot,
    captured: &Captured,
    destination: SocketAddr,
    service: Option<ObjectRef>,
    Assurance { security, identity }: Assurance,
    reporter: Reporter,
) -> ConnectionFacts {
    ConnectionFacts {
        reporter,
        source: proxy.own_peer(&captured.net, captured.client),
        destination: Peer { identity, ..proxy.peer(snapshot, destination) },
        service,
        security,
        dialled: captured.dialled,
        client: captured.client,
        upstream: None,
    }
}

/// Whatever reached the listener without a code that means something, or found the agent full.
fn refuse_unknown(proxy: &Proxy, net: &PodNet, client: &TcpStream, peer: SocketAddr) {
    let dialled = client.local_addr().unwrap_or(peer);
    let known = proxy.codes.destination(dialled.ip());
    let reason = if known.is_some() { RefuseReason::Limit } else { RefuseReason::UnknownDestination };
    let dialled = known.map_or(dialled, |code| SocketAddr::new(code.address, dialled.port()));
    let facts = ConnectionFacts {
        reporter: Reporter::Source,
        source: proxy.own_peer(net, peer),
        destination: proxy.peer(&proxy.snapshot.load(), dialled),
        service: None,
        security: Security::Plaintext,
        dialled,
        client: peer,
        upstream: None,
    };
    proxy.telemetry.connection_refused(facts, reason);
}

fn refusal(reason: NoEndpointReason) -> RefuseReason {
    match reason {
        NoEndpointReason::NoSuchPort => RefuseReason::UnknownPort,
        _ => RefuseReason::NoEndpoints,
    }
}

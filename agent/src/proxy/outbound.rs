//! The client's side: a connection that a pod made to a mesh address.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::Proxy;
use super::relay::{Meter, relay};
use super::tunnel::client::Wanted;
use super::tunnel::stream::{self, Ends};
use super::tunnel::{self, Tunnel};
use super::upstream::{self, Target};
use super::worker::Here;
use crate::balance::{self, NoEndpointReason, Request};
use crate::capture::{Code, PodNet, bound_source};
use crate::model::{Destination, LoadGuard, ObjectRef, Snapshot, Workload};
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
    match reach(&proxy, &here, &snapshot, &captured, &client).await {
        Ok(reached) => {
            let meter = record(&proxy, &snapshot, &captured, &reached);
            let reason = match reached.stream {
                Upstream::Socket(upstream) => relay(client, upstream, &meter).await,
                Upstream::Tunnel(ends) => stream::relay(client, stream::Side::Client, ends, &meter).await,
            };
            meter.close(reason);
        }
        Err(failed) => {
            let facts = facts(&proxy, &snapshot, &captured, failed.towards, failed.service, Reporter::Source);
            proxy.telemetry.connection_refused(facts, failed.reason);
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
    same_node: bool,
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
                .map(|(stream, same_node)| Reached {
                    stream,
                    address: captured.dialled,
                    same_node,
                    service: None,
                    _load: None,
                })
                .map_err(|reason| Failed { reason, towards: captured.dialled, service: None });
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
                let reason = last.unwrap_or(refusal(none.reason));
                let towards = tried.last().copied().unwrap_or(captured.dialled);
                return Err(Failed { reason, towards, service: Some(service.id.clone()) });
            }
        };
        let load = endpoint.load.enter();
        match dial(proxy, here, snapshot, captured, endpoint.address, client).await {
            Ok((stream, same_node)) => {
                let (address, service) = (endpoint.address, Some(service.id.clone()));
                return Ok(Reached { stream, address, same_node, service, _load: Some(load) });
            }
            Err(reason) => {
                tried.push(endpoint.address);
                last = Some(reason);
                if !upstream::is_worth_another(reason) {
                    break;
                }
            }
        }
    }
    let towards = tried.last().copied().unwrap_or(captured.dialled);
    let reason = last.unwrap_or(RefuseReason::NoEndpoints);
    Err(Failed { reason, towards, service: Some(service.id.clone()) })
}

/// The connection, and whether it is vouched for to a pod of this node.
async fn dial(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    snapshot: &Snapshot,
    captured: &Captured,
    to: SocketAddr,
    client: &TcpStream,
) -> Result<(Upstream, bool), RefuseReason> {
    // Nobody vouches for an address that is not the pod's own, whatever the pod has given itself.
    let is_own = captured.bound.is_none_or(|source| captured.net.addresses.contains(&source));
    let is_near = proxy.enrolled.load().contains_key(&to.ip());
    if is_own
        && !is_near
        && let Some((tunnel, destination)) = tunnel_to(proxy, snapshot, to)
    {
        let wanted = Wanted { from: &captured.net, client: captured.client, to, destination };
        // On the heap, so that connections without a tunnel do not carry the room for one.
        let connect = Box::pin(tunnel::client::connect(proxy, tunnel, here, wanted));
        return tokio::select! {
            biased;
            connected = connect => connected.map(|stream| (Upstream::Tunnel(stream), false)),
            () = upstream::gone(client) => Err(RefuseReason::ClientGone),
        };
    }
    let same_node = is_own && is_near;
    let on_behalf_of = same_node.then_some(captured.client);
    // The application's bound address, unless the endpoint is of the other family.
    let source = captured.bound.filter(|source| source.is_ipv4() == to.is_ipv4());
    let target = Target { from: &captured.net, to, source, on_behalf_of };
    let connected = upstream::connect(proxy, &here.dialer, upstream::gone(client), target).await;
    connected.map(|stream| (Upstream::Socket(stream), same_node))
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
    let reporters: &[Reporter] =
        if reached.same_node { &[Reporter::Source, Reporter::Destination] } else { &[Reporter::Source] };
    let open = |reporter: &Reporter| {
        let mut facts = facts(proxy, snapshot, captured, reached.address, reached.service.clone(), *reporter);
        facts.security = match &reached.stream {
            Upstream::Tunnel(_) => Security::MutualTls,
            Upstream::Socket(_) if reached.same_node => Security::SameNode,
            Upstream::Socket(_) => Security::Plaintext,
        };
        facts.upstream = Some(reached.address);
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
    reporter: Reporter,
) -> ConnectionFacts {
    ConnectionFacts {
        reporter,
        source: Peer { workload: Some(captured.net.workload.clone()), address: captured.client },
        destination: proxy.peer(snapshot, destination),
        service,
        security: Security::Plaintext,
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
        source: Peer { workload: Some(net.workload.clone()), address: peer },
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

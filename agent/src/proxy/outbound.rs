//! The client's side: a connection that a pod made to a mesh address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::error;

use super::admission::{Door, Entry};
use super::captured::Captured;
use super::carriage::{Bound, Carriage, carriage};
use super::http;
use super::inbound::Visit;
use super::reach::{self, Assurance, Attempts, Dialled, InTheWay, Unreached, Upstream};
use super::relay::{Carried, Meter, relay};
use super::tunnel::stream;
use super::upstream;
use super::worker::{Fate, Here};
use super::{Place, Proxy};
use crate::balance::{Carries, caps};
use crate::capture::PodNet;
use crate::model::{LoadGuard, PortGuard, Service, UnderWay};
use crate::snapshot::Snapshot;
use crate::telemetry::{ConnectionFacts, RefuseReason, Reporter, Security};

/// Carries one captured connection to where its application wanted it to go.
pub(super) async fn begin(
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    (client, client_socket): (TcpStream, SocketAddr),
    fate: watch::Receiver<Fate>,
) -> Option<Carried> {
    let captured = Captured::of(&proxy, &net, &client, client_socket);
    let Some((captured, place)) = captured.zip(proxy.enter()) else {
        refuse_unknown(&proxy, &net, &client, client_socket);
        return None;
    };
    match carriage(&proxy, &here, &captured, client).await {
        Ok((Carriage::Http1, client)) => {
            let client = http::Client::new((proxy, here), captured, client, fate);
            Some(Box::pin(http::serve_http1(client).map(|()| drop(place))))
        }
        Ok((Carriage::Http2, client)) => {
            let client = http::Client::new((proxy, here), captured, client, fate);
            Some(Box::pin(http::serve_http2(client).map(|()| drop(place))))
        }
        Ok((Carriage::Bytes(bound), client)) => {
            relayed(&proxy, &here, captured, bound, (client, fate, place)).await
        }
        Err(error) => {
            error!(pod = %net.pod, %error, "cannot go on with a connection");
            None
        }
    }
}

/// Finds a way for bytes that nobody looks at.
async fn relayed(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    captured: Captured,
    bound: Bound,
    (client, fate, place): (TcpStream, watch::Receiver<Fate>, Place),
) -> Option<Carried> {
    let snapshot = proxy.snapshot.load_full();
    let service = captured.service(&snapshot).map(|service| &service.id);
    match reached(proxy, here, &snapshot, &captured, bound, &client).await {
        // On one node nobody else asks whether the endpoint takes it.
        Ok(Reached {
            upstream: Upstream::Socket(application),
            assurance,
            address,
            idle,
            entered: Some((door, entry)),
            counted,
        }) => {
            let facts = reach::all_facts(proxy, &snapshot, &captured, address, service, &assurance);
            let facts = facts.map(|facts| match facts.reporter {
                Reporter::Destination => ConnectionFacts { ruling: entry.ruling.clone(), ..facts },
                Reporter::Source => facts,
            });
            let (proxy, here, facts) = (proxy.clone(), here.clone(), facts.collect());
            let visit = Visit {
                proxy,
                here,
                door,
                visitor: captured.caller(),
                facts,
                fate,
                idle,
                carries: Carries::Connection,
            };
            // With the pod go the routes that its connections need.
            let kept = (place, captured.code, captured.net, counted);
            Some(visit.carry(entry, Upstream::Socket(client), application, kept))
        }
        Ok(Reached { upstream, assurance, address, idle, entered: _, counted }) => {
            let meter = reach::record(proxy, &snapshot, &captured, address, service, &assurance);
            let meter = meter.ending_when_idle(idle);
            Some(carry(client, upstream, meter, (place, captured.code, captured.net, counted)))
        }
        Err(Unreached { reason, detail: _, tried, assurance }) => {
            let towards = tried.unwrap_or(captured.dialled);
            let facts =
                reach::facts(proxy, &snapshot, &captured, towards, service, &assurance, Reporter::Source);
            proxy.telemetry.connection_refused(facts, reason);
            None
        }
    }
}

/// Carries bytes to their end. What is to be kept for as long is dropped then.
fn carry(mut client: TcpStream, upstream: Upstream, meter: Meter, kept: impl Send + 'static) -> Carried {
    match upstream {
        Upstream::Socket(upstream) => Box::pin(async move {
            let reason = relay(&client, &upstream, &meter).await;
            drop((client, upstream));
            meter.close(reason);
            drop(kept);
        }),
        Upstream::Tunnel(mut ends) => Box::pin(async move {
            let reason = stream::relay(&mut client, stream::Side::Client, &mut ends, &meter).await;
            drop((client, ends));
            meter.close(reason);
            drop(kept);
        }),
    }
}

/// An upstream that answered.
struct Reached {
    upstream: Upstream,
    assurance: Assurance,
    address: SocketAddr,
    /// How long nothing may move.
    idle: Option<Duration>,
    /// An endpoint of this node, and what it lets the connection in by.
    entered: Option<(Door, Entry)>,
    /// None where a pod's own address was dialled: nothing is chosen by how busy it is, and nothing caps that.
    counted: Option<(LoadGuard, Option<PortGuard>)>,
}

async fn reached(
    proxy: &Arc<Proxy>,
    here: &Arc<Here>,
    snapshot: &Snapshot,
    captured: &Captured,
    bound: Bound,
    client: &TcpStream,
) -> Result<Reached, Unreached> {
    let dial = |to, port| {
        let gone = upstream::gone(client);
        reach::dial(proxy, here, snapshot, captured, (to, port), Carries::Connection, gone)
    };
    let (service, dialled) = match goal(here, snapshot, captured, &bound)? {
        Goal::Service(service, dialled) => (service, dialled),
        Goal::Pod(address) => {
            return match dial(address, None).await {
                Ok(Dialled { upstream, assurance, entered }) => {
                    Ok(Reached { upstream, assurance, address, idle: None, entered, counted: None })
                }
                Err(InTheWay { reason, detail, assurance }) => {
                    Err(Unreached { reason, detail, tried: None, assurance })
                }
            };
        }
    };
    let mut attempts = Attempts::new(proxy, service, captured.client.ip(), dialled);
    let port = attempts.port();
    let place = port.map_or(Ok(None), |port| caps::enter(port, UnderWay::Connections));
    let full = |_full| nowhere(RefuseReason::Overloaded);
    let place = place.map_err(full)?;
    loop {
        let (address, load) = attempts.next()?;
        match dial(address, port).await {
            Ok(Dialled { upstream, assurance, entered }) => {
                attempts.connected();
                let idle = port.and_then(|port| port.traffic.timeouts.idle);
                let counted = Some((load, place));
                return Ok(Reached { upstream, assurance, address, idle, entered, counted });
            }
            Err(why) => attempts.failed(address, why),
        }
    }
}

/// What a connection is to get to.
enum Goal<'s> {
    /// A pod's own address: that pod and no other, ready or not.
    Pod(SocketAddr),
    /// An endpoint of this Service; the address is of the family and the port that are wanted.
    Service(&'s Service, SocketAddr),
}

fn goal<'s>(
    here: &Here,
    snapshot: &'s Snapshot,
    captured: &Captured,
    bound: &Bound,
) -> Result<Goal<'s>, Unreached> {
    let rule = match bound {
        Bound::Dialled => {
            let to =
                |service| Goal::Service(service, SocketAddr::new(captured.dialled.ip(), captured.port()));
            return Ok(captured.service(snapshot).map_or(Goal::Pod(captured.dialled), to));
        }
        Bound::Nowhere => return Err(nowhere(RefuseReason::NoRoute)),
        Bound::By(rule) => rule,
    };
    let backend = rule.backend(here.shares.next()).and_then(|backend| snapshot.backend(&backend.target).ok());
    let (service, port) = backend.ok_or_else(|| nowhere(RefuseReason::InvalidBackend))?;
    Ok(Goal::Service(service, SocketAddr::new(captured.dialled.ip(), port)))
}

/// There is nothing that could be tried.
fn nowhere(reason: RefuseReason) -> Unreached {
    Unreached { reason, detail: None, tried: None, assurance: Assurance::NONE }
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
        ruling: None,
    };
    proxy.telemetry.connection_refused(facts, reason);
}

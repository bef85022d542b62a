//! The server's side: a connection to one of an enrolled pod's own addresses, and what becomes of any that such a pod takes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;

use undermesh_common::lookup::TUNNEL_PORT;

use super::Proxy;
use super::admission::{Caller, Door, Entry, Refused};
use super::http::Inbound;
use super::let_in::Standing;
use super::reach::Upstream;
use super::relay::{Carried, Meter, relay};
use super::tunnel::stream;
use super::upstream::{self, Target};
use super::worker::{Fate, Here};
use crate::balance::Carries;
use crate::capture::PodNet;
use crate::model::MtlsMode;
use crate::telemetry::{CloseReason, ConnectionFacts, RefuseReason, Reporter, Security};

/// Hands a connection that nobody vouched for on to the application, which sees the client that called.
pub(super) async fn begin(
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    (client, client_socket): (TcpStream, SocketAddr),
    fate: watch::Receiver<Fate>,
) -> Option<Carried> {
    let caller = SocketAddr::new(client_socket.ip().to_canonical(), client_socket.port());
    let local = client.local_addr().ok()?;
    let dialled = SocketAddr::new(local.ip().to_canonical(), local.port());
    let mut facts = facts(&proxy, &net, caller, dialled);
    let refuse = |facts: ConnectionFacts, reason: RefuseReason| {
        proxy.telemetry.connection_refused(facts, reason);
        None
    };
    if dialled.port() == TUNNEL_PORT {
        // The tunnel's, which speaks TLS alone: what the application may have there is not for callers from outside.
        return refuse(facts, RefuseReason::PlaintextRefused);
    }
    let Some(place) = proxy.enter() else { return refuse(facts, RefuseReason::Limit) };
    // An address is all that is known of who calls in plaintext.
    let door = Door { pod: net.workload.uid.clone(), address: dialled };
    let visitor = Caller { identity: None, address: caller.ip() };
    let entry = match entry(&proxy, &net, &door, &visitor) {
        Ok(entry) => entry,
        Err(Refused { reason, ruling }) => return refuse(ConnectionFacts { ruling, ..facts }, reason),
    };

    let target = Target { from: &net, to: dialled, source: None, on_behalf_of: Some(caller) };
    match upstream::connect(&proxy, &here.dialer, upstream::gone(&client), target).await {
        Ok(application) => {
            (facts.upstream, facts.ruling) = (Some(dialled), entry.ruling.clone());
            let visit = Visit {
                proxy,
                here,
                door,
                visitor,
                facts: vec![facts],
                fate,
                idle: None,
                carries: Carries::Connection,
            };
            Some(visit.carry(entry, Upstream::Socket(client), application, (place, net)))
        }
        Err(reason) => refuse(facts, reason),
    }
}

fn entry(proxy: &Proxy, net: &PodNet, door: &Door, visitor: &Caller) -> Result<Entry, Refused> {
    let snapshot = proxy.snapshot.load();
    // The kernel lets nothing in that is for a strict port. What it let in before it knew is looked at here.
    let pod = snapshot.workloads.get(&door.pod).unwrap_or(&net.workload);
    match pod.mtls_at(door.address.port()) {
        MtlsMode::Strict => Err(Refused { reason: RefuseReason::PlaintextRefused, ruling: None }),
        MtlsMode::Permissive => door.enter(&snapshot, visitor),
    }
}

/// A connection that an endpoint of this node takes.
pub(super) struct Visit {
    pub(super) proxy: Arc<Proxy>,
    pub(super) here: Arc<Here>,
    pub(super) door: Door,
    pub(super) visitor: Caller,
    /// For each side that reports, one at least.
    pub(super) facts: Vec<ConnectionFacts>,
    /// That of the pod for which this agent carries it.
    pub(super) fate: watch::Receiver<Fate>,
    /// How long nothing may move on it.
    pub(super) idle: Option<Duration>,
    /// What it carries, as far as its client says.
    pub(super) carries: Carries,
}

impl Visit {
    /// Carries it between the two, until one of them ends it or policies do not let it in any more. What is to be kept for as long
    /// is dropped then.
    pub(super) fn carry(
        self,
        entry: Entry,
        client: Upstream,
        mut application: TcpStream,
        kept: impl Send + 'static,
    ) -> Carried {
        let Self { proxy, here, door, visitor, facts, fate, idle, carries } = self;
        let by_request = entry.by_request;
        let security = facts.first().map_or(Security::Plaintext, |facts| facts.security);
        let standing = Standing { carries, ..Standing::new(door.clone(), visitor.clone(), security, entry) };
        let carries_bytes = standing.carries_bytes.clone();
        let entered = here.let_in.enter(&proxy, standing);
        if by_request {
            let inbound = Inbound { proxy, here, door, visitor, facts, fate, carries_bytes };
            return Box::pin(async move {
                entered.carry(inbound.carry(client, application)).await;
                drop(kept);
            });
        }
        let open = |facts| proxy.telemetry.connection_opened(facts);
        let meter = Meter::new(facts.into_iter().map(open)).ending_when_idle(idle);
        match client {
            Upstream::Socket(client) => Box::pin(async move {
                let relayed = entered.carry(relay(&client, &application, &meter));
                let reason = relayed.await.unwrap_or(CloseReason::Denied);
                drop((client, application));
                meter.close(reason);
                drop(kept);
            }),
            Upstream::Tunnel(mut ends) => Box::pin(async move {
                let relayed = stream::relay(&mut application, stream::Side::Server, &mut ends, &meter);
                let reason = entered.carry(relayed).await.unwrap_or(CloseReason::Denied);
                drop((application, ends));
                meter.close(reason);
                drop(kept);
            }),
        }
    }
}

fn facts(proxy: &Proxy, net: &PodNet, caller: SocketAddr, dialled: SocketAddr) -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: proxy.peer(&proxy.snapshot.load(), caller),
        destination: proxy.own_peer(net, dialled),
        service: None,
        security: Security::Plaintext,
        dialled,
        client: caller,
        upstream: None,
        ruling: None,
    }
}

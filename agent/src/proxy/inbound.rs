//! The server's side: a connection to one of an enrolled pod's own addresses that nobody vouched for.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;

use undermesh_common::lookup::TUNNEL_PORT;

use super::http::Inbound;
use super::reach::Upstream;
use super::relay::{Meter, relay};
use super::upstream::{self, Target};
use super::worker::{Fate, Here};
use super::{Proxy, admission};
use crate::capture::PodNet;
use crate::model::Limited;
use crate::telemetry::{ConnectionFacts, RefuseReason, Reporter, Security};

/// Hands the connection on to the application, which sees the client that called.
pub(super) async fn serve(
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    (client, client_socket): (TcpStream, SocketAddr),
    fate: watch::Receiver<Fate>,
) {
    let caller = SocketAddr::new(client_socket.ip().to_canonical(), client_socket.port());
    let Ok(local) = client.local_addr() else { return };
    let dialled = SocketAddr::new(local.ip().to_canonical(), local.port());
    let mut facts = facts(&proxy, &net, caller, dialled);
    let refuse = |facts: ConnectionFacts, reason: RefuseReason| {
        proxy.telemetry.connection_refused(facts, reason);
    };
    if dialled.port() == TUNNEL_PORT {
        // The tunnel's, which speaks TLS alone: what the application may have there is not for callers from outside.
        return refuse(facts, RefuseReason::PlaintextRefused);
    }
    let Some(place) = proxy.enter() else { return refuse(facts, RefuseReason::Limit) };
    // An address is all that is known of who calls in plaintext.
    let source = || admission::unproven(caller.ip());
    if !admission::takes_connection(&proxy.snapshot.load(), dialled, source) {
        return refuse(facts, RefuseReason::RateLimited);
    }

    let target = Target { from: &net, to: dialled, source: None, on_behalf_of: Some(caller) };
    // On the heap, so that a connection that stands does not carry the room for it.
    match Box::pin(upstream::connect(&proxy, &here.dialer, upstream::gone(&client), target)).await {
        Ok(application) => {
            facts.upstream = Some(dialled);
            if admission::is_limited(&proxy.snapshot.load(), dialled, Limited::Requests) {
                let (source, facts) = (source(), vec![facts]);
                let inbound = Inbound { proxy: proxy.clone(), here, to: dialled, source, facts, fate };
                Box::pin(inbound.carry(Upstream::Socket(client), application)).await;
            } else {
                let meter = Meter::new(vec![proxy.telemetry.connection_opened(facts)]);
                let reason = relay(client, application, &meter).await;
                meter.close(reason);
            }
        }
        Err(reason) => refuse(facts, reason),
    }
    drop(place);
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
    }
}

//! Mirrored requests: copies that are sent elsewhere, whose answers nobody waits for.
//!
//! A copy never slows or fails what it is a copy of: it has a connection of its own, and is broken off when it falls behind.

use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use http::{HeaderValue, Request};
use http_body_util::BodyExt as _;
use tracing::debug;

use super::body::RequestBody;
use super::exchange::Exchange;
use super::head;
use super::interim::Herald;
use super::send::{self, Way, Wishes};
use super::talk::{Dialect, Talk};
use crate::model::{Service, ServiceEvent};
use crate::route::{Rule, Target};
use crate::snapshot::Snapshot;
use crate::telemetry::RequestEnd;

/// What a mirrored request is marked with.
pub(super) const MIRRORED: &str = "undermesh-mirrored";

/// Copies that a worker thread has under way at one time. Where a mirror is slow, some requests are not mirrored.
pub(super) const MOST: usize = 256;

/// How long a copy may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Sends copies to where the rule wants some.
pub(super) fn send(
    talk: &Arc<Talk>,
    snapshot: &Arc<Snapshot>,
    rule: &Rule,
    request: &mut Request<RequestBody>,
    authority: Option<&Authority>,
    dialect: Dialect,
) {
    for mirror in &rule.filters.mirrors {
        // A copy of a copy would go round in circles where services mirror each other.
        if !mirror.takes(fastrand::u64(..)) || request.headers().contains_key(MIRRORED) {
            continue;
        }
        let Target::Service { id, port } = mirror.target.clone() else { continue };
        let Some(service) = snapshot.services.get(&id).cloned() else { continue };
        let Ok(place) = talk.here.upstreams.mirrors.clone().try_acquire_owned() else {
            debug!(service = %id, "a request is not mirrored: too many copies are under way");
            service.load.count(ServiceEvent::MirrorDropped);
            continue;
        };
        let body = request.body_mut().copy(&talk.here.upstreams.room_for_copies);
        let mut copy = head::copy(request, body);
        // What is said ahead of answers that nobody waits for goes nowhere either.
        copy.extensions_mut().remove::<Herald>();
        copy.headers_mut().insert(MIRRORED, HeaderValue::from_static("true"));
        if let Some(modifier) = &rule.filters.request_headers {
            modifier.apply(copy.headers_mut());
        }
        if head::aim(&mut copy, dialect, authority, None).is_err() {
            continue;
        }
        let (talk, snapshot) = (talk.clone(), snapshot.clone());
        let tasks = talk.here.upstreams.tasks.clone();
        tasks.spawn(async move {
            let _place = place;
            let came = tokio::time::timeout(LIMIT, carried(&talk, &snapshot, &service, port, copy, dialect));
            service.load.count(came.await.unwrap_or_else(|_elapsed| {
                debug!(service = %id, "a mirrored request took too long");
                ServiceEvent::MirrorFailed
            }));
        });
    }
}

/// Has the copy answered; what came of it.
async fn carried(
    talk: &Arc<Talk>,
    snapshot: &Snapshot,
    service: &Service,
    port: u16,
    mut copy: Request<RequestBody>,
    dialect: Dialect,
) -> ServiceEvent {
    let way = Way::Service { service, port, kept: None };
    let mut exchange = Exchange::begin(&talk.proxy.telemetry, &copy);
    (exchange.service, exchange.talk) = (Some(service.id.clone()), Some(talk.clone()));
    // What it is a copy of is its parent.
    if let Some(trace) = &exchange.trace {
        trace.pass_on(copy.headers_mut());
    }
    match send::send(talk, snapshot, &mut exchange, way, copy, dialect, Wishes::default()).await {
        Ok(response) => {
            // Read to its end, so that the connection may be used again.
            let read = response.into_body().collect().await;
            exchange.done();
            if read.is_ok() { ServiceEvent::Mirrored } else { ServiceEvent::MirrorFailed }
        }
        Err(refusal) => {
            debug!(service = %service.id, detail = refusal.detail, "a mirrored request came to nothing");
            drop(exchange.refused(&refusal));
            // The copy's body broke off.
            let is_dropped = refusal.end == RequestEnd::ClientGone;
            if is_dropped { ServiceEvent::MirrorDropped } else { ServiceEvent::MirrorFailed }
        }
    }
}

//! Connections that stop being HTTP: WebSocket, CONNECT, whatever else two programs agree upon.

use std::sync::atomic::{AtomicU64, Ordering};

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::io::InspectReader;
use tracing::debug;

use super::body::{RequestBody, ResponseBody};
use super::exchange::Exchange;
use super::head;
use super::quiet::Noise;
use crate::proxy::idle::unmoved;
use crate::telemetry::RequestEnd;

/// The client's end of a connection that may be upgraded.
#[derive(Debug)]
pub(super) struct ClientEnd {
    end: OnUpgrade,
    is_connect: bool,
}

/// The two ends of a connection that has been upgraded, once both have said so.
#[derive(Debug)]
pub(super) struct Bridge {
    client: OnUpgrade,
    upstream: OnUpgrade,
}

/// The answer of an upstream, as it is passed on.
pub(super) enum Passed {
    /// HTTP goes on after it.
    Plain(Response<Incoming>),
    /// The connection goes on with another protocol.
    Upgraded(Response<Incoming>, Bridge),
}

impl Passed {
    /// By what the answer says, where the client's end may be upgraded; without what was meant for one hop alone.
    pub(super) fn of(mut response: Response<Incoming>, client_end: Option<ClientEnd>) -> Self {
        match client_end.filter(|client| client.is_upgraded_by(response.status())) {
            Some(client) => {
                let bridge = client.meets(&mut response);
                let is_switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                head::strip_hop_by_hop(response.headers_mut(), is_switching);
                // It has no body, whatever it says (RFC 9110, section 9.3.6).
                response.headers_mut().remove(CONTENT_LENGTH);
                response.headers_mut().remove(TRANSFER_ENCODING);
                Self::Upgraded(response, bridge)
            }
            None => {
                head::strip_hop_by_hop(response.headers_mut(), false);
                Self::Plain(response)
            }
        }
    }

    /// The answer for the client, and what its connection becomes, if it becomes something: that is to be carried from then on.
    pub(super) fn answer(
        self,
        exchange: Box<Exchange>,
    ) -> (Response<ResponseBody>, Option<impl Future<Output = ()> + Send + use<>>) {
        match self {
            Self::Plain(response) => (response.map(|body| ResponseBody::of(body, exchange)), None),
            Self::Upgraded(response, bridge) => {
                (response.map(|_no_body| ResponseBody::Own(None)), Some(bridge.carry(exchange)))
            }
        }
    }
}

impl ClientEnd {
    /// Taken from the request before that is sent on.
    pub(super) fn of(request: &mut Request<RequestBody>) -> Self {
        Self { end: hyper::upgrade::on(&mut *request), is_connect: request.method() == Method::CONNECT }
    }

    /// Whether this status ends HTTP on the connection: 101, or any success of CONNECT (RFC 9110, section 9.3.6).
    fn is_upgraded_by(&self, status: StatusCode) -> bool {
        if self.is_connect { status.is_success() } else { status == StatusCode::SWITCHING_PROTOCOLS }
    }

    /// The way to the upstream's end.
    fn meets<B>(self, response: &mut Response<B>) -> Bridge {
        Bridge { client: self.end, upstream: hyper::upgrade::on(response) }
    }
}

impl Bridge {
    /// Carries bytes both ways until both ends have ended, or have said nothing for longer than they may. The request lasts as long.
    async fn carry(self, mut exchange: Box<Exchange>) {
        let (client, upstream) = match tokio::try_join!(self.client, self.upstream) {
            Ok(ends) => ends,
            Err(error) => return debug!(%error, "a connection was not upgraded after all"),
        };
        let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
        let count =
            |bytes: &AtomicU64, read: &[u8]| _ = bytes.fetch_add(read.len() as u64, Ordering::Relaxed);
        let mut client = InspectReader::new(TokioIo::new(client), |read: &[u8]| count(&sent, read));
        let mut upstream = InspectReader::new(TokioIo::new(upstream), |read: &[u8]| count(&received, read));
        let carried = || (sent.load(Ordering::Relaxed), received.load(Ordering::Relaxed));
        let limit = exchange.noise.as_ref().map(Noise::limit);
        let idle = async {
            match limit {
                Some(limit) => unmoved(limit, || Some(carried())).await,
                None => std::future::pending().await,
            }
        };
        let copied = std::pin::pin!(async {
            tokio::select! {
                biased;
                copied = tokio::io::copy_bidirectional(&mut client, &mut upstream) => copied.map(|_| RequestEnd::Done),
                () = idle => Ok(RequestEnd::Idle),
            }
        });
        match exchange.unless_denied(copied).await {
            Ok(Ok(end)) => {
                let (sent, received) = carried();
                exchange.carried(end, sent, received);
            }
            Ok(Err(error)) => debug!(%error, "an upgraded connection broke"),
            Err(_ruling) => debug!("policies do not let an upgraded connection go on"),
        }
    }
}

//! Connections that stop being HTTP: WebSocket, CONNECT, whatever else two programs agree upon.

use http::{Method, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tracing::debug;

use super::body::RequestBody;
use super::exchange::Exchange;

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

impl ClientEnd {
    /// Taken from the request before that is sent on.
    pub(super) fn of(request: &mut Request<RequestBody>) -> Self {
        Self { end: hyper::upgrade::on(&mut *request), is_connect: request.method() == Method::CONNECT }
    }

    /// Whether this status ends HTTP on the connection: 101, or any success of CONNECT (RFC 9110, section 9.3.6).
    pub(super) fn is_upgraded_by(&self, status: StatusCode) -> bool {
        if self.is_connect { status.is_success() } else { status == StatusCode::SWITCHING_PROTOCOLS }
    }

    /// The way to the upstream's end.
    pub(super) fn meets<B>(self, response: &mut Response<B>) -> Bridge {
        Bridge { client: self.end, upstream: hyper::upgrade::on(response) }
    }
}

impl Bridge {
    /// Carries bytes both ways until both ends have ended. The request lasts as long.
    pub(super) async fn carry(self, mut exchange: Box<Exchange>) {
        let (client, upstream) = match tokio::try_join!(self.client, self.upstream) {
            Ok(ends) => ends,
            Err(error) => return debug!(%error, "a connection was not upgraded after all"),
        };
        let copied =
            tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(upstream)).await;
        match copied {
            Ok((sent, received)) => exchange.carried(sent, received),
            Err(error) => debug!(%error, "an upgraded connection broke"),
        }
    }
}

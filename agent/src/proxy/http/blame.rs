//! Whose doing it is what came of a request: what it says of the endpoint that it was sent to, and of who broke off.

use std::error::Error as _;
use std::io;

use http::Response;
use hyper::body::Incoming;

use super::answer::Refusal;
use super::body::BodyError;
use super::exchange::Exchange;
use crate::balance::outlier::Verdict;
use crate::telemetry::RequestEnd;

/// What the answer says of the endpoint that has given it. That there is none in time says nothing as long as the client is still to say
/// more of the request.
pub(super) fn verdict(
    exchange: &Exchange,
    answer: &Result<Response<Incoming>, Refusal>,
    waits_for_client: bool,
) -> Option<Verdict> {
    let response = match answer {
        Ok(response) => response,
        Err(refusal) => return verdict_of_refusal(refusal.end, waits_for_client),
    };
    Some(match (response.status().as_u16(), exchange.grpc_status()) {
        (502..=504, _) | (_, Some(UNAVAILABLE)) => Verdict::GatewayFailure,
        (500..=599, _) | (_, Some(UNKNOWN | INTERNAL | DATA_LOSS)) => Verdict::ServerError,
        _ => Verdict::Good,
    })
}

/// What it says that the request was not answered at all. Who refuses it for what it is would do so at any other endpoint.
pub(super) fn verdict_of_refusal(end: RequestEnd, waits_for_client: bool) -> Option<Verdict> {
    match end {
        RequestEnd::UpstreamTimeout if waits_for_client => None,
        RequestEnd::ClientGone
        | RequestEnd::RateLimited
        | RequestEnd::Denied
        | RequestEnd::Unauthenticated
        | RequestEnd::BadRequest
        | RequestEnd::InvalidBackend => None,
        _ => Some(Verdict::GatewayFailure),
    }
}

/// Whose doing it is that a connection brought no answer: it may be the client's, in the middle of its request's body.
pub(super) fn blamed(error: &hyper::Error) -> RequestEnd {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let mut causes = causes.skip_while(|cause| !cause.is::<BodyError>()).peekable();
    if causes.peek().is_none() {
        return RequestEnd::UpstreamReset;
    }
    // hyper says so of chunks that are none.
    let is_malformed =
        |cause: &io::Error| matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData);
    match causes.any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_malformed)) {
        true => RequestEnd::BadRequest,
        false => RequestEnd::ClientGone,
    }
}

/// Whether the upstream has said that it has done nothing for the request, which may be sent again then whatever it asks for (RFC 9113,
/// section 8.7): one that it has refused, or that came after the last one that it takes before it goes.
pub(super) fn is_unprocessed(error: &hyper::Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |&cause| cause.source());
    let of_http2 = causes.find_map(|cause| cause.downcast_ref::<h2::Error>());
    of_http2.filter(|error| error.is_remote()).is_some_and(|error| match error.reason() {
        // Of streams that it takes it would not say that it goes, and an error might be of any of them.
        Some(h2::Reason::NO_ERROR) => error.is_go_away(),
        Some(h2::Reason::REFUSED_STREAM) => error.is_reset(),
        _ => false,
    })
}

// Of gRPC, where an answer has them in its head.
const UNKNOWN: u16 = 2;
const INTERNAL: u16 = 13;
const UNAVAILABLE: u16 = 14;
const DATA_LOSS: u16 = 15;

#[cfg(test)]
mod tests {
    use http::Request;
    use hyper::client::conn::http2;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::proxy::http::body::RequestBody;

    /// A frame of this type and stream (RFC 9113, section 4.1).
    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    /// What a request ends with to which a server answers with this frame.
    async fn answered_with(frame_of_server: Vec<u8>) -> hyper::Error {
        const SETTINGS: u8 = 4;
        const HEADERS: u8 = 1;
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let server = async move {
            theirs.write_all(&frame(SETTINGS, 0, &[])).await.unwrap();
            let mut preface = [0; 24];
            theirs.read_exact(&mut preface).await.unwrap();
            loop {
                let mut head = [0; 9];
                theirs.read_exact(&mut head).await.unwrap();
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                theirs.read_exact(&mut vec![0; length as usize]).await.unwrap();
                if head[3] == HEADERS {
                    break;
                }
            }
            theirs.write_all(&frame_of_server).await.unwrap();
            theirs
        };
        let request = Request::post("http://web.test/").body(RequestBody::empty()).unwrap();
        let (answer, _server) = tokio::join!(sender.send_request(request), server);
        answer.unwrap_err()
    }

    #[tokio::test]
    async fn what_an_upstream_has_not_begun_with_is_told_from_what_it_has_broken_off() {
        const RST_STREAM: u8 = 3;
        const GOAWAY: u8 = 7;
        let goaway = |reason: h2::Reason| {
            frame(GOAWAY, 0, &[&0u32.to_be_bytes()[..], &u32::from(reason).to_be_bytes()].concat())
        };
        let reset = |reason: h2::Reason| frame(RST_STREAM, 1, &u32::from(reason).to_be_bytes());
        for (answer, expected) in [
            (goaway(h2::Reason::NO_ERROR), true),
            (goaway(h2::Reason::INTERNAL_ERROR), false),
            (reset(h2::Reason::REFUSED_STREAM), true),
            (reset(h2::Reason::INTERNAL_ERROR), false),
            (reset(h2::Reason::CANCEL), false),
        ] {
            let error = answered_with(answer.clone()).await;
            assert_eq!(is_unprocessed(&error), expected, "{answer:?}: {error:?}");
        }
    }
}

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

/// What the answer says of the endpoint that has given it.
pub(super) fn verdict(exchange: &Exchange, answer: &Result<Response<Incoming>, Refusal>) -> Option<Verdict> {
    let response = match answer {
        Ok(response) => response,
        Err(Refusal {
            end:
                RequestEnd::ClientGone
                | RequestEnd::RateLimited
                | RequestEnd::Denied
                | RequestEnd::Unauthenticated
                | RequestEnd::BadRequest,
            ..
        }) => return None,
        Err(_) => return Some(Verdict::GatewayFailure),
    };
    Some(match (response.status().as_u16(), exchange.grpc_status()) {
        (502..=504, _) | (_, Some(UNAVAILABLE)) => Verdict::GatewayFailure,
        (500..=599, _) | (_, Some(UNKNOWN | INTERNAL | DATA_LOSS)) => Verdict::ServerError,
        _ => Verdict::Good,
    })
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

// Of gRPC, where an answer has them in its head.
const UNKNOWN: u16 = 2;
const INTERNAL: u16 = 13;
const UNAVAILABLE: u16 = 14;
const DATA_LOSS: u16 = 15;

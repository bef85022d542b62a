//! Whether policies let a request in: asked at the endpoint's own node, of the request as the application would get it.

use http::Request;
use serde_json::{Map, Value};

use super::answer::Refusal;
use super::exchange::Exchange;
use super::{head, tokens};
use crate::policy::authorization::{self, PathNormalisation};
use crate::proxy::Proxy;
use crate::proxy::admission::{self, Caller, Door};
use crate::snapshot::Snapshot;
use crate::telemetry::RequestEnd;

/// Asks the policies of the pod; the exchange has what they say. The request becomes what the application is to get.
///
/// # Errors
/// When they deny it, when it shows a token that does not hold, or when its path could be understood in more than one way.
pub(super) async fn request<B>(
    proxy: &Proxy,
    snapshot: &Snapshot,
    (door, visitor): (&Door, &Caller),
    exchange: &mut Exchange,
    request: &mut Request<B>,
) -> Result<(), Refusal> {
    let claims = match door.tokens(snapshot) {
        Some(rules) => tokens::taken(proxy, rules, exchange, request).await?,
        None => None,
    };
    let Some(policies) = door.policies(snapshot) else { return Ok(()) };
    let connection = visitor.at(door.address.port());
    let ask = |asked: &authorization::Request<'_>| policies.request(&connection, asked);
    let shown = Shown { claims: claims.as_ref(), is_grpc: exchange.is_grpc };
    let decision = as_policies_see_it(&proxy.settings.paths, request, shown, ask)
        .map_err(|why| Refusal::new(RequestEnd::BadRequest, why))?;
    exchange.ruling = admission::of(&decision);
    if decision.is_allowed() {
        return Ok(());
    }
    let names_it = proxy.settings.names_policies;
    let detail = exchange.ruling.as_deref().filter(|_| names_it).and_then(|ruling| ruling.detail.clone());
    Err(Refusal::new(
        RequestEnd::Denied,
        detail.unwrap_or_else(|| "policies do not let this request in".to_owned()),
    ))
}

/// What is known of a request beside itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown<'s> {
    /// What its token says.
    pub(super) claims: Option<&'s Map<String, Value>>,
    pub(super) is_grpc: bool,
}

/// Shows the request as policies are asked about it.
///
/// # Errors
/// When it could be understood in more than one way.
pub(super) fn as_policies_see_it<B, T>(
    paths: &PathNormalisation,
    request: &Request<B>,
    Shown { claims, is_grpc }: Shown<'_>,
    ask: impl FnOnce(&authorization::Request<'_>) -> T,
) -> Result<T, String> {
    if request.method().as_str().contains(|c: char| c.is_ascii_lowercase()) {
        // To policies it would be another one than to servers that do not tell them apart (RFC 9110, section 9.1).
        return Err("the method is not in upper case".to_owned());
    }
    let path = authorization::normalise(request.uri().path(), paths).map_err(|why| why.to_string())?;
    let host = head::authority(request).map_err(|why| why.to_string())?;
    Ok(ask(&authorization::Request {
        method: request.method(),
        path: &path,
        host: host.as_ref().map(|host| host.as_str()),
        headers: request.headers(),
        claims,
        is_grpc,
    }))
}

//! Whether policies let a request in: asked at the endpoint's own node, of the request as the application would get it.

use http::Request;

use super::answer::Refusal;
use super::exchange::Exchange;
use super::head;
use crate::policy::authorization;
use crate::proxy::Proxy;
use crate::proxy::admission::{self, Caller, Door};
use crate::snapshot::Snapshot;
use crate::telemetry::RequestEnd;

/// Asks the policies of the pod; the exchange has what they say.
///
/// # Errors
/// When they deny it, or when its path could be understood in more than one way.
pub(super) fn request<B>(
    proxy: &Proxy,
    snapshot: &Snapshot,
    (door, visitor): (&Door, &Caller),
    exchange: &mut Exchange,
    request: &Request<B>,
) -> Result<(), Refusal> {
    let Some(policies) = door.policies(snapshot) else { return Ok(()) };
    let bad = |why: String| Refusal::new(RequestEnd::BadRequest, why);
    let path = authorization::normalise(request.uri().path(), proxy.settings.paths)
        .map_err(|why| bad(why.to_string()))?;
    let host = head::authority(request).map_err(|why| bad(why.to_string()))?;
    let asked = authorization::Request {
        method: request.method(),
        path: &path,
        host: host.as_ref().map(|host| host.as_str()),
        headers: request.headers(),
        claims: None,
        is_grpc: exchange.is_grpc,
    };
    let decision = policies.request(&visitor.at(door.address.port()), &asked);
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

//! What routes and policies would make of a request that nobody has sent: by the functions that those are asked by which are sent.

use http::Request;
use http::header::LOCATION;

use super::answer::{Refusal, is_grpc};
use super::authorize::Shown;
use super::talk::Dialect;
use super::{authorize, forward, head, tokens};
use crate::model::Service;
use crate::policy::authorization;
use crate::policy::jwt::Rules;
use crate::proxy::Proxy;
use crate::route::{Backend, Matched};
use crate::snapshot::Snapshot;

/// A request that a rule fits.
#[derive(Debug)]
pub(in crate::proxy) struct Routed<'s> {
    pub(in crate::proxy) matched: Matched<'s>,
    /// What the agent answers itself.
    pub(in crate::proxy) own_answer: Option<String>,
    /// The request as each backend would get it, or why it cannot.
    pub(in crate::proxy) sent: Vec<(&'s Backend, Result<Request<()>, String>)>,
}

/// What the routes of the port make of the request; nothing where none is about it.
///
/// # Errors
/// Why the agent refuses it.
pub(in crate::proxy) fn routed<'s>(
    snapshot: &'s Snapshot,
    (service, port): (Option<&'s Service>, u16),
    client_namespace: &str,
    request: &Request<()>,
) -> Result<Option<Routed<'s>>, String> {
    let told = |refusal: Refusal| refusal.detail;
    let authority = head::authority(request).map_err(|bad| bad.to_string())?;
    let found = forward::matched(snapshot, (service, port), client_namespace, request, authority.as_ref());
    let Some(matched) = found.map_err(told)? else { return Ok(None) };
    let own_answer = forward::own_answer(port, &matched, request, authority.as_ref()).map(|(_, answer)| {
        let to = answer.headers().get(LOCATION).map(|to| String::from_utf8_lossy(to.as_bytes()));
        let to = to.map_or_else(String::new, |to| format!(", to {to}"));
        format!("the agent answers it itself with {}{to}", answer.status().as_u16())
    });
    let sent = matched.rule.backends.iter().map(|backend| {
        let sent = forward::modified(request.clone(), &matched, backend, authority.clone(), Dialect::Http1);
        (backend, sent.map_err(told))
    });
    let sent = sent.collect();
    Ok(Some(Routed { matched, own_answer, sent }))
}

/// Shows the request as policies would be asked about it, where this is said of tokens.
///
/// # Errors
/// How it would be answered instead, and why.
pub(in crate::proxy) fn as_policies_see_it<T>(
    proxy: &Proxy,
    tokens: Option<&Rules>,
    request: &Request<()>,
    ask: impl FnOnce(&authorization::Request<'_>) -> T,
) -> Result<T, String> {
    let mut request = request.clone();
    let is_grpc = is_grpc(request.headers());
    let claims = match tokens {
        Some(rules) => tokens::taken_now(proxy, rules, &mut request)
            .map_err(|why| format!("answered with 401 by {}: {why}", rules.policy))?,
        None => None,
    };
    let shown = Shown { claims: claims.as_ref(), is_grpc };
    authorize::as_policies_see_it(&proxy.settings.paths, &request, shown, ask)
        .map_err(|why| format!("answered with 400: {why}"))
}

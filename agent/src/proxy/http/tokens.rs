//! What requests show as tokens: held against what the endpoint's pod says of them, and made into what its application gets.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::Request;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::answer::Refusal;
use super::exchange::Exchange;
use crate::model::Name;
use crate::policy::jwt::{self, Accepted, Invalid, Rules};
use crate::proxy::Proxy;
use crate::proxy::admission;
use crate::telemetry::RequestEnd;

/// What the token of the request says, if it shows one; of the request what the application is to get is left.
///
/// # Errors
/// When it shows one that does not hold.
pub(super) async fn taken<B>(
    proxy: &Proxy,
    rules: &Rules,
    exchange: &mut Exchange,
    request: &mut Request<B>,
) -> Result<Option<Map<String, Value>>, Refusal> {
    let since = Instant::now();
    let checked = loop {
        let mut told = 0;
        let keys = |address: &Name| {
            let held = proxy.jwks.held(address);
            told = held.told;
            held.keys
        };
        match rules.check(request.headers(), request.uri(), keys, now()) {
            // Its issuer may have another key by now. On the heap: hardly any request waits for one.
            Err(jwt::Refusal { outdated: Some(address), .. })
                if Box::pin(proxy.jwks.newer(address, told, since)).await => {}
            checked => break checked,
        }
    };
    let accepted = checked.map_err(|refusal| refused(proxy, rules, exchange, &refusal.why))?;
    left(rules, accepted, request).map_err(|why| refused(proxy, rules, exchange, &why))
}

/// The same by the keys that are there, for a request that nobody has sent.
///
/// # Errors
/// Why it would be refused.
pub(super) fn taken_now<B>(
    proxy: &Proxy,
    rules: &Rules,
    request: &mut Request<B>,
) -> Result<Option<Map<String, Value>>, Invalid> {
    let keys = |address: &Name| proxy.jwks.held(address).keys;
    let checked = rules.check(request.headers(), request.uri(), keys, now());
    left(rules, checked.map_err(|refusal| refusal.why)?, request)
}

/// Leaves of the request what the application is to get; what its token says.
fn left<B>(
    rules: &Rules,
    accepted: Option<Accepted<'_>>,
    request: &mut Request<B>,
) -> Result<Option<Map<String, Value>>, Invalid> {
    let mut uri = std::mem::take(request.uri_mut());
    let applied = rules.apply(accepted.as_ref(), request.headers_mut(), &mut uri);
    *request.uri_mut() = uri;
    applied?;
    Ok(accepted.map(|accepted| accepted.claims))
}

/// In seconds since 1970. Before that nothing has been signed.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Who shows a bad token may know what is wrong with it, and nothing of policies.
fn refused(proxy: &Proxy, rules: &Rules, exchange: &mut Exchange, why: &Invalid) -> Refusal {
    let ruling = admission::denied(&rules.policy, &why.to_string());
    let detail = ruling.detail.clone().unwrap_or_default();
    exchange.ruling = Some(ruling);
    let told = match why {
        _ if proxy.settings.names_policies => detail,
        Invalid::Rules(_) => "tokens cannot be checked".to_owned(),
        why => why.to_string(),
    };
    Refusal::new(RequestEnd::Unauthenticated, told)
}

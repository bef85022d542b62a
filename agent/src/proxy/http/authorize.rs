//! Whether policies let a request in: asked at the endpoint's own node, of the request as the application would get it; and asked again
//! while it is under way.

use http::{Request, StatusCode};
use serde_json::{Map, Value};

use super::answer::Refusal;
use super::body::RequestBody;
use super::exchange::Exchange;
use super::{head, tokens};
use crate::policy::authorization::{self, Connection, Decision, PathNormalisation, Set};
use crate::proxy::Proxy;
use crate::proxy::admission::{self, Caller, Door};
use crate::snapshot::Snapshot;
use crate::telemetry::{RequestEnd, RulingOf};

/// A request's head as policies are asked about it, kept so that they can be asked again.
#[derive(Debug)]
pub(in crate::proxy) struct Kept {
    head: Request<()>,
    /// What its token said when it came.
    claims: Option<Map<String, Value>>,
    is_grpc: bool,
    paths: PathNormalisation,
}

/// Asks the policies of the pod; the exchange has what they say. The request becomes what the application is to get; its head is kept
/// where policies want to see requests, or whatever they say if it `is_kept`. Of what becomes bytes none is: it is held to what policies say
/// of those.
///
/// # Errors
/// When they deny it, or what it asks to become, when it shows a token that does not hold, or when its path could be understood in more
/// than one way.
pub(super) async fn request(
    proxy: &Proxy,
    snapshot: &Snapshot,
    (door, visitor): (&Door, &Caller),
    exchange: &mut Exchange,
    request: &mut Request<RequestBody>,
    is_kept: bool,
) -> Result<Option<Kept>, Refusal> {
    if let Some(authority) = request.uri().authority().cloned() {
        // It may have been handed over to go elsewhere, which in HTTP/2 is without a Host.
        head::say_host(request.headers_mut(), &authority)
            .map_err(|bad| Refusal::new(RequestEnd::BadRequest, bad.to_string()))?;
    }
    if !door.is_known(snapshot) {
        return Err(refused(proxy, &None));
    }
    let claims = match door.tokens(snapshot) {
        Some(rules) => {
            request.body_mut().clear_trailers(rules.clone());
            tokens::taken(proxy, rules, exchange, request).await?
        }
        None => None,
    };
    let (is_grpc, paths) = (exchange.is_grpc, proxy.settings.paths);
    let policies = door.policies(snapshot);
    let port = door.address.port();
    if let Some(policies) = policies {
        let shown = Shown { claims: claims.as_ref(), is_grpc };
        let decision = decision(policies, &visitor.at(port), &paths, request, shown)
            .map_err(|why| Refusal::new(RequestEnd::BadRequest, why))?;
        exchange.ruling = admission::of(&decision);
        if !decision.is_allowed() {
            return Err(refused(proxy, &exchange.ruling));
        }
    }
    if head::asks_for_tunnel(request) {
        return tunnel(proxy, snapshot, (door, visitor), exchange).map(|()| None);
    }
    let is_kept = is_kept || policies.is_some_and(|policies| policies.needs_requests(port));
    Ok(is_kept.then(|| Kept { head: head::bare(request), claims, is_grpc, paths }))
}

/// Whether a connection may become bytes by CONNECT. There may be requests among them, to a server that agrees to anything, and nobody
/// would look at these: so they are let in where bytes are, and nobody's tokens are looked at.
fn tunnel(
    proxy: &Proxy,
    snapshot: &Snapshot,
    (door, visitor): (&Door, &Caller),
    exchange: &mut Exchange,
) -> Result<(), Refusal> {
    let ruling = match door.tokens(snapshot) {
        Some(rules) => {
            Some(admission::denied(&rules.policy, "in what a CONNECT becomes nobody looks at tokens"))
        }
        None => door.of_bytes(snapshot, visitor),
    };
    if !ruling.as_ref().is_some_and(|ruling| ruling.is_denied) {
        return Ok(());
    }
    exchange.ruling = ruling;
    let refusal = refused(proxy, &exchange.ruling);
    Err(Refusal { status: Some(StatusCode::METHOD_NOT_ALLOWED), ..refusal })
}

/// What a client is told whose request policies deny.
pub(super) fn refused(proxy: &Proxy, ruling: &RulingOf) -> Refusal {
    let names_it = proxy.settings.names_policies;
    let detail = ruling.as_deref().filter(|_| names_it).and_then(|ruling| ruling.detail.clone());
    Refusal::new(
        RequestEnd::Denied,
        detail.unwrap_or_else(|| "policies do not let this request in".to_owned()),
    )
}

impl Kept {
    /// What the policies say of it, where they deny it.
    pub(in crate::proxy) fn denied(&self, policies: &Set, connection: &Connection<'_>) -> Option<RulingOf> {
        let shown = Shown { claims: self.claims.as_ref(), is_grpc: self.is_grpc };
        match decision(policies, connection, &self.paths, &self.head, shown) {
            Ok(decision) => (!decision.is_allowed()).then(|| admission::of(&decision)),
            // It began while nobody wanted to know its path.
            Err(_ambiguous) => Some(None),
        }
    }
}

fn decision<B>(
    policies: &Set,
    connection: &Connection<'_>,
    paths: &PathNormalisation,
    request: &Request<B>,
    shown: Shown<'_>,
) -> Result<Decision, String> {
    as_policies_see_it(paths, request, shown, |asked| policies.request(connection, asked))
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
        ignores_path_case: paths.case_insensitive,
        host: host.as_ref().map(|host| host.as_str()),
        headers: request.headers(),
        claims,
        is_grpc,
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::policy::authorization::{Action, Applied, Matcher, Operation, PathPattern, Policy, Rule};

    /// `Deny paths: [/Admin]`, asked about a path; whether it is let in.
    fn lets_in(settings: PathNormalisation, path: &str) -> bool {
        let paths = Matcher { any_of: vec![PathPattern::Exact("/Admin".into())], none_of: Vec::new() };
        let rule = Rule { to: vec![Operation { paths, ..Operation::default() }], ..Rule::default() };
        let policy = Policy {
            name: "no-admin".into(),
            action: Action::Deny,
            dry_run: false,
            rules: vec![rule],
            invalid: None,
        };
        let policies = Set::new(vec![Applied { policy: Arc::new(policy), ports: None }]);
        let connection = Connection { identity: None, address: [10, 0, 0, 1].into(), port: 80 };
        let request = Request::get(path).header("host", "shop").body(()).unwrap();
        let shown = Shown { claims: None, is_grpc: false };
        decision(&policies, &connection, &settings, &request, shown).unwrap().is_allowed()
    }

    #[test]
    fn a_rule_with_a_capital_letter_denies_also_where_case_is_ignored() {
        let told_apart = PathNormalisation::default();
        let caseless = PathNormalisation { case_insensitive: true, ..told_apart };
        let check = |path, expected| {
            assert_eq!([told_apart, caseless].map(|settings| lets_in(settings, path)), expected, "{path}");
        };
        check("/Admin", [false, false]);
        check("/admin", [true, false]);
        check("/%41dmin", [false, false]);
        check("/Admin/x", [true, true]);
    }
}

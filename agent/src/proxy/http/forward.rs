//! One request's way: which rule it falls under, what that makes of it, which endpoint it is sent to, and its answer.

use std::sync::Arc;

use http::header::{CONNECTION, LOCATION, ORIGIN};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;

use super::answer::Refusal;
use super::body::{RequestBody, ResponseBody};
use super::exchange::Exchange;
use super::quiet::Quiet;
use super::send::{self, Way, Wishes};
use super::session::Session;
use super::talk::{Dialect, Talk};
use super::upgrade::{ClientEnd, Passed};
use super::{head, mirror};
use crate::model::Service;
use crate::route::{Backend, Matched, RequestHead, Rule, UrlRewrite};
use crate::snapshot::Snapshot;
use crate::telemetry::RequestEnd;

/// Answers the request, one way or another.
pub(super) async fn answer(
    talk: Arc<Talk>,
    request: Request<Incoming>,
    dialect: Dialect,
) -> Response<ResponseBody> {
    let mut exchange = Exchange::begin(&talk.proxy.telemetry, &request);
    exchange.talk = Some(talk.clone());
    exchange.noise = talk.quiet.as_ref().map(Quiet::begun);
    let snapshot = talk.proxy.snapshot.load_full();
    let outcome = carry(&talk, &snapshot, &mut exchange, request, dialect).await;
    let mut response = match outcome {
        Ok(Outcome::Passed(passed)) => {
            let (response, bridge) = passed.answer(exchange);
            if let Some(bridge) = bridge {
                talk.here.upstreams.tasks.spawn(bridge);
                return response;
            }
            response
        }
        Ok(Outcome::Own(end, response)) => exchange.answered(end, response),
        Err(refusal) => exchange.refused(&refusal),
    };
    if dialect == Dialect::Http1 && talk.is_leaving() {
        // The client's next request is on a connection that another agent takes, or none.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What becomes of a request that is not refused.
enum Outcome {
    /// An upstream answers.
    Passed(Passed),
    /// The rule itself is the answer.
    Own(RequestEnd, Response<ResponseBody>),
}

async fn carry(
    talk: &Arc<Talk>,
    snapshot: &Arc<Snapshot>,
    exchange: &mut Exchange,
    mut request: Request<Incoming>,
    dialect: Dialect,
) -> Result<Outcome, Refusal> {
    let authority =
        head::read(&mut request).map_err(|bad| Refusal::new(RequestEnd::BadRequest, bad.to_string()))?;
    exchange.authority = authority.clone();
    let service = talk.captured.service(snapshot);
    exchange.service = service.map(|service| service.id.clone());
    let namespace = &talk.captured.net.workload.pod.namespace;
    let dialled_port = (service, talk.captured.port());
    let matched = matched(snapshot, dialled_port, namespace, &request, authority.as_ref())?;
    exchange.rule = matched.map(|matched| matched.rule.clone());
    let Some(matched) = matched else {
        // No route says anything: it goes where it was sent.
        let ways = service.into_iter().map(|service| ((), service, talk.captured.port()));
        let session = Session::among(None, ways, request.headers());
        let kept = session.as_ref().and_then(Session::way);
        let way = kept.map_or_else(|| dialled(talk, service), |((), way)| way);
        let (request, client_end) = outgoing(exchange, request, dialect);
        let request = aimed(request, authority, None, dialect)?;
        let mut response =
            send::send(talk, snapshot, exchange, way, request, dialect, Wishes::default()).await?;
        if let (Some(session), Some(endpoint)) = (session, exchange.upstream) {
            session.keep(way, endpoint, response.headers_mut());
        }
        return Ok(Outcome::Passed(Passed::of(response, client_end)));
    };
    if let Some((end, response)) = own_answer(talk.captured.port(), &matched, &request, authority.as_ref()) {
        return Ok(Outcome::Own(end, response));
    }
    let origin = request.headers().get(ORIGIN).cloned();
    let ways = matched.rule.backends.iter().filter_map(|backend| {
        let (service, port) = snapshot.backend(&backend.target).ok()?;
        Some((backend, service, port))
    });
    let session = Session::among(Some(matched.rule), ways, request.headers());
    let (backend, way) = match session.as_ref().and_then(Session::way) {
        Some(kept) => kept,
        None => chosen(talk, matched.rule, snapshot)?,
    };
    let (mut request, client_end) = outgoing(exchange, request, dialect);
    mirror::send(talk, snapshot, matched.rule, &mut request, authority.as_ref(), dialect);
    let request = modified(request, &matched, backend, authority, dialect)?;
    let mut response =
        send::send(talk, snapshot, exchange, way, request, dialect, Wishes::of(matched.rule)).await?;
    let headers = response.headers_mut();
    for filters in [&backend.filters, &matched.rule.filters] {
        filters.respond(origin.as_ref(), headers);
    }
    if let (Some(session), Some(endpoint)) = (session, exchange.upstream) {
        session.keep(way, endpoint, headers);
    }
    Ok(Outcome::Passed(Passed::of(response, client_end)))
}

/// The rule that the request falls under; none where no route says anything of its port.
pub(super) fn matched<'s, B>(
    snapshot: &'s Snapshot,
    (service, port): (Option<&'s Service>, u16),
    client_namespace: &str,
    request: &Request<B>,
    authority: Option<&Authority>,
) -> Result<Option<Matched<'s>>, Refusal> {
    let routed = || {
        let service = service?;
        Some((service, snapshot.routes.get(&service.id)?.http(port, client_namespace)?))
    };
    let Some((service, table)) = routed() else { return Ok(None) };
    match table.find(&request_head(request, authority)) {
        Some(matched) => Ok(Some(matched)),
        None => Err(Refusal::new(
            RequestEnd::NoRoute,
            format!("no rule of the routes of {} fits the request", service.id),
        )),
    }
}

fn request_head<'a, B>(request: &'a Request<B>, authority: Option<&'a Authority>) -> RequestHead<'a> {
    RequestHead {
        method: request.method(),
        host: authority.map_or("", Authority::host),
        path: request.uri().path(),
        query: request.uri().query(),
        headers: request.headers(),
    }
}

/// The answer of rules that send the client elsewhere, or tell a browser what it may do.
pub(super) fn own_answer<B>(
    port: u16,
    matched: &Matched<'_>,
    request: &Request<B>,
    authority: Option<&Authority>,
) -> Option<(RequestEnd, Response<ResponseBody>)> {
    let filters = &matched.rule.filters;
    let preflight = || filters.cors.as_ref()?.preflight(request.headers());
    if request.method() == Method::OPTIONS
        && let Some(headers) = preflight()
    {
        let mut response = Response::new(ResponseBody::Own(None));
        *response.status_mut() = StatusCode::NO_CONTENT;
        if let Some(modifier) = &filters.response_headers {
            modifier.apply(response.headers_mut());
        }
        response.headers_mut().extend(headers);
        return Some((RequestEnd::Preflight, response));
    }
    let redirect = filters.redirect.as_ref()?;
    let head = request_head(request, authority);
    let host = authority.map_or("", Authority::as_str);
    let (status, location) = redirect.answer(&head, host, "http", port, matched.prefix);
    let mut response = Response::new(ResponseBody::Own(None));
    *response.status_mut() = status;
    response.headers_mut().insert(LOCATION, location);
    filters.respond(request.headers().get(ORIGIN), response.headers_mut());
    Some((RequestEnd::Redirected, response))
}

/// The backend that the rule's weights give the request.
fn chosen<'s>(
    talk: &Talk,
    rule: &'s Rule,
    snapshot: &'s Snapshot,
) -> Result<(&'s Backend, Way<'s>), Refusal> {
    let Some(backend) = rule.backend(talk.here.shares.next()) else {
        let detail = format!("{} has no backend with a weight for this request", rule.route);
        return Err(Refusal::new(RequestEnd::NoBackend, detail));
    };
    match snapshot.backend(&backend.target) {
        Ok((service, port)) => Ok((backend, Way::Service { service, port, kept: None })),
        Err(why) => Err(Refusal::new(RequestEnd::InvalidBackend, format!("{}: {why}", rule.route))),
    }
}

/// Where the client sent it.
fn dialled<'s>(talk: &Talk, service: Option<&'s Service>) -> Way<'s> {
    match service {
        Some(service) => Way::Service { service, port: talk.captured.port(), kept: None },
        // A pod's own address: that pod and no other, ready or not.
        None => Way::Pod(talk.captured.dialled),
    }
}

/// The request without what was meant for this hop alone and with its place in a trace, and the client's end of what may become another protocol.
pub(super) fn outgoing(
    exchange: &Exchange,
    request: Request<Incoming>,
    dialect: Dialect,
) -> (Request<RequestBody>, Option<ClientEnd>) {
    let upload = exchange.upload.clone();
    let mut request = request.map(|body| RequestBody::new(body, upload));
    let client_end = head::asks_for_upgrade(&request).then(|| ClientEnd::of(&mut request));
    let keeps_upgrade = client_end.is_some() && request.method() != Method::CONNECT;
    head::strip_hop_by_hop(request.headers_mut(), keeps_upgrade && dialect == Dialect::Http1);
    if let Some(trace) = &exchange.trace {
        trace.pass_on(request.headers_mut());
    }
    (request, client_end)
}

/// The request as the rule and its backend want it.
pub(super) fn modified<B>(
    mut request: Request<B>,
    matched: &Matched<'_>,
    backend: &Backend,
    mut authority: Option<Authority>,
    dialect: Dialect,
) -> Result<Request<B>, Refusal> {
    let mut path = None;
    for filters in [&matched.rule.filters, &backend.filters] {
        if let Some(modifier) = &filters.request_headers {
            modifier.apply(request.headers_mut());
        }
        if let Some(rewrite) = &filters.rewrite {
            path = rewritten(request.uri(), rewrite, matched.prefix)?.or(path);
            if let Some(hostname) = &rewrite.hostname {
                authority = Some(Authority::try_from(&**hostname).map_err(|_| unwritable(hostname))?);
            }
        }
    }
    aimed(request, authority, path, dialect)
}

fn rewritten(
    target: &Uri,
    rewrite: &UrlRewrite,
    prefix: Option<&str>,
) -> Result<Option<PathAndQuery>, Refusal> {
    let Some(path) = rewrite.path(target.path(), prefix) else { return Ok(None) };
    let whole = match target.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    PathAndQuery::try_from(whole.as_str()).map(Some).map_err(|_| unwritable(&whole))
}

pub(super) fn aimed<B>(
    mut request: Request<B>,
    authority: Option<Authority>,
    path: Option<PathAndQuery>,
    dialect: Dialect,
) -> Result<Request<B>, Refusal> {
    head::aim(&mut request, dialect, authority.as_ref(), path)
        .map_err(|error| Refusal::new(RequestEnd::BadRequest, error.to_string()))?;
    Ok(request)
}

fn unwritable(text: &str) -> Refusal {
    Refusal::new(
        RequestEnd::InvalidBackend,
        format!("the rule makes {text:?} of the request, which is no address"),
    )
}

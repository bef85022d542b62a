//! A request that knows where it wants to go, sent to one endpoint after another until one answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, Request, Response, Uri};
use hyper::body::Incoming;
use tokio::time::{sleep, timeout, timeout_at};
use tracing::debug;

use super::answer::Refusal;
use super::body::{OnceMore, RequestBody};
use super::endpoints::Endpoints;
use super::exchange::Exchange;
use super::mirror::MIRRORED;
use super::pool::{Lease, Loan};
use super::retry::{Retries, Wish, mark_in_vain};
use super::talk::{Dialect, Talk};
use super::{authorize, blame, deadline, fault, head, interim, limit};
use crate::balance::{budget, caps};
use crate::model::{Limited, Service, ServicePort, TrafficSettings, UnderWay};
use crate::policy::Standing;
use crate::proxy::admission::{self, Entry};
use crate::proxy::let_in;
use crate::proxy::reach::{self, InTheWay};
use crate::route::{Rule, Timeouts};
use crate::sentence::in_one_sentence;
use crate::snapshot::Snapshot;
use crate::telemetry::RequestEnd;

/// Where a request is to go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way<'s> {
    /// To this pod.
    Pod(SocketAddr),
    /// To an endpoint of a Service.
    Service {
        service: &'s Service,
        port: u16,
        /// The one that the request's session is with.
        kept: Option<SocketAddr>,
    },
}

impl<'s> Way<'s> {
    /// The Service and its port, if it leads to one.
    fn port(self) -> Option<(&'s Service, &'s ServicePort)> {
        match self {
            Self::Pod(_) => None,
            Self::Service { service, port, .. } => Some((service, service.port(port)?)),
        }
    }
}

/// What a rule says of how long and how often its requests are tried.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wishes<'s> {
    timeouts: Timeouts,
    retry: Option<Wish<'s>>,
}

impl<'s> Wishes<'s> {
    pub(super) fn of(rule: &'s Rule) -> Self {
        Self { timeouts: rule.timeouts, retry: rule.retry.as_ref().map(Wish::of_rule) }
    }
}

/// How long and how often a request is tried.
#[derive(Clone, Copy, Debug)]
struct Patience<'s> {
    /// When the answer must be there.
    until: Option<Instant>,
    /// When it is of no use to the client any more, by what that says.
    asked: Option<Instant>,
    /// How long one attempt may take.
    attempt: Option<Duration>,
    retry: Option<Wish<'s>>,
}

impl<'s> Patience<'s> {
    /// By the rule, by what the port says where that says nothing or there is none, and by how long the client waits.
    fn of(
        wishes: Wishes<'s>,
        settings: Option<&'s TrafficSettings>,
        request: &Request<RequestBody>,
        (began, is_grpc): (Instant, bool),
    ) -> Self {
        let Wishes { timeouts, retry } = wishes;
        let after = |limit: Duration| began + limit;
        let ports = settings.map(|settings| settings.timeouts).unwrap_or_default();
        // Nobody waits for the answer to a copy.
        let is_copy = || request.headers().contains_key(MIRRORED);
        let wish =
            || settings.and_then(|it| Wish::of_port(&it.retries, request.method())).filter(|_| !is_copy());
        let until = timeouts.request.or(ports.request).map(after);
        let asked = deadline::asked(request.headers(), is_grpc).map(after);
        Self {
            until: [until, asked].into_iter().flatten().min(),
            asked,
            attempt: timeouts.backend_request.or(ports.per_try),
            retry: retry.or_else(wish),
        }
    }

    /// When all of the answer to an attempt that begins then must be there, and what it counts as otherwise. Of gRPC that is all of a
    /// stream, which rules do not limit.
    fn whole(&self, began: Instant, is_grpc: bool) -> Option<(Instant, RequestEnd)> {
        let until = if is_grpc { self.asked } else { self.until };
        let attempt =
            self.attempt.filter(|_| !is_grpc).map(|limit| (began + limit, RequestEnd::UpstreamTimeout));
        let limits = [until.map(|until| (until, RequestEnd::RequestTimeout)), attempt];
        limits.into_iter().flatten().min_by_key(|(until, _)| *until)
    }

    /// How long the answer to an attempt is of use that begins now.
    fn left(&self, now: Instant, is_grpc: bool) -> Option<Duration> {
        self.whole(now, is_grpc).map(|(until, _)| until.saturating_duration_since(now))
    }

    /// A client that will not wait for longer says nothing of the endpoint.
    fn is_clients(&self) -> bool {
        self.asked.is_some() && self.asked == self.until
    }
}

/// The head of the answer. The exchange has the connection that its body comes on.
pub(super) async fn send(
    talk: &Arc<Talk>,
    snapshot: &Snapshot,
    exchange: &mut Exchange,
    way: Way<'_>,
    mut request: Request<RequestBody>,
    dialect: Dialect,
    wishes: Wishes<'_>,
) -> Result<Response<Incoming>, Refusal> {
    if let Way::Service { service, port, .. } = way {
        exchange.backend = Some((service.id.clone(), port));
    }
    let port = way.port();
    let settings = port.map(|(_, port)| &*port.traffic);
    let patience = Patience::of(wishes, settings, &request, (exchange.began(), exchange.is_grpc));
    if let Some((service, port)) = port {
        exchange.place = caps::enter(port, UnderWay::Requests).map_err(|full| {
            Refusal::new(RequestEnd::Overloaded, format!("{}:{}: {full}", service.id, port.port))
        })?;
    }
    let sending = Sending { talk, snapshot, dialect, patience };
    let mut endpoints = Endpoints::of(talk, way, &request);
    if settings.is_some_and(|settings| settings.tls.is_some()) {
        head::encrypted(&mut request);
    }
    let answer = async {
        if let Some((service, port)) = port {
            // It counts as time that the request takes.
            fault::inject(service, &port.traffic.faults, request.headers()).await?;
        }
        sending.answer(exchange, &mut endpoints, request).await
    };
    match patience.until {
        None => answer.await,
        // Nobody waits for what would be sent now.
        Some(until) if until <= Instant::now() => Err(out_of_time()),
        Some(until) => timeout_at(until.into(), answer).await.unwrap_or_else(|_elapsed| {
            // Where it was with none, between two attempts, there is none to blame.
            if patience.is_clients() {
                endpoints.gave_up();
            } else {
                endpoints.was_too_slow();
            }
            Err(out_of_time())
        }),
    }
}

fn out_of_time() -> Refusal {
    Refusal::new(RequestEnd::RequestTimeout, "no answer within the time that the request is given")
}

/// What stays the same from one attempt to the next.
struct Sending<'a> {
    talk: &'a Arc<Talk>,
    snapshot: &'a Snapshot,
    dialect: Dialect,
    patience: Patience<'a>,
}

impl Sending<'_> {
    async fn answer(
        &self,
        exchange: &mut Exchange,
        endpoints: &mut Endpoints<'_>,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, Refusal> {
        let mut retries = Retries::of(self.patience.retry, self.patience.until, request.headers());
        if retries.keep_body(&request) {
            request = kept(request).await?;
        }
        loop {
            let (to, load) = endpoints.next()?;
            exchange.attempts += 1;
            exchange.upstream = Some(to);
            exchange.load = load;
            // Only what can be made again can be sent again.
            let again = if retries.are_left() { copy(&request) } else { None };
            let mut answer =
                match self.attempt(exchange, (to, endpoints.port().map(|(_, port)| port)), request).await {
                    Err(Failed::Unconnected(why, unsent)) => {
                        endpoints.failed(to, why);
                        request = *unsent;
                        continue;
                    }
                    Err(Failed::Broken(refusal)) => Err(refusal),
                    Ok(response) => Ok(response),
                };
            let verdict = blame::verdict(exchange, &answer, endpoints.wait_for_client());
            match verdict {
                Some(verdict) => endpoints.answered(exchange.asked, &answer, verdict),
                None => endpoints.no_verdict(),
            }
            let Some((service, port)) = endpoints.port() else { return answer };
            if !retries.has_failed(&answer, verdict) {
                if verdict.is_some() {
                    budget::answered(service);
                }
                return answer;
            }
            let wait = again.and_then(|again| Some((retries.wait(service, port, &answer)?, again)));
            exchange.retried_in_vain = retries.in_vain();
            let Some((wait, again)) = wait else {
                if let (Ok(response), Some(made)) = (&mut answer, retries.in_vain()) {
                    mark_in_vain(response.headers_mut(), made);
                }
                return answer;
            };
            request = again;
            retries.mark(request.headers_mut());
            // What comes of the answer is not read: its connection goes with it.
            exchange.loan = None;
            exchange.load = None;
            endpoints.avoid(to);
            sleep(wait).await;
        }
    }

    /// Sends the request to the endpoint, over a connection that stands or else a fresh one.
    async fn attempt(
        &self,
        exchange: &mut Exchange,
        (to, port): (SocketAddr, Option<&ServicePort>),
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, Failed> {
        let Self { talk, snapshot, dialect, .. } = self;
        let dialled = exchange.service.clone();
        let service = dialled.as_ref();
        let Admitted { standing, came } =
            self.admitted(exchange, to, &mut request).await.map_err(Failed::Broken)?;
        // The connection that stood and has not brought an answer. It keeps no place for that.
        let mut spent = None;
        loop {
            let mut lease = match talk.lease(snapshot, service, (to, port), *dialect, spent.as_ref()).await {
                Ok(lease) => lease,
                Err(why) => {
                    if let Some((uri, headers)) = came {
                        (*request.uri_mut(), *request.headers_mut()) = (uri, headers);
                    }
                    return Err(Failed::Unconnected(why, Box::new(request)));
                }
            };
            let told = talk.told(snapshot, service, to, &lease.assurance);
            exchange.tell(told);
            // A connection that stood may be gone by now. That loses no request that may be sent twice (RFC 9110, 9.2.2), and none that
            // the upstream has not begun with, which HTTP/2 has it say.
            let (is_reused, is_idempotent) = (lease.is_reused, request.method().is_idempotent());
            let may_be_repeated =
                is_reused && spent.is_none() && (is_idempotent || *dialect == Dialect::Http2);
            let once_more = if may_be_repeated { once_more(&mut request) } else { None };
            let now = Instant::now();
            exchange.asked = Some(now);
            if let Some(left) = self.patience.left(now, exchange.is_grpc) {
                deadline::tell(left, request.headers_mut(), exchange.is_grpc);
            }
            if !exchange.is_held() && talk.wants_its_head(snapshot, to) {
                let detail = format!("{to}: policies begin to want to see requests");
                return Err(Failed::Broken(Refusal::new(RequestEnd::UpstreamReset, detail)));
            }
            let answered = {
                let sent = std::pin::pin!(self.over(&mut lease, request));
                exchange.unless_denied(sent).await
            };
            match answered.map_err(|ruling| Failed::Broken(authorize::refused(&talk.proxy, &ruling)))? {
                Ok(mut response) => {
                    if let Some(standing) = &standing {
                        limit::tell(standing, response.headers_mut());
                    }
                    exchange.head(response.status().as_u16(), response.headers());
                    if let Some((until, end)) = self.patience.whole(now, exchange.is_grpc) {
                        exchange.limit(until, end);
                    }
                    exchange.loan = Some(Loan::new(&talk.here.upstreams, talk.key(to, port), lease));
                    return Ok(response);
                }
                Err(Unanswered::TooSlow) => {
                    let detail = format!("{to}: no answer within the time that an attempt is given");
                    return Err(Failed::Broken(Refusal::new(RequestEnd::UpstreamTimeout, detail)));
                }
                Err(Unanswered::Broken { error, unsent }) => {
                    let once_more = once_more.filter(|_| is_idempotent || blame::is_unprocessed(&error));
                    match unsent.map(|unsent| *unsent).or_else(|| begun_anew(once_more?)) {
                        Some(same) if is_reused && spent.is_none() => {
                            debug!(%to, %error, "a connection had died; trying a new one");
                            request = same;
                            spent = Some(Arc::downgrade(&lease.terms));
                        }
                        _ => {
                            let end = blame::blamed(&error);
                            let detail = format!("{to}: {}", in_one_sentence(&error));
                            return Err(Failed::Broken(Refusal::new(end, detail)));
                        }
                    }
                }
            }
        }
    }

    /// Whether an endpoint of this node takes the request, which becomes what its application is to get. Others are asked by their own
    /// agents.
    async fn admitted(
        &self,
        exchange: &mut Exchange,
        to: SocketAddr,
        request: &mut Request<RequestBody>,
    ) -> Result<Admitted, Refusal> {
        let (talk, snapshot) = (self.talk, self.snapshot);
        exchange.let_go();
        request.body_mut().let_go();
        let becomes_another = head::asks_for_upgrade(request);
        let is_asked = !snapshot.access.is_empty()
            || !snapshot.tokens.is_empty()
            || admission::is_limited(snapshot, to, Limited::Requests);
        if !is_asked && !becomes_another {
            return Ok(Admitted::default());
        }
        let Some((door, assurance)) = reach::door(&talk.proxy, snapshot, &talk.captured, to) else {
            return Ok(Admitted::default());
        };
        let visitor = talk.captured.caller();
        let came = door.tokens(snapshot).map(|_| (request.uri().clone(), request.headers().clone()));
        let asked =
            authorize::request(&talk.proxy, snapshot, (&door, &visitor), exchange, request, false).await;
        let admitted = asked.and_then(|kept| {
            let admission = admission::admit(snapshot, to, Limited::Requests, || visitor.source());
            Ok((limit::admitted(admission)?, kept))
        });
        let (standing, kept) = admitted.inspect_err(|_| {
            exchange.tell(talk.told(snapshot, exchange.service.as_ref(), to, &assurance));
        })?;
        if kept.is_some() || becomes_another {
            let policies = door.policies(snapshot).cloned();
            let entry = Entry { by_request: kept.is_some(), policies, ..Entry::default() };
            let let_in = let_in::Standing::new(door, visitor, assurance.security, entry);
            let let_in = let_in::Standing { request: kept, ..let_in };
            exchange.hold(&talk.here.let_in, &talk.proxy, let_in, request);
        }
        Ok(Admitted { standing, came })
    }

    async fn over(
        &self,
        lease: &mut Lease,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, Unanswered> {
        interim::listen(&mut request);
        let answer = lease.sender.send(request);
        let answer = match self.patience.attempt {
            None => answer.await,
            Some(limit) => timeout(limit, answer).await.map_err(|_elapsed| Unanswered::TooSlow)?,
        };
        answer.map_err(|mut failed| {
            let unsent = failed.take_message().map(Box::new);
            Unanswered::Broken { error: failed.into_error(), unsent }
        })
    }
}

/// A request that an endpoint takes.
#[derive(Default)]
struct Admitted {
    standing: Option<Standing>,
    /// Target and headers as it came with them, where it is not passed on with them: another endpoint's agent wants to see them.
    came: Option<(Uri, HeaderMap)>,
}

/// An attempt that came to nothing.
enum Failed {
    /// No connection: not a byte was sent, and another endpoint may do better.
    Unconnected(InTheWay, Box<Request<RequestBody>>),
    /// The endpoint has the request, or some of it.
    Broken(Refusal),
}

/// A connection brought no answer.
enum Unanswered {
    TooSlow,
    Broken {
        error: hyper::Error,
        /// The request, if nothing of it was sent.
        unsent: Option<Box<Request<RequestBody>>>,
    },
}

/// The request with the whole of its body.
async fn kept(request: Request<RequestBody>) -> Result<Request<RequestBody>, Refusal> {
    let (head, body) = request.into_parts();
    match body.kept().await {
        Ok(body) => Ok(Request::from_parts(head, body)),
        Err(error) => Err(Refusal::new(RequestEnd::ClientGone, in_one_sentence(&error))),
    }
}

/// The request once more, if it has no body that would have to be had twice.
fn copy(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    Some(head::copy(request, request.body().again()?))
}

/// The request once more, should its connection have gone.
fn once_more(request: &mut Request<RequestBody>) -> Option<Request<OnceMore>> {
    let body = request.body_mut().once_more()?;
    Some(head::copy(request, body))
}

fn begun_anew(once_more: Request<OnceMore>) -> Option<Request<RequestBody>> {
    let (head, body) = once_more.into_parts();
    Some(Request::from_parts(head, body.begin()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{RetrySettings, TrafficTimeouts};
    use crate::route::{Retry, TimeLimit};

    #[test]
    fn a_rule_says_for_itself_what_it_says_the_port_the_rest_and_a_client_how_long_it_waits() {
        let second = Duration::from_secs(1);
        let settings = TrafficSettings {
            timeouts: TrafficTimeouts {
                request: Some(second * 9),
                per_try: Some(second * 3),
                ..TrafficTimeouts::default()
            },
            retries: RetrySettings { attempts: 4, ..RetrySettings::default() },
            ..TrafficSettings::default()
        };
        let retry = Retry { codes: Vec::new(), attempts: 1, backoff: None };
        let rule = Wishes {
            timeouts: Timeouts {
                request: TimeLimit::After(second),
                backend_request: TimeLimit::After(second * 2),
            },
            retry: Some(Wish::of_rule(&retry)),
        };
        let check = |wishes, settings, headers: &[(&'static str, &str)], expected: (_, _, _, bool)| {
            let mut request = Request::new(RequestBody::empty());
            for (name, value) in headers {
                request.headers_mut().insert(*name, http::HeaderValue::from_str(value).unwrap());
            }
            let began = Instant::now();
            let patience = Patience::of(wishes, settings, &request, (began, false));
            let until = patience.until.map(|until| (until - began).as_secs());
            let attempt = patience.attempt.map(|limit| limit.as_secs());
            let attempts = patience.retry.map(|wish| wish.attempts);
            assert_eq!((until, attempt, attempts, patience.is_clients()), expected, "{headers:?}");
        };
        let (nothing, some) = (Some(&TrafficSettings::default()), Some(&settings));
        check(Wishes::default(), None, &[], (None, None, None, false));
        check(Wishes::default(), nothing, &[], (None, None, None, false));
        check(Wishes::default(), some, &[], (Some(9), Some(3), Some(4), false));
        // A copy.
        check(Wishes::default(), some, &[(MIRRORED, "true")], (Some(9), Some(3), None, false));
        check(rule, some, &[], (Some(1), Some(2), Some(1), false));
        let whole_alone = Timeouts { backend_request: TimeLimit::Unsaid, ..rule.timeouts };
        check(Wishes { timeouts: whole_alone, ..rule }, some, &[], (Some(1), Some(3), Some(1), false));
        let never = Timeouts { request: TimeLimit::Never, backend_request: TimeLimit::Never };
        check(Wishes { timeouts: never, ..rule }, some, &[], (None, None, Some(1), false));
        // Whoever waits for less has it.
        check(Wishes::default(), None, &[("undermesh-timeout-ms", "5000")], (Some(5), None, None, true));
        check(rule, some, &[("undermesh-timeout-ms", "5000")], (Some(1), Some(2), Some(1), false));
        check(
            Wishes::default(),
            some,
            &[("undermesh-timeout-ms", "5000")],
            (Some(5), Some(3), Some(4), true),
        );
    }
}

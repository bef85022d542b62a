//! HTTP where somebody wants to know of an endpoint's requests: each is held to its policies and to what the endpoint takes, and handed
//! to the application as it came.
//!
//! One connection of a client is one connection to the application, as it would be without the agent: what becomes of the one
//! becomes of the other. Nothing is routed, retried or pooled here; that was for the client's side to do.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, Version};
use hyper::body::Incoming;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, oneshot, watch};
use tracing::{debug, error};

use super::answer::Refusal;
use super::body::{RequestBody, ResponseBody};
use super::exchange::Exchange;
use super::forward::{aimed, outgoing};
use super::io::{Counted, Io, Stream};
use super::limit;
use super::pool::Sender;
use super::talk::{Dialect, Told};
use super::upgrade::Passed;
use super::{HttpLimits, authorize, blame, connect, head, interim, serve};
use crate::model::Limited;
use crate::proxy::admission::{Caller, Door, Entry};
use crate::proxy::detect::{self, Speech};
use crate::proxy::reach::{Assurance, Upstream};
use crate::proxy::relay::{Meter, relay};
use crate::proxy::tasks::Tasks;
use crate::proxy::tunnel::stream::{self, Ends};
use crate::proxy::worker::{Fate, Here};
use crate::proxy::{Proxy, admission, let_in};
use crate::sentence::in_one_sentence;
use crate::telemetry::{CloseReason, ConnectionFacts, RequestEnd};

/// A connection that a client has made to an endpoint whose requests are looked at.
#[derive(Debug)]
pub(in crate::proxy) struct Inbound {
    pub(in crate::proxy) proxy: Arc<Proxy>,
    pub(in crate::proxy) here: Arc<Here>,
    /// The endpoint.
    pub(in crate::proxy) door: Door,
    /// Who the client is.
    pub(in crate::proxy) visitor: Caller,
    /// For each side that reports, one at least.
    pub(in crate::proxy) facts: Vec<ConnectionFacts>,
    /// That of the pod for which this agent carries it.
    pub(in crate::proxy) fate: watch::Receiver<Fate>,
    /// Set once it has turned out to carry something else than requests.
    pub(in crate::proxy) carries_bytes: Arc<AtomicBool>,
}

impl Inbound {
    /// Carries the connection until one of the two ends it: request by request, if that is what it consists of, else as bytes. To know
    /// it, one of the two is waited for, however long it takes.
    pub(in crate::proxy) async fn carry(self, client: Upstream, application: TcpStream) {
        let open = |facts: &ConnectionFacts| self.proxy.telemetry.connection_opened(facts.clone());
        let meter = Meter::new(self.facts.iter().map(open));
        match client {
            Upstream::Socket(client) => match detect::between(client, application).await {
                Ok((speech @ (Speech::Http1 | Speech::Http2), client, application)) => {
                    self.requests((Stream::socket(client), speech), application, meter).await;
                }
                Ok((speech @ (Speech::Opaque | Speech::Silence), client, application)) => {
                    if self.is_denied_as_bytes(speech, &meter) {
                        return meter.close(CloseReason::Denied);
                    }
                    self.carries_bytes.store(true, Ordering::Relaxed);
                    let reason = relay(&client, &application, &meter).await;
                    drop((client, application));
                    meter.close(reason);
                }
                Err(error) => self.cannot_go_on(&error, meter),
            },
            Upstream::Tunnel(ends) => self.carry_stream(ends, application, meter).await,
        }
    }

    async fn carry_stream(self, mut ends: Ends, application: TcpStream, meter: Meter) {
        match detect::between_frames(&mut ends.recv, application).await {
            Ok((speech @ (Speech::Http1 | Speech::Http2), seen, application)) => {
                let client = Stream::tunnel(ends, seen, &self.here.upstreams.tasks);
                self.requests((client, speech), application, meter).await;
            }
            Ok((speech @ (Speech::Opaque | Speech::Silence), seen, mut application)) => {
                if self.is_denied_as_bytes(speech, &meter) {
                    return meter.close(CloseReason::Denied);
                }
                self.carries_bytes.store(true, Ordering::Relaxed);
                // What is in the way of it shows again when the rest is relayed.
                _ = application.write_all(&seen).await;
                _ = ends.recv.flow_control().release_capacity(seen.len());
                meter.sent(seen.len());
                let reason = stream::relay(&mut application, stream::Side::Server, &mut ends, &meter).await;
                drop((application, ends));
                meter.close(reason);
            }
            Err(error) => self.cannot_go_on(&error, meter),
        }
    }

    fn cannot_go_on(&self, error: &io::Error, meter: Meter) {
        error!(to = %self.door.address, %error, "cannot go on with a connection");
        meter.close(CloseReason::Internal);
    }

    /// Whether policies deny it now that it turns out to carry something else than requests.
    fn is_denied_as_bytes(&self, speech: Speech, meter: &Meter) -> bool {
        let snapshot = self.proxy.snapshot.load();
        let ruling = match self.door.tokens(&snapshot).filter(|rules| rules.make_headers()) {
            // To the application it may be a request all the same, that says what only tokens may.
            Some(rules) if speech == Speech::Opaque => {
                Some(admission::denied(&rules.policy, "it makes headers of claims, and this is not HTTP"))
            }
            _ => self.door.of_bytes(&snapshot, &self.visitor),
        };
        let Some(ruling) = ruling else { return false };
        meter.rule(&ruling);
        ruling.is_denied
    }

    async fn requests(self, (client, speech): (Stream, Speech), application: TcpStream, meter: Meter) {
        let application = Io::Left(Counted::new(Stream::socket(application), meter, None));
        let proxy = self.proxy.clone();
        let limits = &proxy.settings.http_limits;
        let (sender, is_over) = match begun(&self.here.upstreams.tasks, limits, speech, application).await {
            Ok(begun) => begun,
            Err(error) => {
                return debug!(to = %self.door.address, %error, "an application does not begin to speak HTTP");
            }
        };
        let Some(first) = self.facts.first() else { return };
        let assurance = Assurance { security: first.security, identity: first.source.identity.clone() };
        let to = self.door.address;
        let told = Told::new(&self.proxy.telemetry, to, assurance, self.facts.clone());
        let mut fate = self.fate.clone();
        let (told, sender, bridges) = (Arc::new(told), Mutex::new(sender), Tasks::default());
        let application = Arc::new(Application { inbound: self, told, sender, bridges: bridges.clone() });
        let answer = move |request| {
            let application = application.clone();
            async move { application.answer(request).await }
        };
        let is_over = async { _ = is_over.await };
        if speech == Speech::Http2 {
            let leave = async {
                tokio::select! {
                    () = is_over => {}
                    _ = fate.wait_for(|fate| *fate != Fate::Serve) => {}
                }
            };
            return serve::http2(limits, client, answer, leave).await;
        }
        // Closed between two requests, it could take one with it: until the application ends it, it is left.
        serve::http1(to, limits, client, answer, is_over).await;
        bridges.ended().await;
    }
}

/// What requests are handed to, and what breaks off when the application's connection does.
async fn begun(
    tasks: &Tasks,
    limits: &HttpLimits,
    speech: Speech,
    application: Io,
) -> hyper::Result<(Sender, oneshot::Receiver<Infallible>)> {
    let (over, is_over) = oneshot::channel();
    if speech == Speech::Http2 {
        let (sender, connection) = connect::http2(limits, application).await?;
        tasks.spawn(until_over(connection, over));
        return Ok((Sender::Http2(sender), is_over));
    }
    let (sender, connection) = connect::http1(limits, application).await?;
    tasks.spawn(until_over(connection, over));
    Ok((Sender::Http1(sender), is_over))
}

async fn until_over(connection: impl Future<Output = ()>, over: oneshot::Sender<Infallible>) {
    connection.await;
    drop(over);
}

/// The application at the other end of the connection.
struct Application {
    inbound: Inbound,
    told: Arc<Told>,
    /// HTTP/1 takes one request after the other.
    sender: Mutex<Sender>,
    /// What the connection goes on as where it becomes another protocol: it ends with it.
    bridges: Tasks,
}

impl Application {
    /// Answers the request; an error where the application gave none, which ends the client's connection or stream as it ended.
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<ResponseBody>, BrokenOff> {
        let mut exchange = Exchange::begin(&self.inbound.proxy.telemetry, &request);
        exchange.tell(self.told.clone());
        exchange.upstream = Some(self.inbound.door.address);
        match self.carry(&mut exchange, request).await {
            Ok(passed) => {
                let (response, bridge) = passed.answer(exchange);
                bridge.into_iter().for_each(|bridge| self.bridges.spawn(bridge));
                Ok(response)
            }
            Err(Unanswered::Refused(refusal)) => Ok(exchange.refused(&refusal)),
            Err(Unanswered::Broken(error)) => match blame::blamed(&error) {
                // What the client has sent is none, which it is told of.
                RequestEnd::BadRequest => {
                    Ok(exchange.refused(&Refusal::new(RequestEnd::BadRequest, in_one_sentence(&error))))
                }
                end => {
                    exchange.broke(end);
                    Err(error.into())
                }
            },
            // The application has said that it takes no more, and knows nothing of this one: its client may send it again.
            Err(Unanswered::Unsent) => {
                exchange.broke(RequestEnd::UpstreamReset);
                Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into())
            }
        }
    }

    async fn carry(
        &self,
        exchange: &mut Exchange,
        mut request: Request<Incoming>,
    ) -> Result<Passed, Unanswered> {
        let authority =
            head::read(&mut request).map_err(|bad| Refusal::new(RequestEnd::BadRequest, bad.to_string()))?;
        exchange.authority = authority.clone();
        let dialect = match request.version() {
            Version::HTTP_2 => Dialect::Http2,
            _ => Dialect::Http1,
        };
        // What a header names away is away before policies look, and before claims become headers.
        let (mut request, client_end) = outgoing(exchange, request, dialect);
        let Inbound { proxy, here, door, visitor, .. } = &self.inbound;
        let snapshot = proxy.snapshot.load_full();
        let kept =
            authorize::request(proxy, &snapshot, (door, visitor), exchange, &mut request, true).await?;
        let admission = admission::admit(&snapshot, door.address, Limited::Requests, || visitor.source());
        let standing = limit::admitted(admission)?;
        let policies = door.policies(&snapshot).cloned();
        drop(snapshot);
        let entry = Entry { by_request: kept.is_some(), policies, ..Entry::default() };
        let let_in = let_in::Standing::new(door.clone(), visitor.clone(), self.told.security(), entry);
        let let_in = let_in::Standing { request: kept, ..let_in };
        exchange.hold(&here.let_in, proxy, let_in, &mut request);
        let mut request = aimed(request, authority, None, dialect)?;
        interim::listen(&mut request);
        exchange.attempts = 1;
        let sent = std::pin::pin!(self.send(request));
        let answered = exchange.unless_denied(sent).await;
        let mut response = answered.map_err(|ruling| authorize::refused(proxy, &ruling))??;
        exchange.head(response.status().as_u16(), response.headers());
        if let Some(standing) = standing {
            limit::tell(&standing, response.headers_mut());
        }
        let closes = dialect == Dialect::Http1 && head::closes(&response);
        let mut passed = Passed::of(response, client_end);
        if let Passed::Plain(response) = &mut passed
            && closes
        {
            // The connection to the application goes, and with it this one.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(passed)
    }

    async fn send(&self, request: Request<RequestBody>) -> Result<Response<Incoming>, Unanswered> {
        let answer = {
            let mut sender = self.sender.lock().await;
            sender.ready().await?;
            sender.send(request)
        };
        answer.await.map_err(|mut failed| match failed.take_message() {
            Some(_unsent) => Unanswered::Unsent,
            None => Unanswered::Broken(failed.into_error()),
        })
    }
}

/// Why a client's connection or stream is broken off.
#[derive(Debug, thiserror::Error)]
enum BrokenOff {
    #[error("the application broke off")]
    Application(#[from] hyper::Error),
    /// A stream is reset with the reason that this has.
    #[error("the application takes no more")]
    Reset(#[from] h2::Error),
}

/// A request that the application has not answered.
enum Unanswered {
    Refused(Refusal),
    Broken(hyper::Error),
    /// The connection is gone, and nothing of the request was sent.
    Unsent,
}

impl From<Refusal> for Unanswered {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<hyper::Error> for Unanswered {
    fn from(error: hyper::Error) -> Self {
        Self::Broken(error)
    }
}

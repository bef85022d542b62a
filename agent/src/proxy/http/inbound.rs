//! HTTP at the server's side: each request is held to what the endpoint takes, and handed to the application as it came.
//!
//! One connection of a client is one connection to the application, as it would be without the agent: what becomes of the one
//! becomes of the other. Nothing is routed, retried or pooled here; that was for the client's side to do.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use http::{Request, Response, Version};
use hyper::body::Incoming;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, oneshot, watch};
use tracing::debug;

use super::answer::Refusal;
use super::body::{RequestBody, ResponseBody};
use super::exchange::Exchange;
use super::forward::{Outcome, aimed, outgoing, passed};
use super::io::{Counted, Stream};
use super::limit;
use super::pool::Sender;
use super::talk::{Dialect, Told};
use super::{connect, head, send, serve};
use crate::capture::PodNet;
use crate::model::{Limited, Name};
use crate::proxy::admission;
use crate::proxy::reach::Assurance;
use crate::proxy::relay::Meter;
use crate::proxy::tasks::Tasks;
use crate::proxy::worker::{Fate, Here};
use crate::proxy::{Proxy, detect::Speech};
use crate::telemetry::{ConnectionFacts, RequestEnd};

/// A connection that a client has made to an application of a pod, and on which it speaks HTTP.
#[derive(Debug)]
pub(in crate::proxy) struct Inbound {
    pub(in crate::proxy) proxy: Arc<Proxy>,
    pub(in crate::proxy) here: Arc<Here>,
    pub(in crate::proxy) net: Arc<PodNet>,
    /// The application's address.
    pub(in crate::proxy) to: SocketAddr,
    /// What the client is held to its limits as.
    pub(in crate::proxy) source: Name,
    pub(in crate::proxy) facts: ConnectionFacts,
    pub(in crate::proxy) fate: watch::Receiver<Fate>,
}

impl Inbound {
    /// Counts the connection from here on.
    pub(in crate::proxy) fn meter(&self) -> Meter {
        Meter::new(vec![self.proxy.telemetry.connection_opened(self.facts.clone())])
    }

    /// Carries the requests of the client to the application, until one of the two ends its connection.
    pub(in crate::proxy) async fn serve(
        self,
        (client, speech): (Stream, Speech),
        application: TcpStream,
        meter: Meter,
    ) {
        let application = Counted::new(Stream::socket(application), meter, None);
        let (sender, is_over) = match begun(&self.here.upstreams.tasks, speech, application).await {
            Ok(begun) => begun,
            Err(error) => {
                return debug!(pod = %self.net.pod, %error, "an application does not begin to speak HTTP");
            }
        };
        let assurance =
            Assurance { security: self.facts.security, identity: self.facts.source.identity.clone() };
        let told = Told::new(&self.proxy.telemetry, self.to, assurance, vec![self.facts.clone()]);
        let (pod, mut fate) = (self.net.pod.clone(), self.fate.clone());
        let application =
            Arc::new(Application { inbound: self, told: Arc::new(told), sender: Mutex::new(sender) });
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
            return serve::http2(client, answer, leave).await;
        }
        // Closed between two requests, it could take one with it: until the application ends it, it is left.
        serve::http1(&pod, client, answer, is_over).await;
    }
}

/// What requests are handed to, and what breaks off when the application's connection does.
async fn begun(
    tasks: &Tasks,
    speech: Speech,
    application: Counted,
) -> hyper::Result<(Sender, oneshot::Receiver<Infallible>)> {
    let (over, is_over) = oneshot::channel();
    let sender = if speech == Speech::Http2 {
        let (sender, connection) = connect::http2(tasks, application).await?;
        tasks.spawn(async move {
            connection.await;
            drop(over);
        });
        Sender::Http2(sender)
    } else {
        let (sender, connection) = connect::http1(application).await?;
        tasks.spawn(async move {
            connection.await;
            drop(over);
        });
        Sender::Http1(sender)
    };
    Ok((sender, is_over))
}

/// The application at the other end of the connection.
struct Application {
    inbound: Inbound,
    told: Arc<Told>,
    /// HTTP/1 takes one request after the other.
    sender: Mutex<Sender>,
}

impl Application {
    /// Answers the request; an error where the application gave none, which ends the client's connection or stream as it ended.
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<ResponseBody>, hyper::Error> {
        let mut exchange = Exchange::begin(&self.inbound.proxy.telemetry, &request);
        exchange.tell(self.told.clone());
        exchange.upstream = Some(self.inbound.to);
        match self.carry(&mut exchange, request).await {
            Ok(Outcome::Passed(response)) => Ok(response.map(|body| ResponseBody::of(body, exchange))),
            Ok(Outcome::Upgraded(response, bridge)) => {
                self.inbound.here.upstreams.tasks.spawn(bridge.carry(exchange));
                Ok(response.map(|_no_body| ResponseBody::Own(None)))
            }
            Ok(Outcome::Own(end, response)) => Ok(exchange.answered(end, response)),
            Err(Unanswered::Refused(refusal)) => Ok(exchange.refused(&refusal)),
            Err(Unanswered::Broken(error)) => {
                exchange.broke(send::blamed(&error));
                Err(error)
            }
        }
    }

    async fn carry(
        &self,
        exchange: &mut Exchange,
        request: Request<Incoming>,
    ) -> Result<Outcome, Unanswered> {
        let authority =
            head::authority(&request).map_err(|bad| Refusal::new(RequestEnd::BadRequest, bad.to_string()))?;
        exchange.authority = authority.clone();
        let snapshot = self.inbound.proxy.snapshot.load_full();
        let source = || self.inbound.source.clone();
        let admission = admission::admit(&snapshot, self.inbound.to, Limited::Requests, source);
        let standing = limit::admitted(admission)?;
        let dialect = match request.version() {
            Version::HTTP_2 => Dialect::Http2,
            _ => Dialect::Http1,
        };
        let (request, client_end) = outgoing(exchange, request, dialect);
        let mut request = aimed(request, authority, None, dialect)?;
        send::let_go_on(&mut request);
        exchange.attempts = 1;
        let mut response = self.send(request).await?;
        exchange.head(response.status().as_u16(), response.headers());
        if let Some(standing) = standing {
            limit::tell(&standing, response.headers_mut());
        }
        Ok(passed(response, client_end))
    }

    async fn send(&self, request: Request<RequestBody>) -> hyper::Result<Response<Incoming>> {
        let response: Pin<Box<dyn Future<Output = _> + Send>> = match &mut *self.sender.lock().await {
            Sender::Http1(sender) => {
                sender.ready().await?;
                Box::pin(sender.send_request(request))
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                Box::pin(sender.send_request(request))
            }
        };
        response.await
    }
}

/// A request that the application has not answered.
enum Unanswered {
    Refused(Refusal),
    Broken(hyper::Error),
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

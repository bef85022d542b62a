//! One request, from its head to the end of its answer: what is held meanwhile, and what telemetry is told at the end.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http::header::HeaderMap;
use http::uri::Authority;
use http::{Method, Request, Response, Uri, Version};
use http_body::Frame;
use tokio::time::{Sleep, sleep_until};

use super::answer::{Refusal, is_grpc};
use super::body::{AnswerError, RequestBody, ResponseBody, Upload};
use super::pool::Loan;
use super::quiet::Noise;
use super::retry::mark_in_vain;
use super::talk::{Talk, Told};
use crate::model::{LoadGuard, ObjectRef, PortGuard};
use crate::proxy::Proxy;
use crate::proxy::let_in::{Held, LetIn, Standing};
use crate::route::Rule;
use crate::telemetry::{
    ActiveRequest, HttpCounters, HttpRequest, RequestEnd, RequestTrace, RouteLabel, RulingOf, Telemetry,
};

/// A request that is being answered. Dropped before its answer has passed, it counts as one whose client has gone.
#[derive(Debug)]
pub(super) struct Exchange {
    telemetry: Arc<Telemetry>,
    began: Instant,
    /// Where it stands in a trace, if it does and somebody wants to know.
    pub(super) trace: Option<RequestTrace>,
    method: Method,
    version: Version,
    target: Uri,
    pub(super) authority: Option<Authority>,
    pub(super) is_grpc: bool,
    pub(super) rule: Option<Arc<Rule>>,
    /// The Service that the client dialled.
    pub(super) service: Option<ObjectRef>,
    /// The Service that it is sent to, and the port of that.
    pub(super) backend: Option<(ObjectRef, u16)>,
    /// Why it was refused.
    detail: Option<String>,
    /// How often an upstream was tried.
    pub(super) attempts: u32,
    /// What the client has said of it.
    pub(super) upload: Arc<Upload>,
    response_bytes: u64,
    status: Option<u16>,
    grpc_status: Option<u16>,
    end: Option<RequestEnd>,
    /// When all of the answer must have passed, and how it ends otherwise.
    limit: Option<(Pin<Box<Sleep>>, RequestEnd)>,
    /// What policies have said of it.
    pub(super) ruling: RulingOf,
    /// Where it is held to the policies of an endpoint of this node.
    held: Option<Arc<Held>>,
    /// With whom it is counted.
    told: Option<Arc<Told>>,
    /// Who knows with whom that is as long as nobody was reached.
    pub(super) talk: Option<Arc<Talk>>,
    /// It counts among the active ones there.
    active: Vec<ActiveRequest>,
    pub(super) upstream: Option<SocketAddr>,
    /// When it was sent to the endpoint that has it now.
    pub(super) asked: Option<Instant>,
    /// How often it was sent again, where that was in vain.
    pub(super) retried_in_vain: Option<u32>,
    /// The connection that the answer comes on.
    pub(super) loan: Option<Loan>,
    /// Its part of the endpoint's load.
    pub(super) load: Option<LoadGuard>,
    /// Its place among the requests of the Service port, where there is a cap on those.
    pub(super) place: Option<PortGuard>,
    /// Its connection is not idle for as long.
    pub(super) noise: Option<Noise>,
}

impl Exchange {
    pub(super) fn begin<B>(telemetry: &Arc<Telemetry>, request: &Request<B>) -> Box<Self> {
        Box::new(Self {
            telemetry: telemetry.clone(),
            began: Instant::now(),
            trace: telemetry.trace(request.headers()),
            method: request.method().clone(),
            version: request.version(),
            target: request.uri().clone(),
            authority: None,
            is_grpc: is_grpc(request.headers()),
            rule: None,
            service: None,
            backend: None,
            detail: None,
            attempts: 0,
            upload: Arc::default(),
            response_bytes: 0,
            status: None,
            grpc_status: None,
            end: None,
            limit: None,
            ruling: None,
            held: None,
            told: None,
            talk: None,
            active: Vec::new(),
            upstream: None,
            asked: None,
            retried_in_vain: None,
            loan: None,
            load: None,
            place: None,
            noise: None,
        })
    }

    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// The agent answers this itself.
    pub(super) fn answered(
        mut self: Box<Self>,
        end: RequestEnd,
        response: Response<ResponseBody>,
    ) -> Response<ResponseBody> {
        self.head(response.status().as_u16(), response.headers());
        self.end = Some(end);
        response
    }

    /// The agent refuses it, and says why.
    pub(super) fn refused(mut self: Box<Self>, refusal: &Refusal) -> Response<ResponseBody> {
        let mut response = refusal.answer(self.is_grpc);
        if let Some(made) = self.retried_in_vain {
            mark_in_vain(response.headers_mut(), made);
        }
        self.detail = Some(refusal.detail.clone());
        self.answered(refusal.end, response)
    }

    /// There is no answer, for this reason.
    pub(super) fn broke(mut self: Box<Self>, end: RequestEnd) {
        self.end = Some(end);
    }

    /// It is counted with these from here on.
    pub(super) fn tell(&mut self, told: Arc<Told>) {
        self.active = told.counters.iter().map(HttpCounters::enter).collect();
        (self.told, self.talk) = (Some(told), None);
    }

    /// From here on it is held to policies as what it was let in as; to those of now to begin with.
    pub(super) fn hold(
        &mut self,
        let_in: &LetIn,
        proxy: &Proxy,
        standing: Standing,
        request: &mut Request<RequestBody>,
    ) {
        let held = let_in.hold(proxy, standing);
        request.body_mut().hold(held.clone());
        self.held = Some(held);
    }

    /// It is held to no policies here.
    pub(super) fn let_go(&mut self) {
        self.held = None;
    }

    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// What the future comes to, unless policies do not let the request go on: then what they say, which the exchange has then, too.
    pub(super) async fn unless_denied<T>(
        &mut self,
        mut future: Pin<&mut impl Future<Output = T>>,
    ) -> Result<T, RulingOf> {
        std::future::poll_fn(|cx| match self.poll_denied(cx) {
            Poll::Ready(ruling) => Poll::Ready(Err(ruling)),
            Poll::Pending => future.as_mut().poll(cx).map(Ok),
        })
        .await
    }

    /// Once policies do not let it go on: what they say, which it has then.
    pub(super) fn poll_denied(&mut self, cx: &Context<'_>) -> Poll<RulingOf> {
        let Some(held) = &self.held else { return Poll::Pending };
        let ruling = std::task::ready!(held.poll_answer(cx));
        self.denied(&ruling);
        Poll::Ready(ruling)
    }

    /// All of the answer must have passed until then, or it ends so.
    pub(super) fn limit(&mut self, until: Instant, end: RequestEnd) {
        self.limit = Some((Box::pin(sleep_until(until.into())), end));
    }

    /// Once the answer takes longer than it may.
    pub(super) fn poll_overdue(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((limit, end)) = &mut self.limit else { return Poll::Pending };
        std::task::ready!(limit.as_mut().poll(cx));
        self.end = Some(*end);
        Poll::Ready(())
    }

    fn denied(&mut self, ruling: &RulingOf) {
        self.end = Some(RequestEnd::Denied);
        self.ruling = ruling.clone().or_else(|| self.ruling.take());
    }

    /// Policies or its limit end it while it is answered: a call of gRPC with its status, anything else by being broken off.
    pub(super) fn last(&mut self) -> Result<Frame<Bytes>, AnswerError> {
        let end = self.end.unwrap_or(RequestEnd::Denied);
        let why = match end {
            RequestEnd::Denied => "policies do not let this request in any more",
            _ => "the answer has not ended within the time that the request is given",
        };
        if !self.is_grpc || self.version != Version::HTTP_2 {
            // Nothing says more of it that clients would not take for something else.
            return Err(AnswerError::Ended { why, source: h2::Reason::CANCEL.into() });
        }
        let trailers = Refusal::new(end, why).trailers();
        self.grpc_status = grpc_status(&trailers);
        Ok(Frame::trailers(trailers))
    }

    /// The head of the answer.
    pub(super) fn head(&mut self, status: u16, headers: &HeaderMap) {
        self.status = Some(status);
        if self.is_grpc {
            // An answer without messages has the status in its head.
            self.grpc_status = grpc_status(headers);
        }
    }

    /// The status of a gRPC call, as far as it is known.
    pub(super) fn grpc_status(&self) -> Option<u16> {
        self.grpc_status
    }

    /// A frame of the answer's body passes, or what ends it.
    pub(super) fn passes(&mut self, frame: Option<&Result<Frame<Bytes>, hyper::Error>>, is_last: bool) {
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.response_bytes += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.grpc_status = grpc_status(trailers).or(self.grpc_status);
                }
                // Trailers are the last that comes, and who has them need not ask for more.
                if is_last || frame.is_trailers() {
                    self.done();
                }
            }
            Some(Err(_)) => self.end = Some(RequestEnd::UpstreamReset),
            None => self.done(),
        }
    }

    /// The connection went on with another protocol, has carried so many bytes each way and ended so.
    pub(super) fn carried(&mut self, end: RequestEnd, sent: u64, received: u64) {
        self.upload.add(sent);
        self.response_bytes += received;
        self.end.get_or_insert(end);
    }

    /// The answer has passed as a whole, and its connection is free for the next.
    pub(super) fn done(&mut self) {
        self.end.get_or_insert(RequestEnd::Done);
        (self.load, self.place, self.held) = (None, None, None);
        if let Some(loan) = self.loan.take() {
            loan.give_back();
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // However little has come of it, somebody has asked.
        let of_service = |talk: Arc<Talk>| talk.told_of_service(self.service.as_ref());
        let Some(told) = self.told.take().or_else(|| self.talk.take().map(of_service)) else { return };
        // It may have gone with its connection, by the same policies.
        if self.end.is_none()
            && let Some(ruling) = self.held.take().and_then(|held| held.denied())
        {
            self.denied(&ruling);
        }
        let request = HttpRequest {
            route: self.rule.as_deref().map(label),
            backend: self.backend.take(),
            detail: self.detail.take(),
            method: std::mem::take(&mut self.method),
            status: self.status,
            grpc_status: self.grpc_status,
            version: self.version,
            authority: self
                .authority
                .as_ref()
                .map(|authority| authority.as_str().to_owned())
                .unwrap_or_default(),
            path: self.target.path().to_owned(),
            end: self.end.unwrap_or(RequestEnd::ClientGone),
            attempts: self.attempts,
            duration: self.began.elapsed(),
            request_bytes: self.upload.bytes(),
            response_bytes: self.response_bytes,
            facts: told.facts.clone(),
            upstream: self.upstream,
            ruling: self.ruling.take(),
            trace: self.trace.take(),
        };
        self.telemetry.request_finished(&told.counters, request);
    }
}

fn label(rule: &Rule) -> RouteLabel {
    let name = rule.name.clone().unwrap_or_else(|| rule.index.to_string().into());
    RouteLabel { kind: rule.route.kind.as_str(), id: rule.route.id.clone(), rule: name }
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

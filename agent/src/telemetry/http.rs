//! What is told of HTTP requests: they are counted for each pair of workloads, and offered to the access log.
//!
//! The proxy says what became of a request; nothing here looks at a header or knows how a route matches.

mod series;

pub(super) use series::{DurationLabels, HttpSeries, HttpSet, RequestFigures, Sizes, is_named};

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use ::http::HeaderMap;

use super::access_log::AuditRecord;
use super::series::Series;
use super::{ConnectionFacts, RequestEnd, RequestTrace, RulingOf, Telemetry};
use crate::model::{Name, ObjectRef};

/// Where the requests between two workloads are counted, on behalf of one reporter. Cheap to clone; made to be kept
/// with an upstream connection, which keeps the series from being retired.
#[derive(Clone, Debug)]
pub struct HttpCounters(Arc<Series>);

/// A request that is being answered, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the request in the metrics"]
pub struct ActiveRequest(Arc<Series>);

/// One request that has ended: answered by an upstream or by the agent itself.
#[derive(Clone, Debug)]
pub struct HttpRequest {
    /// The rule that it fell under.
    pub route: Option<RouteLabel>,
    /// The Service that it was to be sent to, and the port of that: the rule's backend, or what the client dialled. For the access log.
    pub backend: Option<(ObjectRef, u16)>,
    /// What it asked to be done.
    pub method: ::http::Method,
    /// What it was answered; `None` where the client left or the upstream broke before an answer.
    pub status: Option<u16>,
    /// The status of a gRPC call, if it was one and came so far.
    pub grpc_status: Option<u16>,
    /// The version that the client spoke.
    pub version: ::http::Version,
    /// The host that was asked for, as the client wrote it.
    pub authority: String,
    /// The path without the query: queries carry secrets.
    pub path: String,
    /// Why it ended as it did.
    pub end: RequestEnd,
    /// Why the agent refused it, if it did, with the culprit's name. For the access log.
    pub detail: Option<String>,
    /// How often an upstream was tried.
    pub attempts: u32,
    /// From its head to the end of the answer.
    pub duration: Duration,
    /// Bytes of its body.
    pub request_bytes: u64,
    /// Bytes of the answer's body.
    pub response_bytes: u64,
    /// The connection that it is told of with, for the access log.
    pub facts: Arc<ConnectionFacts>,
    /// Where the agent sent it, for the access log.
    pub upstream: Option<SocketAddr>,
    /// What policies have said of it, where there are some.
    pub ruling: RulingOf,
    /// Where it stands in a trace, if it does.
    pub trace: Option<RequestTrace>,
}

/// The rule of a route, as metrics and logs name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteLabel {
    /// `HTTPRoute` or `GRPCRoute`.
    pub kind: &'static str,
    /// The route.
    pub id: ObjectRef,
    /// The rule's name, or its index from 0.
    pub rule: Name,
}

impl Telemetry {
    /// Where requests between the two workloads of these facts are counted. It finds or makes their label set as
    /// connections do, by the same limits.
    pub fn http_counters(&self, facts: &ConnectionFacts) -> HttpCounters {
        // What is beyond the maximum is told by requests, not by how often somebody asks where to count them.
        HttpCounters(self.series.find_or_make(facts))
    }

    /// Where a request with these headers stands in a trace; None where nobody wants to know.
    pub fn trace(&self, headers: &HeaderMap) -> Option<RequestTrace> {
        self.traces.place(headers, self.access_log.is_on())
    }

    /// Counts the request with each of the counters, and traces and logs it.
    pub fn request_finished(&self, counters: &[HttpCounters], request: HttpRequest) {
        for counters in counters {
            self.series.count_request(&counters.0, &request);
        }
        self.ruled(&request.ruling, || AuditRecord::Request(Box::new(request.clone())));
        self.traces.ended(&request);
        self.access_log.request(request);
    }
}

/// How much of a method, an authority, a path and a detail is kept: a full queue of the longest ones is 128 MiB.
const MOST_OF_TEXT: usize = 2_048;

impl HttpRequest {
    /// Gives back what is beyond the maximum, in memory too: for queues.
    pub(super) fn shorten(&mut self) {
        for text in [&mut self.authority, &mut self.path].into_iter().chain(&mut self.detail) {
            if text.len() > MOST_OF_TEXT {
                text.truncate(text.floor_char_boundary(MOST_OF_TEXT));
                text.shrink_to_fit();
            }
        }
        // The beginning of a token is a token.
        let beginning = self.method.as_str().get(..MOST_OF_TEXT).map(|text| text.parse());
        if let Some(Ok(method)) = beginning {
            self.method = method;
        }
    }
}

impl HttpCounters {
    /// Counts a request among the active ones, for as long as the guard lives.
    pub fn enter(&self) -> ActiveRequest {
        self.0.active_requests.fetch_add(1, Relaxed);
        ActiveRequest(self.0.clone())
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active_requests.fetch_sub(1, Relaxed);
    }
}

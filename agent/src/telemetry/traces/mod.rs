//! Traces: where each HTTP request stands in one, and the spans that the agent records of them, sent to a collector by OTLP.
//!
//! The proxy says what came with a request and what became of it; whether that is a span's worth is decided here, once, at its
//! head. A span is handed over at the request's end and never waited for: where the collector is slow or gone, spans are
//! dropped and counted. What applications do of their own is theirs to tell.

mod collector;
mod context;
mod exporter;
#[cfg(fuzzing)]
pub mod fuzzing;
mod span;
#[cfg(test)]
mod tests;

pub use collector::{TraceHeader, TraceHeaderValue, TraceSettingsError};
pub use context::TraceId;
pub use exporter::TraceExporter;

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::num::{NonZeroU64, NonZeroU128};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use ::http::header::{HeaderMap, HeaderValue};
use tokio::sync::{mpsc, oneshot};

use super::HttpRequest;
use crate::model::Name;
use collector::Collector;
use context::{RANDOM, SAMPLED, SpanId, TRACEPARENT, TRACESTATE, TraceContext};

/// Spans that may wait to be sent: some seconds of a busy node, and at most 48 MiB of the longest ones.
const QUEUE: usize = 8_192;

/// What is kept of a `tracestate` for the span; the upstream gets all of it. The specification asks for as much.
const MOST_OF_STATE: usize = 512;

/// Where spans go, and how many.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// The collector. A path is for OTLP over HTTP, where it replaces `/v1/traces`.
    pub endpoint: ::http::Uri,
    /// How it is spoken to.
    pub protocol: TraceProtocol,
    /// The share of requests that are recorded, from 0 to 1, of those whose callers have not decided.
    pub sampling: f64,
    /// What the collector is shown with each batch.
    pub headers: Vec<TraceHeader>,
    /// The roots, in PEM, that the collector's certificate must lead to; the system's, if none.
    pub ca: Option<PathBuf>,
    /// This node.
    pub node: Name,
}

/// The two forms of OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceProtocol {
    /// gRPC, by custom on port 4317.
    Grpc,
    /// Protobuf in HTTP requests, by custom on port 4318.
    Http,
}

/// Why a span did not reach the collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanDrop {
    /// More came than the collector took.
    QueueFull,
    /// The collector did not answer, or not in time, or had too much to do, more than once.
    Unavailable,
    /// The collector does not want it.
    Rejected,
}

impl SpanDrop {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 3] = [Self::QueueFull, Self::Unavailable, Self::Rejected];

    /// The stable name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Unavailable => "unavailable",
            Self::Rejected => "rejected",
        }
    }
}

/// What is decided of each request's trace, and the way to the exporter. Off, it costs a branch.
#[derive(Debug)]
pub struct Traces {
    exported: Option<Exported>,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Exported {
    sampling: f64,
    /// Makes ids differ from those of other nodes, however alike their threads' generators have been seeded.
    salt: u64,
    queue: mpsc::Sender<Message>,
}

/// What became of spans.
#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    dropped: [AtomicU64; SpanDrop::ALL.len()],
}

impl Counts {
    fn dropped(&self, spans: u64, why: SpanDrop) {
        self.dropped[why as usize].fetch_add(spans, Relaxed);
    }
}

/// What the exporter is told. Spans are made of requests there, not on the proxy's threads.
#[derive(Debug)]
enum Message {
    Ended { request: Box<HttpRequest>, at: SystemTime },
    Flush(oneshot::Sender<()>),
}

impl Traces {
    /// Nothing is recorded, and contexts pass untouched.
    pub fn off() -> Self {
        Self { exported: None, counts: Arc::default() }
    }

    /// The traces and what sends them, to be run by a runtime that does not carry the proxy's connections.
    ///
    /// # Errors
    /// When the settings cannot be right, or the roots cannot be read. A collector that is not there is no error.
    pub fn new(settings: &TraceSettings) -> Result<(Self, TraceExporter), TraceSettingsError> {
        let collector = Collector::new(settings)?;
        let (queue, waiting) = mpsc::channel(QUEUE);
        let counts = Arc::<Counts>::default();
        let exporter = TraceExporter::new(collector, waiting, counts.clone(), settings.node.clone());
        let salt = RandomState::new().hash_one(());
        let exported = Some(Exported { sampling: settings.sampling, salt, queue });
        Ok((Self { exported, counts }, exporter))
    }

    /// Where a request with these headers stands, and whether a span is recorded of it. Without the exporter it is looked for in
    /// the headers only if somebody wants to know.
    pub(super) fn place(&self, headers: &HeaderMap, is_asked_for: bool) -> Option<RequestTrace> {
        let Some(exported) = &self.exported else {
            if !is_asked_for {
                return None;
            }
            return Some(RequestTrace { context: TraceContext::of(headers)?, part: Part::None });
        };
        Some(match TraceContext::of(headers) {
            Some(context) if !context.is_sampled() => RequestTrace { context, part: Part::None },
            Some(TraceContext { trace, parent, flags }) => {
                let context = TraceContext { trace, parent: span_id(), flags: flags & (SAMPLED | RANDOM) };
                let lineage = Lineage { parent: Some(parent), state: state(headers) };
                RequestTrace { context, part: Part::Recorded(Box::new(lineage)) }
            }
            None => {
                let is_sampled = fastrand::f64() < exported.sampling;
                let flags = if is_sampled { RANDOM | SAMPLED } else { RANDOM };
                let context = TraceContext { trace: exported.trace_id(), parent: span_id(), flags };
                let part = if is_sampled { Part::Recorded(Box::default()) } else { Part::Begun };
                RequestTrace { context, part }
            }
        })
    }

    /// Hands the span of a request that has ended to the exporter, if one is recorded.
    pub(super) fn ended(&self, request: &HttpRequest) {
        let Some(exported) = &self.exported else { return };
        if !request.trace.as_ref().is_some_and(RequestTrace::is_recorded) {
            return;
        }
        let mut request = Box::new(request.clone());
        request.shorten();
        if exported.queue.try_send(Message::Ended { request, at: SystemTime::now() }).is_err() {
            self.counts.dropped(1, SpanDrop::QueueFull);
        }
    }

    /// Waits until what is queued has been sent or given up, but no longer than this.
    pub async fn flush(&self, limit: Duration) {
        let Some(exported) = &self.exported else { return };
        let (done, is_done) = oneshot::channel();
        let flushed = async {
            if exported.queue.send(Message::Flush(done)).await.is_ok() {
                _ = is_done.await;
            }
        };
        _ = tokio::time::timeout(limit, flushed).await;
    }

    /// Spans that the collector has taken.
    pub(super) fn exported(&self) -> u64 {
        self.counts.exported.load(Relaxed)
    }

    /// Spans that it has not, by why.
    pub(super) fn dropped(&self) -> [(SpanDrop, u64); SpanDrop::ALL.len()] {
        SpanDrop::ALL.map(|why| (why, self.counts.dropped[why as usize].load(Relaxed)))
    }
}

impl Exported {
    fn trace_id(&self) -> TraceId {
        let (left, right) = (self.salt ^ fastrand::u64(..), fastrand::u64(1..));
        TraceId(NonZeroU128::from(nonzero(right)) | u128::from(left) << 64)
    }
}

fn span_id() -> SpanId {
    SpanId(nonzero(fastrand::u64(1..)))
}

fn nonzero(random: u64) -> NonZeroU64 {
    NonZeroU64::new(random).unwrap_or(NonZeroU64::MIN)
}

/// What others have added to the context, if it is not too much.
fn state(headers: &HeaderMap) -> String {
    let mut state = String::new();
    for value in headers.get_all(&TRACESTATE) {
        let Ok(value) = value.to_str() else { return String::new() };
        let comma = if state.is_empty() { "" } else { "," };
        if state.len() + comma.len() + value.len() > MOST_OF_STATE {
            return String::new();
        }
        state.extend([comma, value]);
    }
    state
}

/// Where one request stands in a trace.
#[derive(Clone, Debug)]
pub struct RequestTrace {
    /// What the upstream is told.
    context: TraceContext,
    part: Part,
}

/// The agent's part in a trace.
#[derive(Clone, Debug)]
enum Part {
    /// None: what the caller told is passed on as it is.
    None,
    /// It has decided that nobody records it.
    Begun,
    /// It records a span, whose id is the context's.
    Recorded(Box<Lineage>),
}

/// Where a span comes from.
#[derive(Clone, Debug, Default)]
struct Lineage {
    /// The caller's; none where the trace begins.
    parent: Option<SpanId>,
    state: String,
}

impl RequestTrace {
    /// The trace.
    pub fn id(&self) -> TraceId {
        self.context.trace
    }

    /// Writes into a request's headers what the upstream is to know.
    pub fn pass_on(&self, headers: &mut HeaderMap) {
        match &self.part {
            Part::None => return,
            Part::Recorded(lineage) if lineage.parent.is_some() => {}
            // What could not be read is nobody's any more, and what goes with it neither (section 4.3).
            Part::Begun | Part::Recorded(_) => drop(headers.remove(&TRACESTATE)),
        }
        if let Ok(value) = HeaderValue::try_from(self.context.to_string()) {
            headers.insert(&TRACEPARENT, value);
        }
    }

    fn is_recorded(&self) -> bool {
        matches!(self.part, Part::Recorded(_))
    }
}

impl fmt::Display for RequestTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)
    }
}

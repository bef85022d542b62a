//! Sends spans to the collector, batch by batch; what it does not take is counted.
//!
//! How the collector is spoken to is for `collector`. Whoever hands in spans is never waited for here.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use super::collector::{Collector, Failure};
use super::{Counts, Message, SpanDrop, span};
use crate::model::Name;

/// The most spans of one batch.
const BATCH: usize = 512;

/// How long a span may wait for others.
const DELAY: Duration = Duration::from_secs(1);

/// Before a batch is sent again. Then it is given up, so that those behind it get their turn.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// Between two warnings of the same trouble.
const QUIET: Duration = Duration::from_secs(60);

/// What sends spans. It does so while [`run`](Self::run) is polled.
#[derive(Debug)]
pub struct TraceExporter {
    collector: Collector,
    waiting: mpsc::Receiver<Message>,
    counts: Arc<Counts>,
    resource: Resource,
    trouble: Trouble,
}

/// What is wrong with the collector, as the log has been told.
#[derive(Debug, Default)]
struct Trouble {
    is_on: bool,
    told: Option<Instant>,
}

impl TraceExporter {
    pub(super) fn new(
        collector: Collector,
        waiting: mpsc::Receiver<Message>,
        counts: Arc<Counts>,
        node: Name,
    ) -> Self {
        let attributes = vec![
            span::attribute("service.name", "undermesh"),
            span::attribute("service.version", env!("CARGO_PKG_VERSION")),
            span::attribute("k8s.node.name", &node),
        ];
        let resource = Resource { attributes, ..Resource::default() };
        Self { collector, waiting, counts, resource, trouble: Trouble::default() }
    }

    /// Sends what comes, until nothing more can.
    pub async fn run(mut self) {
        while let Some(Batch { spans, flush }) = self.batch().await {
            if !spans.is_empty() {
                self.send(spans).await;
            }
            if let Some(done) = flush {
                // Whoever asked may have gone.
                _ = done.send(());
            }
        }
    }

    async fn batch(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        batch.take(self.waiting.recv().await?);
        let until = Instant::now() + DELAY;
        while batch.spans.len() < BATCH && batch.flush.is_none() {
            match timeout_at(until, self.waiting.recv()).await {
                Ok(Some(message)) => batch.take(message),
                // What is there is sent before the end is seen.
                Ok(None) | Err(_) => break,
            }
        }
        Some(batch)
    }

    async fn send(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let scope = InstrumentationScope {
            name: "undermesh".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
        let resource = Some(self.resource.clone());
        let resource_spans = vec![ResourceSpans { resource, scope_spans, ..ResourceSpans::default() }];
        let request = ExportTraceServiceRequest { resource_spans };
        let mut pauses = PAUSES.iter();
        let failure = loop {
            match self.collector.export(&request).await {
                Ok(taken) => {
                    let rejected = taken.rejected.min(count);
                    self.counts.exported.fetch_add(count - rejected, Relaxed);
                    match rejected {
                        0 => self.trouble.is_over(),
                        _ => {
                            self.counts.dropped(rejected, SpanDrop::Rejected);
                            self.trouble.tell(&format!("it rejects spans: {:?}", taken.message));
                        }
                    }
                    return;
                }
                Err(failure) => match pauses.next().filter(|_| failure.is_passing) {
                    Some(pause) => sleep(*pause).await,
                    None => break failure,
                },
            }
        };
        let Failure { is_passing, why } = failure;
        self.counts.dropped(count, if is_passing { SpanDrop::Unavailable } else { SpanDrop::Rejected });
        self.trouble.tell(&why);
    }
}

impl Trouble {
    fn tell(&mut self, why: &str) {
        self.is_on = true;
        if self.told.is_none_or(|told| told.elapsed() >= QUIET) {
            self.told = Some(Instant::now());
            warn!("the traces' collector does not take all spans, which are dropped and counted: {why}");
        }
    }

    fn is_over(&mut self) {
        if std::mem::take(&mut self.is_on) {
            info!("the traces' collector takes spans again");
        }
    }
}

#[derive(Default)]
struct Batch {
    spans: Vec<Span>,
    /// Who wants to know when it is sent.
    flush: Option<oneshot::Sender<()>>,
}

impl Batch {
    fn take(&mut self, message: Message) {
        match message {
            Message::Ended { request, at } => self.spans.extend(span::of(&request, at)),
            Message::Flush(done) => self.flush = Some(done),
        }
    }
}

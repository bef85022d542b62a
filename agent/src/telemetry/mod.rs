//! What the proxy sees, for people, Prometheus and collectors: metrics, the live table of connections, the access log, traces.
//!
//! Telemetry knows the model only. It opens no socket but the one to the traces' collector, reads no kernel map and takes part in
//! no decision: the proxy reports each connection, the wiring reports the rest, `admin` asks.

mod access_log;
mod certificates;
mod connection;
mod controller;
mod exposition;
mod histogram;
mod http;
mod issuer_keys;
mod kernel;
mod plaintext;
mod process;
mod prometheus_text;
mod reason;
mod ruling;
mod series;
mod shared;
mod status;
mod table;
mod traces;
mod tunnels;

pub use self::http::{ActiveRequest, HttpCounters, HttpRequest, RouteLabel};
pub use access_log::{AccessLog, AccessLogFormat, AccessLogOutput, AccessLogSettings};
pub use certificates::{CertificateFigures, CertificateLifetime};
pub use connection::{Connection, ConnectionFacts, OpenConnection, Peer, Reporter, Security};
pub use controller::{Checked, ControllerTelemetry, DenyReason, ReviewResult};
pub use issuer_keys::IssuerKeyFigures;
pub use kernel::{KernelCounters, PodTcp};
pub use plaintext::{Calls, Plaintext, PlaintextCaller, PlaintextReport, PlaintextSource, Watched};
pub use reason::{CloseReason, RefuseReason, RequestEnd};
pub use ruling::{Ruling, RulingOf, Tried};
pub use status::{NotEnrolledReason, PodReport, PodStanding, PodState, Rejection, Status};
#[cfg(fuzzing)]
pub use traces::fuzzing;
pub use traces::{
    RequestTrace, SpanDrop, TraceExporter, TraceHeader, TraceHeaderValue, TraceId, TraceProtocol,
    TraceSettings, TraceSettingsError, Traces,
};
pub use tunnels::{OpenTunnel, TunnelEnd, Tunnels};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::Name;
use crate::snapshot::Snapshot;
use access_log::AuditRecord;
use ruling::{Outcome, Rulings};
use series::SeriesSet;
use table::{Slot, Table};

/// How much telemetry may keep.
#[derive(Clone, Copy, Debug)]
pub struct TelemetrySettings {
    /// Label sets of connection metrics; what comes beyond them is counted under `other`. Each costs about 600 bytes
    /// and six or so time series.
    pub max_label_sets: usize,
    /// Kinds of HTTP requests in all label sets, by rule, method, answer and reason; what comes beyond them is counted
    /// under `other`. Each costs about 150 bytes and a time series, the first of a label set 600 bytes more. No label
    /// set has more than a tenth of them, and there are no more sets of histograms than that.
    pub max_request_sets: usize,
    /// How long the series of a workload that is gone stay. Several scrape intervals, so that its last figures are
    /// read.
    pub series_grace: Duration,
    /// Callers that came in plaintext, by what they called; what comes beyond them is counted alone. Each costs about 200 bytes.
    pub max_plaintext_callers: usize,
    /// How long such a caller is remembered after its last connection.
    pub plaintext_memory: Duration,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self {
            max_label_sets: 10_000,
            max_request_sets: 10_000,
            series_grace: Duration::from_secs(300),
            max_plaintext_callers: 10_000,
            plaintext_memory: Duration::from_secs(86_400),
        }
    }
}

/// The agent's telemetry: made once, shared by all.
pub struct Telemetry {
    table: Table,
    series: SeriesSet,
    plaintext: Plaintext,
    access_log: AccessLog,
    audit_log: AccessLog,
    rulings: Rulings,
    traces: Traces,
    status: Arc<Status>,
    tunnels: Arc<Tunnels>,
    kernel: Mutex<KernelCounters>,
    certificates: Mutex<CertificateFigures>,
    issuer_keys: Mutex<IssuerKeyFigures>,
    watch_failures: Mutex<BTreeMap<&'static str, u64>>,
    mtls_downgrades: AtomicU64,
    on_scrape: Mutex<Vec<Arc<ScrapeHook>>>,
}

/// Where lines go.
#[derive(Debug, Default)]
pub struct Logs {
    /// One for each connection and request.
    pub access: AccessLog,
    /// One for each that policies have denied, want to know of, or would have treated otherwise.
    pub audit: AccessLog,
}

/// What is done before each scrape.
type ScrapeHook = dyn Fn(&Telemetry) + Send + Sync;

/// The formats of the metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsFormat {
    /// The Prometheus text format, version 0.0.4.
    PrometheusText,
    /// OpenMetrics text, version 1.0.0.
    OpenMetrics,
}

impl MetricsFormat {
    fn of_openmetrics(self, text: String) -> String {
        match self {
            Self::OpenMetrics => text,
            Self::PrometheusText => prometheus_text::from_openmetrics(&text),
        }
    }
}

impl Telemetry {
    /// Telemetry that has seen nothing yet.
    pub fn new(settings: TelemetrySettings, status: Arc<Status>, logs: Logs, traces: Traces) -> Arc<Self> {
        Arc::new(Self {
            table: Table::default(),
            series: SeriesSet::new(settings),
            plaintext: Plaintext::new(
                settings.max_plaintext_callers,
                settings.plaintext_memory,
                Instant::now(),
            ),
            access_log: logs.access,
            audit_log: logs.audit,
            rulings: Rulings::default(),
            traces,
            status,
            tunnels: Arc::default(),
            kernel: Mutex::default(),
            certificates: Mutex::default(),
            issuer_keys: Mutex::default(),
            watch_failures: Mutex::default(),
            mtls_downgrades: AtomicU64::new(0),
            on_scrape: Mutex::default(),
        })
    }

    /// Counts and lists a connection that has got an upstream, or is about to.
    pub fn connection_opened(self: &Arc<Self>, facts: ConnectionFacts) -> OpenConnection {
        self.ruled(&facts.ruling, || AuditRecord::Connection(Box::new(facts.clone())));
        let series = self.series.get(&facts);
        series.opened.fetch_add(1, Ordering::Relaxed);
        self.plaintext.opened(&facts, Instant::now());
        let connection = Arc::new(Connection::new(facts, series));
        let slot = self.table.insert(connection.clone());
        // Until the proxy says otherwise: whoever drops a connection without a word is shutting down.
        OpenConnection { telemetry: self.clone(), connection, slot, reason: CloseReason::Cancelled }
    }

    /// Counts and logs a connection that never got an upstream.
    pub fn connection_refused(&self, facts: ConnectionFacts, reason: RefuseReason) {
        self.series.get(&facts).refused[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.ruled(&facts.ruling, || AuditRecord::Connection(Box::new(facts.clone())));
        self.access_log.refused(facts, reason);
    }

    /// An attempt to watch objects of this kind, by its plural name, has failed.
    pub fn watch_failed(&self, resource: &'static str) {
        *self.watch_failures.lock().unwrap_or_else(PoisonError::into_inner).entry(resource).or_default() += 1;
    }

    /// Counts what policies have said, and writes it to the audit log where that is to be known.
    fn ruled(&self, ruling: &RulingOf, record: impl FnOnce() -> AuditRecord) {
        let Some(ruling) = ruling.as_deref().filter(|ruling| ruling.is_notable()) else { return };
        self.rulings.count(ruling);
        if self.audit_log.is_on() {
            self.audit_log.audited(record());
        }
    }

    /// A pod takes plaintext that refused it.
    pub fn mtls_downgraded(&self) {
        self.mtls_downgrades.fetch_add(1, Ordering::Relaxed);
    }

    /// Where the tunnels between nodes are counted.
    pub fn tunnels(&self) -> &Arc<Tunnels> {
        &self.tunnels
    }

    /// Every connection that is open now, in no order.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        let mut open = Vec::new();
        self.table.for_each(|connection| open.push(connection.clone()));
        open
    }

    /// Who calls this node's pods in plaintext.
    pub fn plaintext(&self) -> &Plaintext {
        &self.plaintext
    }

    /// Who has called this node's pods in plaintext, those included whose connections are still open.
    pub fn plaintext_report(&self, now: Instant) -> PlaintextReport {
        self.table.for_each(|connection| self.plaintext.is_open(connection, now));
        self.plaintext.report(now)
    }

    /// Retires the series of workloads and Services that have been gone from the snapshot for the grace, and are not
    /// in use by a connection. To be called at every change of the snapshot and every few seconds; most calls return
    /// at once.
    pub fn retain(&self, snapshot: &Snapshot, now: Instant) {
        self.series.retain(snapshot, now);
    }

    /// Sets what the kernel has counted, in place of what it had before.
    pub fn set_kernel_counters(&self, counters: KernelCounters) {
        *self.kernel.lock().unwrap_or_else(PoisonError::into_inner) = counters;
    }

    /// Sets what is known of certificates, in place of what was known before.
    pub fn set_certificates(&self, figures: CertificateFigures) {
        *self.certificates.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }

    /// Sets what is known of the keys of tokens, in place of what was known before.
    pub fn set_issuer_keys(&self, figures: IssuerKeyFigures) {
        *self.issuer_keys.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }

    /// Has something done before each scrape, on the scrape's thread: reading the kernel's counters, say. It may
    /// block for a moment.
    pub fn on_scrape(&self, hook: impl Fn(&Telemetry) + Send + Sync + 'static) {
        self.on_scrape.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(hook));
    }

    /// The metrics page. Reads `/proc` and whatever the hooks read, so not for an async thread.
    pub fn scrape(&self, format: MetricsFormat) -> String {
        let hooks = self.on_scrape.lock().unwrap_or_else(PoisonError::into_inner).clone();
        hooks.iter().for_each(|hook| hook(self));
        self.table.for_each(|connection| connection.count_bytes());
        format.of_openmetrics(exposition::openmetrics(self))
    }

    /// What the agent reports of itself.
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The access log and the audit log, to flush them before the process ends.
    pub fn logs(&self) -> [&AccessLog; 2] {
        [&self.access_log, &self.audit_log]
    }

    /// The traces, to send what is left of them before the process ends.
    pub fn traces(&self) -> &Traces {
        &self.traces
    }

    fn kernel_counters(&self) -> KernelCounters {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn rulings(&self) -> BTreeMap<(Name, Outcome), u64> {
        self.rulings.all()
    }

    fn watch_failures(&self) -> BTreeMap<&'static str, u64> {
        self.watch_failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn issuer_key_figures(&self) -> IssuerKeyFigures {
        self.issuer_keys.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn certificate_figures(&self) -> CertificateFigures {
        self.certificates.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn connection_closed(&self, slot: Slot, connection: &Arc<Connection>, reason: CloseReason) {
        self.table.remove(slot);
        connection.count_bytes();
        let duration = connection.age();
        connection.series.durations.observe_duration(duration);
        connection.series.closed[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.access_log.closed(connection, reason, duration);
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

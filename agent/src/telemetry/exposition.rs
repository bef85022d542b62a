//! What a scrape sees: every figure read once, and written as OpenMetrics by prometheus-client.
//!
//! The figures live elsewhere, in atomics made for those who count. Here is the only place that knows the names of
//! metrics and labels; `docs/metrics.md` explains them to users.

mod http;
mod services;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::certificates::CertificateFigures;
use super::histogram::{Histogram, HistogramFigures};
use super::http::{DurationLabels, Sizes};
use super::issuer_keys::IssuerKeyFigures;
use super::kernel::{KernelCounters, PodTcp};
use super::process::ProcessFigures;
use super::ruling::Outcome;
use super::series::{DestinationLabels, Series, SeriesLabels};
use super::status::PodState;
use super::{CloseReason, RefuseReason, Reporter, SpanDrop, Telemetry, TunnelEnd, Tunnels};
use crate::model::{Name, Probers};
use crate::snapshot::Snapshot;

/// All metrics of the agent in OpenMetrics text, `# EOF` included.
pub(super) fn openmetrics(telemetry: &Telemetry) -> String {
    text_of(Scrape::of(telemetry))
}

/// What a collector has, in OpenMetrics text.
pub(super) fn text_of(collector: impl Collector) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collector));
    let mut text = String::new();
    // Writing to a String cannot fail, and the collector makes no error of its own.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// Every figure at one moment.
#[derive(Debug)]
struct Scrape {
    series: Vec<Arc<Series>>,
    durations: Vec<(DestinationLabels, Arc<Histogram>)>,
    request_durations: Vec<(DurationLabels, Arc<Histogram>)>,
    request_sizes: Vec<(DestinationLabels, Arc<Sizes>)>,
    tunnels: Arc<Tunnels>,
    kernel: KernelCounters,
    certificates: CertificateFigures,
    issuer_keys: IssuerKeyFigures,
    process: ProcessFigures,
    enrolled: u64,
    not_enrolled: BTreeMap<&'static str, u64>,
    probers: Option<Probers>,
    rejected_documents: u64,
    /// Of when the configuration is, if its source does not say it now.
    as_of: Option<SystemTime>,
    snapshot: Arc<Snapshot>,
    watch_failures: BTreeMap<&'static str, u64>,
    rulings: BTreeMap<(Name, Outcome), u64>,
    mtls_downgrades: u64,
    series_overflow: u64,
    access_log_dropped: u64,
    audit_log_dropped: u64,
    spans_exported: u64,
    spans_dropped: [(SpanDrop, u64); SpanDrop::ALL.len()],
}

impl Scrape {
    fn of(telemetry: &Telemetry) -> Self {
        let status = &telemetry.status;
        let mut enrolled = 0;
        let mut not_enrolled = BTreeMap::new();
        for standing in status.pods() {
            let wanted = standing.workload.is_some_and(|w| w.enrolment.is_wanted());
            match standing.state {
                Some(PodState::Enrolled { .. }) => enrolled += 1,
                Some(PodState::NotEnrolled { reason, .. }) => {
                    *not_enrolled.entry(reason.as_str()).or_default() += 1
                }
                Some(PodState::Pending) => *not_enrolled.entry("pending").or_default() += 1,
                None if wanted => *not_enrolled.entry("pending").or_default() += 1,
                None => {}
            }
        }
        Self {
            series: telemetry.series.all(),
            durations: telemetry.series.durations(),
            request_durations: telemetry.series.http().durations(),
            request_sizes: telemetry.series.http().sizes(),
            tunnels: telemetry.tunnels.clone(),
            kernel: telemetry.kernel_counters(),
            certificates: telemetry.certificate_figures(),
            issuer_keys: telemetry.issuer_key_figures(),
            process: ProcessFigures::read(),
            enrolled,
            not_enrolled,
            probers: status.probers(),
            snapshot: status.snapshot.load_full(),
            rejected_documents: status.rejections().len() as u64,
            as_of: status.as_of(),
            watch_failures: telemetry.watch_failures(),
            rulings: telemetry.rulings(),
            mtls_downgrades: telemetry.mtls_downgrades.load(Relaxed),
            series_overflow: telemetry.series.overflow(),
            access_log_dropped: telemetry.access_log.dropped(),
            audit_log_dropped: telemetry.audit_log.dropped(),
            spans_exported: telemetry.traces.exported(),
            spans_dropped: telemetry.traces.dropped(),
        }
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut out = Out(encoder);
        self.connections(&mut out)?;
        self.requests(&mut out)?;
        self.services(&mut out)?;
        self.tunnels(&mut out)?;
        self.pods(&mut out)?;
        self.certificates(&mut out)?;
        self.issuer_keys(&mut out)?;
        self.agent(&mut out)?;
        process(&mut out, &self.process)
    }
}

impl Scrape {
    fn connections(&self, out: &mut Out<'_>) -> fmt::Result {
        let opened: Vec<_> = self.series.iter().filter(|s| s.opened.load(Relaxed) > 0).collect();

        let mut family =
            out.counter("undermesh_tcp_connections_opened", "Connections that got an upstream.")?;
        for series in &opened {
            counter(&mut family, &labels(&series.labels), series.opened.load(Relaxed))?;
        }

        let mut family =
            out.counter("undermesh_tcp_connections_closed", "Connections that ended, by what ended them.")?;
        for series in &opened {
            let counts = CloseReason::ALL.iter().map(|r| r.as_str()).zip(&series.closed);
            by_reason(&mut family, &series.labels, counts)?;
        }

        let help = "Connections that got no upstream, by what was in the way.";
        let mut family = out.counter("undermesh_tcp_connections_refused", help)?;
        for series in &self.series {
            let counts = RefuseReason::ALL.iter().map(|r| r.as_str()).zip(&series.refused);
            by_reason(&mut family, &series.labels, counts)?;
        }

        let mut family = out.gauge("undermesh_tcp_connections_active", "Connections that are open now.")?;
        for series in &opened {
            // The closed ones first: what closes in between then shows as still open, never as less than none.
            let closed: u64 = series.closed.iter().map(|count| count.load(Relaxed)).sum();
            gauge(&mut family, &labels(&series.labels), series.opened.load(Relaxed).saturating_sub(closed))?;
        }

        let mut family = out.counter("undermesh_tcp_sent_bytes", "Bytes from the client to the server.")?;
        for series in &opened {
            counter(&mut family, &labels(&series.labels), series.sent.load(Relaxed))?;
        }

        let mut family =
            out.counter("undermesh_tcp_received_bytes", "Bytes from the server to the client.")?;
        for series in &opened {
            counter(&mut family, &labels(&series.labels), series.received.load(Relaxed))?;
        }

        let help = "How long connections were open, by destination, observed at their end.";
        let mut family = out.histogram("undermesh_tcp_connection_duration_seconds", help)?;
        for (labels, durations) in &self.durations {
            histogram(&mut family, &destination_labels(labels), durations)?;
        }
        Ok(())
    }

    fn tunnels(&self, out: &mut Out<'_>) -> fmt::Result {
        let help = "Handshakes of tunnels between nodes, by how they went.";
        let mut family = out.counter("undermesh_tls_handshakes", help)?;
        for (handshake, count) in self.tunnels.handshakes() {
            let labels = [
                ("reporter", handshake.reporter.as_str()),
                ("result", handshake.result),
                ("reason", handshake.reason),
            ];
            counter(&mut family, &labels, count)?;
        }
        let help =
            "Requests inside of tunnels that led to no application, by what they were answered and why.";
        let mut family = out.counter("undermesh_tunnel_requests_refused", help)?;
        for (refused, count) in self.tunnels.refused_requests() {
            let status = refused.status.to_string();
            counter(&mut family, &[("status", &status), ("reason", refused.reason)], count)?;
        }
        let sides = Reporter::ALL.map(|reporter| (reporter.as_str(), self.tunnels.side(reporter)));
        let mut family = out.gauge("undermesh_tunnels_open", "Tunnels between nodes that stand now.")?;
        for (reporter, side) in sides {
            gauge(&mut family, &[("reporter", reporter)], side.open.load(Relaxed))?;
        }
        let help = "Connections that travel in tunnels now.";
        let mut family = out.gauge("undermesh_tunnel_streams_open", help)?;
        for (reporter, side) in sides {
            gauge(&mut family, &[("reporter", reporter)], side.streams.load(Relaxed))?;
        }
        let mut family =
            out.counter("undermesh_tunnels_closed", "Tunnels that ended, by what ended them.")?;
        for (reporter, side) in sides {
            for (end, count) in TunnelEnd::ALL.iter().zip(&side.closed) {
                let count = count.load(Relaxed);
                if count > 0 {
                    let labels = [("reporter", reporter), ("reason", end.as_str())];
                    counter(&mut family, &labels, count)?;
                }
            }
        }
        let help = "Connections that went in plaintext past the agent of their destination, which was down.";
        out.one_counter("undermesh_tunnel_bypasses", help, self.tunnels.bypasses())
    }

    fn pods(&self, out: &mut Out<'_>) -> fmt::Result {
        out.one_gauge("undermesh_pods_enrolled", "Pods of this node that are in the mesh.", self.enrolled)?;

        let help = "Pods of this node that ask to be in the mesh and are not, by what is in the way.";
        let mut family = out.gauge("undermesh_pods_not_enrolled", help)?;
        for (reason, count) in &self.not_enrolled {
            gauge(&mut family, &[("reason", *reason)], *count)?;
        }

        let help = "Connections to mesh destinations that went past the agent, by why.";
        let mut family = out.counter("undermesh_bypassed_connections", help)?;
        for (reason, count) in &self.kernel.bypassed {
            counter(&mut family, &[("reason", *reason)], *count)?;
        }
        let help = "Connections that the kernel programs refused by themselves, by why.";
        let mut family = out.counter("undermesh_kernel_refused_connections", help)?;
        for (reason, count) in &self.kernel.refused {
            counter(&mut family, &[("reason", *reason)], *count)?;
        }

        if let Some(probers) = &self.probers {
            let help = "1 for whose connections are taken for the kubelet's.";
            let mut family = out.gauge("undermesh_probe_callers", help)?;
            for who in Probers::NAMES {
                gauge(&mut family, &[("who", who)], u64::from(who == probers.as_str()))?;
            }
        }

        type Figure = fn(&PodTcp) -> u64;
        let families: [(&str, &str, Figure); 4] = [
            ("undermesh_pod_tcp_retransmits", "Segments that the pod's sockets sent again.", |p| {
                p.retransmits
            }),
            ("undermesh_pod_tcp_timeouts", "Retransmission time-outs of the pod's sockets.", |p| p.timeouts),
            ("undermesh_pod_tcp_connected", "Connections that the pod opened.", |p| p.connected),
            ("undermesh_pod_tcp_accepted", "Connections that the pod accepted.", |p| p.accepted),
        ];
        for (name, help, figure) in families {
            let mut family = out.counter(name, help)?;
            for tcp in &self.kernel.pods {
                let labels = [("pod_name", &*tcp.pod.name), ("pod_namespace", &*tcp.pod.namespace)];
                counter(&mut family, &labels, figure(tcp))?;
            }
        }
        let help = "Open connections that the pod had before it was enrolled, and that nobody carries.";
        let mut family = out.gauge("undermesh_pod_connections_before_enrolment", help)?;
        for tcp in &self.kernel.pods {
            let labels = [("pod_name", &*tcp.pod.name), ("pod_namespace", &*tcp.pod.namespace)];
            gauge(&mut family, &labels, tcp.before_enrolment)?;
        }
        Ok(())
    }

    fn certificates(&self, out: &mut Out<'_>) -> fmt::Result {
        let certificates = &self.certificates;
        let help = "When the certificate expires, since the epoch.";
        let mut family = out.gauge("undermesh_certificate_expiry_timestamp_seconds", help)?;
        for lifetime in &certificates.lifetimes {
            gauge(
                &mut family,
                &[("kind", lifetime.kind), ("identity", &lifetime.identity)],
                lifetime.expires,
            )?;
        }
        let help = "What is left of the certificate's life; negative when it is over.";
        let mut family = out.gauge("undermesh_certificate_remaining_seconds", help)?;
        for lifetime in &certificates.lifetimes {
            gauge(
                &mut family,
                &[("kind", lifetime.kind), ("identity", &lifetime.identity)],
                lifetime.remaining,
            )?;
        }
        let help = "How much of its life the identity's certificate has left: 1 when it was received, 0 when it expires.";
        let mut family = out.gauge("undermesh_certificate_life_left_ratio", help)?;
        for (identity, share) in &certificates.lives_left {
            gauge(&mut family, &[("identity", identity)], *share)?;
        }
        let help = "How late the renewal of the identity's certificate is; 0 before it is due.";
        let mut family = out.gauge("undermesh_certificate_renewal_lag_seconds", help)?;
        for (identity, lag) in &certificates.renewal_lags {
            gauge(&mut family, &[("identity", identity)], *lag)?;
        }
        let mut family =
            out.counter("undermesh_certificate_renewals", "Requests for certificates, by their result.")?;
        for (result, count) in &certificates.renewals {
            counter(&mut family, &[("result", *result)], *count)?;
        }
        let help = "The largest advance of another clock over this node's that was seen.";
        out.one_gauge("undermesh_clock_skew_seconds", help, certificates.clock_skew)
    }

    fn issuer_keys(&self, out: &mut Out<'_>) -> fmt::Result {
        let help = "Attempts to fetch the keys of those who make tokens, by their result.";
        let mut family = out.counter("undermesh_jwks_fetches", help)?;
        for (result, count) in &self.issuer_keys.fetches {
            counter(&mut family, &[("result", *result)], *count)?;
        }
        let help = "How long ago the keys in use were told last, by the address that they are fetched from.";
        let mut family = out.gauge("undermesh_jwks_age_seconds", help)?;
        for (uri, age) in &self.issuer_keys.ages {
            gauge(&mut family, &[("uri", &**uri)], *age)?;
        }
        Ok(())
    }

    fn agent(&self, out: &mut Out<'_>) -> fmt::Result {
        let mut family =
            out.gauge("undermesh_build_info", "Always 1; the version of the agent is in the label.")?;
        gauge(&mut family, &[("version", env!("CARGO_PKG_VERSION"))], 1u64)?;

        let help = "Counts the configurations that this process has taken; 0 before the first.";
        out.one_gauge("undermesh_config_generation", help, self.snapshot.generation)?;
        let help = "Documents that are not taken, or only in part, because of an error in them.";
        out.one_gauge("undermesh_config_rejected_documents", help, self.rejected_documents)?;
        if let Some(as_of) = self.as_of {
            let help = "How old the configuration is that an agent before this one has written down, while it is in use.";
            let age = as_of.elapsed().unwrap_or_default().as_secs();
            out.one_gauge("undermesh_config_recalled_age_seconds", help, age)?;
        }
        let help = "Attempts to watch objects at the API server that failed; what is known of them holds.";
        let mut family = out.counter("undermesh_kubernetes_watch_failures", help)?;
        for (resource, count) in &self.watch_failures {
            counter(&mut family, &[("resource", *resource)], *count)?;
        }
        let help = "Times that a pod took plaintext which it had refused before.";
        out.one_counter("undermesh_mtls_downgrades", help, self.mtls_downgrades)?;
        let help = "Connections and requests counted under `other` because there are too many label sets.";
        out.one_counter("undermesh_metrics_series_overflow", help, self.series_overflow)?;
        let help = "Lines of the access log that were not written, for its output was too slow or broken.";
        out.one_counter("undermesh_access_log_dropped", help, self.access_log_dropped)?;
        let help = "Lines of the audit log that were not written, for its output was too slow or broken.";
        out.one_counter("undermesh_audit_log_dropped", help, self.audit_log_dropped)?;
        let help = "What policies have denied or wanted to know of, or would have treated otherwise, by what they have come to.";
        let mut family = out.counter("undermesh_policy_outcomes", help)?;
        for ((policy, outcome), count) in &self.rulings {
            counter(&mut family, &[("policy", &**policy), ("outcome", outcome.as_str())], *count)?;
        }
        let help = "Spans that the traces' collector has taken.";
        out.one_counter("undermesh_trace_spans_exported", help, self.spans_exported)?;
        let help = "Spans that it has not, by why.";
        let mut family = out.counter("undermesh_trace_spans_dropped", help)?;
        for (why, count) in self.spans_dropped {
            counter(&mut family, &[("reason", why.as_str())], count)?;
        }
        Ok(())
    }
}

/// What every role tells of its process.
pub(super) fn process(out: &mut Out<'_>, process: &ProcessFigures) -> fmt::Result {
    if let Some(seconds) = process.cpu_seconds {
        out.one_counter("process_cpu_seconds", "User and system CPU time of the process.", seconds)?;
    }
    if let Some(bytes) = process.resident_bytes {
        out.one_gauge("process_resident_memory_bytes", "Resident memory of the process.", bytes)?;
    }
    if let Some(count) = process.open_fds {
        out.one_gauge("process_open_fds", "Descriptors that the process has open.", count)?;
    }
    if let Some(count) = process.max_fds {
        out.one_gauge("process_max_fds", "Descriptors that the process may have open.", count)?;
    }
    if let Some(seconds) = process.start_time {
        out.one_gauge("process_start_time_seconds", "When the process started, since the epoch.", seconds)?;
    }
    Ok(())
}

/// Starts families; shortens what the encoder wants to be told.
pub(super) struct Out<'a>(pub(super) DescriptorEncoder<'a>);

impl Out<'_> {
    fn family<'s>(
        &'s mut self,
        name: &'s str,
        help: &'s str,
        kind: MetricType,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.0.encode_descriptor(name, help, None, kind)
    }

    /// `name` is without `_total`, which the encoder adds to the samples.
    pub(super) fn counter<'s>(
        &'s mut self,
        name: &'s str,
        help: &'s str,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.family(name, help, MetricType::Counter)
    }

    pub(super) fn gauge<'s>(
        &'s mut self,
        name: &'s str,
        help: &'s str,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.family(name, help, MetricType::Gauge)
    }

    fn histogram<'s>(&'s mut self, name: &'s str, help: &'s str) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.family(name, help, MetricType::Histogram)
    }

    pub(super) fn one_counter(
        &mut self,
        name: &str,
        help: &str,
        value: impl EncodeCounterValue,
    ) -> fmt::Result {
        self.counter(name, help)?.encode_counter::<NoLabelSet, _, f64>(&value, None)
    }

    pub(super) fn one_gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.gauge(name, help)?.encode_gauge(&value)
    }
}

pub(super) type Label<'a> = (&'static str, &'a str);

pub(super) fn counter<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[Label<'_>; N],
    value: u64,
) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)
}

pub(super) fn gauge<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[Label<'_>; N],
    value: impl EncodeGaugeValue,
) -> fmt::Result {
    family.encode_family(labels)?.encode_gauge(&value)
}

/// Nothing of a histogram that has seen nothing: its buckets would be many samples that say the same.
fn histogram(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    histogram: &Histogram,
) -> fmt::Result {
    let HistogramFigures { sum, count, buckets } = histogram.read();
    if count == 0 {
        return Ok(());
    }
    family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

/// A sample for each reason that has occurred: most never do, and a series each would be a waste.
fn by_reason<'a>(
    family: &mut MetricEncoder<'_>,
    series: &SeriesLabels,
    counts: impl Iterator<Item = (&'static str, &'a AtomicU64)>,
) -> fmt::Result {
    let [a, b, c, d, e, f, g, h, i, j] = labels(series);
    for (reason, count) in counts {
        let count = count.load(Relaxed);
        if count > 0 {
            counter(family, &[a, b, c, d, e, f, g, h, i, j, ("reason", reason)], count)?;
        }
    }
    Ok(())
}

fn labels(labels: &SeriesLabels) -> [Label<'_>; 10] {
    [
        ("reporter", labels.reporter.as_str()),
        ("source_workload", &labels.source.name),
        ("source_namespace", &labels.source.namespace),
        ("destination_workload", &labels.destination.name),
        ("destination_namespace", &labels.destination.namespace),
        ("destination_service", &labels.service.name),
        ("destination_service_namespace", &labels.service.namespace),
        ("security", labels.security.as_str()),
        ("source_identity", &labels.source_identity),
        ("destination_identity", &labels.destination_identity),
    ]
}

fn destination_labels(labels: &DestinationLabels) -> [Label<'_>; 4] {
    [
        ("reporter", labels.reporter.as_str()),
        ("destination_workload", &labels.destination.name),
        ("destination_namespace", &labels.destination.namespace),
        ("security", labels.security.as_str()),
    ]
}

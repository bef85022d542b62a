//! What the controller counts, and how a scrape sees it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::MetricsFormat;
use super::exposition::{Out, counter, gauge, process, text_of};
use super::process::ProcessFigures;

/// Why a request for a certificate got none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// It shows no bearer token.
    NoToken,
    /// The API server does not take the token, or not for this audience.
    TokenRefused,
    /// The token is another service account's than the agents'.
    NotAnAgent,
    /// The token does not say on which node its pod runs, and the pod is not known.
    UnknownNode,
    /// No pod of the service account runs on the caller's node.
    NoPodOnNode,
    /// The identity is of another trust domain.
    WrongTrustDomain,
    /// The identity or the request for the certificate cannot be read, or its owner does not hold its key.
    BadRequest,
    /// The controller does not know the cluster's pods yet.
    NotSynced,
    /// The API server did not answer whether the token is right.
    ApiUnavailable,
    /// There is no root to sign with, or it has expired.
    NoAuthority,
    /// Too many requests at one time.
    Busy,
    /// It took too long.
    Timeout,
}

/// What became of asking the API server about a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReviewResult {
    /// It knows whose it is.
    Authenticated,
    /// It does not take it.
    Refused,
    /// It did not answer, and the token holds by the keys of its issuer.
    ByKeys,
    /// It did not answer.
    Unavailable,
}

/// What the webhook has to say of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// Nothing.
    Clean,
    /// It warned its writer.
    Warned,
    /// It refused it.
    Refused,
}

/// The figures of one controller: made once, shared by all.
#[derive(Debug, Default)]
pub struct ControllerTelemetry {
    issued: AtomicU64,
    denied: [AtomicU64; DenyReason::ALL.len()],
    reviews: [AtomicU64; ReviewResult::ALL.len()],
    leader: AtomicBool,
    taints_removed: AtomicU64,
    pods: AtomicU64,
    checked: [AtomicU64; Checked::ALL.len()],
    trusted_roots: AtomicU64,
    /// Seconds since the epoch; 0 while there is none.
    signing_root_expires: AtomicI64,
    own_certificate_expires: AtomicI64,
    token_keys_told: AtomicI64,
}

impl ControllerTelemetry {
    /// Counts a certificate.
    pub fn issued(&self) {
        self.issued.fetch_add(1, Relaxed);
    }

    /// Counts a request that got none.
    pub fn denied(&self, reason: DenyReason) {
        self.denied[reason as usize].fetch_add(1, Relaxed);
    }

    /// Counts a question about a token.
    pub fn reviewed(&self, result: ReviewResult) {
        self.reviews[result as usize].fetch_add(1, Relaxed);
    }

    /// Tells whether this one leads now.
    pub fn set_leader(&self, leads: bool) {
        self.leader.store(leads, Relaxed);
    }

    /// Counts a node that pods may be scheduled to from now on.
    pub fn taint_removed(&self) {
        self.taints_removed.fetch_add(1, Relaxed);
    }

    /// Counts an object that the webhook has looked at.
    pub fn checked(&self, outcome: Checked) {
        self.checked[outcome as usize].fetch_add(1, Relaxed);
    }

    /// Tells how many pods are known.
    pub fn set_pods(&self, count: usize) {
        self.pods.store(count as u64, Relaxed);
    }

    /// Tells how many roots are to be trusted, and when the one that signs expires.
    pub fn set_roots(&self, trusted: usize, signing_expires: SystemTime) {
        self.trusted_roots.store(trusted as u64, Relaxed);
        self.signing_root_expires.store(seconds(signing_expires), Relaxed);
    }

    /// Tells when the certificate that callers are shown expires.
    pub fn set_own_certificate(&self, expires: SystemTime) {
        self.own_certificate_expires.store(seconds(expires), Relaxed);
    }

    /// Tells when the keys of service account tokens were told last.
    pub fn set_token_keys(&self, told: SystemTime) {
        self.token_keys_told.store(seconds(told), Relaxed);
    }

    /// The metrics page. Reads `/proc`, so not for an async thread.
    pub fn scrape(self: &Arc<Self>, format: MetricsFormat) -> String {
        format.of_openmetrics(text_of(Scrape { figures: self.clone(), process: ProcessFigures::read() }))
    }
}

#[derive(Debug)]
struct Scrape {
    figures: Arc<ControllerTelemetry>,
    process: ProcessFigures,
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let (mut out, figures) = (Out(encoder), &self.figures);
        let help = "Certificates that were issued.";
        out.one_counter("undermesh_ca_certificates_issued", help, figures.issued.load(Relaxed))?;
        let help = "Requests for certificates that got none, by why.";
        let mut family = out.counter("undermesh_ca_requests_denied", help)?;
        for reason in DenyReason::ALL {
            let count = figures.denied[reason as usize].load(Relaxed);
            counter(&mut family, &[("reason", reason.as_str())], count)?;
        }
        let help = "Questions to the API server whose token it is, by their result.";
        let mut family = out.counter("undermesh_ca_token_reviews", help)?;
        for result in ReviewResult::ALL {
            let count = figures.reviews[result as usize].load(Relaxed);
            counter(&mut family, &[("result", result.as_str())], count)?;
        }
        let help = "Objects that the webhook has looked at, by what it had to say.";
        let mut family = out.counter("undermesh_webhook_objects", help)?;
        for outcome in Checked::ALL {
            let count = figures.checked[outcome as usize].load(Relaxed);
            counter(&mut family, &[("result", outcome.as_str())], count)?;
        }
        let help = "Roots that the mesh is to trust; two or more while one is rotated.";
        out.one_gauge("undermesh_ca_trusted_roots", help, figures.trusted_roots.load(Relaxed))?;
        let now = seconds(SystemTime::now());
        let families = [
            (
                "undermesh_ca_root_remaining_seconds",
                "What is left of the life of the certificate that signs; negative when it is over.",
                &figures.signing_root_expires,
            ),
            (
                "undermesh_ca_server_certificate_remaining_seconds",
                "What is left of the life of the certificate that callers are shown.",
                &figures.own_certificate_expires,
            ),
        ];
        for (name, help, expires) in families {
            // None before there is a certificate: 0 would look like one that expires now.
            match expires.load(Relaxed) {
                0 => {}
                expires => out.one_gauge(name, help, expires - now)?,
            }
        }
        let help = "How long ago the API server told the keys of service account tokens.";
        match figures.token_keys_told.load(Relaxed) {
            0 => {}
            told => out.one_gauge("undermesh_ca_token_keys_age_seconds", help, now - told)?,
        }
        let help = "1 while this replica leads.";
        out.one_gauge("undermesh_controller_leader", help, u64::from(figures.leader.load(Relaxed)))?;
        let help = "Startup taints that this replica has removed.";
        out.one_counter("undermesh_controller_taints_removed", help, figures.taints_removed.load(Relaxed))?;
        let help = "Pods of the cluster that are not finished, as far as they are known.";
        out.one_gauge("undermesh_controller_pods_known", help, figures.pods.load(Relaxed))?;
        let mut family =
            out.gauge("undermesh_build_info", "Always 1; the version of the program is in the label.")?;
        gauge(&mut family, &[("version", env!("CARGO_PKG_VERSION"))], 1u64)?;
        process(&mut out, &self.process)
    }
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

impl DenyReason {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 12] = [
        Self::NoToken,
        Self::TokenRefused,
        Self::NotAnAgent,
        Self::UnknownNode,
        Self::NoPodOnNode,
        Self::WrongTrustDomain,
        Self::BadRequest,
        Self::NotSynced,
        Self::ApiUnavailable,
        Self::NoAuthority,
        Self::Busy,
        Self::Timeout,
    ];

    /// Its stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::TokenRefused => "token_refused",
            Self::NotAnAgent => "not_an_agent",
            Self::UnknownNode => "unknown_node",
            Self::NoPodOnNode => "no_pod_on_node",
            Self::WrongTrustDomain => "wrong_trust_domain",
            Self::BadRequest => "bad_request",
            Self::NotSynced => "not_synced",
            Self::ApiUnavailable => "api_unavailable",
            Self::NoAuthority => "no_authority",
            Self::Busy => "busy",
            Self::Timeout => "timeout",
        }
    }
}

impl Checked {
    const ALL: [Self; 3] = [Self::Clean, Self::Warned, Self::Refused];

    fn as_str(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Warned => "warned",
            Self::Refused => "refused",
        }
    }
}

impl ReviewResult {
    const ALL: [Self; 4] = [Self::Authenticated, Self::Refused, Self::ByKeys, Self::Unavailable];

    fn as_str(self) -> &'static str {
        match self {
            Self::Authenticated => "authenticated",
            Self::Refused => "refused",
            Self::ByKeys => "by_keys",
            Self::Unavailable => "unavailable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_and_reason_is_in_the_documentation() {
        let docs = include_str!("../../../docs/metrics.md");
        let telemetry = Arc::new(ControllerTelemetry::default());
        for (at, reason) in DenyReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
            assert!(docs.contains(&format!("`{}`", reason.as_str())), "{}", reason.as_str());
            telemetry.denied(reason);
        }
        telemetry.reviewed(ReviewResult::Refused);
        telemetry.set_roots(2, SystemTime::now() + std::time::Duration::from_secs(1_050));
        telemetry.set_leader(true);
        telemetry.set_token_keys(SystemTime::now());
        let text = telemetry.scrape(MetricsFormat::PrometheusText);
        for name in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
            assert!(docs.contains(&format!("`{name}`")), "docs/metrics.md does not mention `{name}`");
        }
        for line in [
            "undermesh_ca_requests_denied_total{reason=\"no_pod_on_node\"} 1",
            "undermesh_ca_token_reviews_total{result=\"refused\"} 1",
            "undermesh_ca_trusted_roots 2",
            "undermesh_controller_leader 1",
            "undermesh_ca_certificates_issued_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("\nundermesh_ca_root_remaining_seconds 10"), "{text}");
        assert!(!text.contains("\nundermesh_ca_server_certificate_remaining_seconds "), "{text}");
    }
}

//! What `/debug/certs` shows and `undermesh certs` prints: facts of certificates, never a key.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::clock::rfc3339;
use super::radar::Radar;

/// The page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertificatesView {
    /// The trust domain of this mesh.
    pub trust_domain: String,
    /// The certificates of this node's service accounts, ordered by identity.
    pub certificates: Vec<CertificateView>,
    /// The roots that are believed.
    pub roots: Vec<RootView>,
    /// `require`, `prefer` or `off`.
    pub crl_mode: String,
    /// The revocation lists in force.
    pub crls: Vec<CrlView>,
    /// By how many seconds another clock was seen to be ahead of this node's, if by any worth mentioning.
    pub clock_skew_seconds: Option<u64>,
    /// What people should look at, a sentence each.
    pub warnings: Vec<String>,
}

/// One certificate, or the lack of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertificateView {
    /// The SPIFFE id.
    pub identity: String,
    /// In hexadecimal digits; like all that follows, missing while there is no certificate.
    pub serial: Option<String>,
    /// RFC 3339.
    pub not_before: Option<String>,
    /// RFC 3339.
    pub not_after: Option<String>,
    /// What is left of its life; negative when it is over.
    pub remaining_seconds: Option<i64>,
    /// The subject of the certificate that signed it.
    pub issuer: Option<String>,
    /// What is left of that one's life.
    pub issuer_remaining_seconds: Option<i64>,
    /// The subject of the root that it leads to.
    pub root: Option<String>,
    /// What is left of that one's life.
    pub root_remaining_seconds: Option<i64>,
    /// When its renewal is, or was, due (RFC 3339).
    pub renewal_due: String,
    /// How late the renewal is.
    pub renewal_lag_seconds: u64,
    /// Requests that failed since the last success.
    pub failures: u32,
    /// Why the last one failed.
    pub last_error: Option<String>,
}

/// One root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RootView {
    /// For whom it is believed.
    pub trust_domain: String,
    /// Its subject.
    pub subject: String,
    /// In hexadecimal digits.
    pub serial: String,
    /// RFC 3339.
    pub not_after: String,
    /// What is left of its life; negative when it is over.
    pub remaining_seconds: i64,
}

/// One revocation list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CrlView {
    /// Whose certificates it lists.
    pub issuer: String,
    /// When its issuer promised the next (RFC 3339).
    pub next_update: Option<String>,
    /// True when that has passed.
    pub expired: bool,
}

impl Radar {
    /// The page of `/debug/certs`.
    pub fn view(&self) -> CertificatesView {
        let now = self.store.now();
        let believed = self.trust.believed();
        let certificates = self.store.standings().into_iter().map(|standing| {
            let svid = standing.svid.as_ref();
            CertificateView {
                identity: standing.id.to_string(),
                serial: svid.map(|svid| svid.serial.clone()),
                not_before: svid.map(|svid| rfc3339(svid.not_before)),
                not_after: svid.map(|svid| rfc3339(svid.not_after)),
                remaining_seconds: svid.map(|svid| seconds_between(now, svid.not_after)),
                issuer: svid.map(|svid| svid.issuer.subject.clone()),
                issuer_remaining_seconds: svid.map(|svid| seconds_between(now, svid.issuer.not_after)),
                root: svid.map(|svid| svid.root.subject.clone()),
                root_remaining_seconds: svid.map(|svid| seconds_between(now, svid.root.not_after)),
                renewal_due: rfc3339(standing.due),
                renewal_lag_seconds: now.duration_since(standing.due).unwrap_or_default().as_secs(),
                failures: standing.failures,
                last_error: standing.last_error.as_ref().map(ToString::to_string),
            }
        });
        let roots = believed.bundle.iter().flat_map(|(domain, roots)| {
            roots.facts.iter().map(move |root| RootView {
                trust_domain: domain.to_string(),
                subject: root.subject.clone(),
                serial: root.serial.clone(),
                not_after: rfc3339(root.not_after),
                remaining_seconds: seconds_between(now, root.not_after),
            })
        });
        let crls = believed.crls.iter().map(|crl| CrlView {
            issuer: crl.issuer.clone(),
            next_update: crl.next_update.map(rfc3339),
            expired: crl.next_update.is_some_and(|at| at < now),
        });
        CertificatesView {
            trust_domain: self.trust.own.to_string(),
            certificates: certificates.collect(),
            roots: roots.collect(),
            crl_mode: believed.crl_mode.as_str().into(),
            crls: crls.collect(),
            clock_skew_seconds: self.trust.clock_skew().map(|skew| skew.as_secs()),
            warnings: self.warnings().iter().map(ToString::to_string).collect(),
        }
    }
}

/// Negative when `to` is before `from`.
fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    super::clock::to_unix(to).saturating_sub(super::clock::to_unix(from))
}

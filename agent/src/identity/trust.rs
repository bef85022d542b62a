//! Whom we believe: the roots of our own trust domain and of federated ones, and what has been revoked.
//!
//! The one place where a certificate becomes an identity. It is the same check for both ends of a handshake and for
//! what an authority sends us; what is believed is swapped as a whole, so that no check sees half of a change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use tokio::sync::watch;
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::clock::unix_time;
use super::crl::Crl;
use super::reason::PeerRejected;
use super::x509::{Facts, X509Error};
use super::{CrlMode, SpiffeId, TrustDomain};

/// What differs between clocks before anybody is told.
const SKEW_SLACK: Duration = Duration::from_secs(30);

/// What is believed, and how far the clocks of those who are believed seem to be off.
#[derive(Debug)]
pub struct Trust {
    /// The trust domain of this mesh.
    pub own: TrustDomain,
    current: ArcSwap<Believed>,
    /// Says that there is something new in it.
    changed: watch::Sender<()>,
    algorithms: WebPkiSupportedAlgorithms,
    /// How far authorities of our own domain date back what they sign, in seconds; 0 where that is not known.
    backdates_by: AtomicU64,
    /// The largest advance of another clock that was seen, in seconds.
    skew: AtomicU64,
}

/// Everything believed at one moment.
#[derive(Clone, Debug)]
pub(super) struct Believed {
    pub(super) bundle: TrustBundle,
    pub(super) crls: Arc<[Crl]>,
    pub(super) crl_mode: CrlMode,
}

/// The roots of each trust domain; several at once while they are rotated.
#[derive(Clone, Debug, Default)]
pub struct TrustBundle(BTreeMap<TrustDomain, Arc<DomainRoots>>);

/// Where roots are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootSource {
    /// The certificate authority of our own trust domain.
    Authority,
    /// A file: federated domains, and our own while one authority takes over from another.
    File,
}

/// The roots of one trust domain.
#[derive(Debug, Default)]
pub struct DomainRoots {
    /// As certificates, each once.
    pub certificates: Vec<CertificateDer<'static>>,
    by_source: [Vec<CertificateDer<'static>>; 2],
    /// The same in the same order, for the check.
    anchors: Vec<TrustAnchor<'static>>,
    /// The same in the same order: a trust anchor does not know when it expires.
    pub(super) facts: Vec<Facts>,
}

/// What a peer is checked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Client,
}

impl Trust {
    /// Believes nobody yet.
    pub fn new(own: TrustDomain, crl_mode: CrlMode) -> Arc<Self> {
        let believed = Believed { bundle: TrustBundle::default(), crls: Arc::from([]), crl_mode };
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        let (backdates_by, skew) = (AtomicU64::new(0), AtomicU64::new(0));
        let (current, changed) = (ArcSwap::from_pointee(believed), watch::Sender::new(()));
        Arc::new(Self { own, current, changed, algorithms, backdates_by, skew })
    }

    /// Believes these roots of a trust domain, in place of those before from the same source. A domain without a root
    /// is not believed any more. True if that is a change.
    ///
    /// # Errors
    /// When one is not a certificate of an authority; then nothing changes.
    pub fn set_roots(
        &self,
        domain: &TrustDomain,
        source: RootSource,
        certificates: &[CertificateDer<'static>],
    ) -> Result<bool, X509Error> {
        let roots = DomainRoots::read(certificates)?;
        let mut changed = false;
        self.current.rcu(|before| {
            let mut next = Believed::clone(before);
            let mut sources =
                before.bundle.0.get(domain).map(|roots| roots.by_source.clone()).unwrap_or_default();
            changed = sources[source as usize] != roots.certificates;
            sources[source as usize] = roots.certificates.clone();
            // Read before, each by itself: this cannot fail.
            if let Ok(mut merged) = DomainRoots::read(&sources.concat()) {
                merged.by_source = sources;
                match merged.certificates.is_empty() {
                    true => next.bundle.0.remove(domain),
                    false => next.bundle.0.insert(domain.clone(), Arc::new(merged)),
                };
            }
            next
        });
        if changed {
            self.changed.send_replace(());
        }
        Ok(changed)
    }

    /// Takes these revocation lists in place of those before.
    pub(super) fn set_crls(&self, crls: Vec<Crl>) {
        let crls: Arc<[Crl]> = crls.into();
        self.current.rcu(|before| Believed { crls: crls.clone(), ..Believed::clone(before) });
        self.changed.send_replace(());
    }

    /// Tells how far our own authority dates back what it signs; makes skew between clocks visible.
    pub(super) fn set_backdating(&self, by: Option<Duration>) {
        self.backdates_by.store(by.unwrap_or_default().as_secs(), Ordering::Relaxed);
    }

    /// The largest advance of another clock over ours that was seen, if it was worth mentioning.
    pub fn clock_skew(&self) -> Option<Duration> {
        match self.skew.load(Ordering::Relaxed) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        }
    }

    /// What is believed from now on is told here.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(super) fn believed(&self) -> Arc<Believed> {
        self.current.load_full()
    }

    /// Checks a peer's chain, leaf first: validity, signatures up to a root of the trust domain that the leaf claims,
    /// revocation, and the form of an X.509-SVID.
    pub(super) fn verify(
        &self,
        chain: Chain<'_>,
        role: Role,
        now: SystemTime,
    ) -> Result<SpiffeId, PeerRejected> {
        let leaf = Facts::read(chain.leaf)?;
        let id = leaf.identity()?;
        let believed = self.current.load();
        let Some(roots) = believed.bundle.roots(id.trust_domain()) else {
            return Err(PeerRejected::WrongTrustDomain { id });
        };
        let verify_at = |time| roots.verify(chain, role, time, self.algorithms, Some(&believed));
        let verified = verify_at(now);
        if id.is_of(&self.own) {
            let signer = match &verified {
                Ok(root) => Some(*root),
                // Whoever can reach a pod can show any date: only what one of our roots has signed tells of clocks.
                Err(PeerRejected::Chain(webpki::Error::CertNotValidYet { .. })) => {
                    verify_at(leaf.not_before).ok()
                }
                Err(_) => None,
            };
            if let Some(root) = signer {
                self.note_skew(roots.is_from(RootSource::Authority, root), leaf.not_before, now);
            }
        }
        verified.map(|_root| id)
    }

    /// A certificate that begins after our now, once the backdating of our own authority is undone, was made by a clock
    /// ahead of ours. What an authority beside it has signed is not dated back by ours.
    fn note_skew(&self, is_ours: bool, not_before: SystemTime, now: SystemTime) {
        let backdated = match is_ours {
            true => Duration::from_secs(self.backdates_by.load(Ordering::Relaxed)),
            false => Duration::ZERO,
        };
        let ahead = (not_before + backdated).duration_since(now).unwrap_or_default();
        if ahead > SKEW_SLACK {
            self.note_clock_ahead(ahead);
        }
    }

    pub(super) fn note_clock_ahead(&self, ahead: Duration) {
        // The largest counts: the first handshake after a renewal shows the most.
        if self.skew.fetch_max(ahead.as_secs(), Ordering::Relaxed) < ahead.as_secs() {
            tracing::warn!(
                seconds = ahead.as_secs(),
                "the clock of this node is behind that of a peer or of the certificate authority: synchronise them"
            );
        }
    }
}

/// A chain as it comes: the leaf, and what may lead to a root.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain<'a> {
    pub(super) leaf: &'a CertificateDer<'a>,
    pub(super) intermediates: &'a [CertificateDer<'a>],
}

impl TrustBundle {
    /// The roots of a trust domain.
    pub fn roots(&self, domain: &str) -> Option<&Arc<DomainRoots>> {
        self.0.iter().find(|(name, _)| name.as_str() == domain).map(|(_, roots)| roots)
    }

    /// Every trust domain with its roots.
    pub fn iter(&self) -> impl Iterator<Item = (&TrustDomain, &Arc<DomainRoots>)> {
        self.0.iter()
    }
}

impl DomainRoots {
    pub(super) fn read(certificates: &[CertificateDer<'static>]) -> Result<Self, X509Error> {
        let mut roots = Self::default();
        for certificate in certificates {
            if roots.certificates.contains(certificate) {
                continue;
            }
            let facts = Facts::read(certificate)?;
            let anchor = webpki::anchor_from_trusted_cert(certificate)
                .map_err(|error| X509Error(format!("{} cannot be a root: {error}", facts.subject)))?;
            roots.anchors.push(anchor.to_owned());
            roots.certificates.push(certificate.clone());
            roots.facts.push(facts);
        }
        Ok(roots)
    }

    /// Whether the root is known from there, be it from elsewhere too.
    fn is_from(&self, source: RootSource, root: usize) -> bool {
        self.by_source[source as usize].contains(&self.certificates[root])
    }

    /// Which root the chain leads to.
    pub(super) fn verify(
        &self,
        chain: Chain<'_>,
        role: Role,
        now: SystemTime,
        algorithms: WebPkiSupportedAlgorithms,
        believed: Option<&Believed>,
    ) -> Result<usize, PeerRejected> {
        let leaf = EndEntityCert::try_from(chain.leaf)?;
        let crls: Vec<&CertRevocationList<'_>> =
            believed.map(|b| b.crls.iter().map(|crl| &*crl.list).collect()).unwrap_or_default();
        let mode = believed.map_or(CrlMode::Off, |believed| believed.crl_mode);
        let revocation = match (mode, RevocationOptionsBuilder::new(&crls)) {
            (CrlMode::Off, _) | (CrlMode::Prefer, Err(_)) => None,
            (CrlMode::Require, Err(_)) => return Err(PeerRejected::NoCrl),
            (CrlMode::Require, Ok(options)) => Some(
                options
                    .with_depth(RevocationCheckDepth::Chain)
                    .with_status_policy(UnknownStatusPolicy::Deny)
                    .with_expiration_policy(ExpirationPolicy::Enforce)
                    .build(),
            ),
            (CrlMode::Prefer, Ok(options)) => Some(
                options
                    .with_depth(RevocationCheckDepth::Chain)
                    .with_status_policy(UnknownStatusPolicy::Allow)
                    .with_expiration_policy(ExpirationPolicy::Ignore)
                    .build(),
            ),
        };
        let usage = match role {
            Role::Server => KeyUsage::server_auth(),
            Role::Client => KeyUsage::client_auth(),
        };
        let time = unix_time(now);
        let path = leaf.verify_for_usage(
            algorithms.all,
            &self.anchors,
            chain.intermediates,
            time,
            usage,
            revocation,
            None,
        )?;
        let found = self.anchors.iter().position(|anchor| anchor == path.anchor());
        let root = found.ok_or(webpki::Error::UnknownIssuer)?;
        // A trust anchor is only a name and a key to the check above.
        let facts = &self.facts[root];
        if now > facts.not_after {
            return Err(webpki::Error::CertExpired { time, not_after: unix_time(facts.not_after) }.into());
        }
        if now < facts.not_before {
            return Err(
                webpki::Error::CertNotValidYet { time, not_before: unix_time(facts.not_before) }.into()
            );
        }
        Ok(root)
    }
}

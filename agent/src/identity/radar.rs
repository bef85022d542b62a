//! The expiry radar: what is going to expire, long before it does, for metrics, the log and readiness.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tracing::{error, warn};

use super::clock::{rfc3339, to_unix};
use super::store::Standing;
use super::svid::Svid;
use super::{CertificateStore, CrlMode, RenewalResult, SpiffeId, Trust};

/// A leaf is worth a warning when it has less than this part of its life left: its renewal is long overdue.
const LEAF_WARNING: f64 = 0.25;
/// Authorities are replaced by people, who need time.
const ROOT_WARNINGS: [u64; 3] = [30, 14, 3];

/// Looks at the certificates in use and at the roots believed.
#[derive(Debug)]
pub struct Radar {
    pub(super) store: Arc<CertificateStore>,
    pub(super) trust: Arc<Trust>,
    /// What has been said, by subject, and how urgent it was.
    said: Mutex<BTreeMap<String, Urgency>>,
}

/// Everything that the metrics tell, read at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// What expires when.
    pub lifetimes: Vec<Lifetime>,
    /// How late the renewal of each identity is.
    pub lags: Vec<RenewalLag>,
    /// How much of its life each leaf has left.
    pub lives: Vec<LifeLeft>,
    /// How many requests ended how.
    pub renewals: Vec<(RenewalResult, u64)>,
    /// The largest advance of another clock over ours that was seen.
    pub clock_skew: Option<Duration>,
}

/// When one certificate expires.
#[derive(Clone, Debug, PartialEq)]
pub struct Lifetime {
    /// What it is to the identity.
    pub kind: Kind,
    /// The SPIFFE id: a service account's, or for trusted roots the trust domain's.
    pub identity: String,
    /// The certificate's subject; empty for leaves, which have none.
    pub subject: String,
    /// When it expires, in seconds since 1970.
    pub expires: i64,
    /// What is left, in seconds; negative when it is over.
    pub remaining: f64,
}

/// What a certificate is to an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Its own.
    Leaf,
    /// The one that signed the leaf.
    Issuer,
    /// The root that the leaf leads to.
    Root,
    /// A root that is believed for a trust domain.
    TrustedRoot,
}

/// How late a renewal is.
#[derive(Clone, Debug, PartialEq)]
pub struct RenewalLag {
    /// Whose.
    pub identity: SpiffeId,
    /// Time since the renewal was due; none for one that is not.
    pub lag: Duration,
}

/// How much of its life a leaf has left.
#[derive(Clone, Debug, PartialEq)]
pub struct LifeLeft {
    /// Whose.
    pub identity: SpiffeId,
    /// Of the time that it had when it was received: 1 at first, 0 when it expires.
    pub share: f64,
}

/// Something that people should look at, as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// What it is about; there is one warning for each at most.
    pub subject: String,
    /// A sentence with facts.
    pub text: String,
    urgency: Urgency,
}

/// What endangers an identity's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Danger {
    /// It is too late already.
    pub is_expired: bool,
    /// What expires when, and what is to be done. It stays the same for as long as the danger does.
    pub text: String,
}

/// The later in the list, the more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// Less than so many of the steps of [`ROOT_WARNINGS`] are left, or a leaf is late.
    Soon(u8),
    Expired,
}

impl Radar {
    /// Looks at these.
    pub fn new(store: Arc<CertificateStore>, trust: Arc<Trust>) -> Arc<Self> {
        Arc::new(Self { store, trust, said: Mutex::default() })
    }

    /// What the metrics tell.
    pub fn read(&self) -> Reading {
        let now = self.store.now();
        let mut lifetimes = Vec::new();
        let (mut lags, mut lives) = (Vec::new(), Vec::new());
        for standing in self.store.standings() {
            lags.push(RenewalLag {
                lag: now.duration_since(standing.due).unwrap_or_default(),
                identity: standing.id.clone(),
            });
            let Some(svid) = standing.svid else { continue };
            let id = svid.id.as_str();
            lifetimes.push(Lifetime::of(Kind::Leaf, id, "", svid.not_after, now));
            lives.push(LifeLeft { identity: svid.id.clone(), share: life_left(&svid, now) });
            for (kind, signatory) in [(Kind::Issuer, &svid.issuer), (Kind::Root, &svid.root)] {
                lifetimes.push(Lifetime::of(kind, id, &signatory.subject, signatory.not_after, now));
            }
        }
        for (domain, roots) in self.trust.believed().bundle.iter() {
            // While roots overlap, the last one to expire counts: without it nobody of the domain is believed.
            if let Some(root) = roots.facts.iter().max_by_key(|root| root.not_after) {
                let id = domain.id();
                lifetimes.push(Lifetime::of(Kind::TrustedRoot, &id, &root.subject, root.not_after, now));
            }
        }
        Reading {
            lifetimes,
            lags,
            lives,
            renewals: self.store.results().to_vec(),
            clock_skew: self.trust.clock_skew(),
        }
    }

    /// Everything that people should look at now.
    pub fn warnings(&self) -> Vec<Warning> {
        let now = self.store.now();
        let mut warnings: BTreeMap<String, Warning> = BTreeMap::new();
        for standing in self.store.standings() {
            let Some(svid) = &standing.svid else { continue };
            if let Some(warning) = leaf_warning(&standing, now) {
                warnings.insert(warning.subject.clone(), warning);
            }
            for signatory in [&svid.issuer, &svid.root] {
                if let Some(warning) = root_warning(&signatory.subject, signatory.not_after, now) {
                    warnings.insert(warning.subject.clone(), warning);
                }
            }
        }
        for (_, roots) in self.trust.believed().bundle.iter() {
            let last = roots.facts.iter().max_by_key(|root| root.not_after);
            if let Some(warning) = last.and_then(|root| root_warning(&root.subject, root.not_after, now)) {
                warnings.insert(warning.subject.clone(), warning);
            }
        }
        warnings.into_values().collect()
    }

    /// What endangers the certificates in use, those that they lead to included.
    pub fn dangers(&self) -> HashMap<SpiffeId, Danger> {
        let now = self.store.now();
        let standings = self.store.standings();
        standings.iter().filter_map(|it| Some((it.id.clone(), danger(it.svid.as_deref()?, now)?))).collect()
    }

    /// Logs what is new among the warnings, or has become more urgent. To be called every minute or so.
    pub fn tell(&self) {
        let warnings = self.warnings();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in &warnings {
            if said.get(&warning.subject).is_none_or(|before| *before < warning.urgency) {
                match warning.urgency {
                    Urgency::Expired => error!("{}", warning.text),
                    Urgency::Soon(_) => warn!("{}", warning.text),
                }
            }
        }
        *said = warnings.into_iter().map(|warning| (warning.subject, warning.urgency)).collect();
    }

    /// Tells for ever. Whoever spawns it ends it.
    pub async fn watch(self: Arc<Self>, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            self.tell();
        }
    }

    /// What keeps this node's pods from speaking mutual TLS, a sentence each; empty when nothing does.
    pub fn missing(&self) -> Vec<String> {
        let now = self.store.now();
        let mut missing = Vec::new();
        let believed = self.trust.believed();
        if believed.bundle.roots(self.trust.own.as_str()).is_none() {
            let why = self.store.roots_failure().map(|error| format!(": {error}")).unwrap_or_default();
            missing.push(format!("no root of the trust domain {} is known yet{why}", self.trust.own));
        }
        for standing in self.store.standings() {
            match &standing.svid {
                None => missing.push(match &standing.last_error {
                    Some(error) => format!("{} has no certificate: {error}", standing.id),
                    None => format!("{} has no certificate yet", standing.id),
                }),
                Some(svid) if svid.not_after <= now => {
                    let at = rfc3339(svid.not_after);
                    missing.push(format!(
                        "the certificate of {} expired at {at}{}",
                        standing.id,
                        because(&standing)
                    ));
                }
                Some(_) => {}
            }
        }
        if believed.crl_mode == CrlMode::Require {
            if believed.crls.is_empty() {
                missing.push("revocation lists are required, and there is none".into());
            }
            let expired = believed.crls.iter().filter(|crl| crl.next_update.is_some_and(|at| at < now));
            missing.extend(expired.map(|crl| format!("the revocation list of {} has expired", crl.issuer)));
        }
        missing
    }
}

fn life_left(svid: &Svid, now: SystemTime) -> f64 {
    let life = svid.not_after.duration_since(svid.received).unwrap_or_default();
    if life.is_zero() { 0.0 } else { svid.remaining(now).as_secs_f64() / life.as_secs_f64() }
}

fn leaf_warning(standing: &Standing, now: SystemTime) -> Option<Warning> {
    let svid = standing.svid.as_ref()?;
    let left = svid.remaining(now);
    let (urgency, what) = if left.is_zero() {
        (Urgency::Expired, format!("expired at {}", rfc3339(svid.not_after)))
    } else if life_left(svid, now) < LEAF_WARNING {
        (Urgency::Soon(0), format!("expires in {} s and should have been renewed long ago", left.as_secs()))
    } else {
        return None;
    };
    let id = &standing.id;
    Some(Warning {
        subject: id.to_string(),
        text: format!("the certificate of {id} {what}{}", because(standing)),
        urgency,
    })
}

fn danger(svid: &Svid, now: SystemTime) -> Option<Danger> {
    let expires = |what: &str, at: SystemTime| match at <= now {
        true => format!("{what} expired at {}", rfc3339(at)),
        false => format!("{what} expires at {}", rfc3339(at)),
    };
    let mut dangers = Vec::new();
    if life_left(svid, now) < LEAF_WARNING {
        let what = expires("its certificate", svid.not_after);
        dangers.push((
            svid.not_after,
            format!("{what} and is not renewed: ask `undermesh certs` on its node for the reason"),
        ));
    }
    // Where no other certificate is between them, the root is the issuer.
    let authorities: BTreeMap<&str, SystemTime> =
        [&svid.issuer, &svid.root].map(|it| (&*it.subject, it.not_after)).into();
    for (subject, not_after) in authorities {
        if root_warning(subject, not_after, now).is_some() {
            let what = expires(&format!("the authority {subject} of its certificate"), not_after);
            dangers.push((not_after, format!("{what}: rotate it, or no certificate will be valid")));
        }
    }
    let is_expired = dangers.iter().any(|(at, _)| *at <= now);
    let text = dangers.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("; ");
    (!text.is_empty()).then_some(Danger { is_expired, text })
}

fn because(standing: &Standing) -> String {
    standing.last_error.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
}

fn root_warning(subject: &str, not_after: SystemTime, now: SystemTime) -> Option<Warning> {
    const DAY: u64 = 86_400;
    let warning = |urgency, what: String| Warning {
        subject: subject.to_owned(),
        text: format!("the authority {subject} {what}; rotate it, or no certificate will be valid"),
        urgency,
    };
    let Ok(left) = not_after.duration_since(now) else {
        return Some(warning(Urgency::Expired, format!("expired at {}", rfc3339(not_after))));
    };
    let passed = ROOT_WARNINGS.iter().filter(|days| left.as_secs() < *days * DAY).count();
    let days = left.as_secs() / DAY;
    (passed > 0).then(|| warning(Urgency::Soon(passed as u8), format!("expires in {days} days")))
}

impl Lifetime {
    fn of(kind: Kind, identity: &str, subject: &str, not_after: SystemTime, now: SystemTime) -> Self {
        let remaining = match not_after.duration_since(now) {
            Ok(left) => left.as_secs_f64(),
            Err(over) => -over.duration().as_secs_f64(),
        };
        Self {
            kind,
            identity: identity.into(),
            subject: subject.into(),
            expires: to_unix(not_after),
            remaining,
        }
    }
}

impl Kind {
    /// The stable name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leaf => "leaf",
            Self::Issuer => "issuer",
            Self::Root => "root",
            Self::TrustedRoot => "trusted_root",
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests;

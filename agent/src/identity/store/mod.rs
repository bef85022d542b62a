//! The certificates of this node: one for each service account that has a pod here, renewed long before it must be.
//!
//! The store decides when to ask the authority and whether to believe the answer. It does not know what the
//! certificates are used for. An authority that is down harms nothing until what was issued before expires.

mod entry;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use imbl::OrdMap;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

use super::ca::{CaError, CertificateAuthority, CertificateRequest, Roots};
use super::clock::rfc3339;
use super::key::PrivateKey;
use super::schedule;
use super::svid::Svid;
use super::trust::RootSource;
use super::{Clock, SpiffeId, Trust};
pub(super) use entry::Standing;
use entry::{Busy, Entry};

/// Once the authority answers, whoever waits for it is asked for again within this time.
const HURRY: Duration = Duration::from_secs(1);

/// So long without a certificate means that the authority has been away, or was not needed.
const SILENCE: Duration = Duration::from_secs(10);

/// How certificates are asked for.
#[derive(Clone, Copy, Debug)]
pub struct StoreSettings {
    /// How long a certificate is to live.
    pub leaf_life: Duration,
    /// How long the authority may take for an answer.
    pub issue_timeout: Duration,
    /// Requests under way at one time.
    pub parallel: usize,
    /// How often the authority's roots are looked at.
    pub roots_every: Duration,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            leaf_life: Duration::from_secs(86_400),
            issue_timeout: Duration::from_secs(10),
            parallel: 8,
            roots_every: Duration::from_secs(2),
        }
    }
}

/// The certificates of this node. Made once, shared by all.
#[derive(Debug)]
pub struct CertificateStore {
    ca: Arc<dyn CertificateAuthority>,
    trust: Arc<Trust>,
    clock: Clock,
    settings: StoreSettings,
    entries: ArcSwap<OrdMap<SpiffeId, Arc<Entry>>>,
    /// Held while entries come and go, never across an await.
    writing: Mutex<()>,
    wake: Notify,
    results: [AtomicU64; RenewalResult::ALL.len()],
    last_answer: Mutex<Option<SystemTime>>,
    /// What kept the authority from telling its roots, so that it is said once.
    roots_failed: Mutex<Option<CaError>>,
}

/// Nobody has asked for a certificate of this identity, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate is kept for {0}")]
pub struct NotHeld(pub SpiffeId);

/// What became of a request: the values of a metric's `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenewalResult {
    /// A certificate.
    Success,
    /// No answer.
    Unavailable,
    /// A refusal.
    Refused,
    /// An answer that must not be used.
    BadAnswer,
}

impl CertificateStore {
    /// A store without certificates. Roots that the authority knows already are believed at once.
    pub fn new(
        ca: Arc<dyn CertificateAuthority>,
        trust: Arc<Trust>,
        clock: Clock,
        settings: StoreSettings,
    ) -> Arc<Self> {
        trust.set_backdating(ca.backdates_by());
        let store = Arc::new(Self {
            ca,
            trust,
            clock,
            settings,
            entries: ArcSwap::default(),
            writing: Mutex::new(()),
            wake: Notify::new(),
            results: Default::default(),
            last_answer: Mutex::default(),
            roots_failed: Mutex::default(),
        });
        store.refresh_roots();
        store
    }

    /// Keeps a certificate for the identity, until it is released as often as this was called.
    pub fn ensure(&self, id: &SpiffeId) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = self.entries.load();
        if let Some(entry) = entries.get(id) {
            entry.users.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let entry = Arc::new(Entry::new(id.clone(), self.clock.now()));
        self.entries.store(Arc::new(entries.update(id.clone(), entry)));
        self.wake.notify_one();
    }

    /// Gives back what [`CertificateStore::ensure`] asked for. The last one to do so ends the certificate.
    pub fn release(&self, id: &SpiffeId) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = self.entries.load();
        let Some(entry) = entries.get(id) else { return };
        if entry.users.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.entries.store(Arc::new(entries.without(id)));
            entry.end();
        }
    }

    /// The certificate in use, without waiting for anything.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        self.entries.load().get(id)?.svid.load_full()
    }

    /// The certificate in use, or the first one as soon as it is there. Waits as long as that takes: the caller has the
    /// time-out.
    ///
    /// # Errors
    /// When none is kept for the identity.
    pub async fn get(&self, id: &SpiffeId) -> Result<Arc<Svid>, NotHeld> {
        let entry = self.entries.load().get(id).cloned().ok_or_else(|| NotHeld(id.clone()))?;
        entry.first().await.ok_or_else(|| NotHeld(id.clone()))
    }

    /// Asks for certificates and renews them, and follows the authority's roots, for ever. Whoever spawns it ends it.
    pub async fn run(self: Arc<Self>) {
        let mut requests = JoinSet::new();
        loop {
            self.refresh_roots();
            let now = self.clock.now();
            let mut next = self.settings.roots_every;
            for entry in self.entries.load().values() {
                match entry.due_in(now) {
                    Some(wait) if wait.is_zero() && requests.len() < self.settings.parallel => {
                        if let Some(busy) = Busy::take(entry) {
                            requests.spawn(self.clone().renew(busy));
                        }
                    }
                    Some(wait) if !wait.is_zero() => next = next.min(wait),
                    _ => {}
                }
            }
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                () = self.wake.notified() => {}
                Some(done) = requests.join_next() => if let Err(error) = done {
                    error!(%error, "asking for a certificate failed inside the agent");
                },
            }
        }
    }

    /// One request, and what follows from its outcome.
    async fn renew(self: Arc<Self>, busy: Busy) {
        let entry = busy.entry();
        let outcome = self.request(&entry.id).await;
        let now = self.clock.now();
        let result = RenewalResult::of(&outcome);
        self.results[result as usize].fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(svid) => {
                self.install(entry, svid);
                if self.is_first_answer_after_silence(now) {
                    // Not all at once: other nodes have waited as well.
                    for waiting in self.entries.load().values() {
                        waiting.hurry(now + HURRY.mul_f64(fastrand::f64()));
                    }
                }
            }
            Err(error) => {
                let remaining = entry.svid.load().as_ref().map(|svid| svid.remaining(now));
                let failures = entry.failed(&error, |failures| {
                    now + schedule::retry_after(failures, remaining, fastrand::f64())
                });
                // The back-off goes on for as long as the outage: the first time is news, the radar tells the rest.
                match failures {
                    1 => warn!(identity = %entry.id, %error, "no certificate; trying again"),
                    _ => debug!(identity = %entry.id, %error, failures, "no certificate; trying again"),
                }
            }
        }
    }

    /// An authority that answers some and not others is busy, not back.
    fn is_first_answer_after_silence(&self, now: SystemTime) -> bool {
        let mut last = self.last_answer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.replace(now);
        before.is_none_or(|before| now.duration_since(before).is_ok_and(|silence| silence >= SILENCE))
    }

    async fn request(&self, id: &SpiffeId) -> Result<Svid, CaError> {
        let own = |error: super::KeyError| CaError::Unavailable(error.to_string());
        let key = PrivateKey::generate().map_err(own)?;
        let request = CertificateRequest {
            id: id.clone(),
            csr: key.request(id).map_err(own)?,
            public_key: key.public_key(),
            validity: self.settings.leaf_life,
        };
        let answer = tokio::time::timeout(self.settings.issue_timeout, self.ca.issue(&request)).await;
        let issued = answer.unwrap_or_else(|_| {
            let seconds = self.settings.issue_timeout.as_secs_f64();
            Err(CaError::Unavailable(format!("no answer within {seconds} s")))
        })?;
        Svid::accept(id, &key, issued, self.clock.now())
            .map_err(|error| CaError::BadAnswer(error.to_string()))
    }

    fn install(&self, entry: &Entry, svid: Svid) {
        if let Some(ahead) = svid.skew() {
            self.trust.note_clock_ahead(ahead);
        }
        let due = schedule::renew_at(svid.received, svid.not_after, fastrand::f64());
        info!(
            identity = %svid.id, serial = svid.serial, not_after = rfc3339(svid.not_after),
            "certificate issued"
        );
        entry.renewed(svid, due);
        // It may have brought roots, and the one before may have held others.
        self.refresh_roots();
    }

    /// Believes what the authority wants believed. What it cannot tell just now stays as it was.
    fn refresh_roots(&self) {
        let roots = match self.ca.roots() {
            Ok(Roots::These(roots)) => Ok(roots),
            Ok(Roots::AndThoseIssued(mut roots)) => {
                for entry in self.entries.load().values() {
                    roots.extend(entry.svid.load().iter().flat_map(|svid| svid.roots.iter().cloned()));
                }
                Ok(roots)
            }
            Err(error) => Err(error),
        };
        let set = roots.and_then(|roots| match roots.is_empty() {
            true => Ok(false),
            false => self
                .trust
                .set_roots(&self.trust.own, RootSource::Authority, &roots)
                .map_err(|error| CaError::BadAnswer(error.to_string())),
        });
        let mut failed = self.roots_failed.lock().unwrap_or_else(PoisonError::into_inner);
        match set {
            Ok(changed) => {
                *failed = None;
                if changed {
                    info!(trust_domain = %self.trust.own, "the trusted roots have changed");
                }
            }
            Err(error) => {
                if failed.as_ref() != Some(&error) {
                    warn!(%error, "the authority's roots cannot be read; those known before stay in force");
                    *failed = Some(error);
                }
            }
        }
    }

    /// How every certificate stands, ordered by identity.
    pub(super) fn standings(&self) -> Vec<Standing> {
        self.entries.load().values().map(|entry| entry.standing()).collect()
    }

    /// How many requests ended how.
    pub fn results(&self) -> [(RenewalResult, u64); RenewalResult::ALL.len()] {
        RenewalResult::ALL.map(|result| (result, self.results[result as usize].load(Ordering::Relaxed)))
    }

    /// What keeps the authority from telling its roots, if anything does.
    pub(super) fn roots_failure(&self) -> Option<CaError> {
        self.roots_failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn now(&self) -> SystemTime {
        self.clock.now()
    }
}

impl RenewalResult {
    /// Every result, in the order of the declaration.
    pub const ALL: [Self; 4] = [Self::Success, Self::Unavailable, Self::Refused, Self::BadAnswer];

    /// The stable name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::BadAnswer => "bad_answer",
        }
    }

    fn of<T>(outcome: &Result<T, CaError>) -> Self {
        match outcome {
            Ok(_) => Self::Success,
            Err(CaError::Unavailable(_)) => Self::Unavailable,
            Err(CaError::Refused(_)) => Self::Refused,
            Err(CaError::BadAnswer(_)) => Self::BadAnswer,
        }
    }
}

#[cfg(test)]
mod tests;

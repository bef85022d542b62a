//! The keys of issuers of tokens: fetched from where they publish them, kept for all pods of the node, and kept fresh.
//!
//! What the keys are for is not known here, nor which requests wait for them. Keys that could not be fetched anew are used for a day.

mod fetch;
mod source;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::model::Name;
use crate::policy::jwt::KeySet;
use fetch::Fetcher;
use source::Source;

/// The most addresses that keys are fetched from.
const MOST_ADDRESSES: usize = 256;

/// How long a request may wait for keys that it needs.
const PATIENCE: Duration = Duration::from_secs(2);

/// How keys are fetched.
#[derive(Clone, Debug, Default)]
pub struct JwksSettings {
    /// Roots that the certificates of issuers lead to, instead of the system's.
    pub ca: Option<PathBuf>,
}

/// The keys of all addresses that are wanted.
pub struct Jwks {
    fetcher: Fetcher,
    sources: ArcSwap<BTreeMap<Name, Arc<Source>>>,
    changed: watch::Sender<()>,
    counts: Arc<Counts>,
}

/// Keys of an address, as they were at one moment.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// None where there are none, or none any more.
    pub keys: Option<Arc<KeySet>>,
    /// How often the address has told them, or that they are the same.
    pub told: u64,
}

/// What became of an attempt to fetch keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchResult {
    /// They are others than before.
    Changed,
    /// They are the same.
    Unchanged,
    /// There was no answer, or none with keys in it.
    Failed,
}

/// What there is to tell of the keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Attempts to fetch keys, by their result.
    pub fetches: [(FetchResult, u64); FetchResult::ALL.len()],
    /// How long ago the keys of each address were told last, where there are any.
    pub ages: Vec<(Name, Duration)>,
}

#[derive(Debug, Default)]
struct Counts([AtomicU64; FetchResult::ALL.len()]);

impl FetchResult {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Changed, Self::Unchanged, Self::Failed];

    /// The stable name, for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
        }
    }
}

impl Jwks {
    /// Keys of no address yet.
    ///
    /// # Errors
    /// When the roots that were given cannot be used.
    pub fn new(settings: &JwksSettings) -> Result<Arc<Self>, String> {
        Ok(Arc::new(Self {
            fetcher: Fetcher::new(settings.ca.as_deref())?,
            sources: ArcSwap::default(),
            changed: watch::Sender::new(()),
            counts: Arc::default(),
        }))
    }

    /// From here on the keys of these addresses are wanted, and of no others.
    pub fn want(&self, addresses: BTreeSet<Name>) {
        let before = self.sources.load();
        let (count, known) = (addresses.len(), before.len());
        // Whoever comes later takes nothing from those whose keys are held.
        let (held, new): (Vec<_>, Vec<_>) =
            addresses.into_iter().partition(|address| before.contains_key(address));
        let wanted = held.into_iter().chain(new).take(MOST_ADDRESSES);
        let sources: BTreeMap<Name, Arc<Source>> = wanted
            .map(|address| {
                let source = before.get(&address).cloned();
                let source = source.unwrap_or_else(|| Arc::new(Source::new(address.clone())));
                (address, source)
            })
            .collect();
        if sources.len() == known && sources.keys().all(|address| before.contains_key(address)) {
            return;
        }
        if count > MOST_ADDRESSES {
            warn!(
                wanted = count,
                most = MOST_ADDRESSES,
                "keys of tokens are wanted of too many addresses: tokens of those beyond are refused"
            );
        }
        self.sources.store(Arc::new(sources));
        self.changed.send_replace(());
    }

    /// Fetches what is wanted, for as long as it is polled.
    pub async fn run(&self) {
        let mut changes = self.changed.subscribe();
        changes.mark_changed();
        let mut tasks = JoinSet::new();
        let mut under_way: HashMap<Name, (Arc<Source>, AbortHandle)> = HashMap::new();
        // The sender is our own.
        while changes.changed().await.is_ok() {
            let sources = self.sources.load_full();
            under_way.retain(|address, (source, task)| {
                let stays = sources.get(address).is_some_and(|wanted| Arc::ptr_eq(wanted, source));
                if !stays {
                    task.abort();
                }
                stays
            });
            for (address, source) in &*sources {
                under_way.entry(address.clone()).or_insert_with(|| {
                    let (own, fetcher, counts) = (source.clone(), self.fetcher.clone(), self.counts.clone());
                    (source.clone(), tasks.spawn(async move { own.keep_fresh(&fetcher, &counts).await }))
                });
            }
            while tasks.try_join_next().is_some() {}
        }
    }

    /// The keys of the address that are at hand.
    pub fn held(&self, address: &Name) -> Held {
        self.sources.load().get(address).map(|source| source.held()).unwrap_or_default()
    }

    /// Waits, for a moment at most, for keys of the address that may be others than those that were told so many times. False if
    /// there are none: then whoever needs others has to do without.
    pub async fn newer(&self, address: &Name, told: u64, since: Instant) -> bool {
        let Some(source) = self.sources.load().get(address).cloned() else { return false };
        timeout_at(since + PATIENCE, source.newer(told)).await.unwrap_or(false)
    }

    /// What there is to tell.
    pub fn read(&self) -> Reading {
        let ages = self.sources.load();
        let ages = ages.iter().filter_map(|(address, source)| Some((address.clone(), source.age()?)));
        Reading {
            fetches: FetchResult::ALL.map(|result| (result, self.counts.0[result as usize].load(Relaxed))),
            ages: ages.collect(),
        }
    }
}

impl Counts {
    fn add(&self, result: FetchResult) {
        self.0[result as usize].fetch_add(1, Relaxed);
    }
}

impl fmt::Debug for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwks").field("sources", &self.sources.load().keys()).finish_non_exhaustive()
    }
}

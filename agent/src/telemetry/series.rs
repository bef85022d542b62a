//! Label sets and their counters: found without allocating, bounded in number, gone when their workloads are.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::connection::{ConnectionFacts, Reporter, Security};
use super::histogram::{CONNECTION_DURATIONS, Histogram};
use super::http::{HttpRequest, HttpSeries, HttpSet};
use super::shared::Shared;
use super::{CloseReason, RefuseReason, TelemetrySettings};
use crate::model::{Name, Workload};
use crate::snapshot::{Destination, Snapshot};

/// The label value of a peer that is no known pod, and of the Service of a client that dialled a pod.
pub(super) const UNKNOWN: &str = "unknown";
/// The label value of everything beyond the maximum of label sets.
pub(super) const OTHER: &str = "other";

const SHARDS: usize = 16;

/// The counters of one label set. Whoever holds it keeps it from being retired.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) labels: SeriesLabels,
    pub(super) opened: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) closed: [AtomicU64; CloseReason::ALL.len()],
    pub(super) refused: [AtomicU64; RefuseReason::ALL.len()],
    pub(super) durations: Arc<Histogram>,
    pub(super) active_requests: AtomicU64,
    /// Of most it is never made: their connections carry no HTTP that anybody looks at.
    pub(super) http: OnceLock<Box<HttpSeries>>,
}

/// The values of the labels that every connection metric has.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SeriesLabels {
    pub(super) source: WorkloadName,
    pub(super) destination: WorkloadName,
    pub(super) service: WorkloadName,
    pub(super) source_identity: Name,
    pub(super) destination_identity: Name,
    pub(super) reporter: Reporter,
    pub(super) security: Security,
}

/// The labels of what has many buckets, and is kept for the destination alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct DestinationLabels {
    pub(super) destination: WorkloadName,
    pub(super) reporter: Reporter,
    pub(super) security: Security,
}

/// Namespace and name; both [`UNKNOWN`] or [`OTHER`] where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct WorkloadName {
    pub(super) namespace: Name,
    pub(super) name: Name,
}

/// The same without owning it: what a connection is looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key<'a> {
    source: (&'a str, &'a str),
    destination: (&'a str, &'a str),
    service: (&'a str, &'a str),
    identities: [&'a str; 2],
    reporter: Reporter,
    security: Security,
}

/// Every label set in use.
#[derive(Debug)]
pub(super) struct SeriesSet {
    shards: [RwLock<Shard>; SHARDS],
    durations: Shared<DestinationLabels, Histogram>,
    http: HttpSet,
    hasher: RandomState,
    count: AtomicUsize,
    overflow: AtomicU64,
    max: usize,
    grace: Duration,
    last_sweep: Mutex<Option<Instant>>,
}

/// By the hash of the key; the vector resolves what collides.
type Shard = HashMap<u64, Vec<Entry>>;

#[derive(Debug)]
struct Entry {
    series: Arc<Series>,
    /// Since when one of its workloads is gone and no connection holds it.
    gone_since: Option<Instant>,
}

impl SeriesSet {
    pub(super) fn new(settings: TelemetrySettings) -> Self {
        Self {
            shards: Default::default(),
            durations: Shared::default(),
            http: HttpSet::new(settings.max_request_sets),
            hasher: RandomState::new(),
            count: AtomicUsize::new(0),
            overflow: AtomicU64::new(0),
            max: settings.max_label_sets,
            grace: settings.series_grace,
            last_sweep: Mutex::new(None),
        }
    }

    /// The counters of the connection's label set, of which it is one more if there are too many.
    pub(super) fn get(&self, facts: &ConnectionFacts) -> Arc<Series> {
        let series = self.find_or_make(facts);
        if series.labels.is_other() {
            self.overflow.fetch_add(1, Ordering::Relaxed);
        }
        series
    }

    /// The counters of these facts' label set; made on first sight, `other` when there are too many.
    pub(super) fn find_or_make(&self, facts: &ConnectionFacts) -> Arc<Series> {
        let key = Key::of(facts);
        let hash = self.hasher.hash_one(key);
        if let Some(series) =
            find(&self.shard(hash).read().unwrap_or_else(PoisonError::into_inner), hash, key)
        {
            return series;
        }
        if self.try_count() {
            return self.insert(hash, key, true);
        }
        let other = key.folded();
        let hash = self.hasher.hash_one(other);
        let found = find(&self.shard(hash).read().unwrap_or_else(PoisonError::into_inner), hash, other);
        // One `other` for each reporter and security: a handful, so they are not counted against the maximum.
        found.unwrap_or_else(|| self.insert(hash, other, false))
    }

    /// Counts a request of this label set.
    pub(super) fn count_request(&self, series: &Series, request: &HttpRequest) {
        let http = series.http.get_or_init(|| Box::new(self.http.series_of(&series.labels)));
        let has_place = http.count(&self.http, &series.labels, request);
        if !has_place || series.labels.is_other() {
            self.overflow.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connections and requests that were counted under `other`.
    pub(super) fn overflow(&self) -> u64 {
        self.overflow.load(Ordering::Relaxed)
    }

    /// All of them, ordered by their labels.
    pub(super) fn all(&self) -> Vec<Arc<Series>> {
        let mut all = Vec::with_capacity(self.count.load(Ordering::Relaxed));
        for shard in &self.shards {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.values().flatten().map(|entry| entry.series.clone()));
        }
        all.sort_unstable_by(|a, b| a.labels.cmp(&b.labels));
        all
    }

    /// The histograms of connection durations, ordered by their labels.
    pub(super) fn durations(&self) -> Vec<(DestinationLabels, Arc<Histogram>)> {
        self.durations.all()
    }

    /// What the requests of all label sets have in common.
    pub(super) fn http(&self) -> &HttpSet {
        &self.http
    }

    /// Retires what has been without its workloads or its Service for the grace, and is not in use.
    ///
    /// One sweep reads the whole snapshot, so it is done at most ten times per grace however often this is called:
    /// the cost of a change must not grow with the size of the cluster.
    pub(super) fn retain(&self, snapshot: &Snapshot, now: Instant) {
        {
            let mut last = self.last_sweep.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_some_and(|last| now.saturating_duration_since(last) < self.grace / 10) {
                return;
            }
            *last = Some(now);
        }
        let alive = Alive::of(snapshot);
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            shard.retain(|_, entries| {
                entries.retain_mut(|entry| !self.retire(entry, &alive, now));
                !entries.is_empty()
            });
        }
        self.durations.sweep();
        self.http.sweep();
    }

    fn retire(&self, entry: &mut Entry, alive: &Alive<'_>, now: Instant) -> bool {
        // Under the shard's write lock nobody can get hold of the series, so being its only holder is final.
        let Some(series) = Arc::get_mut(&mut entry.series).filter(|series| !alive.has(&series.labels)) else {
            entry.gone_since = None;
            return false;
        };
        let since = *entry.gone_since.get_or_insert(now);
        let retire = now.saturating_duration_since(since) >= self.grace;
        if retire && !series.labels.is_other() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        if retire && let Some(http) = series.http.get_mut() {
            self.http.retired(http);
        }
        retire
    }

    /// Takes one of the places, if one is left.
    fn try_count(&self) -> bool {
        self.count
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < self.max).then_some(count + 1))
            .is_ok()
    }

    fn insert(&self, hash: u64, key: Key<'_>, counted: bool) -> Arc<Series> {
        let mut shard = self.shard(hash).write().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = find(&shard, hash, key) {
            // Another thread was faster: the place taken for it goes back.
            if counted {
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
            return series;
        }
        let labels = key.to_labels();
        let series = Arc::new(Series {
            durations: self.durations.get(labels.destination(), || Histogram::new(CONNECTION_DURATIONS)),
            labels,
            opened: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            closed: Default::default(),
            refused: Default::default(),
            active_requests: AtomicU64::new(0),
            http: OnceLock::new(),
        });
        shard.entry(hash).or_default().push(Entry { series: series.clone(), gone_since: None });
        series
    }

    fn shard(&self, hash: u64) -> &RwLock<Shard> {
        // The map uses the low bits.
        &self.shards[(hash >> 48) as usize % SHARDS]
    }
}

impl<'a> Key<'a> {
    fn of(facts: &'a ConnectionFacts) -> Self {
        let name = |workload: Option<&'a Arc<Workload>>| {
            workload.map_or((UNKNOWN, UNKNOWN), |w| (&*w.pod.namespace, &*w.workload))
        };
        Self {
            source: name(facts.source.workload.as_ref()),
            destination: name(facts.destination.workload.as_ref()),
            service: facts.service.as_ref().map_or((UNKNOWN, UNKNOWN), |s| (&*s.namespace, &*s.name)),
            identities: [&facts.source, &facts.destination]
                .map(|peer| peer.identity.as_deref().unwrap_or(UNKNOWN)),
            reporter: facts.reporter,
            security: facts.security,
        }
    }

    fn folded(self) -> Key<'static> {
        let other = (OTHER, OTHER);
        Key {
            source: other,
            destination: other,
            service: other,
            identities: [OTHER; 2],
            reporter: self.reporter,
            security: self.security,
        }
    }

    fn to_labels(self) -> SeriesLabels {
        let own =
            |(namespace, name): (&str, &str)| WorkloadName { namespace: namespace.into(), name: name.into() };
        SeriesLabels {
            source: own(self.source),
            destination: own(self.destination),
            service: own(self.service),
            source_identity: self.identities[0].into(),
            destination_identity: self.identities[1].into(),
            reporter: self.reporter,
            security: self.security,
        }
    }

    fn matches(self, labels: &SeriesLabels) -> bool {
        self == Key {
            source: labels.source.as_pair(),
            destination: labels.destination.as_pair(),
            service: labels.service.as_pair(),
            identities: [&labels.source_identity, &labels.destination_identity],
            reporter: labels.reporter,
            security: labels.security,
        }
    }
}

impl SeriesLabels {
    pub(super) fn destination(&self) -> DestinationLabels {
        DestinationLabels {
            destination: self.destination.clone(),
            reporter: self.reporter,
            security: self.security,
        }
    }

    fn is_other(&self) -> bool {
        [&self.source, &self.destination, &self.service].iter().all(|n| n.as_pair() == (OTHER, OTHER))
    }
}

impl DestinationLabels {
    pub(super) fn folded(&self) -> Self {
        Self { destination: WorkloadName::other(), ..self.clone() }
    }
}

impl WorkloadName {
    pub(super) fn other() -> Self {
        Self { namespace: OTHER.into(), name: OTHER.into() }
    }

    fn as_pair(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

/// The names that the snapshot still has.
struct Alive<'a> {
    workloads: HashSet<(&'a str, &'a str)>,
    services: HashSet<(&'a str, &'a str)>,
}

impl<'a> Alive<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let workloads = snapshot.workloads.values().map(|w| (&*w.pod.namespace, &*w.workload)).collect();
        let services = snapshot.destinations.values().filter_map(|destination| match destination {
            Destination::Service(service) => Some((&*service.id.namespace, &*service.id.name)),
            Destination::Workload(_) => None,
        });
        Self { workloads, services: services.collect() }
    }

    fn has(&self, labels: &SeriesLabels) -> bool {
        let known = |set: &HashSet<(&str, &str)>, name: &WorkloadName| {
            matches!(name.as_pair(), (UNKNOWN, UNKNOWN) | (OTHER, OTHER)) || set.contains(&name.as_pair())
        };
        // Callers known by their certificate alone, those of other trust domains above all, are in no snapshot.
        let is_stranger =
            labels.source.as_pair() == (UNKNOWN, UNKNOWN) && *labels.source_identity != *UNKNOWN;
        !is_stranger
            && known(&self.workloads, &labels.source)
            && known(&self.workloads, &labels.destination)
            && known(&self.services, &labels.service)
    }
}

fn find(shard: &Shard, hash: u64, key: Key<'_>) -> Option<Arc<Series>> {
    shard.get(&hash)?.iter().find(|entry| key.matches(&entry.series.labels)).map(|entry| entry.series.clone())
}

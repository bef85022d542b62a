//! One identity of the store: its certificate, and when to ask for the next.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use crate::identity::SpiffeId;
use crate::identity::ca::CaError;
use crate::identity::svid::Svid;

/// A clock that goes back further than this makes what was issued before suspect: to others it may not be valid yet.
const CLOCK_WENT_BACK: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: SpiffeId,
    /// How many want it; changed only by who holds the store's write lock.
    pub(super) users: AtomicUsize,
    pub(super) svid: ArcSwapOption<Svid>,
    renewal: Mutex<Renewal>,
    /// Tells who waits that there is news; true once the entry has left the store.
    ended: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
struct Renewal {
    due: SystemTime,
    /// When it was due first, while attempts fail.
    due_first: SystemTime,
    failures: u32,
    last_error: Option<CaError>,
    busy: bool,
}

/// How a certificate and its renewal stand.
#[derive(Clone, Debug)]
pub(in super::super) struct Standing {
    pub(in super::super) id: SpiffeId,
    pub(in super::super) svid: Option<Arc<Svid>>,
    /// When the renewal is or was due, attempts that failed not counted.
    pub(in super::super) due: SystemTime,
    pub(in super::super) failures: u32,
    pub(in super::super) last_error: Option<CaError>,
}

impl Entry {
    /// Due at once.
    pub(super) fn new(id: SpiffeId, now: SystemTime) -> Self {
        let renewal = Renewal { due: now, due_first: now, failures: 0, last_error: None, busy: false };
        Self {
            id,
            users: AtomicUsize::new(1),
            svid: ArcSwapOption::empty(),
            renewal: Mutex::new(renewal),
            ended: watch::Sender::new(false),
        }
    }

    fn renewal(&self) -> MutexGuard<'_, Renewal> {
        self.renewal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long until it must be asked for; `None` while it is.
    pub(super) fn due_in(&self, now: SystemTime) -> Option<Duration> {
        let renewal = self.renewal();
        if renewal.busy {
            return None;
        }
        let went_back = self.svid.load().as_ref().is_some_and(|svid| svid.received > now + CLOCK_WENT_BACK);
        match went_back && renewal.failures == 0 {
            true => Some(Duration::ZERO),
            false => Some(renewal.due.duration_since(now).unwrap_or_default()),
        }
    }

    pub(super) fn renewed(&self, svid: Svid, due: SystemTime) {
        let mut renewal = self.renewal();
        *renewal = Renewal { due, due_first: due, failures: 0, last_error: None, busy: renewal.busy };
        self.svid.store(Some(Arc::new(svid)));
        drop(renewal);
        self.ended.send_modify(|_| {});
    }

    /// Notes a failure and returns how many there have been in a row.
    pub(super) fn failed(&self, error: &CaError, retry: impl FnOnce(u32) -> SystemTime) -> u32 {
        let mut renewal = self.renewal();
        renewal.failures = renewal.failures.saturating_add(1);
        renewal.last_error = Some(error.clone());
        renewal.due = retry(renewal.failures);
        renewal.failures
    }

    /// The authority answers others again: nothing is gained by waiting on.
    pub(super) fn hurry(&self, due: SystemTime) {
        let mut renewal = self.renewal();
        if matches!(renewal.last_error, Some(CaError::Unavailable(_))) {
            renewal.due = renewal.due.min(due);
        }
    }

    /// It has left the store.
    pub(super) fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Waits for the first certificate; `None` if there will be none.
    pub(super) async fn first(&self) -> Option<Arc<Svid>> {
        let mut news = self.ended.subscribe();
        loop {
            if let Some(svid) = self.svid.load_full() {
                return Some(svid);
            }
            if *news.borrow_and_update() || news.changed().await.is_err() {
                return None;
            }
        }
    }

    pub(super) fn standing(&self) -> Standing {
        let renewal = self.renewal().clone();
        Standing {
            id: self.id.clone(),
            svid: self.svid.load_full(),
            due: renewal.due_first,
            failures: renewal.failures,
            last_error: renewal.last_error,
        }
    }
}

/// Marks an entry as being asked for until it is dropped, however the request ends.
#[derive(Debug)]
pub(super) struct Busy(Arc<Entry>);

impl Busy {
    /// `None` if it is marked already.
    pub(super) fn take(entry: &Arc<Entry>) -> Option<Self> {
        let mut renewal = entry.renewal();
        (!std::mem::replace(&mut renewal.busy, true)).then(|| Self(entry.clone()))
    }

    pub(super) fn entry(&self) -> &Entry {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.renewal().busy = false;
    }
}

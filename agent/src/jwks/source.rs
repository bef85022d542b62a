//! The keys of one address: when they are fetched, and for how long they are used.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::fetch::{Answer, Fetcher, Terms};
use super::{Counts, FetchResult, Held};
use crate::model::Name;

/// Until keys are fetched anew, where the issuer does not say.
const USUAL: Duration = Duration::from_secs(5 * 60);

/// The least and the most that the issuer may say.
const LEAST: Duration = Duration::from_secs(60);
const MOST: Duration = Duration::from_secs(60 * 60);

/// Between attempts that fail, the first and the longest of the pauses.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Between two fetches that somebody has asked for: anybody can, with a token that names no key.
const BETWEEN_EARLY: Duration = Duration::from_secs(10);

/// How long keys are used that could not be fetched anew.
const USABLE: Duration = Duration::from_secs(24 * 60 * 60);

/// One address.
#[derive(Debug)]
pub(super) struct Source {
    address: Name,
    pub(super) state: watch::Sender<State>,
    early: Mutex<Early>,
    asked: Notify,
}

#[derive(Debug, Default)]
pub(super) struct State {
    held: Held,
    /// When they were told last.
    told_at: Option<Instant>,
    /// What the address calls them.
    pub(super) tag: Option<HeaderValue>,
    /// Attempts that have ended.
    attempts: u64,
    /// How many of them have failed since.
    failures: u32,
}

#[derive(Debug)]
struct Early {
    /// An attempt is under way, or is about to be.
    is_fetching: bool,
    last: Option<Instant>,
}

impl Source {
    pub(super) fn new(address: Name) -> Self {
        Self {
            address,
            state: watch::Sender::default(),
            // It is wanted because somebody is about to need it.
            early: Mutex::new(Early { is_fetching: true, last: None }),
            asked: Notify::new(),
        }
    }

    pub(super) fn held(&self) -> Held {
        self.state.borrow().held.clone()
    }

    pub(super) fn age(&self) -> Option<Duration> {
        let state = self.state.borrow();
        state.held.keys.as_ref().and(state.told_at).map(|at| at.elapsed())
    }

    /// Waits for keys that have been told more often than that. False when there will be none soon.
    pub(super) async fn newer(&self, told: u64) -> bool {
        let mut state = self.state.subscribe();
        let attempts = {
            let state = state.borrow_and_update();
            if state.held.told != told {
                return true;
            }
            state.attempts
        };
        if !self.ask() {
            // The last one may have ended just now.
            return state.borrow().held.told != told;
        }
        match state.wait_for(|state| state.attempts != attempts).await {
            Ok(state) => state.held.told != told,
            Err(_) => false,
        }
    }

    /// Asks for an attempt before its time. False if there was one a moment ago, which must do.
    pub(super) fn ask(&self) -> bool {
        let mut early = self.early();
        if early.is_fetching {
            return true;
        }
        if early.last.is_some_and(|last| last.elapsed() < BETWEEN_EARLY) {
            return false;
        }
        *early = Early { is_fetching: true, last: Some(Instant::now()) };
        self.asked.notify_one();
        true
    }

    /// Fetches the keys, time and again.
    pub(super) async fn keep_fresh(&self, fetcher: &Fetcher, counts: &Counts) {
        loop {
            let tag = self.state.borrow().tag.clone();
            let outcome = fetcher.fetch(&self.address, tag.as_ref()).await;
            let pause = self.take(outcome, counts);
            tokio::select! {
                () = sleep(pause) => {}
                () = self.asked.notified() => {}
            }
            self.early().is_fetching = true;
        }
    }

    /// Takes in what an attempt has brought. How long to wait for the next.
    pub(super) fn take(&self, outcome: Result<Answer, String>, counts: &Counts) -> Duration {
        let mut pause = USUAL;
        // Whoever waits sees that the attempt has ended, and may ask for another.
        self.early().is_fetching = false;
        self.state.send_modify(|state| {
            state.attempts += 1;
            let (result, next) = match outcome {
                Ok(answer) => self.told(state, answer),
                Err(why) => self.failed(state, &why),
            };
            counts.add(result);
            pause = next;
        });
        pause
    }

    fn told(&self, state: &mut State, answer: Answer) -> (FetchResult, Duration) {
        let (keys, terms) = match answer {
            Answer::Keys(keys, terms) => (Some(keys), terms),
            Answer::Unchanged(terms) => (None, terms),
        };
        let keys = keys.filter(|keys| state.held.keys.as_deref() != Some(keys));
        if state.failures > 0 || state.held.told == 0 || keys.is_some() {
            let left_out = keys.as_ref().map(|keys| keys.left_out().join(", ")).unwrap_or_default();
            info!(uri = %self.address, changed = keys.is_some(), left_out, "keys of tokens are fetched");
        }
        let result = if keys.is_some() { FetchResult::Changed } else { FetchResult::Unchanged };
        if let Some(keys) = keys {
            state.held.keys = Some(Arc::new(keys));
        }
        let Terms { tag, max_age } = terms;
        state.tag = tag;
        state.held.told += 1;
        state.told_at = Some(Instant::now());
        state.failures = 0;
        let pause = max_age.unwrap_or(USUAL).clamp(LEAST, MOST);
        // Agents that have begun together do not ask together.
        (result, pause.mul_f64(1.0 - fastrand::f64() / 10.0))
    }

    fn failed(&self, state: &mut State, why: &str) -> (FetchResult, Duration) {
        match (state.failures, &state.held.keys) {
            (0, Some(_)) => {
                warn!(uri = %self.address, "keys of tokens cannot be fetched anew, and those of before are used: {why}");
            }
            (0, None) => {
                warn!(uri = %self.address, "keys of tokens cannot be fetched, and tokens of their issuer are refused: {why}");
            }
            _ => debug!(uri = %self.address, "keys of tokens cannot be fetched: {why}"),
        }
        if state.held.keys.is_some() && state.told_at.is_none_or(|at| at.elapsed() >= USABLE) {
            warn!(
                uri = %self.address,
                "keys of tokens could not be fetched anew for a day: tokens of their issuer are refused from here on: {why}"
            );
            state.held.keys = None;
            state.tag = None;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << state.failures.min(6)).min(LONGEST_PAUSE);
        state.failures = state.failures.saturating_add(1);
        (FetchResult::Failed, pause.mul_f64(0.5 + fastrand::f64() / 2.0))
    }

    fn early(&self) -> MutexGuard<'_, Early> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

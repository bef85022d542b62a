//! What this node has seen of an endpoint: figures that all snapshots share, kept by its address, that go with it.
//!
//! They are only kept here. What follows from them is for `balance` to decide.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// What is known of an endpoint as a destination of this node. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct EndpointLoad(Arc<EndpointFigures>);

#[derive(Debug, Default)]
struct EndpointFigures {
    /// Connections and requests.
    open: AtomicU32,
    /// Requests without an answer.
    waiting: AtomicU32,
    health: Mutex<Health>,
    first_seen: OnceLock<Instant>,
    /// A [`Latency`]; 0 where there is none.
    latency: AtomicU64,
    /// That of `health`, to be read without its lock.
    standing: AtomicU8,
    /// Answers of all kinds, and the good ones of them; counted where somebody compares them.
    outcomes: AtomicU32,
    good_outcomes: AtomicU32,
    is_gone: AtomicBool,
}

/// One counted connection or request; see [`EndpointLoad::enter`].
#[derive(Debug)]
pub struct LoadGuard(Arc<EndpointFigures>);

/// One request without an answer; see [`EndpointLoad::wait`].
#[derive(Debug)]
pub struct WaitGuard(Arc<EndpointFigures>);

/// How long answers took, as of an age of the endpoint, to the millisecond.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    seconds: f32,
    at: u32,
}

/// What an endpoint has answered since it was thought of first. The figures go round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// All answers, and failures to give one.
    pub all: u32,
    /// Those that say nothing against it.
    pub good: u32,
}

/// How an endpoint has done of late.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    /// Answers of the kind 5xx in a row, gateway failures included.
    pub server_errors: u32,
    /// Gateway errors and failed connections in a row.
    pub gateway_failures: u32,
    /// Since it did too badly.
    pub ejection: Option<Ejection>,
    /// How often it was ejected.
    pub times: u32,
    /// When it came back last.
    pub returned: Option<Instant>,
}

/// A time in which nothing goes to an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Ejection {
    /// When it may be tried again.
    pub until: Instant,
    /// Since when somebody tries.
    pub probed: Option<Instant>,
}

/// How an endpoint stands, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// Nothing is held against it.
    Good = 0,
    /// It has failed of late.
    Failing = 1,
    /// Nothing is to go there.
    Ejected = 2,
}

impl EndpointLoad {
    /// Whether no Service has the endpoint any more.
    pub fn is_gone(&self) -> bool {
        self.0.is_gone.load(Relaxed)
    }

    /// Says whether a Service has it.
    pub fn set_gone(&self, is_gone: bool) {
        self.0.is_gone.store(is_gone, Relaxed);
    }

    /// Connections and requests that are open now.
    pub fn open(&self) -> u32 {
        self.0.open.load(Relaxed)
    }

    /// Counts one for as long as the guard lives.
    pub fn enter(&self) -> LoadGuard {
        self.0.open.fetch_add(1, Relaxed);
        LoadGuard(self.0.clone())
    }

    /// Requests that wait for their answer to begin.
    pub fn waiting(&self) -> u32 {
        self.0.waiting.load(Relaxed)
    }

    /// Counts one of them for as long as the guard lives.
    pub fn wait(&self) -> WaitGuard {
        self.0.waiting.fetch_add(1, Relaxed);
        WaitGuard(self.0.clone())
    }

    /// When this was asked first: now, if never before.
    pub fn first_seen(&self, now: Instant) -> Instant {
        *self.0.first_seen.get_or_init(|| now)
    }

    /// How long its answers took, if there were any.
    pub fn latency(&self) -> Option<Latency> {
        Latency::unpack(self.0.latency.load(Relaxed))
    }

    /// Takes another answer in.
    pub fn change_latency(&self, change: impl Fn(Option<Latency>) -> Latency) {
        self.0.latency.update(Relaxed, Relaxed, |packed| change(Latency::unpack(packed)).pack());
    }

    /// Counts an answer, or a failure to give one.
    pub fn count_outcome(&self, is_good: bool) {
        self.0.outcomes.fetch_add(1, Relaxed);
        self.0.good_outcomes.fetch_add(u32::from(is_good), Relaxed);
    }

    /// What was counted.
    pub fn outcomes(&self) -> Outcomes {
        // In this order one that is counted just now is a failure at the worst, and for once.
        let good = self.0.good_outcomes.load(Relaxed);
        Outcomes { all: self.0.outcomes.load(Relaxed), good }
    }

    /// How it stands. To be asked for each request: it takes no lock.
    pub fn standing(&self) -> Standing {
        match self.0.standing.load(Relaxed) {
            0 => Standing::Good,
            1 => Standing::Failing,
            _ => Standing::Ejected,
        }
    }

    /// Changes what is held against it.
    pub fn change_health<T>(&self, change: impl FnOnce(&mut Health) -> T) -> T {
        let mut health = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut health);
        self.0.standing.store(health.standing() as u8, Relaxed);
        result
    }
}

impl Outcomes {
    /// What has come since.
    pub fn since(self, before: Self) -> Self {
        Self { all: self.all.wrapping_sub(before.all), good: self.good.wrapping_sub(before.good) }
    }
}

impl Latency {
    /// After 49 days of the endpoint ages begin anew, and the figure counts as new for once.
    pub fn new(seconds: f64, age: Duration) -> Self {
        Self { seconds: seconds as f32, at: age.as_millis() as u32 }
    }

    /// How long answers took.
    pub fn seconds(&self) -> f64 {
        f64::from(self.seconds)
    }

    /// Of which age of the endpoint that is.
    pub fn at(&self) -> Duration {
        Duration::from_millis(self.at.into())
    }

    fn pack(self) -> u64 {
        u64::from(self.at) << 32 | u64::from(self.seconds.to_bits())
    }

    fn unpack(packed: u64) -> Option<Self> {
        let latency = Self { seconds: f32::from_bits(packed as u32), at: (packed >> 32) as u32 };
        (packed != 0).then_some(latency)
    }
}

impl Health {
    fn standing(&self) -> Standing {
        if self.ejection.is_some() {
            Standing::Ejected
        } else if self.server_errors > 0 || self.gateway_failures > 0 {
            Standing::Failing
        } else {
            Standing::Good
        }
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

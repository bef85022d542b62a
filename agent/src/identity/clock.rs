//! What time it is: asked of whoever made the clock, so that a test lives through a day in a millisecond.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// A wall clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The machine's own.
    pub fn system() -> Self {
        Self::of(SystemTime::now)
    }

    /// One that says what `now` says.
    pub fn of(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// The time.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.now()))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// As TLS libraries count time: whole seconds, none before 1970.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// The time of so many seconds since 1970; what cannot be told is the epoch.
pub(super) fn from_unix(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs());
    let told = match seconds >= 0 {
        true => SystemTime::UNIX_EPOCH.checked_add(since),
        false => SystemTime::UNIX_EPOCH.checked_sub(since),
    };
    told.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Seconds since 1970, negative before.
pub(super) fn to_unix(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    }
}

/// RFC 3339 in whole seconds, for people and files.
pub(super) fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::from_second(to_unix(time))
        .map_or_else(|_| "out of range".into(), |time| time.to_string())
}

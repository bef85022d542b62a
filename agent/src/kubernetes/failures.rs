//! Of many things to be written, those that the API server has not taken: each is left alone for longer and longer, and holds up none
//! of the others.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// After the first failure; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What has failed: how often, and until when it is left alone.
#[derive(Debug)]
pub(crate) struct Failures<K>(HashMap<K, (u32, Instant)>);

impl<K> Default for Failures<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Clone + Eq + Hash> Failures<K> {
    /// Notes a further one. The answer is how long the thing is left alone.
    pub(crate) fn add(&mut self, key: &K, now: Instant) -> Duration {
        let (count, until) = self.0.entry(key.clone()).or_insert((0, now));
        let pause = FIRST_PAUSE.saturating_mul(1 << (*count).min(10)).min(LONGEST_PAUSE);
        (*count, *until) = (*count + 1, now + pause);
        pause
    }

    /// Notes that nothing could be done with it, which says nothing of the thing itself: the pauses do not grow.
    pub(crate) fn put_off(&mut self, key: &K, now: Instant) -> Duration {
        let (_, until) = self.0.entry(key.clone()).or_insert((0, now));
        *until = now + FIRST_PAUSE;
        FIRST_PAUSE
    }

    pub(crate) fn remove(&mut self, key: &K) {
        self.0.remove(key);
    }

    pub(crate) fn is_left_alone(&self, key: &K, now: Instant) -> bool {
        self.0.get(key).is_some_and(|(_, until)| *until > now)
    }

    /// Forgets those that are neither left alone nor tried again: there is nothing to write any more.
    pub(crate) fn keep(&mut self, is_tried: impl Fn(&K) -> bool, now: Instant) {
        self.0.retain(|key, (_, until)| *until > now || is_tried(key));
    }

    /// When one is to be tried again.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.values().map(|(_, until)| *until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_left_alone_for_longer_and_longer() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let pauses: Vec<u64> = (0..7).map(|_| failures.add(&"web", now).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60]);
        let later = now + Duration::from_secs(60);
        assert!(failures.is_left_alone(&"web", now) && !failures.is_left_alone(&"web", later));
        assert!(!failures.is_left_alone(&"db", now));
        assert_eq!(failures.next(), Some(later));
        failures.keep(|_| false, now);
        assert_eq!(failures.next(), Some(later));
        failures.keep(|_| false, later);
        assert_eq!(failures.next(), None);
        for _ in 0..3 {
            assert_eq!(failures.put_off(&"web", now), FIRST_PAUSE);
        }
        assert_eq!(failures.add(&"web", now), FIRST_PAUSE);
    }
}

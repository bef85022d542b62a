//! How many requests or connections an endpoint takes in a time, and who of those that ask gets them.
//!
//! The generic cell rate algorithm (ITU-T I.371): what is kept of a limit is the time at which everything admitted so far would
//! have come at an even pace. A limit that is shared keeps one of these for all, and one for each source at an equal
//! share of the pace. What is within the source's own share is admitted whatever the others do; what is beyond it, if all together
//! leave room. So who floods has what is left, and nobody has less than his share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Limited, Name, ObjectRef, RateLimit, SharedBy};

/// Sources that a limit tells apart. Those beyond are one.
const MOST_SOURCES: usize = 1_024;

/// Who has asked in so many of a limit's periods, a second at least, has a share of it.
const ACTIVE: u32 = 2;

/// The limits of one endpoint by one Service, and what has been admitted by them. It outlives the configurations that leave it as it is.
#[derive(Debug)]
pub struct Limits {
    service: ObjectRef,
    limits: Vec<Limit>,
}

#[derive(Debug)]
struct Limit {
    rule: RateLimit,
    state: Mutex<State>,
}

/// What has been admitted by one limit.
#[derive(Debug, Default)]
struct State {
    /// By all together; not kept where each source has a limit of its own.
    all: Option<Instant>,
    sources: HashMap<Name, Source>,
    swept: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Source {
    /// When all that was admitted of it would have come, at an even pace.
    due: Instant,
    /// When it asked last.
    asked: Instant,
}

/// Whether something is admitted.
#[derive(Clone, Debug, PartialEq)]
pub enum Admission {
    /// It is. Of several limits, this is how the source stands with the one that leaves it least.
    Admitted(Option<Standing>),
    /// It is not, and would be after `wait`.
    Refused {
        /// How the source stands with the limit that is in the way.
        standing: Standing,
        /// When asking again is worth it.
        wait: Duration,
    },
}

/// How a source stands with a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// So many in a period.
    pub quota: u32,
    /// The period.
    pub per: Duration,
    /// What may be had at once.
    pub left: u32,
    /// When all of it may be had again.
    pub until_whole: Duration,
}

impl Limits {
    /// Those of a Service's endpoint; nothing has been admitted yet.
    pub fn new(service: ObjectRef, rules: &[RateLimit]) -> Self {
        let limits = rules.iter().map(|rule| Limit { rule: rule.clone(), state: Mutex::default() });
        Self { service, limits: limits.collect() }
    }

    /// The Service whose policy they are.
    pub fn service(&self) -> &ObjectRef {
        &self.service
    }

    /// Whether they are of these rules.
    pub fn are_of(&self, rules: &[RateLimit]) -> bool {
        self.limits.iter().map(|limit| &limit.rule).eq(rules)
    }

    /// Whether anything of this kind is limited.
    pub fn count(&self, what: Limited) -> bool {
        self.limits.iter().any(|limit| limit.rule.of == what)
    }
}

/// Asks for one request or connection of a source: an identity, or the address of one that has none. All limits must let it in, and
/// what one of them refuses counts with none.
pub fn admit(all: &[Arc<Limits>], what: Limited, source: &Name, now: Instant) -> Admission {
    let limits = || all.iter().flat_map(|limits| &limits.limits).filter(|limit| limit.rule.of == what);
    let count = limits().count();
    let mut least: Option<Standing> = None;
    for (place, limit) in limits().enumerate() {
        // What the last one takes, all do. Threads that ask at the same moment may each get the last of it: no lock is held over
        // several limits.
        match limit.ask(source, now, place + 1 == count) {
            Ok(standing) => {
                least = [least, Some(standing)].into_iter().flatten().min_by_key(|standing| standing.left);
            }
            Err((standing, wait)) => return Admission::Refused { standing, wait },
        }
    }
    for limit in limits().take(count.saturating_sub(1)) {
        _ = limit.ask(source, now, true);
    }
    Admission::Admitted(least)
}

impl Limit {
    /// How the source stands with one more; else how it stands, and after what time there is room for it. Kept only if it is
    /// `taken`.
    fn ask(&self, source: &Name, now: Instant, is_taken: bool) -> Result<Standing, (Standing, Duration)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { all, sources, swept } = &mut *state;
        let active_for = self.rule.per.max(Duration::from_secs(1)) * ACTIVE;
        if swept.is_none_or(|swept| now.saturating_duration_since(swept) >= active_for / ACTIVE) {
            *swept = Some(now);
            sources.retain(|_, it| it.due > now || now.saturating_duration_since(it.asked) < active_for);
        }
        // One too many for a place of its own shares one with all such.
        let has_place = sources.contains_key(source) || sources.len() < MOST_SOURCES;
        let place = if has_place { source.clone() } else { Name::default() };
        let before = sources.entry(place.clone()).or_insert(Source { due: now, asked: now }).due;
        let sharers = if self.rule.by == SharedBy::Everyone { sources.len() } else { 1 };
        let (share, whole) = (Pace::of(&self.rule, sharers as u32), Pace::of(&self.rule, 1));

        let all_before = all.unwrap_or(now);
        let (due, all_due, wait) = match (share.take(before, now), self.rule.by) {
            // Whatever the others have had: they wait for it.
            (Ok(due), _) => (due, all_before.max(now) + whole.each, None),
            (Err(wait), SharedBy::Source) => (before, all_before, Some(wait)),
            (Err(wait), SharedBy::Everyone) => match whole.take(all_before, now) {
                Ok(all_due) => (before, all_due, None),
                Err(longer) => (before, all_before, Some(wait.min(longer))),
            },
        };
        let mut standing = share.standing(&self.rule, due, now);
        if self.rule.by == SharedBy::Everyone {
            let of_all = whole.standing(&self.rule, all_due, now);
            standing = if of_all.left > standing.left { of_all } else { standing };
        }
        let kept = if is_taken { (due, Some(all_due)) } else { (before, *all) };
        *all = kept.1.filter(|_| self.rule.by == SharedBy::Everyone);
        sources.insert(place, Source { due: kept.0, asked: now });
        wait.map_or(Ok(standing), |wait| Err((standing, wait)))
    }
}

/// How fast something is admitted.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// The time that one takes.
    each: Duration,
    /// As much of it may be had ahead.
    ahead: Duration,
}

impl Pace {
    /// That of each of so many sharers.
    fn of(rule: &RateLimit, sharers: u32) -> Self {
        let count = rule.count.max(1);
        let each = rule.per * sharers.max(1) / count;
        // The share of what may be had at once is as long as the whole, at a slower pace; one may always be had.
        Self { each, ahead: (rule.per * rule.burst.max(1) / count).max(each) }
    }

    /// One more; else how long it takes until there is room for it.
    fn take(self, due: Instant, now: Instant) -> Result<Instant, Duration> {
        let due = due.max(now) + self.each;
        match due.saturating_duration_since(now + self.ahead) {
            Duration::ZERO => Ok(due),
            wait => Err(wait),
        }
    }

    fn standing(self, rule: &RateLimit, due: Instant, now: Instant) -> Standing {
        let taken = due.saturating_duration_since(now);
        let left = self.ahead.saturating_sub(taken).as_nanos() / self.each.as_nanos().max(1);
        Standing {
            quota: rule.count,
            per: rule.per,
            left: left.try_into().unwrap_or(u32::MAX),
            until_whole: taken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(count: u32, burst: u32, by: SharedBy) -> Arc<Limits> {
        let rule = RateLimit { of: Limited::Requests, count, per: Duration::from_secs(1), burst, by };
        Arc::new(Limits::new(ObjectRef::new("shop", "web"), &[rule]))
    }

    fn ask(limits: &Arc<Limits>, source: &str, now: Instant) -> Admission {
        admit(std::slice::from_ref(limits), Limited::Requests, &source.into(), now)
    }

    /// Sources that each ask at a pace of their own for so many seconds; how many a second each got in the second half.
    fn rates(limits: &Arc<Limits>, asks: &[(&str, u32)], seconds: u32) -> Vec<f64> {
        let start = Instant::now();
        let mut all: Vec<(Duration, usize)> = Vec::new();
        for (index, (_, pace)) in asks.iter().enumerate() {
            let asks = (0..pace * seconds).map(|n| (Duration::from_secs(1) * n / *pace, index));
            all.extend(asks);
        }
        all.sort();
        let mut got = vec![0_u32; asks.len()];
        for (at, index) in all {
            let admission = ask(limits, asks[index].0, start + at);
            let counts = at >= Duration::from_secs(1) * seconds / 2;
            got[index] += u32::from(counts && matches!(admission, Admission::Admitted(_)));
        }
        got.into_iter().map(|got| f64::from(got) / f64::from(seconds) * 2.0).collect()
    }

    #[test]
    fn each_has_its_share_and_what_the_others_leave() {
        for (by, asks, expected) in [
            // Alone, all of it.
            (SharedBy::Everyone, &[("a", 1_000)][..], &[100.0][..]),
            // Two that want it all have a half each; how hard they ask is nothing to it.
            (SharedBy::Everyone, &[("a", 1_000), ("b", 1_000)], &[50.0, 50.0]),
            (SharedBy::Everyone, &[("a", 10_000), ("b", 200)], &[50.0, 50.0]),
            // Who wants less has that, and the other has the rest.
            (SharedBy::Everyone, &[("a", 5_000), ("b", 20)], &[80.0, 20.0]),
            (SharedBy::Everyone, &[("a", 5_000), ("b", 20), ("c", 10)], &[70.0, 20.0, 10.0]),
            // Within the limit nobody is refused.
            (SharedBy::Everyone, &[("a", 60), ("b", 30)], &[60.0, 30.0]),
            // Each has all of it.
            (SharedBy::Source, &[("a", 5_000), ("b", 20), ("c", 200)], &[100.0, 20.0, 100.0]),
        ] {
            for burst in [1, 10, 100] {
                let rates = rates(&limits(100, burst, by), asks, 20);
                for ((rate, expected), (name, _)) in rates.iter().zip(expected).zip(asks) {
                    // Two that ask at the same moments cannot both have theirs without anything ahead.
                    let most = if burst == 1 { 8.0 } else { 3.0 };
                    assert!(
                        (rate - expected).abs() <= most,
                        "{name} of {asks:?} at once {burst}, {by:?}: {rates:?} instead of {expected:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn who_is_refused_is_told_when_to_come_again_and_gets_it_then() {
        let (limits, start) = (limits(10, 3, SharedBy::Everyone), Instant::now());
        let admit = |at: Duration| ask(&limits, "a", start + at);
        let standing = |left, tenths: u64| Standing {
            quota: 10,
            per: Duration::from_secs(1),
            left,
            until_whole: Duration::from_millis(tenths * 100),
        };
        assert_eq!(admit(Duration::ZERO), Admission::Admitted(Some(standing(2, 1))));
        assert_eq!(admit(Duration::ZERO), Admission::Admitted(Some(standing(1, 2))));
        assert_eq!(admit(Duration::ZERO), Admission::Admitted(Some(standing(0, 3))));
        let wait = Duration::from_millis(100);
        assert_eq!(admit(Duration::ZERO), Admission::Refused { standing: standing(0, 3), wait });
        let almost = wait - Duration::from_millis(1);
        assert!(matches!(admit(almost), Admission::Refused { .. }));
        assert_eq!(admit(wait), Admission::Admitted(Some(standing(0, 3))));
        let connection =
            super::admit(std::slice::from_ref(&limits), Limited::Connections, &"a".into(), start);
        assert_eq!(connection, Admission::Admitted(None));
    }

    #[test]
    fn the_limit_in_the_way_is_told_and_the_others_count_nothing() {
        let rule = |count, per| RateLimit {
            of: Limited::Requests,
            count,
            per: Duration::from_secs(per),
            burst: count,
            by: SharedBy::Source,
        };
        let limits = |rules: &[RateLimit]| Arc::new(Limits::new(ObjectRef::new("shop", "web"), rules));
        let now = Instant::now();
        // In whichever order they stand, and whether of one Service or of two.
        for all in [
            vec![limits(&[rule(10, 1), rule(5, 60)])],
            vec![limits(&[rule(5, 60), rule(10, 1)])],
            vec![limits(&[rule(10, 1)]), limits(&[rule(5, 60)])],
        ] {
            let admit = |at: Duration| super::admit(&all, Limited::Requests, &"a".into(), now + at);
            for left in (0..5).rev() {
                let Admission::Admitted(Some(standing)) = admit(Duration::ZERO) else { panic!("refused") };
                assert_eq!((standing.quota, standing.left), (5, left));
            }
            // What the one refuses does not count with the other, however often it is asked for.
            for _ in 0..20 {
                let Admission::Refused { standing, wait } = admit(Duration::ZERO) else { panic!("admitted") };
                assert_eq!((standing.quota, standing.left, wait), (5, 0, Duration::from_secs(12)));
            }
            let others = all.iter().flat_map(|limits| &limits.limits).find(|limit| limit.rule.count == 10);
            let standing = others.unwrap().ask(&"a".into(), now, false).unwrap();
            assert_eq!(standing.left, 4, "five of ten, and this one");
        }
    }

    #[test]
    fn sources_are_forgotten_and_too_many_share_a_place() {
        let (limits, start) = (limits(1_000_000, 1_000, SharedBy::Everyone), Instant::now());
        let known = || limits.limits[0].state.lock().unwrap().sources.len();
        for number in 0..3_000 {
            ask(&limits, &number.to_string(), start);
        }
        assert_eq!(known(), MOST_SOURCES + 1);
        ask(&limits, "a", start + Duration::from_secs(10));
        assert_eq!(known(), 1);
    }
}

//! How many requests to a Service may be sent again: a token bucket for each Service and node.
//!
//! What fills it is requests that were answered well, not requests: when nothing is, retries stop but for a few a second.
//! In a chain of services, each of which retries what the next one fails, the last one would otherwise get 1.2 times the load
//! for each hop, and no hop can tell.

use std::time::{Duration, Instant};

use crate::model::{RetryBudget, RetryTokens, ServiceLoad};

/// What a Service begins with, and saves up at least: this, or what a second brings.
const BURST: f64 = 10.0;

/// What is saved up besides, the share of an interval's requests, goes by how many there were over at least this.
const WINDOW: Duration = Duration::from_secs(1);

/// A request has been answered, and is not to be sent again.
pub fn answered(service: &ServiceLoad) {
    service.count_answer();
}

/// Takes one retry out of the budget, if one is left. There is one for each Service, and what fills it is what the port says whose
/// request it is.
pub fn may_retry(service: &ServiceLoad, budget: &RetryBudget, now: Instant) -> bool {
    let RetryBudget { percent, per_second, interval } = *budget;
    if percent == 0 && per_second <= 0.0 {
        return false;
    }
    let share = f64::from(percent) / 100.0;
    let burst = BURST.max(per_second);
    let answers = service.take_answers();
    service.change_retries(|tokens| {
        let tokens = tokens.get_or_insert(RetryTokens {
            left: burst,
            most: burst,
            at: now,
            counting_since: now,
            counted: 0,
        });
        tokens.counted += answers;
        let counted_for = now.saturating_duration_since(tokens.counting_since);
        if counted_for >= WINDOW {
            let rate = tokens.counted as f64 / counted_for.as_secs_f64();
            tokens.most = burst + share * rate * interval.as_secs_f64();
            (tokens.counting_since, tokens.counted) = (now, 0);
        }
        let elapsed = now.saturating_duration_since(tokens.at).as_secs_f64();
        let earned = share * answers as f64 + per_second * elapsed;
        tokens.left = (tokens.left + earned).min(tokens.most);
        tokens.at = tokens.at.max(now);
        let may = tokens.left >= 1.0;
        if may {
            tokens.left -= 1.0;
        }
        may
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests at a rate for a time, of which every so many-th fails and asks for one retry; how many got it.
    fn retried(
        service: &ServiceLoad,
        start: Instant,
        rate: u64,
        seconds: u64,
        fails: impl Fn(u64) -> bool,
    ) -> u64 {
        let requests = (0..rate * seconds).map(|number| {
            let now = start + Duration::from_secs_f64(number as f64 / rate as f64);
            if fails(number) {
                return u64::from(may_retry(service, &RetryBudget::default(), now));
            }
            answered(service);
            0
        });
        requests.sum()
    }

    #[test]
    fn a_share_of_what_is_answered_and_a_few_a_second() {
        // rate, seconds, one of so many fails; at least and at most so many of the failures are retried.
        for (rate, seconds, one_of, least, most) in [
            // Few fail: all are retried.
            (100, 60, 10, 600, 600),
            (1, 100, 2, 50, 50),
            // A half fails: 20 % of the other half, and 3 a second.
            (100, 60, 2, 600 + 170, 600 + 195),
            (1000, 60, 2, 6_000 + 170, 6_000 + 290),
            // All fail: no more than 3 a second, and what was saved up.
            (1000, 60, 1, 180, 191),
            (2, 60, 1, 120, 120),
        ] {
            let retried = retried(&ServiceLoad::default(), Instant::now(), rate, seconds, |number| {
                number % one_of == 0
            });
            assert!(
                (least..=most).contains(&retried),
                "{rate}/s, one of {one_of} fails: {retried} are retried"
            );
        }
    }

    #[test]
    fn what_is_saved_up_is_a_share_of_the_interval_and_does_not_grow() {
        let of = |interval| RetryBudget { interval, ..RetryBudget::default() };
        for (budget, most) in [(RetryBudget::default(), 20), (of(Duration::from_secs(10)), 210)] {
            let (service, start) = (ServiceLoad::default(), Instant::now());
            assert!(may_retry(&service, &budget, start), "the first one of all");
            let mut now = start;
            for hours in 1..4 {
                for _ in 0..3600 * 100 {
                    answered(&service);
                }
                now += Duration::from_secs(3600);
                let saved = (0..).take_while(|_| may_retry(&service, &budget, now)).count();
                assert_eq!(saved, most, "after {hours} hours of 100 requests a second: {budget:?}");
            }
        }
    }

    /// Four hops that all retry twice, at 200 requests a second: all goes well for a while, then the last service fails.
    #[test]
    fn a_chain_does_not_multiply_retries() {
        const HOPS: usize = 4;
        fn ask(budgets: &[ServiceLoad], now: Instant, fails: bool, reached: &mut u64) -> bool {
            let Some((first, rest)) = budgets.split_first() else {
                *reached += 1;
                return !fails;
            };
            for attempt in 0..3 {
                if attempt > 0 && !may_retry(first, &RetryBudget::default(), now) {
                    return false;
                }
                if ask(rest, now, fails, reached) {
                    answered(first);
                    return true;
                }
            }
            false
        }
        let budgets: Vec<ServiceLoad> = (0..HOPS).map(|_| ServiceLoad::default()).collect();
        let start = Instant::now();
        let mut loads = [0; 2];
        for number in 0..200 * 60 {
            let now = start + Duration::from_secs_f64(f64::from(number) / 200.0);
            let fails = number >= 200 * 30;
            ask(&budgets, now, fails, &mut loads[usize::from(fails)]);
        }
        assert_eq!(loads[0], 6_000);
        assert!(loads[1] as f64 <= 1.1 * 6_000.0, "{loads:?}");
    }
    #[test]
    fn a_port_says_for_itself_how_much_that_is() {
        for (percent, per_second, expected) in [
            (0, 0.0, 0..=0),
            (0, 1.0, 68..=71),
            (100, 0.0, 3_000..=3_011),
            (10, 0.0, 308..=311),
            (0, 40.0, 2_400..=2_440),
        ] {
            let (service, budget, start) = (
                ServiceLoad::default(),
                RetryBudget { percent, per_second, ..RetryBudget::default() },
                Instant::now(),
            );
            // A hundred a second for a minute, of which every second one fails.
            let mut made = 0;
            for number in 0..6_000 {
                let now = start + Duration::from_millis(number * 10);
                match number % 2 {
                    0 => answered(&service),
                    _ => made += u32::from(may_retry(&service, &budget, now)),
                }
            }
            assert!(expected.contains(&made), "{percent} % and {per_second} a second: {made}");
        }
    }
}

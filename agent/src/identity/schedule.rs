//! When a certificate is renewed. Pure: time and dice are arguments.

use std::time::{Duration, SystemTime};

/// How far from half life a renewal may be, as a part of the life: so that what was issued together is not renewed
/// together.
const JITTER: f64 = 0.05;
const FIRST_RETRY: Duration = Duration::from_secs(1);
const SLOWEST_RETRY: Duration = Duration::from_secs(300);
/// While there is no certificate at all, and so no connection.
const SLOWEST_FIRST: Duration = Duration::from_secs(30);

/// When to renew what was received at `received` and expires at `not_after`: at half of the life that it had then,
/// give or take the jitter. `dice` is in `0.0..1.0`.
///
/// Counted from the receipt, not from `not_before`: that is dated back by minutes, which is all of a short life.
pub(super) fn renew_at(received: SystemTime, not_after: SystemTime, dice: f64) -> SystemTime {
    let life = not_after.duration_since(received).unwrap_or_default();
    received + life.mul_f64(0.5 - JITTER + 2.0 * JITTER * dice.clamp(0.0, 1.0))
}

/// How long to wait after so many failures in a row (one at least): twice as long each time, the later half of it by
/// dice, five minutes at most, and never more than an eighth of what is left of the certificate in use: an outage that
/// ends shortly before the expiry must be noticed in time. Half a minute at most where there is none in use.
pub(super) fn retry_after(failures: u32, remaining: Option<Duration>, dice: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let longest = remaining.map_or(SLOWEST_FIRST, |left| (left / 8).clamp(FIRST_RETRY, SLOWEST_RETRY));
    doubled.min(longest).mul_f64(0.5 + dice.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn half_life_and_its_jitter() {
        let now = SystemTime::UNIX_EPOCH + secs(1_800_000_000);
        let after = |life: u64, dice: f64| renew_at(now, now + secs(life), dice).duration_since(now).unwrap();
        assert_eq!(after(86_400, 0.5), secs(43_200));
        assert_eq!(after(86_400, 0.0), secs(38_880));
        assert_eq!(after(86_400, 1.0), secs(47_520));
        assert_eq!(after(60, 0.5), secs(30));
        assert_eq!(renew_at(now, now - secs(9), 0.5), now, "expired on arrival");
    }

    #[test]
    fn back_off_doubles_up_to_five_minutes_and_hurries_near_the_end() {
        let waits = |remaining: Option<Duration>| -> Vec<u64> {
            (1..=10).map(|failures| retry_after(failures, remaining, 1.0).as_secs()).collect()
        };
        assert_eq!(waits(Some(secs(43_200))), [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(waits(None), [1, 2, 4, 8, 16, 30, 30, 30, 30, 30]);
        assert_eq!(waits(Some(secs(80))), [1, 2, 4, 8, 10, 10, 10, 10, 10, 10]);
        assert_eq!(waits(Some(Duration::ZERO)), [1; 10], "expired: every second");
        assert_eq!(retry_after(3, None, 0.0), secs(2));
    }

    proptest! {
        #[test]
        fn bounds(failures in 1u32.., left in prop::option::of(0u64..1_000_000), dice in 0.0..1.0f64, life in 0u64..1_000_000) {
            let wait = retry_after(failures, left.map(secs), dice);
            prop_assert!(wait >= FIRST_RETRY / 2 && wait <= SLOWEST_RETRY);
            let now = SystemTime::UNIX_EPOCH;
            let due = renew_at(now, now + secs(life), dice).duration_since(now).unwrap().as_secs_f64();
            prop_assert!(due >= life as f64 * 0.449 && due <= life as f64 * 0.551);
        }
    }
}

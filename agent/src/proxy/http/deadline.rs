//! How long an answer is of use to whoever asks: read off a request, and told to the next one with what is left of it.
//!
//! Times and not moments are told, for clocks differ: `grpc-timeout` (gRPC over HTTP/2, "Requests") by gRPC, and `undermesh-timeout-ms` by all else.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};

static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
static TIMEOUT_MS: HeaderName = HeaderName::from_static("undermesh-timeout-ms");

/// The digits that gRPC allows.
const MOST_DIGITS: usize = 8;

/// How long the client is going to wait, if it says so. What cannot be read says nothing.
pub(super) fn asked(headers: &HeaderMap, is_grpc: bool) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok();
    if is_grpc { grpc(text(&GRPC_TIMEOUT)?) } else { millis(text(&TIMEOUT_MS)?) }
}

/// Tells the next one what is left.
pub(super) fn tell(left: Duration, headers: &mut HeaderMap, is_grpc: bool) {
    if is_grpc {
        if let Ok(value) = HeaderValue::try_from(grpc_text(left)) {
            headers.insert(&GRPC_TIMEOUT, value);
        }
        return;
    }
    // None at all would be none to speak of.
    let millis = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
    headers.insert(&TIMEOUT_MS, HeaderValue::from(millis));
}

fn millis(text: &str) -> Option<Duration> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok().map(Duration::from_millis)).flatten()
}

fn grpc(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > MOST_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(count * 3_600),
        'M' => Duration::from_secs(count * 60),
        'S' => Duration::from_secs(count),
        'm' => Duration::from_millis(count),
        'u' => Duration::from_micros(count),
        'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// As exactly as there are digits for.
fn grpc_text(left: Duration) -> String {
    let most = 10_u128.pow(MOST_DIGITS as u32);
    let counts = [(left.as_micros(), 'u'), (left.as_millis(), 'm'), (left.as_secs().into(), 'S')];
    match counts.into_iter().find(|(count, _)| *count < most) {
        Some((count, unit)) => format!("{count}{unit}"),
        // Longer than three years.
        None => format!("{}S", most - 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_clients_say_of_how_long_they_wait() {
        let check = |name: &'static str, value: &'static str, is_grpc, expected: Option<u64>| {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static(name),
                HeaderValue::from_str(value).unwrap(),
            )]);
            let found = asked(&headers, is_grpc).map(|found| found.as_micros() as u64);
            assert_eq!(found, expected, "{name}: {value}");
        };
        for (value, expected) in [
            ("1H", Some(3_600_000_000)),
            ("2M", Some(120_000_000)),
            ("3S", Some(3_000_000)),
            ("100m", Some(100_000)),
            ("250u", Some(250)),
            ("5000n", Some(5)),
            ("99999999H", Some(359_999_996_400_000_000)),
            ("999999999S", None),
            ("S", None),
            ("1", None),
            ("1x", None),
            ("-1S", None),
            ("1ä", None),
            ("", None),
        ] {
            check("grpc-timeout", value, true, expected);
            check("grpc-timeout", value, false, None);
        }
        check("undermesh-timeout-ms", "1500", false, Some(1_500_000));
        check("undermesh-timeout-ms", "1500", true, None);
        check("undermesh-timeout-ms", "+5", false, None);
        check("undermesh-timeout-ms", "soon", false, None);
        check("undermesh-timeout-ms", "99999999999999999999999", false, None);
    }

    proptest! {
        /// Whoever reads what was told never waits for longer than is left, nor for much less.
        #[test]
        fn what_is_told_is_what_is_left(micros in 1_000_u64.., is_grpc: bool) {
            let left = Duration::from_micros(micros % (3_600_000_000 * 24 * 365 * 3) + 1_000);
            let mut headers = HeaderMap::new();
            tell(left, &mut headers, is_grpc);
            let read = asked(&headers, is_grpc).unwrap();
            let lost = left.checked_sub(read).unwrap();
            prop_assert!(lost < Duration::from_secs(1) && lost.as_secs_f64() <= left.as_secs_f64() / 2.0);
        }
    }
}

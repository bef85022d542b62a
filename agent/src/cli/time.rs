//! Lengths of time as users write them.

use std::time::Duration;

/// `90s`, `5m`, `24h`, `30d`; a bare number is seconds.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    const LONGEST: u64 = 100 * 365 * 86_400;
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3_600),
        Some((at, 'd')) => (&text[..at], 86_400),
        _ => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    match seconds {
        Some(seconds) if (1..=LONGEST).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err("a time is a number above 0 with s, m, h or d, at most 100 years".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let check = |text: &str, seconds: Option<u64>| {
            assert_eq!(parse_time(text).ok(), seconds.map(Duration::from_secs), "{text:?}");
        };
        check("90s", Some(90));
        check("90", Some(90));
        check("5m", Some(300));
        check("24h", Some(86_400));
        check("30d", Some(2_592_000));
        for odd in ["", "s", "0", "-1s", "1.5h", "1w", "1 h", "9999999999999999999d", "5ü", "36501d"] {
            check(odd, None);
        }
    }
}

//! What a client is told of the rate limits that it is held to: `RateLimit` and `RateLimit-Policy`
//! (draft-ietf-httpapi-ratelimit-headers-10) and `Retry-After`.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};

use super::answer::Refusal;
use crate::policy::{Admission, Standing};
use crate::telemetry::RequestEnd;

static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// A request that came too soon.
#[derive(Debug)]
pub(super) struct TooSoon {
    standing: Standing,
    wait: Duration,
}

/// How the request's source stands with the limits that it is within; none where nothing is limited.
pub(super) fn admitted(admission: Admission) -> Result<Option<Standing>, Refusal> {
    let (standing, wait) = match admission {
        Admission::Admitted(standing) => return Ok(standing),
        Admission::Refused { standing, wait } => (standing, wait),
    };
    let detail = format!(
        "no more than {} requests in {} s are taken here",
        standing.quota,
        standing.per.as_secs_f64()
    );
    let mut refusal = Refusal::new(RequestEnd::RateLimited, detail);
    refusal.too_soon = Some(Box::new(TooSoon { standing, wait }));
    Err(refusal)
}

impl TooSoon {
    /// When asking again is worth it, as a client is told.
    pub(super) fn retry_after(&self) -> Duration {
        Duration::from_secs(whole_seconds(self.wait))
    }

    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        tell(&self.standing, headers);
        headers.insert(RETRY_AFTER, HeaderValue::from(self.retry_after().as_secs()));
    }
}

/// How its source stands with a limit.
pub(super) fn tell(standing: &Standing, headers: &mut HeaderMap) {
    let Standing { quota, per, left, until_whole } = standing;
    let policy = format!("\"undermesh\";q={quota};w={}", whole_seconds(*per));
    let now = format!("\"undermesh\";r={left};t={}", whole_seconds(*until_whole));
    for (name, value) in [(&RATE_LIMIT_POLICY, policy), (&RATE_LIMIT, now)] {
        // Digits and letters: it never fails.
        if let Ok(value) = HeaderValue::try_from(value) {
            // The application may have some of its own.
            headers.append(name, value);
        }
    }
}

/// One at least, for who comes back at once is too soon again.
fn whole_seconds(time: Duration) -> u64 {
    (time.as_secs() + u64::from(time.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_how_it_stands_and_when_to_come_again() {
        let standing = Standing {
            quota: 100,
            per: Duration::from_secs(60),
            left: 7,
            until_whole: Duration::from_millis(55_800),
        };
        let said = |headers: &HeaderMap| {
            [&RATE_LIMIT_POLICY, &RATE_LIMIT, &RETRY_AFTER]
                .map(|name| headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned())
        };
        let mut headers = HeaderMap::new();
        tell(&standing, &mut headers);
        assert_eq!(said(&headers), ["\"undermesh\";q=100;w=60", "\"undermesh\";r=7;t=56", ""]);
        assert!(admitted(Admission::Admitted(Some(standing))).is_ok_and(|it| it == Some(standing)));

        let refused = Admission::Refused { standing, wait: Duration::from_millis(600) };
        let refusal = admitted(refused).unwrap_err();
        let answer = refusal.answer(false);
        assert_eq!(answer.status(), 429);
        assert_eq!(said(answer.headers())[2], "1");
        assert_eq!(refusal.answer(true).headers()["grpc-status"], "8");
    }
}

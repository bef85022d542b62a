//! Whether a request that failed is sent again, and when; and what is said of it to the hops before and behind.
//!
//! How often all requests of a Service may be is for `balance::budget`.

use std::time::{Duration, Instant, SystemTime};

use http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use hyper::body::{Body as _, Incoming};

use super::answer::Refusal;
use super::body::RequestBody;
use super::head;
use crate::balance::outlier::Verdict;
use crate::balance::{budget, caps};
use crate::model::{PortGuard, RetrySettings, ServiceEvent, ServiceLoad, ServicePort, UnderWay};
use crate::route::Retry;
use crate::telemetry::RequestEnd;

/// On a request: the number of the attempt, of all but the first. Whoever sees it leaves retries to who has sent it.
static ATTEMPT: HeaderName = HeaderName::from_static("undermesh-attempt");

/// On an answer: how often its request was sent again, in vain. Sending it once more from further away is of no use.
static RETRIED: HeaderName = HeaderName::from_static("undermesh-retried");

/// Between two attempts, where the rule does not say: long enough for a hiccup to pass.
const BACKOFF: Duration = Duration::from_millis(25);

/// An upstream that wants to be left alone for longer gets no retry: its client may come back by itself.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The longest body that is kept to be sent again.
const LONGEST_KEPT: u64 = 64 * 1024;

/// What is left of one request's retries.
#[derive(Debug)]
pub(super) struct Retries<'a> {
    wish: Option<Wish<'a>>,
    /// When the answer must have begun.
    until: Option<Instant>,
    left: u32,
    made: u32,
    /// There would have been more, if not for the budget.
    is_cut_short: bool,
    is_retry: bool,
    /// Its place among the requests that are being sent again, where there is a cap on those.
    place: Option<PortGuard>,
}

/// How often a request is to be sent again, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish<'a> {
    pub(super) attempts: u32,
    codes: &'a [StatusCode],
    backoff: Option<Duration>,
}

impl<'a> Wish<'a> {
    /// As a rule has it: whatever the request is, for the route knows.
    pub(super) fn of_rule(Retry { attempts, codes, backoff }: &'a Retry) -> Self {
        Self { attempts: *attempts, codes, backoff: *backoff }
    }

    /// As a Service port has it, for what may be sent twice (RFC 9110, section 9.2.2), or all if it says so.
    pub(super) fn of_port(settings: &'a RetrySettings, method: &Method) -> Option<Self> {
        let RetrySettings { attempts, codes, any_method, backoff, .. } = settings;
        let is_wanted = *attempts > 0 && (*any_method || method.is_idempotent());
        is_wanted.then_some(Self { attempts: *attempts, codes, backoff: *backoff })
    }
}

impl<'a> Retries<'a> {
    pub(super) fn of(wish: Option<Wish<'a>>, until: Option<Instant>, request: &HeaderMap) -> Self {
        let left = wish.map_or(0, |wish| wish.attempts);
        let is_retry = request.contains_key(&ATTEMPT);
        Self { wish, until, left, made: 0, is_cut_short: false, is_retry, place: None }
    }

    /// Whether it may come to one.
    pub(super) fn are_left(&self) -> bool {
        self.left > 0
    }

    /// Whether the request's body is to be kept, so that it can be sent again.
    pub(super) fn keep_body(&self, request: &Request<RequestBody>) -> bool {
        let body = request.body();
        self.are_left()
            && !self.is_retry
            && !body.is_end_stream()
            && body.size_hint().exact().is_some_and(|length| length <= LONGEST_KEPT)
            // It comes only when the upstream asks for it.
            && !head::waits_to_go_on(request)
    }

    /// Whether the answer is one that asks for another attempt, or would where any is wanted. A refusal of our own that says nothing of the
    /// endpoint would be the same at any other, and is none.
    pub(super) fn has_failed<B>(
        &self,
        answer: &Result<Response<B>, Refusal>,
        verdict: Option<Verdict>,
    ) -> bool {
        match (answer, self.wish) {
            // As if the endpoint's own agent had said so.
            (Err(Refusal { end: RequestEnd::RateLimited, .. }), wish) => {
                wish.is_some_and(|wish| wish.codes.contains(&StatusCode::TOO_MANY_REQUESTS))
            }
            (Err(_), _) => verdict.is_some(),
            (Ok(response), Some(wish)) => wish.codes.contains(&response.status()),
            (Ok(response), None) => response.status().is_server_error(),
        }
    }

    /// How long to wait before the request is sent again; None: not at all. It was sent in vain so far, and can be sent again.
    pub(super) fn wait(
        &mut self,
        service: &ServiceLoad,
        port: &ServicePort,
        answer: &Result<Response<Incoming>, Refusal>,
    ) -> Option<Duration> {
        if self.left == 0 {
            return None;
        }
        let headers = answer.as_ref().ok().map(Response::headers);
        if self.is_retry || headers.is_some_and(|headers| headers.contains_key(&RETRIED)) {
            service.count(ServiceEvent::RetriedElsewhere);
            return None;
        }
        let least = self.wish.and_then(|wish| wish.backoff).unwrap_or(BACKOFF);
        // Not all at the same moment: what failed for one has failed for others.
        let backoff = least.mul_f64(1.0 + fastrand::f64());
        let now = Instant::now();
        let asked_for = match answer {
            Ok(response) => retry_after(response.headers(), SystemTime::now()),
            Err(refusal) => refusal.too_soon.as_ref().map(|too_soon| too_soon.retry_after()),
        };
        if let Some(asked_for) = asked_for
            && (asked_for > LONGEST_WAIT || self.until.is_some_and(|until| now + asked_for >= until))
        {
            service.count(ServiceEvent::RetryAfterTooLong);
            return None;
        }
        if self.place.is_none() {
            match caps::enter(port, UnderWay::Retries) {
                Ok(place) => self.place = place,
                Err(_full) => {
                    service.count(ServiceEvent::RetriesCapped);
                    self.is_cut_short = true;
                    return None;
                }
            }
        }
        if !budget::may_retry(service, &port.traffic.retries.budget, now) {
            service.count(ServiceEvent::RetryBudgetSpent);
            self.is_cut_short = true;
            return None;
        }
        service.count(ServiceEvent::Retried);
        self.left -= 1;
        self.made += 1;
        Some(asked_for.map_or(backoff, |asked_for| asked_for + backoff))
    }

    /// Says on the request that it is sent again.
    pub(super) fn mark(&self, request: &mut HeaderMap) {
        request.insert(&ATTEMPT, HeaderValue::from(self.made + 1));
    }

    /// What a failure's answer is to say: how often its request was sent again, if nobody is to send it once more.
    pub(super) fn in_vain(&self) -> Option<u32> {
        (self.made > 0 || self.is_cut_short).then_some(self.made)
    }
}

/// Says on an answer that the request was sent again so often, in vain.
pub(super) fn mark_in_vain(answer: &mut HeaderMap, made: u32) {
    answer.insert(&RETRIED, HeaderValue::from(made));
}

/// How long the upstream wants to be left alone (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(SystemTime::from(date).duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Caps, TrafficSettings};
    use crate::proxy::http::blame;
    use crate::telemetry::RequestEnd;

    #[test]
    fn a_port_has_sent_again_what_may_be_sent_twice() {
        let settings =
            RetrySettings { attempts: 2, codes: vec![StatusCode::BAD_GATEWAY], ..RetrySettings::default() };
        let any = RetrySettings { any_method: true, ..settings.clone() };
        let wished =
            |settings: &RetrySettings, method| Wish::of_port(settings, &method).map(|wish| wish.attempts);
        for (method, is_idempotent) in [
            (Method::GET, true),
            (Method::HEAD, true),
            (Method::OPTIONS, true),
            (Method::PUT, true),
            (Method::DELETE, true),
            (Method::POST, false),
            (Method::PATCH, false),
            (Method::CONNECT, false),
        ] {
            assert_eq!(wished(&settings, method.clone()), is_idempotent.then_some(2), "{method}");
            assert_eq!(wished(&any, method.clone()), Some(2), "{method}");
            assert_eq!(wished(&RetrySettings::default(), method), None);
        }
    }

    #[test]
    fn refusals_that_say_nothing_of_the_endpoint_are_not_sent_again() {
        let settings =
            RetrySettings { attempts: 2, codes: vec![StatusCode::FORBIDDEN], ..RetrySettings::default() };
        let retries = Retries::of(Wish::of_port(&settings, &Method::GET), None, &HeaderMap::new());
        for (end, expected) in [
            (RequestEnd::UpstreamReset, true),
            (RequestEnd::UpstreamTimeout, true),
            (RequestEnd::Denied, false),
            (RequestEnd::Unauthenticated, false),
            (RequestEnd::BadRequest, false),
            (RequestEnd::InvalidBackend, false),
            (RequestEnd::ClientGone, false),
            (RequestEnd::RateLimited, false),
        ] {
            let answer: Result<Response<()>, _> = Err(Refusal::new(end, "why"));
            let verdict = blame::verdict_of_refusal(end, false);
            assert_eq!(retries.has_failed(&answer, verdict), expected, "{end:?}");
        }
        let too_slow = blame::verdict_of_refusal(RequestEnd::UpstreamTimeout, true);
        assert_eq!(too_slow, None, "the client is still sending");
    }

    #[test]
    fn no_more_requests_are_being_sent_again_than_the_port_allows() {
        let mut service = crate::proxy::testkit::service(TrafficSettings {
            caps: Caps { retries: Some(1), ..Caps::default() },
            retries: RetrySettings { attempts: 3, ..RetrySettings::default() },
            ..TrafficSettings::default()
        });
        let refused = || Err(Refusal::new(RequestEnd::UpstreamReset, "it broke"));
        let (service, load) = (service.ports.remove(0), service.load);
        let again = || {
            let wish = Wish::of_port(&service.traffic.retries, &Method::GET);
            Retries::of(wish, None, &HeaderMap::new())
        };
        let (mut first, mut second) = (again(), again());
        assert!(first.wait(&load, &service, &refused()).is_some());
        assert!(second.wait(&load, &service, &refused()).is_none());
        assert_eq!((load.counted(ServiceEvent::RetriesCapped), second.in_vain()), (1, Some(0)));
        assert!(first.wait(&load, &service, &refused()).is_some(), "it has its place already");
        drop(first);
        assert!(second.wait(&load, &service, &refused()).is_some());
    }

    #[test]
    fn retry_after_is_a_number_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        for (value, expected) in [
            ("3", Some(3)),
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("99999999999999999999999", None),
            ("-1", None),
            ("soon", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(value))]);
            assert_eq!(retry_after(&headers, now), expected.map(Duration::from_secs), "{value}");
        }
    }
}

//! Sessions: requests that carry what an earlier answer gave them go to the endpoint of then (GEP-1619).
//!
//! What they carry names the endpoint and the times of the session. It proves nothing and need not: it only ever chooses
//! among endpoints that the rule leads to anyway.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue, SET_COOKIE};

use super::send::Way;
use crate::route::{Backend, Lifetime, Rule, SessionKind, SessionPersistence};
use crate::snapshot::Snapshot;

/// The session of one request, as its rule has them.
#[derive(Debug)]
pub(super) struct Session<'s> {
    kept_by: &'s SessionPersistence,
    /// What the request carries, as far as it still holds.
    token: Option<Token>,
    way: Option<(&'s Backend, Way<'s>)>,
    now: u64,
}

/// What a request carries. Times are seconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token {
    endpoint: SocketAddr,
    began: u64,
    used: u64,
}

impl<'s> Session<'s> {
    /// None where the rule keeps no sessions.
    pub(super) fn of(rule: &'s Rule, snapshot: &'s Snapshot, headers: &HeaderMap) -> Option<Self> {
        let kept_by = rule.session.as_ref()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let token = carried(kept_by, headers).and_then(Token::read).filter(|token| token.holds(kept_by, now));
        let way = token.and_then(|token| way(rule, snapshot, token.endpoint));
        Some(Self { kept_by, token: token.filter(|_| way.is_some()), way, now })
    }

    /// The backend and the endpoint that the session is with, while the rule leads there: a backend keeps its sessions with
    /// whatever weight, and loses them when it leaves.
    pub(super) fn way(&self) -> Option<(&'s Backend, Way<'s>)> {
        self.way
    }

    /// Has the client carry what leads to this endpoint, unless it does so already.
    pub(super) fn keep(&self, endpoint: SocketAddr, headers: &mut HeaderMap) {
        let same = self.token.filter(|token| token.endpoint == endpoint);
        if same.is_some() && self.kept_by.idle_timeout.is_none() {
            return;
        }
        let began = same.map_or(self.now, |token| token.began);
        let token = Token { endpoint, began, used: self.now }.write();
        match self.kept_by.kind {
            SessionKind::Cookie => {
                if let Ok(cookie) = HeaderValue::try_from(self.cookie(&token, began)) {
                    headers.append(SET_COOKIE, cookie);
                }
            }
            SessionKind::Header => {
                let name = HeaderName::try_from(&*self.kept_by.name);
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(token)) {
                    headers.insert(name, value);
                }
            }
        }
    }

    fn cookie(&self, token: &str, began: u64) -> String {
        let SessionPersistence { name, lifetime, absolute_timeout, .. } = self.kept_by;
        let max_age = match (lifetime, absolute_timeout) {
            (Lifetime::Permanent, Some(limit)) => {
                let left = limit.as_secs().saturating_sub(self.now.saturating_sub(began));
                format!("; Max-Age={left}")
            }
            _ => String::new(),
        };
        format!("{name}={token}; Path=/{max_age}; HttpOnly; SameSite=Lax")
    }
}

fn way<'s>(rule: &'s Rule, snapshot: &'s Snapshot, endpoint: SocketAddr) -> Option<(&'s Backend, Way<'s>)> {
    rule.backends.iter().find_map(|backend| {
        let (service, port) = snapshot.backend(&backend.target).ok()?;
        service.port(port)?.candidate(endpoint)?;
        Some((backend, Way::Service { service, port, kept: Some(endpoint) }))
    })
}

/// What the request carries of the session.
fn carried<'h>(kept_by: &SessionPersistence, headers: &'h HeaderMap) -> Option<&'h str> {
    match kept_by.kind {
        SessionKind::Header => headers.get(&*kept_by.name)?.to_str().ok(),
        SessionKind::Cookie => cookie(headers, &kept_by.name),
    }
}

/// The value of a request's cookie.
pub(super) fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    cookies
        .flat_map(|cookies| cookies.split(';'))
        .find_map(|cookie| cookie.trim().strip_prefix(name)?.strip_prefix('='))
}

impl Token {
    fn read(text: &str) -> Option<Self> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let mut parts = text.split(' ');
        let token = Self {
            endpoint: parts.next()?.parse().ok()?,
            began: parts.next()?.parse().ok()?,
            used: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(token)
    }

    fn write(self) -> String {
        let Self { endpoint, began, used } = self;
        URL_SAFE_NO_PAD.encode(format!("{endpoint} {began} {used}"))
    }

    fn holds(&self, kept_by: &SessionPersistence, now: u64) -> bool {
        let within = |since: u64, limit: Option<Duration>| {
            limit.is_none_or(|limit| now.saturating_sub(since) <= limit.as_secs())
        };
        within(self.began, kept_by.absolute_timeout) && within(self.used, kept_by.idle_timeout)
    }
}

/// For the fuzzer: what is read is written as it was read.
#[cfg(fuzzing)]
pub(super) fn check_token(text: &str) {
    if let Some(token) = Token::read(text) {
        assert_eq!(Token::read(&token.write()), Some(token));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept_by(kind: SessionKind, absolute: Option<u64>, idle: Option<u64>) -> SessionPersistence {
        SessionPersistence {
            name: "sid".into(),
            kind,
            lifetime: Lifetime::Session,
            absolute_timeout: absolute.map(Duration::from_secs),
            idle_timeout: idle.map(Duration::from_secs),
        }
    }

    #[test]
    fn what_a_request_carries_is_found_among_other_cookies() {
        let check = |lines: &[&str], expected: Option<&str>| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(COOKIE, line.parse().unwrap());
            }
            assert_eq!(carried(&kept_by(SessionKind::Cookie, None, None), &headers), expected, "{lines:?}");
        };
        check(&[], None);
        check(&["sid=x"], Some("x"));
        check(&["a=b; sid=x; c=d"], Some("x"));
        check(&["a=b", "c=d;sid=x"], Some("x"));
        check(&["side=y; xsid=z"], None);
        check(&["sid"], None);
        check(&["sid=x; sid=y"], Some("x"));
        let mut headers = HeaderMap::new();
        headers.insert("sid", "token".parse().unwrap());
        assert_eq!(carried(&kept_by(SessionKind::Header, None, None), &headers), Some("token"));
    }

    #[test]
    fn a_session_ends_with_its_time() {
        let token = Token { endpoint: "10.1.2.3:80".parse().unwrap(), began: 1000, used: 1500 };
        let check = |absolute, idle, now, expected| {
            let kept_by = kept_by(SessionKind::Cookie, absolute, idle);
            assert_eq!(token.holds(&kept_by, now), expected, "{absolute:?} {idle:?} {now}");
        };
        check(None, None, u64::MAX, true);
        check(Some(600), None, 1600, true);
        check(Some(600), None, 1601, false);
        check(Some(6000), Some(100), 1600, true);
        check(Some(6000), Some(100), 1601, false);
        // A clock that was set back ends no session.
        check(Some(600), Some(100), 0, true);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ip: std::net::IpAddr, port: u16, began: u64, used: u64) {
            let token = Token { endpoint: SocketAddr::new(ip, port), began, used };
            let text = token.write();
            prop_assert_eq!(Token::read(&text), Some(token));
            prop_assert!(HeaderValue::try_from(text).is_ok());
        }

        #[test]
        fn nothing_else_is(text in "\\PC*") {
            prop_assert!(Token::read(&text).is_none_or(|token| Token::read(&token.write()) == Some(token)));
        }
    }
}

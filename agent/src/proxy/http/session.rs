//! Sessions: requests that carry what an earlier answer gave them go to the endpoint of then (GEP-1619).
//!
//! What they carry names the endpoint and the times of the session. It proves nothing and need not: it only ever chooses
//! among endpoints that the request may go to anyway.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue, SET_COOKIE};

use super::send::Way;
use crate::model::{Service, SessionKind, SessionLifetime, SessionPersistence};
use crate::route::Rule;

/// The session of one request, among the ways that are open to it. With each comes what the caller knows it by.
#[derive(Debug)]
pub(super) struct Session<'s, W> {
    /// What its rule says of sessions; if that says nothing, the port of the way does.
    of_rule: Option<&'s SessionPersistence>,
    /// What the request carries, as far as it still holds, and where that leads.
    held: Option<(Token, W, Way<'s>)>,
    now: u64,
}

/// What a request carries. Times are seconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token {
    endpoint: SocketAddr,
    began: u64,
    used: u64,
}

impl<'s, W: Copy> Session<'s, W> {
    /// None where nobody keeps sessions.
    pub(super) fn among(
        rule: Option<&'s Rule>,
        ways: impl Iterator<Item = (W, &'s Service, u16)>,
        headers: &HeaderMap,
    ) -> Option<Self> {
        let of_rule = rule.and_then(|rule| rule.session.as_ref());
        let mut session = None;
        for (way, service, port) in ways {
            let Some(kept_by) = kept_by(of_rule, service, port) else { continue };
            let session = session.get_or_insert_with(|| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                Self { of_rule, held: None, now }
            });
            let token = carried(kept_by, headers).and_then(Token::read);
            let token = token.filter(|token| token.holds(kept_by, session.now));
            let leads_here = |token: &Token| {
                service.port(port).is_some_and(|port| port.candidate(token.endpoint).is_some())
            };
            if let Some(token) = token.filter(leads_here) {
                session.held = Some((token, way, Way::Service { service, port, kept: Some(token.endpoint) }));
                break;
            }
        }
        session
    }

    /// The way, and the endpoint, that the session is with, while it is open: a backend keeps its sessions with whatever weight,
    /// and loses them when it leaves.
    pub(super) fn way(&self) -> Option<(W, Way<'s>)> {
        self.held.map(|(_, way, to)| (way, to))
    }

    /// Has the client carry what leads to this endpoint, which its request went this way to, unless it does so already.
    pub(super) fn keep(&self, way: Way<'s>, endpoint: SocketAddr, headers: &mut HeaderMap) {
        let Way::Service { service, port, .. } = way else { return };
        let Some(kept_by) = kept_by(self.of_rule, service, port) else { return };
        let same = self.held.map(|(token, ..)| token).filter(|token| token.endpoint == endpoint);
        if same.is_some() && kept_by.idle_timeout.is_none() {
            return;
        }
        let began = same.map_or(self.now, |token| token.began);
        let token = Token { endpoint, began, used: self.now }.write();
        match kept_by.kind {
            SessionKind::Cookie => {
                if let Ok(cookie) = HeaderValue::try_from(set_cookie(kept_by, &token, began, self.now)) {
                    headers.append(SET_COOKIE, cookie);
                }
            }
            SessionKind::Header => {
                let name = HeaderName::try_from(&*kept_by.name);
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(token)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// What keeps the sessions of requests to this port: the rule that they fall under, else the port's policy.
fn kept_by<'s>(
    of_rule: Option<&'s SessionPersistence>,
    service: &'s Service,
    port: u16,
) -> Option<&'s SessionPersistence> {
    of_rule.or_else(|| service.port(port)?.traffic.session.as_ref())
}

fn set_cookie(kept_by: &SessionPersistence, token: &str, began: u64, now: u64) -> String {
    let SessionPersistence { name, lifetime, absolute_timeout, .. } = kept_by;
    let max_age = match (lifetime, absolute_timeout) {
        (SessionLifetime::Permanent, Some(limit)) => {
            let left = limit.as_secs().saturating_sub(now.saturating_sub(began));
            format!("; Max-Age={left}")
        }
        _ => String::new(),
    };
    format!("{name}={token}; Path=/{max_age}; HttpOnly; SameSite=Lax")
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
            lifetime: SessionLifetime::Session,
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

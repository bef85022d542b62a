//! Cross-Origin Resource Sharing: what the pages of other origins may do (<https://fetch.spec.whatwg.org/#http-cors-protocol>).

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS as ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS as ALLOW_HEADERS,
    ACCESS_CONTROL_ALLOW_METHODS as ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN as ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS as EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE as MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS as REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD as REQUEST_METHOD,
    ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::model::Name;

/// What the pages of other origins may do. A browser asks before it does more than a link or a form could, by a *preflight*.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cors {
    /// The origins that may; none means nobody.
    pub allow_origins: Vec<Origin>,
    /// Whether their requests may carry cookies and the like.
    pub allow_credentials: bool,
    /// The methods that they may use beside GET, HEAD and POST.
    pub allow_methods: AllowedMethods,
    /// The headers that they may send beside the harmless ones.
    pub allow_headers: AllowedHeaders,
    /// The headers of an answer that they may see beside the harmless ones.
    pub expose_headers: AllowedHeaders,
    /// For how many seconds a browser need not ask again.
    pub max_age: u32,
}

/// Origins: `scheme://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `*`.
    Any,
    /// Those with all of this.
    Some {
        /// In lower case.
        scheme: Name,
        /// In lower case. A `*` before it stands for anything: `*.example.com`, `*`.
        host: Name,
        /// The port; the scheme's own where none was written.
        port: Option<u16>,
    },
}

/// Methods that are allowed.
#[derive(Clone, Debug, PartialEq)]
pub enum AllowedMethods {
    /// `*`.
    Any,
    /// These.
    These(Vec<Method>),
}

/// Headers that are allowed.
#[derive(Clone, Debug, PartialEq)]
pub enum AllowedHeaders {
    /// `*`.
    Any,
    /// These.
    These(Vec<HeaderName>),
}

impl Cors {
    /// The headers of the answer to a preflight, which is an OPTIONS request with these headers: an answer of 204 that no
    /// backend is asked for. None where the request is not a preflight and goes its way. An origin that may not gets an
    /// answer too, without the headers that would allow it anything.
    pub fn preflight(&self, headers: &HeaderMap) -> Option<HeaderMap> {
        let (origin, method) = headers.get(ORIGIN).zip(headers.get(REQUEST_METHOD))?;
        let mut answer = HeaderMap::new();
        answer.insert(VARY, HeaderValue::from_static("Origin"));
        if !self.allows(origin) {
            return Some(answer);
        }
        self.allow(origin, &mut answer);
        match &self.allow_methods {
            // Said of this request alone, which is right with credentials and without.
            AllowedMethods::Any => {
                answer.insert(ALLOW_METHODS, method.clone());
            }
            AllowedMethods::These(methods) => {
                list(ALLOW_METHODS, methods.iter().map(Method::as_str), &mut answer)
            }
        }
        match (&self.allow_headers, headers.get(REQUEST_HEADERS)) {
            (AllowedHeaders::Any, Some(asked)) => {
                answer.insert(ALLOW_HEADERS, asked.clone());
            }
            (AllowedHeaders::Any, None) => {}
            (AllowedHeaders::These(names), _) => {
                list(ALLOW_HEADERS, names.iter().map(HeaderName::as_str), &mut answer);
            }
        }
        answer.insert(MAX_AGE, HeaderValue::from(self.max_age));
        Some(answer)
    }

    /// Says in the answer to a request of this origin what its page may see. What the application says of an origin that may
    /// not stays as it is.
    pub fn respond(&self, request_origin: Option<&HeaderValue>, response: &mut HeaderMap) {
        // A cache must not give one origin's answer to another, nor to any that of a request without one, which allows nobody anything.
        response.append(VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = request_origin.filter(|origin| self.allows(origin)) else { return };
        self.allow(origin, response);
        match &self.expose_headers {
            // With credentials a browser takes `*` for the name of a header, so that they have to be named.
            AllowedHeaders::Any if self.allow_credentials => {
                let names: Vec<HeaderName> = response.keys().cloned().collect();
                list(EXPOSE_HEADERS, names.iter().map(HeaderName::as_str), response);
            }
            AllowedHeaders::Any => {
                response.insert(EXPOSE_HEADERS, HeaderValue::from_static("*"));
            }
            AllowedHeaders::These(names) => {
                list(EXPOSE_HEADERS, names.iter().map(HeaderName::as_str), response);
            }
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let Ok(origin) = origin.to_str() else { return false };
        self.allow_origins.iter().any(|allowed| allowed.matches(origin))
    }

    /// The origin itself and never `*`, which a browser does not take together with credentials.
    fn allow(&self, origin: &HeaderValue, answer: &mut HeaderMap) {
        answer.insert(ALLOW_ORIGIN, origin.clone());
        if self.allow_credentials {
            answer.insert(ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
}

impl Origin {
    /// Reads `*` or `scheme://host:port`, where the host may begin with a `*` and the port may be missing.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        let (scheme, host, port) = parts(text)?;
        let name = host.strip_prefix('*').unwrap_or(&host);
        let is_host = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._[:]".contains(&byte));
        let is_usable = matches!(&*scheme, "http" | "https") && is_host && port != Some(0);
        is_usable.then(|| Self::Some { scheme: scheme.into(), host: host.into(), port })
    }

    /// Whether the origin that a browser names is one of these.
    fn matches(&self, origin: &str) -> bool {
        let Self::Some { scheme, host, port } = self else { return true };
        let Some((its_scheme, its_host, its_port)) = parts(origin) else { return false };
        let is_host = match host.strip_prefix('*') {
            Some(end) => its_host.len() > end.len() && its_host.ends_with(end),
            None => its_host == **host,
        };
        its_scheme == **scheme && is_host && its_port == *port
    }
}

/// Scheme, host and port, the first two in lower case.
fn parts(origin: &str) -> Option<(String, String, Option<u16>)> {
    let (scheme, authority) = origin.split_once("://")?;
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port.parse().ok()?)),
        _ => (authority, None),
    };
    let scheme = scheme.to_ascii_lowercase();
    let own = match &*scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    (!host.is_empty()).then(|| (scheme, host.to_ascii_lowercase(), port.or(own)))
}

/// Nothing is said of an empty list.
fn list<'a>(header: HeaderName, items: impl Iterator<Item = &'a str>, answer: &mut HeaderMap) {
    let text = items.collect::<Vec<_>>().join(", ");
    if !text.is_empty()
        && let Ok(value) = HeaderValue::try_from(text)
    {
        answer.insert(header, value);
    }
}

impl Default for AllowedMethods {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

impl Default for AllowedHeaders {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    fn shown(headers: &HeaderMap) -> String {
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap())).collect();
        lines.sort();
        lines.concat()
    }

    fn preflight(cors: &Cors, lines: &[(&'static str, &'static str)], expected: Expect) {
        let answer = cors.preflight(&headers(lines));
        expected.assert_eq(&answer.map_or("no preflight".into(), |answer| shown(&answer)));
    }

    fn some() -> Cors {
        Cors {
            allow_origins: vec![
                Origin::parse("https://a.test").unwrap(),
                Origin::parse("https://*.b.test").unwrap(),
            ],
            allow_credentials: true,
            allow_methods: AllowedMethods::These(vec![Method::PUT, Method::DELETE]),
            allow_headers: AllowedHeaders::These(vec![HeaderName::from_static("x-one")]),
            expose_headers: AllowedHeaders::These(vec![HeaderName::from_static("x-two")]),
            max_age: 60,
        }
    }

    fn any(allow_credentials: bool) -> Cors {
        Cors {
            allow_origins: vec![Origin::Any],
            allow_credentials,
            allow_methods: AllowedMethods::Any,
            allow_headers: AllowedHeaders::Any,
            expose_headers: AllowedHeaders::Any,
            max_age: 5,
        }
    }

    #[test]
    fn origins() {
        let check = |pattern: &str, origin: &str, expected: bool| {
            let matches = Origin::parse(pattern).unwrap().matches(origin);
            assert_eq!(matches, expected, "{pattern} {origin}");
        };
        check("*", "https://a.test", true);
        check("*", "null", true);
        check("https://a.test", "https://a.test", true);
        check("https://A.test", "HTTPS://a.TEST:443", true);
        check("https://a.test:443", "https://a.test", true);
        check("https://a.test", "http://a.test", false);
        check("https://a.test", "https://a.test:8443", false);
        check("https://a.test", "https://a.test.evil", false);
        check("https://a.test", "null", false);
        check("https://*.a.test", "https://b.a.test", true);
        check("https://*.a.test", "https://c.b.a.test", true);
        check("https://*.a.test", "https://a.test", false);
        check("https://*.a.test", "https://evila.test", false);
        check("https://*", "https://anything", true);
        check("https://*", "http://anything", false);
        check("https://*:8443", "https://anything:8443", true);
        for text in [
            "",
            "a.test",
            "ftp://a.test",
            "https://",
            "https://a.test/",
            "https://a.*.test",
            "https://a:b",
            "https://a:0",
        ] {
            assert_eq!(Origin::parse(text), None, "{text}");
        }
    }

    #[test]
    fn preflights() {
        let asks = [("origin", "https://x.b.test"), ("access-control-request-method", "PUT")];
        preflight(
            &some(),
            &asks,
            expect![[r#"
                access-control-allow-credentials: true
                access-control-allow-headers: x-one
                access-control-allow-methods: PUT, DELETE
                access-control-allow-origin: https://x.b.test
                access-control-max-age: 60
                vary: Origin
            "#]],
        );
        let evil = [("origin", "https://evil"), asks[1]];
        preflight(
            &some(),
            &evil,
            expect![[r#"
            vary: Origin
        "#]],
        );
        preflight(&some(), &asks[..1], expect!["no preflight"]);
        preflight(&some(), &asks[1..], expect!["no preflight"]);
        for credentials in [false, true] {
            let lines = [asks[0], asks[1], ("access-control-request-headers", "x-any, x-other")];
            let answer = any(credentials).preflight(&headers(&lines)).unwrap();
            assert_eq!(answer.get(ALLOW_CREDENTIALS).is_some(), credentials);
            let text = shown(&answer);
            assert!(text.contains("allow-methods: PUT\n"), "{text}");
            assert!(text.contains("allow-headers: x-any, x-other\n"), "{text}");
            assert!(text.contains("allow-origin: https://x.b.test\n"), "{text}");
        }
        preflight(
            &any(false),
            &asks,
            expect![[r#"
                access-control-allow-methods: PUT
                access-control-allow-origin: https://x.b.test
                access-control-max-age: 5
                vary: Origin
            "#]],
        );
    }

    #[test]
    fn answers() {
        let check = |cors: &Cors, origin: Option<&'static str>, expected: Expect| {
            let mut response = headers(&[("content-type", "text/plain"), ("vary", "Accept")]);
            cors.respond(origin.map(HeaderValue::from_static).as_ref(), &mut response);
            expected.assert_eq(&shown(&response));
        };
        check(
            &some(),
            Some("https://a.test"),
            expect![[r#"
                access-control-allow-credentials: true
                access-control-allow-origin: https://a.test
                access-control-expose-headers: x-two
                content-type: text/plain
                vary: Accept
                vary: Origin
            "#]],
        );
        for origin in [None, Some("https://evil")] {
            check(
                &some(),
                origin,
                expect![[r#"
                    content-type: text/plain
                    vary: Accept
                    vary: Origin
                "#]],
            );
        }
        check(
            &any(false),
            Some("null"),
            expect![[r#"
                access-control-allow-origin: null
                access-control-expose-headers: *
                content-type: text/plain
                vary: Accept
                vary: Origin
            "#]],
        );
        let mut response = headers(&[("x-own", "1")]);
        any(true).respond(Some(&HeaderValue::from_static("https://a.test")), &mut response);
        let exposed = response.get(EXPOSE_HEADERS).unwrap().to_str().unwrap();
        assert!(exposed.contains("x-own") && !exposed.contains('*'), "{exposed}");
    }
}

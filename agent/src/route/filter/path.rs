//! Redirects and rewrites of a URL.

use std::borrow::Cow;

use http::{HeaderValue, StatusCode};

use super::super::RequestHead;
use crate::model::Name;

/// Answers a request with another place to look for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Redirect {
    /// `http` or `https`; None for that of the request.
    pub scheme: Option<Name>,
    /// The host; None for that of the request.
    pub hostname: Option<Name>,
    /// The port; None for the one that belongs to `scheme`, and where that is None too, for the one that was dialled.
    pub port: Option<u16>,
    /// What becomes of the path; None leaves it as it is.
    pub path: Option<PathModifier>,
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
}

/// Changes the URL of a request before it is sent on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UrlRewrite {
    /// What the host becomes; None leaves it as it is.
    pub hostname: Option<Name>,
    /// What becomes of the path; None leaves it as it is.
    pub path: Option<PathModifier>,
}

/// What becomes of a path. The query is never touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathModifier {
    /// This instead of the whole path.
    ReplaceFullPath(Name),
    /// This instead of the prefix that was matched.
    ReplacePrefixMatch(Name),
}

impl Redirect {
    /// The status and the `Location` of the answer. `authority` is what the request names its host by, with the port if it
    /// has one; `scheme` and `port` are those that the client used, and `prefix` is what the path matched.
    pub fn answer(
        &self,
        request: &RequestHead<'_>,
        authority: &str,
        scheme: &str,
        port: u16,
        prefix: Option<&str>,
    ) -> (StatusCode, HeaderValue) {
        let own_scheme = self.scheme.as_deref();
        let port = self.port.unwrap_or_else(|| own_scheme.and_then(well_known).unwrap_or(port));
        let scheme = own_scheme.unwrap_or(scheme);
        let host = self.hostname.as_deref().unwrap_or_else(|| match without_port(authority) {
            "" => request.host,
            host => host,
        });
        let port = if well_known(scheme) == Some(port) { String::new() } else { format!(":{port}") };
        let path = self.path.as_ref().and_then(|modifier| modifier.apply(request.path, prefix));
        let path = path.map_or(Cow::Borrowed(request.path), Cow::Owned);
        let query = request.query.map(|query| format!("?{query}")).unwrap_or_default();
        (self.status, location(&format!("{scheme}://{host}{port}{path}{query}")))
    }
}

impl UrlRewrite {
    /// The new path, None where it stays. The caller puts the query behind it again.
    pub fn path(&self, path: &str, prefix: Option<&str>) -> Option<String> {
        self.path.as_ref()?.apply(path, prefix)
    }
}

impl PathModifier {
    /// The new path. None where there is a prefix to be replaced and the request matched by something else.
    fn apply(&self, path: &str, prefix: Option<&str>) -> Option<String> {
        let replaced = match self {
            Self::ReplaceFullPath(new) => new.to_string(),
            Self::ReplacePrefixMatch(new) => {
                let prefix = prefix?;
                let rest = path.strip_prefix(prefix.strip_suffix('/').unwrap_or(prefix))?;
                format!("{}{rest}", new.strip_suffix('/').unwrap_or(new))
            }
        };
        Some(if replaced.starts_with('/') { replaced } else { format!("/{replaced}") })
    }
}

fn well_known(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// The host of an authority. The colons of an IPv6 address are within brackets.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    }
}

/// As a header: what a URI cannot hold, and a header neither, is percent-encoded.
fn location(uri: &str) -> HeaderValue {
    let encoded: String = uri
        .bytes()
        .map(|byte| match byte {
            b'!'..=b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect();
    HeaderValue::try_from(encoded).unwrap_or_else(|_| HeaderValue::from_static("/"))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_prefix_is_replaced_as_the_gateway_api_shows() {
        // The table in the documentation of HTTPPathModifier, and below it what it does not show.
        for (path, prefix, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo", "/foo", "/xyz/", "/xyz"),
            ("/foo/bar", "/", "/xyz", "/xyz/foo/bar"),
            ("/", "/", "/xyz", "/xyz/"),
            ("/", "/", "/", "/"),
            ("/foo/bar", "/", "", "/foo/bar"),
            ("/foo//bar", "/foo", "/xyz", "/xyz//bar"),
            ("/foo", "/foo", "xyz", "/xyz"),
        ] {
            let path_modifier = PathModifier::ReplacePrefixMatch(replacement.into());
            let rewrite = UrlRewrite { hostname: None, path: Some(path_modifier) };
            let case = format!("{path} {prefix} {replacement}");
            assert_eq!(rewrite.path(path, Some(prefix)).as_deref(), Some(expected), "{case}");
            assert_eq!(rewrite.path(path, None), None, "{case}");
        }
    }

    #[test]
    fn a_full_path_is_replaced_whatever_was_matched() {
        let rewrite = |path: Option<PathModifier>| UrlRewrite { hostname: None, path };
        let full = |path: &str| rewrite(Some(PathModifier::ReplaceFullPath(path.into())));
        assert_eq!(full("/one").path("/a/b", Some("/a")).as_deref(), Some("/one"));
        assert_eq!(full("/one").path("/a/b", None).as_deref(), Some("/one"));
        assert_eq!(full("").path("/a/b", None).as_deref(), Some("/"));
        assert_eq!(rewrite(None).path("/a/b", None), None);
    }

    #[test]
    fn redirects() {
        let check = |redirect: Redirect, authority: &str, url: (&str, u16, &str), expected: &str| {
            let (scheme, port, path) = url;
            let (path, query) =
                path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
            let headers = HeaderMap::new();
            let request =
                RequestHead { method: &Method::GET, host: "fallback", path, query, headers: &headers };
            let (status, location) = redirect.answer(&request, authority, scheme, port, Some("/a"));
            assert_eq!(format!("{} {}", status.as_u16(), location.to_str().unwrap()), expected);
        };
        let plain = || Redirect { status: StatusCode::FOUND, ..Redirect::default() };
        let http = |port: u16| ("http", port, "/a/b?c=d");
        // The request's own, and the port that was dialled, which http and https have each one not shown of.
        check(plain(), "web", http(80), "302 http://web/a/b?c=d");
        check(plain(), "web:80", http(80), "302 http://web/a/b?c=d");
        check(plain(), "web:8080", http(8080), "302 http://web:8080/a/b?c=d");
        check(plain(), "web:8080", http(80), "302 http://web/a/b?c=d");
        check(plain(), "web", ("http", 443, "/"), "302 http://web:443/");
        check(plain(), "web", ("https", 443, "/"), "302 https://web/");
        check(plain(), "[fd00::1]:80", http(80), "302 http://[fd00::1]/a/b?c=d");
        check(plain(), "[fd00::1]", http(81), "302 http://[fd00::1]:81/a/b?c=d");
        check(plain(), "", http(80), "302 http://fallback/a/b?c=d");
        // A scheme brings its port along.
        let https = || Redirect { scheme: Some("https".into()), ..plain() };
        check(https(), "web:8080", http(8080), "302 https://web/a/b?c=d");
        check(Redirect { port: Some(8443), ..https() }, "web", http(80), "302 https://web:8443/a/b?c=d");
        check(Redirect { port: Some(80), ..https() }, "web", http(80), "302 https://web:80/a/b?c=d");
        let to_http = Redirect { scheme: Some("http".into()), ..plain() };
        check(to_http, "web", ("https", 8443, "/"), "302 http://web/");
        check(Redirect { port: Some(80), ..plain() }, "web", http(8080), "302 http://web/a/b?c=d");
        // Host, status and path.
        let elsewhere = Redirect {
            hostname: Some("example.org".into()),
            status: StatusCode::MOVED_PERMANENTLY,
            ..Redirect::default()
        };
        check(elsewhere, "web:8080", http(8080), "301 http://example.org:8080/a/b?c=d");
        let path = |path: PathModifier| Redirect { path: Some(path), ..plain() };
        check(path(PathModifier::ReplaceFullPath("/x".into())), "web", http(80), "302 http://web/x?c=d");
        check(path(PathModifier::ReplacePrefixMatch("/x".into())), "web", http(80), "302 http://web/x/b?c=d");
        // What a client may send and a header may not hold.
        check(plain(), "web", ("http", 80, "/\u{e4}\r\nx: y"), "302 http://web/%C3%A4%0D%0Ax:%20y");
    }

    /// A path as its segments; the last is empty where it ends in a slash.
    fn segments(path: &str) -> Vec<&str> {
        path.split('/').skip(1).collect()
    }

    proptest! {
        /// What is not the prefix stays, segment for segment; what comes out is a path that a request can have; and one that never
        /// matched stays as it is.
        #[test]
        fn a_replaced_prefix_leaves_the_rest_of_the_path(
            matched in prop::collection::vec("[a-z%0-9.]{1,4}", 0..4),
            rest in prop::collection::vec("[a-z%0-9.]{0,3}", 0..4),
            replacement in prop::collection::vec("[a-z]{1,4}", 0..3),
            slashes: (bool, bool),
        ) {
            let join = |segments: &[String]| segments.iter().map(|it| format!("/{it}")).collect::<String>();
            let end = |path: String, slash| if slash || path.is_empty() { format!("{path}/") } else { path };
            let (prefix, new) = (end(join(&matched), slashes.0), end(join(&replacement), slashes.1));
            let path = format!("{}{}", join(&matched), join(&rest));
            let path = if path.is_empty() { "/".to_owned() } else { path };
            let modifier = PathModifier::ReplacePrefixMatch(new.as_str().into());
            let rewritten = UrlRewrite { hostname: None, path: Some(modifier) }.path(&path, Some(&prefix)).unwrap();
            let expected: Vec<&str> = replacement.iter().chain(&rest).map(String::as_str).collect();
            let expected = match expected.is_empty() {
                true => vec![""],
                // `/` itself has one segment, an empty one.
                false if matched.is_empty() && rest.is_empty() => [expected, vec![""]].concat(),
                false => expected,
            };
            prop_assert_eq!(segments(&rewritten), expected, "{} of {} by {}", prefix, path, new);
            prop_assert!(http::uri::PathAndQuery::try_from(rewritten.as_str()).is_ok_and(|it| it.path() == rewritten));
        }
    }
}

//! The heads of messages: what must hold for a request to be passed on at all, and what is meant for one hop alone.

use http::header::{
    CONNECTION, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, InvalidHeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Method, Request, Response, Uri, Version};
use hyper::ext::Protocol;

use super::talk::Dialect;

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Why a request is not passed on: what RFC 9112 has a server answer with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHead {
    /// RFC 9112, section 3.2; RFC 9113, section 8.3.1.
    #[error("a request must have exactly one Host, or an :authority")]
    Host,
    /// What names no authority.
    #[error("the Host is not a host with or without a port")]
    Authority,
    /// RFC 9113, section 8.3.1.
    #[error("the Host differs from the :authority")]
    TwoAuthorities,
    /// RFC 9112, section 3.2.3; RFC 9113, section 8.5.
    #[error("a CONNECT must ask for a host and a port and nothing else, which no other request may")]
    Target,
    /// RFC 9112, section 6.1: others may be framing to one reader and none to another.
    #[error("the Transfer-Encoding is not `chunked` alone")]
    Coding,
}

/// Who a request is for, if all who read it agree on that and on where it ends. Its `Host` says the same from then on, whatever came, for all
/// who look at headers: the application sees no other.
pub(super) fn read<B>(request: &mut Request<B>) -> Result<Option<Authority>, BadHead> {
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    let coding = codings.next();
    if codings.next().is_some() || coding.is_some_and(|it| !it.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(BadHead::Coding);
    }
    if !has_target_of_its_method(request) {
        return Err(BadHead::Target);
    }
    let authority = authority(request)?;
    if let Some(authority) = &authority {
        say_host(request.headers_mut(), authority).map_err(|_| BadHead::Authority)?;
    }
    if request.version() == Version::HTTP_2 {
        join_cookies(request.headers_mut());
    }
    Ok(authority)
}

/// Of cookies that HTTP/2 may bring in as many headers it makes the one that they are to everybody else (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<_> = headers.get_all(COOKIE).iter().collect();
    if crumbs.len() < 2 {
        return;
    }
    let bytes: Vec<_> = crumbs.iter().map(|crumb| crumb.as_bytes()).collect();
    // What can be sent in parts can be sent as a whole.
    let Ok(mut whole) = HeaderValue::try_from(bytes.join(&b"; "[..])) else { return };
    whole.set_sensitive(crumbs.iter().any(|crumb| crumb.is_sensitive()));
    headers.insert(COOKIE, whole);
}

/// Has the `Host` say so.
pub(super) fn say_host(headers: &mut HeaderMap, authority: &Authority) -> Result<(), InvalidHeaderValue> {
    if headers.get(HOST).is_none_or(|host| host != authority.as_str()) {
        headers.insert(HOST, HeaderValue::try_from(authority.as_str())?);
    }
    Ok(())
}

/// Whether CONNECT, and nothing else, asks for a host and a port: to whoever looks at its path it would be what it is not to a server. An
/// extended one (RFC 8441) has a path.
fn has_target_of_its_method<B>(request: &Request<B>) -> bool {
    let target = request.uri();
    let is_authority_alone = target.authority().is_some() && target.scheme().is_none();
    if request.method() != Method::CONNECT {
        return !is_authority_alone;
    }
    match protocol(request) {
        Some(_) => target.authority().is_some(),
        None => is_authority_alone && target.port_u16().is_some(),
    }
}

/// What an extended CONNECT asks for.
fn protocol<B>(request: &Request<B>) -> Option<&str> {
    request.extensions().get().map(Protocol::as_str)
}

/// Who a request is for: the target's authority, else its `Host`. None: HTTP/1.0 without one.
pub(super) fn authority<B>(request: &Request<B>) -> Result<Option<Authority>, BadHead> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let (host, another) = (hosts.next(), hosts.next());
    if another.is_some() {
        return Err(BadHead::Host);
    }
    let read = |host: &HeaderValue| Authority::try_from(host.as_bytes()).map_err(|_| BadHead::Authority);
    let found = match (request.uri().authority(), host) {
        // RFC 9112, section 3.2.2: that of the target counts, whatever the Host says; but in HTTP/2 both must agree.
        (Some(target), Some(host)) if request.version() == Version::HTTP_2 && read(host)? != *target => {
            return Err(BadHead::TwoAuthorities);
        }
        (Some(target), _) => Some(target.clone()),
        // A target that names nobody may have an empty Host, but in HTTP/2.
        (None, Some(host)) if host.is_empty() && request.version() != Version::HTTP_2 => None,
        (None, Some(host)) => Some(read(host)?),
        (None, None) if request.version() > Version::HTTP_10 => return Err(BadHead::Host),
        (None, None) => None,
    };
    match found {
        Some(authority) if !is_host(&authority) => Err(BadHead::Authority),
        found => Ok(found),
    }
}

/// Whether it is a host with or without a port, and has no user (RFC 9110, section 7.2; RFC 9113, section 8.3.1).
fn is_host(authority: &Authority) -> bool {
    let after = authority.as_str().strip_prefix(authority.host());
    after.is_some_and(|port| {
        port.is_empty()
            || port.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Takes out what is for this hop alone (RFC 9110, section 7.6.1). The way of an upgrade is left open.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap, keeps_upgrade: bool) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        // What frames or addresses the message is nobody's to name away, and `TE: trailers` asks for what we do pass on.
        if !is_framing(&name) && name != UPGRADE && name != TE {
            headers.remove(name);
        }
    }
    headers.remove(CONNECTION);
    headers.remove(&KEEP_ALIVE);
    headers.remove(&HTTP2_SETTINGS);
    headers.remove(&PROXY_CONNECTION);
    let mut codings = headers.get_all(TE).iter();
    if codings.next().is_some_and(|first| first != "trailers") || codings.next().is_some() {
        leave_trailers(headers);
    }
    if keeps_upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(UPGRADE);
    }
}

/// Of what the client takes for codings it leaves that it takes trailers.
fn leave_trailers(headers: &mut HeaderMap) {
    let codings = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    let takes_trailers =
        codings.flat_map(|value| value.split(',')).any(|it| it.trim().eq_ignore_ascii_case("trailers"));
    headers.remove(TE);
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

fn is_framing(name: &HeaderName) -> bool {
    *name == HOST || *name == TRANSFER_ENCODING || *name == http::header::CONTENT_LENGTH
}

/// Whether the request asks for another protocol on its connection. HTTP is none that could be asked for so: requests would travel in it
/// that nobody looks at.
pub(super) fn asks_for_upgrade<B>(request: &Request<B>) -> bool {
    let says = |value: &HeaderValue| {
        value
            .to_str()
            .is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade")))
    };
    request.method() == Method::CONNECT
        || request.version() == Version::HTTP_11
            && request.headers().contains_key(UPGRADE)
            && !request.headers().get_all(UPGRADE).iter().any(names_http)
            && request.headers().get_all(CONNECTION).iter().any(says)
}

/// Whether its connection, or its stream, is to carry anything at all, requests among it: CONNECT. One that says what it is to carry, and
/// not that it is HTTP, is to carry that.
pub(super) fn asks_for_tunnel<B>(request: &Request<B>) -> bool {
    request.method() == Method::CONNECT && protocol(request).is_none_or(is_http)
}

/// Whether an `Upgrade` names HTTP itself, or cannot be read.
fn names_http(upgrade: &HeaderValue) -> bool {
    upgrade.to_str().map_or(true, |value| value.split(',').any(is_http))
}

/// Whether the protocol is HTTP again: `h2c` and its drafts, `HTTP/2.0`; and `TLS/1.2`, in which HTTP goes on (RFC 2817).
fn is_http(protocol: &str) -> bool {
    let begins =
        |with: &str| protocol.trim().get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
    ["h2", "http", "tls"].into_iter().any(begins)
}

/// Whether the connection ends with this answer (RFC 9112, section 9.3).
pub(super) fn closes<B>(response: &Response<B>) -> bool {
    let mut options = response.headers().get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let says = |word: &str, value: &str| value.split(',').any(|it| it.trim().eq_ignore_ascii_case(word));
    match response.version() {
        Version::HTTP_10 => !options.any(|value| says("keep-alive", value)),
        _ => options.any(|value| says("close", value)),
    }
}

/// Whether the client sends its body only when it is told to.
pub(super) fn waits_to_go_on<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && request
            .headers()
            .get(EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Addresses a request as the upstream is to see it, with the authority as `Host`. The path is its own unless another one is given. Of
/// HTTP/1 the target stays a whole URL if it is one: it is for a proxy that the client has chosen, and others read it as well (RFC 9112,
/// section 3.2.2).
pub(super) fn aim<B>(
    request: &mut Request<B>,
    dialect: Dialect,
    authority: Option<&Authority>,
    path: Option<PathAndQuery>,
) -> Result<(), http::Error> {
    let target = request.uri();
    if request.method() == Method::CONNECT && path.is_none() {
        return Ok(());
    }
    let is_whole = dialect == Dialect::Http2 || target.scheme().is_some();
    if path.is_some() || is_whole && target.authority() != authority {
        let own_path = || target.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let builder = Uri::builder().path_and_query(path.unwrap_or_else(own_path));
        *request.uri_mut() = match authority.filter(|_| is_whole) {
            Some(authority) => {
                let scheme = target.scheme_str().unwrap_or("http");
                builder.scheme(scheme).authority(authority.clone()).build()?
            }
            None => builder.build()?,
        };
    }
    if let Some(authority) = authority {
        say_host(request.headers_mut(), authority)?;
    }
    Ok(())
}

/// Says of a request that it travels in TLS, where it says how it travels: in HTTP/2 (RFC 9113, section 8.3.1). What HTTP/1 tells a proxy
/// is how to go on from there.
pub(super) fn encrypted<B>(request: &mut Request<B>) {
    if request.version() == Version::HTTP_2 && request.uri().scheme().is_some() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(Scheme::HTTPS);
        // What had a scheme has all that one needs.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
}

/// A request with the same head and another body.
pub(super) fn copy<A, B>(request: &Request<A>, body: B) -> Request<B> {
    let mut copy = bare(request).map(|()| body);
    *copy.extensions_mut() = request.extensions().clone();
    copy
}

/// What the request's head says, and nothing else of it.
pub(super) fn bare<B>(request: &Request<B>) -> Request<()> {
    let mut copy = Request::new(());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, target: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().version(version).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn who_a_request_is_for() {
        use BadHead::{Authority as NoHost, Host, TwoAuthorities};
        let check = |version, target: &str, hosts: &[&str], expected: Result<Option<&str>, BadHead>| {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let found = authority(&request(version, target, &headers));
            let found = found.map(|found| found.map(|found| found.to_string()));
            assert_eq!(found, expected.map(|it| it.map(str::to_owned)), "{version:?} {target} {hosts:?}");
        };
        let (old, one, two) = (Version::HTTP_10, Version::HTTP_11, Version::HTTP_2);
        check(one, "/", &["a"], Ok(Some("a")));
        check(one, "/", &["a:80"], Ok(Some("a:80")));
        check(one, "/", &["[fd96::1]:80"], Ok(Some("[fd96::1]:80")));
        // A zone (RFC 6874) is the asker's own: it passes as it is, and is part of the name for whoever compares it.
        check(one, "/", &["[fe80::1%25eth0]:80"], Ok(Some("[fe80::1%25eth0]:80")));
        check(one, "http://[fe80::1%25eth0]/b", &["a"], Ok(Some("[fe80::1%25eth0]")));
        check(two, "http://[fe80::1%25eth0]/b", &["[fe80::1]"], Err(TwoAuthorities));
        check(one, "/", &["fe80::1%25eth0"], Err(NoHost));
        check(one, "/", &[], Err(Host));
        check(one, "/", &["a", "a"], Err(Host));
        check(one, "/", &["a b"], Err(NoHost));
        check(one, "/", &["a/b"], Err(NoHost));
        check(one, "/", &["a:"], Ok(Some("a:")));
        check(one, "/", &["a:x"], Err(NoHost));
        check(one, "/", &["a@b"], Err(NoHost));
        check(one, "/", &["b@b"], Err(NoHost));
        check(one, "http://a@b/", &["b"], Err(NoHost));
        check(one, "/", &[""], Ok(None));
        check(one, "http://a/b", &["other"], Ok(Some("a")));
        check(old, "/", &[], Ok(None));
        check(two, "/", &[], Err(Host));
        check(two, "/", &["a"], Ok(Some("a")));
        check(two, "/", &[""], Err(NoHost));
        check(old, "/", &["a"], Ok(Some("a")));
        check(two, "http://a/b", &[], Ok(Some("a")));
        check(two, "http://a/b", &["a"], Ok(Some("a")));
        check(two, "http://a/b", &["other"], Err(TwoAuthorities));
        check(two, "http://a@b/", &[], Err(NoHost));
    }

    #[test]
    fn the_host_says_whom_a_request_is_for_to_all_who_look() {
        let check = |version, target: &str, host: Option<&'static str>, expected: Option<&str>| {
            let mut request = request(version, target, &[]);
            request.headers_mut().extend(host.map(|host| (HOST, HeaderValue::from_static(host))));
            read(&mut request).unwrap();
            let found: Vec<_> = request.headers().get_all(HOST).iter().collect();
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{target} {host:?}");
        };
        let (old, one, two) = (Version::HTTP_10, Version::HTTP_11, Version::HTTP_2);
        check(one, "/", Some("A:80"), Some("A:80"));
        check(one, "http://admin/", Some("public"), Some("admin"));
        check(one, "http://admin/", Some(""), Some("admin"));
        check(one, "/", Some(""), Some(""));
        check(old, "http://admin/", None, Some("admin"));
        check(old, "/", None, None);
        check(two, "http://admin:8080/", None, Some("admin:8080"));
        check(two, "http://admin/", Some("ADMIN"), Some("admin"));
        check(two, "/", Some("admin"), Some("admin"));
    }

    #[test]
    fn cookies_are_one_header_to_all_who_look() {
        let check = |version, lines: &[&str], expected: &[&str]| {
            let mut headers = vec![("host", "a")];
            headers.extend(lines.iter().map(|line| ("cookie", *line)));
            let mut request = request(version, "/", &headers);
            read(&mut request).unwrap();
            let found: Vec<_> = request.headers().get_all(COOKIE).iter().collect();
            assert_eq!(found, expected, "{lines:?}");
        };
        check(Version::HTTP_2, &[], &[]);
        check(Version::HTTP_2, &["a=b; c=d"], &["a=b; c=d"]);
        check(Version::HTTP_2, &["a=b", "c=d", "e=f; g=h"], &["a=b; c=d; e=f; g=h"]);
        // Of other versions it is left as it came.
        check(Version::HTTP_11, &["a=b", "c=d"], &["a=b", "c=d"]);
    }

    #[test]
    fn a_connect_asks_for_a_host_and_a_port_and_nothing_else_does() {
        let check = |version, method: Method, target: &str, protocol: Option<&'static str>, expected| {
            let mut request = request(version, target, &[("host", "a")]);
            *request.method_mut() = method;
            if let Some(protocol) = protocol {
                request.extensions_mut().insert(Protocol::from_static(protocol));
            }
            let found = match read(&mut request) {
                Err(BadHead::Target) => "refused",
                _ if asks_for_tunnel(&request) => "a tunnel",
                _ => "a request",
            };
            assert_eq!(found, expected, "{request:?}");
        };
        let (one, two) = (Version::HTTP_11, Version::HTTP_2);
        check(one, Method::CONNECT, "a:443", None, "a tunnel");
        for target in ["/public", "*", "a", "http://a:443/", "http://a:443"] {
            check(one, Method::CONNECT, target, None, "refused");
        }
        check(one, Method::GET, "a:443", None, "refused");
        check(one, Method::GET, "a", None, "refused");
        check(one, Method::OPTIONS, "*", None, "a request");
        check(two, Method::CONNECT, "a:443", None, "a tunnel");
        check(two, Method::CONNECT, "/", None, "refused");
        check(two, Method::CONNECT, "http://a/chat", Some("websocket"), "a request");
        check(two, Method::CONNECT, "http://a/chat", Some("h2c"), "a tunnel");
        check(two, Method::CONNECT, "/chat", Some("websocket"), "refused");
    }

    #[test]
    fn nobody_upgrades_to_http_itself() {
        let check = |upgrades: &[&str], expected| {
            let mut headers = vec![("host", "a"), ("connection", "upgrade")];
            headers.extend(upgrades.iter().map(|upgrade| ("upgrade", *upgrade)));
            assert_eq!(asks_for_upgrade(&request(Version::HTTP_11, "/", &headers)), expected, "{upgrades:?}");
        };
        for upgrade in ["websocket", "WebSocket", "echo", "SPDY/3.1", "tcp", "connect-udp"] {
            check(&[upgrade], true);
        }
        for upgrade in
            ["h2c", "H2C", "h2", "h2c-14", "HTTP/2.0", "http/1.1", "http", "TLS/1.0", "TLS/1.2, HTTP/1.1"]
        {
            check(&[upgrade], false);
        }
        check(&["websocket, h2c"], false);
        check(&["websocket", " h2c"], false);
    }

    #[test]
    fn where_a_request_ends_is_said_in_one_way_alone() {
        let check = |codings: &[&str], expected| {
            let mut headers = vec![("host", "a")];
            headers.extend(codings.iter().map(|coding| ("transfer-encoding", *coding)));
            let found = read(&mut request(Version::HTTP_11, "/", &headers)).map(drop);
            assert_eq!(found, expected, "{codings:?}");
        };
        check(&[], Ok(()));
        check(&["chunked"], Ok(()));
        check(&["Chunked"], Ok(()));
        for codings in
            [&["gzip, chunked"][..], &["identity", "chunked"], &["chunked", "chunked"], &[",chunked"], &[""]]
        {
            check(codings, Err(BadHead::Coding));
        }
    }

    #[test]
    fn a_request_in_tls_says_so_where_it_says_how_it_travels() {
        for (target, expected) in [
            ("http://a:80/b?c", "https://a:80/b?c"),
            ("https://a/", "https://a/"),
            ("/b?c", "/b?c"),
            ("*", "*"),
            ("a:80", "a:80"),
        ] {
            let mut request = request(Version::HTTP_2, target, &[]);
            encrypted(&mut request);
            assert_eq!(request.uri().to_string(), expected);
        }
        let mut to_proxy = request(Version::HTTP_11, "http://a/", &[]);
        encrypted(&mut to_proxy);
        assert_eq!(to_proxy.uri().to_string(), "http://a/");
    }

    #[test]
    fn what_is_for_one_hop_goes_no_further() {
        let check = |headers: &[(&str, &str)], keeps_upgrade, expected: &[(&str, &str)]| {
            let mut left = request(Version::HTTP_11, "/", headers).into_parts().0.headers;
            strip_hop_by_hop(&mut left, keeps_upgrade);
            let left: Vec<_> =
                left.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
            assert_eq!(left, expected, "{headers:?}");
        };
        check(&[("accept", "a"), ("keep-alive", "5"), ("proxy-connection", "x")], false, &[("accept", "a")]);
        check(
            &[("connection", "x-mine, keep-alive"), ("x-mine", "1"), ("x-yours", "2")],
            false,
            &[("x-yours", "2")],
        );
        // Who asks for a proxy has not asked for this one.
        let proxied = [("proxy-authorization", "Basic YTpi"), ("proxy-authenticate", "Basic")];
        check(&proxied, false, &proxied);
        check(&[proxied[0], ("connection", "proxy-authorization")], false, &[]);
        check(&[("te", "trailers"), ("connection", "te")], false, &[("te", "trailers")]);
        check(&[("te", "gzip")], false, &[]);
        check(&[("te", "trailers"), ("te", "gzip")], false, &[("te", "trailers")]);
        check(&[("te", "gzip;q=0.5, Trailers")], false, &[("te", "trailers")]);
        check(&[("te", "gzip"), ("te", "deflate")], false, &[]);
        check(&[("upgrade", "h2c"), ("connection", "upgrade")], false, &[]);
        check(
            &[("upgrade", "websocket"), ("connection", "keep-alive, Upgrade")],
            true,
            &[("upgrade", "websocket"), ("connection", "upgrade")],
        );
        // Nobody names away what says where a message goes and where it ends.
        check(
            &[
                ("host", "a"),
                ("content-length", "5"),
                ("connection", "host, content-length, transfer-encoding"),
            ],
            false,
            &[("host", "a"), ("content-length", "5")],
        );
    }

    #[test]
    fn the_target_of_a_request_as_the_upstream_sees_it() {
        let check = |dialect,
                     method: Method,
                     target: &str,
                     path: Option<&'static str>,
                     expected: &str,
                     host: Option<&str>| {
            let mut request = request(Version::HTTP_11, target, &[("host", "old")]);
            *request.method_mut() = method;
            let authority = Authority::from_static("new:8080");
            let path = path.map(PathAndQuery::from_static);
            aim(&mut request, dialect, Some(&authority), path).unwrap();
            assert_eq!(request.uri().to_string(), expected);
            let headers = request.headers();
            assert_eq!(headers.get(HOST).map(|host| host.to_str().unwrap()), host, "{target}");
        };
        let (one, two) = (Dialect::Http1, Dialect::Http2);
        check(one, Method::GET, "/a?b", None, "/a?b", Some("new:8080"));
        check(one, Method::GET, "http://old/a?b", None, "http://new:8080/a?b", Some("new:8080"));
        check(one, Method::GET, "http://new:8080/a?b", None, "http://new:8080/a?b", Some("new:8080"));
        check(one, Method::GET, "https://old", Some("/c?d"), "https://new:8080/c?d", Some("new:8080"));
        check(one, Method::GET, "/a?b", Some("/c?d"), "/c?d", Some("new:8080"));
        check(one, Method::OPTIONS, "*", None, "*", Some("new:8080"));
        check(one, Method::CONNECT, "there:443", None, "there:443", Some("old"));
        check(two, Method::GET, "http://old/a?b", None, "http://new:8080/a?b", Some("new:8080"));
        check(two, Method::POST, "https://old/a", Some("/c"), "https://new:8080/c", Some("new:8080"));
        check(two, Method::GET, "/a", None, "http://new:8080/a", Some("new:8080"));
    }
}

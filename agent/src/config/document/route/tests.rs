//! What routes say, and what is wrong with how they say it.

use expect_test::{Expect, expect};
use http::HeaderName;

use super::*;
use crate::model::{SessionKind, SessionLifetime};
use crate::route::{HeaderMatch, PathMatch, Pattern, ValueMatch};

/// The rest of the spec of a route to the Service `web`.
fn read(kind: RouteKind, rest: &str) -> (Option<RouteSpec>, String) {
    let yaml = format!(
        "{{apiVersion: gateway.networking.k8s.io/v1, kind: {}, metadata: {{name: a, namespace: shop}}, \
         spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], {rest}}}}}",
        kind.as_str()
    );
    let object: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let mut problems = Vec::new();
    let route = Route::read(kind, &object, &mut problems).unwrap();
    assert_eq!(route.spec.is_some(), problems.is_empty(), "{yaml}: {problems:?}");
    let lines = problems.iter().map(|it| format!("{}: {}\n", it.field, it.message)).collect();
    (route.spec, lines)
}

fn http(rest: &str) -> RouteSpec {
    let (spec, problems) = read(RouteKind::Http, rest);
    spec.unwrap_or_else(|| panic!("{rest}: {problems}"))
}

fn refused(rest: &str, expected: Expect) {
    expected.assert_eq(&read(RouteKind::Http, rest).1);
}

/// Of one filter of a rule with the match of one prefix.
fn refused_filter(filter: &str, expected: Expect) {
    refused(&format!("rules: [{{filters: [{{{filter}}}]}}]"), expected);
}

#[test]
fn matches_of_http() {
    let spec = http(
        "hostnames: [Shop.test, '*.shop.test'], rules: [{name: one, matches: [
           {path: {type: Exact, value: /a}, method: GET},
           {path: {value: /b/}, headers: [{name: X-A, value: '1'}, {name: x-a, value: '2'}]},
           {path: {type: RegularExpression, value: '/c.*'}, queryParams: [{name: q, type: RegularExpression, value: 'a|b'}, {name: q, value: c}]},
           {headers: [{name: v, value: x}]}]}, {}]",
    );
    let hosts: Vec<_> = spec.hostnames.iter().map(ToString::to_string).collect();
    assert_eq!(hosts, ["shop.test", "*.shop.test"]);
    let [exact, prefix, pattern, any] = &spec.rules[0].matches[..] else { panic!("{spec:?}") };
    assert_eq!((&exact.path, &exact.method), (&PathMatch::Exact("/a".into()), &Some(http::Method::GET)));
    assert_eq!(prefix.path, PathMatch::prefix("/b"));
    // Of several with one name the first counts.
    let value = ValueMatch::Exact("1".into());
    assert_eq!(prefix.headers, [HeaderMatch { name: HeaderName::from_static("x-a"), value }]);
    assert_eq!(pattern.path, PathMatch::Regex(Pattern::new("/c.*").unwrap()));
    assert_eq!(pattern.query.len(), 1);
    assert_eq!(pattern.query[0].value, ValueMatch::Regex(Pattern::new("a|b").unwrap()));
    assert_eq!(any.path, PathMatch::default());
    assert_eq!(spec.rules[0].name.as_deref(), Some("one"));
    assert_eq!(spec.rules[1].matches, [Match::default()]);
    // As the API server fills it in.
    assert_eq!(http("").rules[0].matches, [Match::default()]);
}

#[test]
fn matches_of_grpc() {
    let (spec, problems) = read(
        RouteKind::Grpc,
        "rules: [{matches: [
           {method: {service: shop.Cart, method: Get}},
           {method: {service: shop.Cart}},
           {method: {method: Get}},
           {method: {type: RegularExpression, service: 'shop[.].*'}},
           {headers: [{name: v, value: x}]}]}]",
    );
    let matches = &spec.unwrap_or_else(|| panic!("{problems}")).rules[0].matches;
    let paths: Vec<_> = matches.iter().map(|it| it.path.clone()).collect();
    let expected = [
        PathMatch::Exact("/shop.Cart/Get".into()),
        PathMatch::prefix("/shop.Cart"),
        PathMatch::GrpcMethod("Get".into()),
        PathMatch::Regex(Pattern::grpc("shop[.].*", "").unwrap()),
        PathMatch::default(),
    ];
    assert_eq!(paths, expected);
    let refused = |rest: &str, expected: Expect| expected.assert_eq(&read(RouteKind::Grpc, rest).1);
    refused(
        "rules: [{matches: [{method: {}}, {method: {service: a/b}}, {method: {type: Regex, method: a}}, {path: {value: /}}], timeouts: {request: 1s}, retry: {}}]",
        expect![[r#"
            spec.rules[0].matches[3].path: there is no such field, or this version of Undermesh does not know it
            spec.rules[0].matches[0].method: expected a service, a method or both
            spec.rules[0].matches[1].method.service: expected a name of gRPC, without a /, found "a/b"
            spec.rules[0].matches[2].method.type: expected Exact or RegularExpression, found "Regex"
            spec.rules[0].timeouts: GRPCRoutes have no such field
            spec.rules[0].retry: GRPCRoutes have no such field
        "#]],
    );
    refused(
        "rules: [{filters: [{type: URLRewrite, urlRewrite: {hostname: a.test}}]}]",
        expect![[r#"
            spec.rules[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, RequestMirror; found "URLRewrite", which is not supported here
        "#]],
    );
}

#[test]
fn what_is_wrong_with_matches() {
    let matches = |text: &str| format!("rules: [{{matches: [{text}]}}]");
    refused(
        &matches(
            "{path: {value: a}}, {path: {value: /a//b}}, {path: {value: /a/../b}}, {path: {value: /a%2fb}}, \
             {path: {value: '/a?b'}}, {path: {type: Exact, value: '/\u{e4}'}}, {path: {type: Glob, value: /}}, \
             {path: {type: RegularExpression, value: '('}}",
        ),
        expect![[r#"
            spec.rules[0].matches[0].path.value: expected a path that begins with /, found "a"
            spec.rules[0].matches[1].path.value: expected a path without //, which no segment is between, found "/a//b"
            spec.rules[0].matches[2].path.value: expected a path without the segments . and .., which clients resolve, found "/a/../b"
            spec.rules[0].matches[3].path.value: expected a path without an encoded /, found "/a%2fb"
            spec.rules[0].matches[4].path.value: expected a path of visible ASCII characters, without a query and a fragment, found "/a?b"
            spec.rules[0].matches[5].path.value: expected a path of visible ASCII characters, without a query and a fragment, found "/ä"
            spec.rules[0].matches[6].path.type: expected Exact, PathPrefix or RegularExpression, found "Glob"
            spec.rules[0].matches[7].path.value: not a regular expression that can be used: unclosed group
        "#]],
    );
    refused(
        &matches(
            "{method: get}, {headers: [{name: 'a b', value: x}]}, {headers: [{name: a, type: Prefix, value: x}]}, \
             {queryParams: [{name: a, type: RegularExpression, value: '['}]}, {queryParam: []}",
        ),
        expect![[r#"
            spec.rules[0].matches[4].queryParam: there is no such field, or this version of Undermesh does not know it
            spec.rules[0].matches[0].method: expected a method such as GET or POST, found "get"
            spec.rules[0].matches[1].headers[0].name: expected the name of a header, found "a b"
            spec.rules[0].matches[2].headers[0].type: expected Exact or RegularExpression, found "Prefix"
            spec.rules[0].matches[3].queryParams[0].value: not a regular expression that can be used: unclosed character class
        "#]],
    );
}

#[test]
fn what_is_wrong_with_the_rest() {
    refused(
        "rules: []",
        expect![[r#"
        spec.rules: expected at least one rule
    "#]],
    );
    refused(
        "rules: 5",
        expect![[r#"
        spec.rules: expected a sequence, found integer `5`
    "#]],
    );
    refused(
        "hostnames: ['10.0.0.1', 'a:80', '*'], rules: [{name: a}, {name: a}]",
        expect![[r#"
            spec.hostnames[0]: expected a host name such as shop.example.com or *.example.com, without a port and not an address, found "10.0.0.1"
            spec.hostnames[1]: expected a host name such as shop.example.com or *.example.com, without a port and not an address, found "a:80"
            spec.hostnames[2]: expected a host name such as shop.example.com or *.example.com, without a port and not an address, found "*"
            spec.rules[1].name: expected each name once, found "a" again
        "#]],
    );
    refused(
        "rules: [{backendRefs: [{name: web, port: 70000}, {name: web, port: 80, weight: -1}, {name: '', port: 80}, {port: 80}]}]",
        expect![[r#"
            spec.rules[0].backendRefs[3]: missing field `name`
        "#]],
    );
    refused(
        "rules: [{backendRefs: [{name: web, port: 70000}, {name: web, port: 80, weight: -1}, {name: '', port: 80}]}]",
        expect![[r#"
            spec.rules[0].backendRefs[0].port: expected a port from 1 to 65535, found 70000
            spec.rules[0].backendRefs[1].weight: expected 0 to 1000000, found -1
            spec.rules[0].backendRefs[2].name: expected the name of a Service
        "#]],
    );
    refused(
        "rules: [{timeouts: {request: 1s, backendRequest: 2s}}, {timeouts: {request: '1.5s', idle: 1s}}, \
         {retry: {codes: [200, 503], attempts: 0, backoff: fast}}]",
        expect![[r#"
            spec.rules[1].timeouts.idle: there is no such field, or this version of Undermesh does not know it
            spec.rules[0].timeouts.backendRequest: expected no longer than the timeout of the whole request
            spec.rules[1].timeouts.request: expected a duration such as 500ms, 10s or 1h30m, found "1.5s"
            spec.rules[2].retry.codes[0]: expected 400 to 599, found 200
            spec.rules[2].retry.attempts: expected 1 to 2147483647, found 0
            spec.rules[2].retry.backoff: expected a duration such as 500ms, 10s or 1h30m, found "fast"
        "#]],
    );
    refused(
        "rules: [{sessionPersistence: {type: Cookie, sessionName: 'a b'}}, {sessionPersistence: {type: Token}}, \
         {sessionPersistence: {cookieConfig: {lifetimeType: Permanent}}}, \
         {sessionPersistence: {type: Header, cookieConfig: {lifetimeType: Session}}}]",
        expect![[r#"
            spec.rules[0].sessionPersistence.sessionName: expected a name that a cookie or header may have, found "a b"
            spec.rules[1].sessionPersistence.type: expected Cookie or Header, found "Token"
            spec.rules[2].sessionPersistence.absoluteTimeout: expected a duration, for a cookie that is Permanent lasts so long
            spec.rules[3].sessionPersistence.cookieConfig: expected nothing about a cookie where a header carries the session
        "#]],
    );
}

#[test]
fn timeouts_retries_and_sessions() {
    let spec = http(
        "rules: [{timeouts: {request: 0s, backendRequest: 500ms}, retry: {codes: [503], attempts: 3, backoff: 10ms}, \
         sessionPersistence: {cookieConfig: {lifetimeType: Permanent}, absoluteTimeout: 1h}}, {retry: {}}]",
    );
    let rule = &spec.rules[0];
    let milliseconds = std::time::Duration::from_millis;
    // A zero switches it off, and is not the same as nothing.
    let (request, backend_request) = (TimeLimit::Never, TimeLimit::After(milliseconds(500)));
    assert_eq!(rule.timeouts, Timeouts { request, backend_request });
    assert_eq!(spec.rules[1].timeouts.request, TimeLimit::Unsaid);
    let codes = vec![StatusCode::SERVICE_UNAVAILABLE];
    assert_eq!(rule.retry, Some(Retry { codes, attempts: 3, backoff: Some(milliseconds(10)) }));
    let session = rule.session.as_ref().unwrap();
    assert_eq!((&*session.name, session.kind), ("undermesh-shop-a-0", SessionKind::Cookie));
    assert_eq!(
        (session.lifetime, session.absolute_timeout),
        (SessionLifetime::Permanent, Some(milliseconds(3_600_000)))
    );
    assert_eq!(spec.rules[1].retry, Some(Retry { codes: Vec::new(), attempts: 1, backoff: None }));
}

#[test]
fn filters() {
    let spec = http(
        "rules: [{filters: [
           {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: b}], remove: [C]}},
           {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: d, value: e}]}},
           {type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}, percent: 5}},
           {type: RequestMirror, requestMirror: {backendRef: {name: far, namespace: bank, port: 80}, fraction: {numerator: 1, denominator: 3}}},
           {type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}}},
           {type: URLRewrite, urlRewrite: {hostname: a.test, path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}},
           {type: CORS, cors: {allowOrigins: ['https://*.a.test'], allowMethods: ['*'], allowHeaders: [X-A], maxAge: 9}}],
           backendRefs: [{name: web, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: v, value: w}]}}]}]},
         {filters: [{type: RequestRedirect, requestRedirect: {scheme: https, port: 8443, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /y}}}]}]",
    );
    let RuleFilters { plain, mirrors } = &spec.rules[0].filters;
    let shares: Vec<_> = mirrors.iter().map(|(to, share)| (to.id.to_string(), *share)).collect();
    let share = |name: &str, share| (name.to_owned(), share);
    assert_eq!(shares, [share("shop/web", (5, 100)), share("bank/far", (1, 3)), share("shop/web", (1, 1))]);
    expect![[r#"
        HeaderModifier { set: [("a", "b")], add: [], remove: ["c"] }
        HeaderModifier { set: [], add: [("d", "e")], remove: [] }
        UrlRewrite { hostname: Some("a.test"), path: Some(ReplacePrefixMatch("/x")) }
        Cors { allow_origins: [Some { scheme: "https", host: "*.a.test", port: Some(443) }], allow_credentials: false, allow_methods: Any, allow_headers: These(["x-a"]), expose_headers: These([]), max_age: 9 }
        HeaderModifier { set: [("v", "w")], add: [], remove: [] }
        Redirect { scheme: Some("https"), hostname: None, port: Some(8443), path: Some(ReplaceFullPath("/y")), status: 308 }
    "#]]
    .assert_eq(&format!(
        "{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n",
        plain.request_headers.as_ref().unwrap(),
        plain.response_headers.as_ref().unwrap(),
        plain.rewrite.as_ref().unwrap(),
        plain.cors.as_ref().unwrap(),
        spec.rules[0].backends[0].filters.plain.request_headers.as_ref().unwrap(),
        spec.rules[1].filters.plain.redirect.as_ref().unwrap(),
    ));
}

#[test]
fn what_is_wrong_with_filters() {
    refused_filter(
        "type: ExtensionRef, extensionRef: {group: a.test, kind: B, name: c}",
        expect![[r#"
            spec.rules[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS; found "ExtensionRef", which is not supported here
        "#]],
    );
    refused_filter(
        "type: CORS, cors: {allowOrigins: ['a.test'], allowMethods: [get], maxAge: 0}, urlRewrite: {}",
        expect![[r#"
            spec.rules[0].filters[0].urlRewrite: expected nothing but cors in a filter of this type
            spec.rules[0].filters[0].cors.allowMethods[0]: expected a method such as GET or POST, found "get"
            spec.rules[0].filters[0].cors.allowOrigins[0]: expected * or an origin such as https://shop.example.com or https://*.example.com, found "a.test"
            spec.rules[0].filters[0].cors.maxAge: expected 1 to 2147483647, found 0
        "#]],
    );
    refused_filter(
        "type: URLRewrite",
        expect![[r#"
        spec.rules[0].filters[0]: expected urlRewrite in a filter of this type
    "#]],
    );
    refused_filter(
        "type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}, {name: host, value: c}, {name: ':path', value: d}], add: [{name: A, value: e}, {name: x, value: \"a\\nb\"}], remove: [content-length]}",
        expect![[r#"
            spec.rules[0].filters[0].requestHeaderModifier.set[1].name: expected a header other than host, which a URLRewrite filter's hostname changes
            spec.rules[0].filters[0].requestHeaderModifier.set[2].name: expected the name of a header, found ":path"
            spec.rules[0].filters[0].requestHeaderModifier.add[0].name: expected each header once, found a again
            spec.rules[0].filters[0].requestHeaderModifier.add[1].value: expected a value that a header may have, found "a\nb"
            spec.rules[0].filters[0].requestHeaderModifier.remove[0]: expected a header other than content-length, which belongs to the connection
        "#]],
    );
    refused_filter(
        "type: RequestRedirect, requestRedirect: {scheme: ftp, hostname: '*.a.test', statusCode: 304, path: {type: ReplaceFullPath, replacePrefixMatch: /a}}",
        expect![[r#"
            spec.rules[0].filters[0].requestRedirect.scheme: expected http or https, found "ftp"
            spec.rules[0].filters[0].requestRedirect.statusCode: expected 301, 302, 303, 307 or 308, found 304
            spec.rules[0].filters[0].requestRedirect.hostname: expected a host name without a wildcard and a port, found "*.a.test"
            spec.rules[0].filters[0].requestRedirect.path.replacePrefixMatch: expected nothing but replaceFullPath for this type
            spec.rules[0].filters[0].requestRedirect.path: expected replaceFullPath for this type
        "#]],
    );
    refused_filter(
        "type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}, percent: 5, fraction: {numerator: 1}}",
        expect![[r#"
            spec.rules[0].filters[0].requestMirror: expected either percent or fraction, found both
        "#]],
    );
    refused_filter(
        "type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}, fraction: {numerator: 2, denominator: 1}}",
        expect![[r#"
            spec.rules[0].filters[0].requestMirror.fraction.numerator: expected 0 to 1, found 2
        "#]],
    );
    let redirect = "{type: RequestRedirect, requestRedirect: {}}";
    let rewrite = "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}";
    refused(
        &format!(
            "rules: [{{filters: [{redirect}, {rewrite}, {redirect}], backendRefs: [{{name: web, port: 80}}], matches: [{{path: {{type: Exact, value: /}}}}]}}]"
        ),
        expect![[r#"
            spec.rules[0].filters[2]: expected one filter of the type RequestRedirect, found another
            spec.rules[0].filters: expected either a RequestRedirect or a URLRewrite filter, found both
            spec.rules[0].filters: expected exactly one match of the rule, with a PathPrefix, where its prefix is replaced
            spec.rules[0].backendRefs: expected no backends beside a RequestRedirect filter, which answers by itself
        "#]],
    );
}

/// Where they would do nothing they are refused.
#[test]
fn filters_that_are_for_another_place() {
    let mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}}}";
    let redirect = "{type: RequestRedirect, requestRedirect: {}}";
    let cors = "{type: CORS, cors: {allowOrigins: ['*']}}";
    refused(
        &format!(
            "rules: [{{backendRefs: [{{name: web, port: 80, filters: [{mirror}, {redirect}, {cors}]}}]}}]"
        ),
        expect![[r#"
            spec.rules[0].backendRefs[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, URLRewrite; found "RequestMirror", which is not supported here
            spec.rules[0].backendRefs[0].filters[1].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, URLRewrite; found "RequestRedirect", which is not supported here
            spec.rules[0].backendRefs[0].filters[2].type: expected one of RequestHeaderModifier, ResponseHeaderModifier, URLRewrite; found "CORS", which is not supported here
        "#]],
    );
    refused(
        &format!("rules: [{{filters: [{redirect}, {mirror}]}}]"),
        expect![[r#"
        spec.rules[0].filters: expected either a RequestRedirect filter or copies by RequestMirror, found both
    "#]],
    );
    let (_, problems) = read(
        RouteKind::Grpc,
        &format!("rules: [{{backendRefs: [{{name: web, port: 80, filters: [{mirror}]}}]}}]"),
    );
    expect![[r#"
        spec.rules[0].backendRefs[0].filters[0].type: expected one of RequestHeaderModifier, ResponseHeaderModifier; found "RequestMirror", which is not supported here
    "#]].assert_eq(&problems);
}

#[test]
fn what_is_wrong_with_routes_of_connections() {
    let refused = |kind: RouteKind, rest: &str, expected: Expect| expected.assert_eq(&read(kind, rest).1);
    refused(
        RouteKind::Tcp,
        "hostnames: [a.test], rules: [{backendRefs: [{name: web, port: 80, filters: []}], matches: []}, {}]",
        expect![[r#"
            spec.rules[0].matches: there is no such field, or this version of Undermesh does not know it
            spec.hostnames: TCPRoutes have no such field
            spec.rules[0].backendRefs[0].filters: TCPRoutes have no such field
            spec.rules[1].backendRefs: expected at least one backend
            spec.rules: expected one rule, for nothing chooses among several, found 2
        "#]],
    );
    refused(
        RouteKind::Tls,
        "hostnames: ['10.0.0.1']",
        expect![[r#"
            spec.rules: expected one rule, for nothing chooses among several, found 0
            spec.hostnames[0]: expected a host name such as shop.example.com or *.example.com, without a port and not an address, found "10.0.0.1"
        "#]],
    );
}

#[test]
fn unknown_fields_beside_the_spec() {
    let object = serde_json::json!({"kind": "HTTPRoute", "metadata": {"name": "a"}, "spce": {}, "status": {"x": 1},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}]}});
    let mut problems = Vec::new();
    let route = Route::read(RouteKind::Http, &object, &mut problems).unwrap();
    assert_eq!((route.spec, route.id.to_string()), (None, "HTTPRoute default/a".to_owned()));
    assert_eq!(problems[0].field.to_string(), "spce");
    // A parent that is lost to a misspelt field is no gateway.
    let object = serde_json::json!({"metadata": {"name": "a"}, "spec": {"parentRef": []}});
    Route::read(RouteKind::Http, &object, &mut problems).unwrap();
    assert_eq!(problems[1].field.to_string(), "spec.parentRef");
    // Without a name there is no telling which it is.
    let nameless = serde_json::json!({"metadata": {"name": 5}});
    let problem = Route::read(RouteKind::Http, &nameless, &mut problems).unwrap_err();
    assert_eq!(problem.field.to_string(), "metadata.name");
}

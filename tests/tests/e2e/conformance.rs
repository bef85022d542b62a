//! The mesh conformance cases of the Gateway API, case by case under their names, through the real binary and the kernel: what
//! `conformance/tests/mesh` of the Gateway API asks of a mesh, but for the shares of weights and the routes of consumers, which
//! are in [`crate::routes`].

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Pod, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{SHOP, SOON};
use crate::routes::{GRPC, Stage, ask_from, backend, on_echo, prefix, service, service_port};

/// Routes of a kind in a namespace.
type Routes = Vec<(&'static str, &'static str, Value)>;

/// What a request is answered.
struct Case {
    what: &'static str,
    service: &'static str,
    path: &'static str,
    args: &'static [&'static str],
    expected: Expected,
}

enum Expected {
    /// By this server, with the target that it saw.
    From(&'static str, &'static str),
    /// By any server, and what it saw has these headers; an empty value: it has no such header.
    Saw(&'static [(&'static str, &'static str)]),
    /// With this status and these headers; an empty value: there is no such header.
    Answer(u64, &'static [(&'static str, &'static str)]),
}

impl Case {
    fn check(&self, client: &Pod) -> Result<()> {
        let asked = ask_from(client, self.service, self.path, self.args)?;
        match &self.expected {
            Expected::From(server, target) => {
                let saw = asked.saw()?;
                let target_seen = saw["target"].as_str().unwrap_or_default();
                let path_seen = target_seen
                    .strip_prefix("http://")
                    .map_or(target_seen, |rest| &rest[rest.find('/').unwrap_or(0)..]);
                ensure!(saw["server"] == *server && path_seen == *target, "{saw}");
            }
            Expected::Saw(headers) => {
                let saw = asked.saw()?;
                for (name, value) in *headers {
                    let all = saw["headers"][*name]
                        .as_array()
                        .map(|all| all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","));
                    ensure!(all.as_deref().unwrap_or_default() == *value, "{name}: {saw}");
                }
            }
            Expected::Answer(status, headers) => {
                let answer = asked.answered(*status)?;
                for (name, value) in *headers {
                    ensure!(
                        answer["headers"][*name].as_str().unwrap_or_default() == *value,
                        "{name}: {answer}"
                    );
                }
            }
        }
        Ok(())
    }
}

use Expected::{Answer, From, Saw};

const fn case(
    what: &'static str,
    path: &'static str,
    args: &'static [&'static str],
    expected: Expected,
) -> Case {
    Case { what, service: "echo", path, args, expected }
}

/// Under the name of each case of the suite: the routes, and what requests are then answered.
fn suite() -> Vec<(&'static str, Routes, Vec<Case>)> {
    let redirect = |path: &str, filter: Value| json!({ "matches": [prefix(path)], "filters": [{ "type": "RequestRedirect", "requestRedirect": filter }] });
    let request_headers = json!({
        "set": [{ "name": "X-Set", "value": "new" }],
        "add": [{ "name": "X-Add", "value": "more" }],
        "remove": ["X-Remove"],
    });
    let response_header = |value: &str| json!([{ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": [{ "name": "X-Set", "value": value }] } }]);
    let modified: &'static [&'static str] = &[
        "--header",
        "x-set: old",
        "--header",
        "x-add: some",
        "--header",
        "x-remove: this",
        "--header",
        "x-other: stays",
    ];
    let seen: &'static [(&'static str, &'static str)] =
        &[("x-set", "new"), ("x-add", "some,more"), ("x-remove", ""), ("x-other", "stays")];
    vec![
        (
            "MeshHTTPRouteSimpleSameNamespace",
            on_echo(json!([{ "backendRefs": [backend("echo-v1")] }])),
            vec![case("all of it", "/", &[], From("echo-v1", "/"))],
        ),
        (
            "MeshHTTPRouteMatching",
            on_echo(json!([
                { "matches": [prefix("/"), { "headers": [{ "name": "version", "value": "one" }] }], "backendRefs": [backend("echo-v1")] },
                { "matches": [prefix("/v2"), { "headers": [{ "name": "version", "value": "two" }] }], "backendRefs": [backend("echo-v2")] },
            ])),
            vec![
                case("no prefix", "/", &[], From("echo-v1", "/")),
                case("another path", "/example", &[], From("echo-v1", "/example")),
                case("a header", "/", &["--header", "Version: one"], From("echo-v1", "/")),
                case("the longer prefix", "/v2", &[], From("echo-v2", "/v2")),
                case("below the longer prefix", "/v2/example", &[], From("echo-v2", "/v2/example")),
                case("a header over the same path", "/", &["--header", "Version: two"], From("echo-v2", "/")),
                case("half a segment is none", "/v2example", &[], From("echo-v1", "/v2example")),
                case(
                    "another header",
                    "/foo/v2",
                    &["--header", "Version: three"],
                    From("echo-v1", "/foo/v2"),
                ),
            ],
        ),
        (
            "MeshHTTPRouteQueryParamMatching",
            on_echo(json!([
                { "matches": [{ "queryParams": [{ "name": "animal", "value": "whale" }] }], "backendRefs": [backend("echo-v1")] },
                { "matches": [{ "queryParams": [{ "name": "animal", "value": "dolphin" }] }], "backendRefs": [backend("echo-v2")] },
                { "matches": [{ "headers": [{ "name": "version", "value": "one" }], "queryParams": [{ "name": "animal", "value": "whale" }] }], "backendRefs": [backend("echo-v2")] },
                { "matches": [prefix("/path5")], "backendRefs": [backend("echo-v1")] },
                { "matches": [{ "queryParams": [{ "name": "animal", "value": "hydra" }] }], "backendRefs": [backend("echo-v2")] },
            ])),
            vec![
                case("one value", "/?animal=whale", &[], From("echo-v1", "/?animal=whale")),
                case("another value", "/?animal=dolphin", &[], From("echo-v2", "/?animal=dolphin")),
                case(
                    "among others",
                    "/?color=blue&animal=dolphin",
                    &[],
                    From("echo-v2", "/?color=blue&animal=dolphin"),
                ),
                case(
                    "with a header",
                    "/?animal=whale",
                    &["--header", "version: one"],
                    From("echo-v2", "/?animal=whale"),
                ),
                case(
                    "a longer path first",
                    "/path5?animal=hydra",
                    &[],
                    From("echo-v1", "/path5?animal=hydra"),
                ),
                case("no such value", "/?animal=shark", &[], Answer(404, &[])),
                case("none", "/", &[], Answer(404, &[])),
            ],
        ),
        (
            "MeshHTTPRouteNamedRule",
            on_echo(json!([
                { "name": "named-rule", "matches": [prefix("/named")], "backendRefs": [backend("echo-v1")] },
                { "matches": [prefix("/unnamed")], "backendRefs": [backend("echo-v2")] },
            ])),
            vec![
                case("named", "/named", &[], From("echo-v1", "/named")),
                case("unnamed", "/unnamed", &[], From("echo-v2", "/unnamed")),
            ],
        ),
        (
            "MeshHTTPRouteRequestHeaderModifier",
            on_echo(json!([{
                "filters": [{ "type": "RequestHeaderModifier", "requestHeaderModifier": request_headers }],
                "backendRefs": [backend("echo-v1")],
            }])),
            vec![
                case("set, add, remove", "/", modified, Saw(seen)),
                case("of what is not there", "/", &[], Saw(&[("x-set", "new"), ("x-add", "more")])),
            ],
        ),
        (
            "MeshHTTPRouteBackendRequestHeaderModifier",
            on_echo(json!([{ "backendRefs": [{
                "name": "echo-v1", "port": 8080,
                "filters": [{ "type": "RequestHeaderModifier", "requestHeaderModifier": request_headers }],
            }] }])),
            vec![case("set, add, remove", "/", modified, Saw(seen))],
        ),
        (
            "MeshHTTPRouteRedirectHostAndStatus",
            on_echo(json!([
                redirect("/host", json!({ "hostname": "example.org" })),
                redirect("/host-and-status", json!({ "hostname": "example.org", "statusCode": 301 })),
            ])),
            vec![
                case("the host", "/host", &[], Answer(302, &[("location", "http://example.org/host")])),
                case(
                    "and the status",
                    "/host-and-status",
                    &[],
                    Answer(301, &[("location", "http://example.org/host-and-status")]),
                ),
            ],
        ),
        (
            "MeshHTTPRouteRedirectPath",
            on_echo(json!([
                redirect(
                    "/prefix",
                    json!({ "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/new" } })
                ),
                redirect(
                    "/full",
                    json!({ "path": { "type": "ReplaceFullPath", "replaceFullPath": "/other" }, "statusCode": 301 })
                ),
            ])),
            vec![
                case("a prefix", "/prefix/lemon", &[], Answer(302, &[("location", "http://echo/new/lemon")])),
                case(
                    "the whole",
                    "/full/path/original",
                    &[],
                    Answer(301, &[("location", "http://echo/other")]),
                ),
            ],
        ),
        (
            "MeshHTTPRouteRedirectPort",
            on_echo(json!([
                redirect("/port", json!({ "port": 8083 })),
                redirect("/port-and-host", json!({ "port": 8083, "hostname": "example.org" })),
            ])),
            vec![
                case("the port", "/port", &[], Answer(302, &[("location", "http://echo:8083/port")])),
                case(
                    "and the host",
                    "/port-and-host",
                    &[],
                    Answer(302, &[("location", "http://example.org:8083/port-and-host")]),
                ),
            ],
        ),
        (
            "MeshHTTPRouteSchemeRedirect",
            on_echo(json!([
                redirect("/scheme", json!({ "scheme": "https" })),
                redirect(
                    "/scheme-and-host",
                    json!({ "scheme": "https", "hostname": "example.org", "statusCode": 301 })
                ),
            ])),
            vec![
                case("the scheme", "/scheme", &[], Answer(302, &[("location", "https://echo/scheme")])),
                case(
                    "and the host",
                    "/scheme-and-host",
                    &[],
                    Answer(301, &[("location", "https://example.org/scheme-and-host")]),
                ),
            ],
        ),
        (
            "MeshHTTPRoute303Redirect, 307, 308",
            on_echo(json!([
                redirect("/see-other", json!({ "hostname": "example.org", "statusCode": 303 })),
                redirect("/temporary", json!({ "hostname": "example.org", "statusCode": 307 })),
                redirect("/permanent", json!({ "hostname": "example.org", "statusCode": 308 })),
            ])),
            vec![
                case("303", "/see-other", &[], Answer(303, &[("location", "http://example.org/see-other")])),
                case("307", "/temporary", &[], Answer(307, &[("location", "http://example.org/temporary")])),
                case("308", "/permanent", &[], Answer(308, &[("location", "http://example.org/permanent")])),
            ],
        ),
        (
            "MeshHTTPRouteRewritePath",
            on_echo(json!([
                { "matches": [prefix("/prefix/one")], "backendRefs": [backend("echo-v1")],
                  "filters": [{ "type": "URLRewrite", "urlRewrite": { "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/one" } } }] },
                { "matches": [prefix("/strip")], "backendRefs": [backend("echo-v1")],
                  "filters": [{ "type": "URLRewrite", "urlRewrite": { "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/" } } }] },
                { "matches": [prefix("/full")], "backendRefs": [backend("echo-v1")],
                  "filters": [{ "type": "URLRewrite", "urlRewrite": { "hostname": "other.example", "path": { "type": "ReplaceFullPath", "replaceFullPath": "/one" } } }] },
            ])),
            vec![
                case("a prefix", "/prefix/one/two?a=b", &[], From("echo-v1", "/one/two?a=b")),
                case("to nothing", "/strip/three", &[], From("echo-v1", "/three")),
                case("all of it", "/strip", &[], From("echo-v1", "/")),
                case("the whole", "/full/one/two?a=b", &[], From("echo-v1", "/one?a=b")),
                case("the host", "/full", &[], Saw(&[("host", "other.example")])),
            ],
        ),
        (
            "MeshFrontend, MeshFrontendHostname",
            vec![(
                "HTTPRoute",
                SHOP,
                json!({ "parentRefs": [service("echo-v2")],
                "rules": [{ "filters": response_header("set"), "backendRefs": [{ "name": "echo-v2", "port": 80 }] }] }),
            )],
            vec![
                Case {
                    what: "the Service",
                    service: "echo-v2",
                    path: "/",
                    args: &[],
                    expected: Answer(200, &[("x-set", "set"), ("x-server", "echo-v2")]),
                },
                Case {
                    what: "its address, and another host",
                    service: "echo-v2",
                    path: "/",
                    args: &["--host", "echo-v1"],
                    expected: Answer(200, &[("x-set", "set")]),
                },
                Case {
                    what: "its host, and another address",
                    service: "echo-v1",
                    path: "/",
                    args: &["--host", "echo-v2"],
                    expected: Answer(200, &[("x-set", "")]),
                },
            ],
        ),
        (
            "MeshPorts",
            vec![
                (
                    "HTTPRoute",
                    SHOP,
                    json!({ "parentRefs": [service_port("echo-v1", 80)], "rules": [{ "filters": response_header("v1"), "backendRefs": [{ "name": "echo-v1", "port": 80 }] }] }),
                ),
                (
                    "HTTPRoute",
                    SHOP,
                    json!({ "parentRefs": [service("echo-v2")], "rules": [{ "filters": response_header("v2"), "backendRefs": [{ "name": "echo-v2", "port": 80 }] }] }),
                ),
            ],
            vec![
                Case {
                    what: "the port",
                    service: "echo-v1:80",
                    path: "/",
                    args: &[],
                    expected: Answer(200, &[("x-set", "v1")]),
                },
                Case {
                    what: "another port",
                    service: "echo-v1:8080",
                    path: "/",
                    args: &[],
                    expected: Answer(200, &[("x-set", "")]),
                },
                Case {
                    what: "every port",
                    service: "echo-v2:80",
                    path: "/",
                    args: &[],
                    expected: Answer(200, &[("x-set", "v2")]),
                },
                Case {
                    what: "every port indeed",
                    service: "echo-v2:8080",
                    path: "/",
                    args: &[],
                    expected: Answer(200, &[("x-set", "v2")]),
                },
            ],
        ),
        (
            "MeshGRPCRoute (methods and headers)",
            vec![(
                "GRPCRoute",
                SHOP,
                json!({ "parentRefs": [service_port("echo", 7070)], "rules": [
                { "matches": [{ "method": { "service": "shop.Cart", "method": "Add" } }], "backendRefs": [{ "name": "echo-v1", "port": 7070 }] },
                { "matches": [{ "method": { "service": "shop.Cart" } }], "backendRefs": [{ "name": "echo-v2", "port": 7070 }],
                  "filters": [{ "type": "RequestHeaderModifier", "requestHeaderModifier": { "set": [{ "name": "x-set", "value": "new" }] } }] },
            ] }),
            )],
            vec![
                Case {
                    what: "a method",
                    service: "echo:7070",
                    path: "/shop.Cart/Add",
                    args: GRPC,
                    expected: From("echo-v1", "/shop.Cart/Add"),
                },
                Case {
                    what: "a service",
                    service: "echo:7070",
                    path: "/shop.Cart/Take",
                    args: GRPC,
                    expected: From("echo-v2", "/shop.Cart/Take"),
                },
                Case {
                    what: "a header",
                    service: "echo:7070",
                    path: "/shop.Cart/Take",
                    args: GRPC,
                    expected: Saw(&[("x-set", "new"), ("te", "trailers")]),
                },
                Case {
                    what: "another service",
                    service: "echo:7070",
                    path: "/shop.Till/Open",
                    args: GRPC,
                    expected: Answer(200, &[("grpc-status", "12")]),
                },
            ],
        ),
    ]
}

#[test]
fn the_cases_of_the_conformance_suite() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-routes")?;
    for (name, routes, cases) in suite() {
        stage.route(&routes)?;
        for case in &cases {
            eventually(SOON, &format!("{name}: {}", case.what), || case.check(&stage.client))?;
        }
        stage.unroute(&routes)?;
    }
    // MeshBasic: with no route left, the Service goes to its own endpoints again.
    eventually(SOON, "MeshBasic", || {
        let served = stage.ask("echo", "/", &["--count", "40"])?.all(200)?;
        ensure!(served.len() == 2, "{served:?}");
        Ok(())
    })
}

//! What AuthorizationPolicies say, and what is wrong with how they say it.

use expect_test::{Expect, expect};

use super::*;
use crate::policy::authorization::Rule;

fn read(spec: &str) -> (AuthorizationPolicy, String) {
    let yaml = format!("{{metadata: {{name: a, namespace: shop}}, spec: {spec}}}");
    let object: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let mut problems = Vec::new();
    let policy = AuthorizationPolicy::read(&object, &mut problems).unwrap();
    assert_eq!(policy.policy.invalid.is_none(), problems.is_empty(), "{yaml}: {problems:?}");
    (policy, problems.iter().map(|problem| format!("{problem}\n")).collect())
}

fn refused(spec: &str, expected: Expect) {
    expected.assert_eq(&read(spec).1);
}

/// The rules of a policy that is well written.
fn rules(rules: &str) -> Vec<Rule> {
    let (policy, problems) = read(&format!("{{rules: {rules}}}"));
    assert_eq!(problems, "", "{rules}");
    policy.policy.rules.clone()
}

#[test]
fn what_is_not_said() {
    let (AuthorizationPolicy { key, attached, policy }, _) = read("{}");
    assert_eq!((key.to_string(), attached), ("AuthorizationPolicy shop/a".into(), Attachment::All));
    let Policy { name, action, dry_run, rules, invalid } = &*policy;
    assert_eq!((&**name, *action, *dry_run), ("AuthorizationPolicy shop/a", Action::Allow, false));
    assert_eq!((rules.len(), invalid), (0, &None));
    assert_eq!(self::rules("[{}]"), [Rule::default()]);
}

#[test]
fn all_that_can_be_said() {
    let (policy, _) =
        read("{action: Audit, dryRun: true, targetRefs: [{group: '', kind: Service, name: web}]}");
    assert_eq!((policy.policy.action, policy.policy.dry_run), (Action::Audit, true));
    let target = Target { index: 0, service: ObjectRef::new("shop", "web"), section: None };
    assert_eq!(policy.attached, Attachment::Services(vec![target]));
    let said = rules(
        "[{from: [{identities: ['*', spiffe://a.test/ns/b/sa/c, 'spiffe://a.test/*', '*/sa/c'], notIdentities: [spiffe://a.test/ns/b/sa/d],
            serviceAccounts: [web, bank/teller], notServiceAccounts: [x/y], namespaces: [shop, 'shop-*'], notNamespaces: [a],
            trustDomains: [a.test], notTrustDomains: ['*.test'], ipBlocks: [10.0.0.1/8, 'fd00::/8', 192.0.2.1], notIpBlocks: ['::1']}],
          to: [{ports: [80], notPorts: [81], methods: [GET, 'P*'], notMethods: [PUT], hosts: [WEB.shop, '*.shop:80'], notHosts: ['*'],
            paths: [/], notPaths: [/a], grpc: [{service: shop.v1.Orders, method: Get}, {service: shop.v1.Carts}]}],
          when: [{header: {name: X-User, values: ['*'], notValues: [root]}}, {claim: {path: [realm, roles], notValues: [guest]}}]}]",
    );
    expect![[r#"
        [
            Rule {
                from: [
                    Source {
                        identities: Matcher {
                            any_of: [
                                Present,
                                Exact(
                                    "spiffe://a.test/ns/b/sa/c",
                                ),
                                Prefix(
                                    "spiffe://a.test/",
                                ),
                                Suffix(
                                    "/sa/c",
                                ),
                            ],
                            none_of: [
                                Exact(
                                    "spiffe://a.test/ns/b/sa/d",
                                ),
                            ],
                        },
                        service_accounts: Matcher {
                            any_of: [
                                ServiceAccount {
                                    namespace: "shop",
                                    name: "web",
                                },
                                ServiceAccount {
                                    namespace: "bank",
                                    name: "teller",
                                },
                            ],
                            none_of: [
                                ServiceAccount {
                                    namespace: "x",
                                    name: "y",
                                },
                            ],
                        },
                        namespaces: Matcher {
                            any_of: [
                                Exact(
                                    "shop",
                                ),
                                Prefix(
                                    "shop-",
                                ),
                            ],
                            none_of: [
                                Exact(
                                    "a",
                                ),
                            ],
                        },
                        trust_domains: Matcher {
                            any_of: [
                                Exact(
                                    "a.test",
                                ),
                            ],
                            none_of: [
                                Suffix(
                                    ".test",
                                ),
                            ],
                        },
                        ip_blocks: Matcher {
                            any_of: [
                                10.0.0.0/8,
                                fd00::/8,
                                192.0.2.1/32,
                            ],
                            none_of: [
                                ::1/128,
                            ],
                        },
                    },
                ],
                to: [
                    Operation {
                        ports: Matcher {
                            any_of: [
                                80,
                            ],
                            none_of: [
                                81,
                            ],
                        },
                        methods: Matcher {
                            any_of: [
                                Exact(
                                    "GET",
                                ),
                                Prefix(
                                    "P",
                                ),
                            ],
                            none_of: [
                                Exact(
                                    "PUT",
                                ),
                            ],
                        },
                        paths: Matcher {
                            any_of: [
                                Exact(
                                    "/",
                                ),
                            ],
                            none_of: [
                                Exact(
                                    "/a",
                                ),
                            ],
                        },
                        hosts: Matcher {
                            any_of: [
                                Exact(
                                    "web.shop",
                                ),
                                Suffix(
                                    ".shop:80",
                                ),
                            ],
                            none_of: [
                                Present,
                            ],
                        },
                        grpc: [
                            GrpcMethod {
                                service: "shop.v1.Orders",
                                method: Some(
                                    "Get",
                                ),
                            },
                            GrpcMethod {
                                service: "shop.v1.Carts",
                                method: None,
                            },
                        ],
                    },
                ],
                when: [
                    Header {
                        name: "x-user",
                        values: Matcher {
                            any_of: [
                                Present,
                            ],
                            none_of: [
                                Exact(
                                    "root",
                                ),
                            ],
                        },
                    },
                    Claim {
                        path: [
                            "realm",
                            "roles",
                        ],
                        values: Matcher {
                            any_of: [],
                            none_of: [
                                Exact(
                                    "guest",
                                ),
                            ],
                        },
                    },
                ],
            },
        ]
    "#]]
    .assert_debug_eq(&said);
}

#[test]
fn paths() {
    let path = |text: &str| {
        let (policy, problems) = read(&format!("{{rules: [{{to: [{{paths: ['{text}']}}]}}]}}"));
        match policy.policy.rules.first().and_then(|rule| rule.to.first()?.paths.any_of.first()) {
            Some(path) => format!("{path:?}"),
            None => problems.trim_end().rsplit(": ").next().unwrap_or_default().to_owned(),
        }
    };
    let mut table = String::new();
    for text in [
        "/",
        "/a",
        "/a/",
        "/a/b.c",
        "/a*",
        "/a/*",
        "/*",
        "*",
        "*.php",
        "*/a",
        "*/",
        "*../a",
        "*//",
        "*//a",
        "*/a//b",
        "*/../a",
        "*a/./b",
        "*/..",
        "/a/{*}",
        "/a/{*}/b/{**}",
        "/{**}",
        "/%61",
        "",
        "a",
        "a*",
        "/a/*/b",
        "/*a",
        "**",
        "/a**",
        "*a*",
        "/a?b",
        "/a#b",
        "/a//b",
        "/a/./b",
        "/a/..",
        "/a/{**}/b",
        "/a/{*}b",
        "/a/{*}/*",
        "/{a}",
        "/a b",
        "/a\\b",
        "/%C3%A4%20",
        "/%c3%a4",
        "/ä",
        "/%2",
        "/%2F",
        "*{*}",
    ] {
        table += &format!("{text:?}: {}\n", path(text));
    }
    expect![[r#"
        "/": Exact("/")
        "/a": Exact("/a")
        "/a/": Exact("/a/")
        "/a/b.c": Exact("/a/b.c")
        "/a*": Prefix("/a")
        "/a/*": Prefix("/a/")
        "/*": Prefix("/")
        "*": Prefix("")
        "*.php": Suffix(".php")
        "*/a": Suffix("/a")
        "*/": Suffix("/")
        "*../a": Suffix("../a")
        "*//": it has //, which is / in requests by then
        "*//a": it has //, which is / in requests by then
        "*/a//b": it has //, which is / in requests by then
        "*/../a": it has a segment . or .., which requests have lost by then
        "*a/./b": it has a segment . or .., which requests have lost by then
        "*/..": it has a segment . or .., which requests have lost by then
        "/a/{*}": Template([Literal("a"), One])
        "/a/{*}/b/{**}": Template([Literal("a"), One, Literal("b"), Any])
        "/{**}": Template([Any])
        "/%61": requests have what needs no escape without one, and what needs one as %XX in upper case
        "": it does not begin with /
        "a": it does not begin with /
        "a*": it does not begin with /
        "/a/*/b": * is for its end, {*} for a segment
        "/*a": * is for its end, {*} for a segment
        "**": one * is all that may be there
        "/a**": * is for its end, {*} for a segment
        "*a*": one * is all that may be there
        "/a?b": the query is no part of it
        "/a#b": the query is no part of it
        "/a//b": it has //, which is / in requests by then
        "/a/./b": it has a segment . or .., which requests have lost by then
        "/a/..": it has a segment . or .., which requests have lost by then
        "/a/{**}/b": {**} is for the last segment
        "/a/{*}b": {*} and {**} are whole segments
        "/a/{*}/*": {*} and {**} are whole segments
        "/{a}": {*} and {**} are whole segments
        "/a b": requests have what needs no escape without one, and what needs one as %XX in upper case
        "/a\\b": requests have what needs no escape without one, and what needs one as %XX in upper case
        "/%C3%A4%20": Exact("/%C3%A4%20")
        "/%c3%a4": requests have what needs no escape without one, and what needs one as %XX in upper case
        "/ä": requests have what needs no escape without one, and what needs one as %XX in upper case
        "/%2": requests have what needs no escape without one, and what needs one as %XX in upper case
        "/%2F": Exact("/%2F")
        "*{*}": one * is all that may be there
    "#]]
    .assert_eq(&table);
}

#[test]
fn what_is_wrong_with_what_it_is_for() {
    refused(
        "{selector: {matchLabels: {a: b}}, targetRefs: [{group: '', kind: Service, name: a}]}",
        expect![[r#"
            spec: expected either a selector or targetRefs
        "#]],
    );
    refused(
        "{targetRefs: []}",
        expect![[r#"
        spec.targetRefs: expected 1 to 16 Services, found 0
    "#]],
    );
    refused(
        "{targetRefs: [{group: apps, kind: Deployment, name: a}, {group: '', kind: Service, name: b}, {group: '', kind: Service, name: b, sectionName: c}]}",
        expect![[r#"
            spec.targetRefs[2].sectionName: there is no such field, or this version of Undermesh does not know it
            spec.targetRefs[0]: expected a Service (group ""), found the kind "Deployment" of the group "apps"
            spec.targetRefs[2]: expected each target once
        "#]],
    );
    refused(
        "{selector: {}, action: deny, dryrun: true}",
        expect![[r#"
        spec.dryrun: there is no such field, or this version of Undermesh does not know it
        spec.selector: expected matchLabels or matchExpressions; without a selector all pods are meant
        spec.action: expected Allow, Deny or Audit, found "deny"
    "#]],
    );
    refused(
        "null",
        expect![[r#"
        spec: expected a map, found null
    "#]],
    );
    refused(
        "{dryRun: 'on', rules: {}}",
        expect![[r#"
        spec.dryRun: expected a boolean, found string "on"
    "#]],
    );
}

#[test]
fn what_is_wrong_with_rules() {
    refused(
        "{rules: [{form: []}, {from: [], to: [], when: []}, {from: [{}], to: [{}], when: [{}]}]}",
        expect![[r#"
            spec.rules[0].form: there is no such field, or this version of Undermesh does not know it
            spec.rules[1].from: expected at least one, or no such field
            spec.rules[1].to: expected at least one, or no such field
            spec.rules[1].when: expected at least one, or no such field
            spec.rules[2].from[0]: expected at least one field; without any it would mean everything
            spec.rules[2].to[0]: expected at least one field; without any it would mean everything
            spec.rules[2].when[0]: expected one of header, claim and expression
        "#]],
    );
    refused(
        "{rules: [{from: [{identities: [cluster.local/ns/a/sa/b, 'ns/*', '', 'a*b', spiffe://A/ns/b/sa/c],
            serviceAccounts: [a/b/c, '*', A], namespaces: [A, a.b], trustDomains: ['spiffe://a'], ipBlocks: [10.0.0.0/33, a, '::ffff:10.0.0.1'],
            notNamespaces: []}]}]}",
        expect![[r#"
            spec.rules[0].from[0].identities[0]: expected a SPIFFE id such as spiffe://cluster.local/ns/shop/sa/web, found "cluster.local/ns/a/sa/b": it does not begin with spiffe://
            spec.rules[0].from[0].identities[1]: expected a SPIFFE id such as spiffe://cluster.local/ns/shop/sa/web, found "ns/*": it does not begin with spiffe://
            spec.rules[0].from[0].identities[2]: expected a text, alone or with one * at its beginning or end, found ""
            spec.rules[0].from[0].identities[3]: expected a text, alone or with one * at its beginning or end, found "a*b"
            spec.rules[0].from[0].identities[4]: expected a SPIFFE id such as spiffe://cluster.local/ns/shop/sa/web, found "spiffe://A/ns/b/sa/c": the trust domain has a character other than a-z, 0-9, '.', '-' and '_'
            spec.rules[0].from[0].serviceAccounts[0]: expected a service account, as NAME or NAMESPACE/NAME, found "a/b/c"
            spec.rules[0].from[0].serviceAccounts[1]: expected a service account, as NAME or NAMESPACE/NAME, found "*"
            spec.rules[0].from[0].serviceAccounts[2]: expected a service account, as NAME or NAMESPACE/NAME, found "A"
            spec.rules[0].from[0].namespaces[0]: expected the name of a namespace, found "A"
            spec.rules[0].from[0].namespaces[1]: expected the name of a namespace, found "a.b"
            spec.rules[0].from[0].notNamespaces: expected at least one, or no such field
            spec.rules[0].from[0].trustDomains[0]: expected a trust domain, found "spiffe://a"
            spec.rules[0].from[0].ipBlocks[0]: expected addresses such as 10.0.0.0/8, fd00::/8 or 10.1.2.3, found "10.0.0.0/33"
            spec.rules[0].from[0].ipBlocks[1]: expected addresses such as 10.0.0.0/8, fd00::/8 or 10.1.2.3, found "a"
            spec.rules[0].from[0].ipBlocks[2]: expected addresses such as 10.0.0.0/8, fd00::/8 or 10.1.2.3, found "::ffff:10.0.0.1"
        "#]],
    );
    refused(
        "{rules: [{to: [{ports: [0, 65536], methods: [get], hosts: ['a b', 'http://a'], grpc: [{service: /a}, {service: a, method: '*'}]}]}]}",
        expect![[r#"
            spec.rules[0].to[0].ports[0]: expected a port from 1 to 65535, found 0
            spec.rules[0].to[0].ports[1]: expected a port from 1 to 65535, found 65536
            spec.rules[0].to[0].methods[0]: expected a method in upper case, found "get"
            spec.rules[0].to[0].hosts[0]: expected a host, found "a b"
            spec.rules[0].to[0].hosts[1]: expected a host, found "http://a"
            spec.rules[0].to[0].grpc[0].service: expected a service such as shop.v1.Orders, found "/a"
            spec.rules[0].to[0].grpc[1].method: expected the name of a method, found "*"
        "#]],
    );
    refused(
        "{rules: [{when: [{header: {name: 'a b', values: [a]}}, {header: {name: a}}, {header: {name: a, values: [a]}, claim: {path: [a], values: [a]}},
            {claim: {path: [], values: [a]}}, {claim: {path: ['']}}, {expression: 'request.colour == 1'}]}]}",
        expect![[r#"
            spec.rules[0].when[0].header.name: expected the name of a header, found "a b"
            spec.rules[0].when[1].header: expected values, notValues or both
            spec.rules[0].when[2]: expected one of header, claim and expression
            spec.rules[0].when[3].claim.path: expected 1 to 8 names, found []
            spec.rules[0].when[4].claim.path: expected 1 to 8 names, found [""]
            spec.rules[0].when[4].claim: expected values, notValues or both
            spec.rules[0].when[5].expression: the expression names request.colour; there is method, path, host, headers
        "#]],
    );
    refused(
        "{rules: [{when: [{header: {name: a, value: b}}]}]}",
        expect![[r#"
        spec.rules[0].when[0].header.value: there is no such field, or this version of Undermesh does not know it
        spec.rules[0].when[0].header: expected values, notValues or both
    "#]],
    );
}

#[test]
fn one_that_cannot_be_used_is_for_whom_it_is_written_for_and_dry_if_it_says_so() {
    let everywhere = Attachment::Pods(Selector::default());
    let target = Target { index: 0, service: ObjectRef::new("shop", "web"), section: None };
    let selector = read("{selector: {matchLabels: {app: web}}}").0.attached;
    let web = "selector: {matchLabels: {app: web}}";
    let service = "targetRefs: [{group: '', kind: Service, name: web}]";
    for (spec, attached, dry) in [
        ("{action: Block}".to_owned(), &Attachment::All, false),
        ("{rules: 5}".into(), &Attachment::All, false),
        (format!("{{{web}, action: Block, dryRun: true}}"), &selector, true),
        (format!("{{{web}, rules: 5, dryRun: true}}"), &selector, true),
        (format!("{{{web}, rules: 5, dryRun: 5}}"), &selector, false),
        (
            format!("{{{service}, rules: [{{to: [{{}}]}}]}}"),
            &Attachment::Services(vec![target.clone()]),
            false,
        ),
        (format!("{{{service}, rules: 5}}"), &Attachment::Services(vec![target]), false),
        (format!("{{{service}, {web}}}"), &everywhere, false),
        ("{selector: 5}".into(), &everywhere, false),
        ("{selector: {}, dryRun: true}".into(), &everywhere, true),
        ("{targetRefs: [{name: web}], rules: 5}".into(), &everywhere, false),
        ("5".into(), &everywhere, false),
    ] {
        let (read, problems) = read(&spec);
        assert_ne!(problems, "", "{spec}");
        assert_eq!((&read.attached, read.policy.dry_run), (attached, dry), "{spec}");
    }
}

/// A rule that has lost what it said would match everything.
#[test]
fn nothing_that_is_left_out_by_mistake_makes_a_rule_wider() {
    let whole = "{rules: [{from: [{namespaces: [a]}], to: [{ports: [1]}], when: [{header: {name: a, values: [b]}}]}]}";
    assert_eq!(read(whole).1, "");
    for field in ["from", "namespaces", "to", "ports", "when", "header", "values"] {
        let misspelt = whole.replace(&format!("{field}:"), &format!("{field}z:"));
        assert!(read(&misspelt).0.policy.invalid.is_some(), "{misspelt}");
        let list = |field: &str, value: &str| whole.replace(value, &format!("{field}: []"));
        for emptied in [
            list("namespaces", "namespaces: [a]"),
            list("ports", "ports: [1]"),
            list("values", "values: [b]"),
        ] {
            assert!(read(&emptied).0.policy.invalid.is_some(), "{emptied}");
        }
    }
}

#[test]
fn what_the_documentation_shows_is_read() {
    let page = include_str!("../../../../../docs/security.md");
    let examples: Vec<&str> =
        page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(examples.len() > 5, "{examples:?}");
    for example in examples {
        for object in serde_saphyr::from_multiple::<Value>(example).unwrap() {
            let mut problems = Vec::new();
            match object["kind"].as_str() {
                Some("AuthorizationPolicy") => {
                    drop(AuthorizationPolicy::read(&object, &mut problems).unwrap())
                }
                Some("MeshPolicy") => drop(super::super::MeshPolicy::read(&object, &mut problems).unwrap()),
                other => panic!("{other:?}: {example}"),
            }
            assert_eq!(problems, [], "{example}");
        }
    }
}

//! Requests and the rules that they find, as tables; and the index against a plain scan.

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use proptest::prelude::*;

use super::super::{
    Backend, Filters, HeaderMatch, Pattern, QueryMatch, RouteKind, RouteRef, Target, Timeouts, ValueMatch,
};
use super::*;
use crate::model::ObjectRef;

/// Routes of lines. `route NAME [CREATED] [HOSTNAME...]` begins one; each line after it is a rule of one match: a path (`=/a`
/// exact, `~/a.*` a pattern, `.a` a method of gRPC, else a prefix), then `GET`..., `name:value` of a header and `?name=value`
/// of the query.
fn routes(text: &str) -> Vec<RouteRules> {
    let mut routes: Vec<RouteRules> = Vec::new();
    let mut name = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.split(' ');
        if let Some(rest) = line.strip_prefix("route ") {
            let mut words = rest.split(' ').peekable();
            name = words.next().unwrap().to_owned();
            let created = words.next_if(|word| word.ends_with('Z')).map(|time| time.parse().unwrap());
            let hostnames = words.map(|host| Hostname::parse(host).unwrap()).collect();
            routes.push(RouteRules { hostnames, created, rules: Vec::new() });
            continue;
        }
        let path = words.next().unwrap();
        let mut matches = Match {
            path: match path.split_at(1) {
                ("=", path) => PathMatch::Exact(path.into()),
                ("~", pattern) => PathMatch::Regex(Pattern::new(pattern).unwrap()),
                (".", method) => PathMatch::GrpcMethod(method.into()),
                _ => PathMatch::prefix(path),
            },
            ..Match::default()
        };
        for word in words {
            if let Some((name, value)) = word.strip_prefix('?').and_then(|param| param.split_once('=')) {
                matches.query.push(QueryMatch { name: name.into(), value: ValueMatch::Exact(value.into()) });
            } else if let Some((name, value)) = word.split_once(':') {
                let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
                matches.headers.push(HeaderMatch { name, value: ValueMatch::Exact(value.into()) });
            } else {
                matches.method = Some(word.parse().unwrap());
            }
        }
        let rules = &mut routes.last_mut().unwrap().rules;
        let rule = rule(&name, rules.len());
        rules.push((vec![matches], rule));
    }
    routes
}

fn rule(route: &str, index: usize) -> Arc<Rule> {
    let (namespace, name) = route.split_once('/').unwrap_or(("shop", route));
    Arc::new(Rule {
        route: RouteRef { kind: RouteKind::Http, id: ObjectRef::new(namespace, name) },
        name: None,
        index,
        filters: Filters::default(),
        backends: Vec::new(),
        timeouts: Timeouts::default(),
        retry: None,
        session: None,
    })
}

/// Asks for `METHOD URL name:value...`; the answer is `route[rule]` and the prefix.
fn ask(table: &HttpTable, request: &str) -> String {
    let mut words = request.split(' ');
    let method: Method = words.next().unwrap().parse().unwrap();
    let (host, url) = words.next().unwrap().split_once('/').unwrap();
    let url = format!("/{url}");
    let (path, query) = url.split_once('?').map_or((&*url, None), |(path, query)| (path, Some(query)));
    let mut headers = HeaderMap::new();
    for (name, value) in words.map(|word| word.split_once(':').unwrap()) {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        headers.append(name, HeaderValue::from_str(value).unwrap());
    }
    let request = RequestHead { method: &method, host, path, query, headers: &headers };
    match table.find(&request) {
        None => "none".into(),
        Some(Matched { rule, prefix }) => {
            let prefix = prefix.map(|prefix| format!(" by {prefix}")).unwrap_or_default();
            format!("{}[{}]{prefix}", rule.route.id.name, rule.index)
        }
    }
}

fn check(text: &str, expected: &[(&str, &str)]) {
    // Whatever order the routes come in.
    let mut routes = routes(text);
    for _ in 0..2 {
        let table = HttpTable::new(routes.clone());
        for (request, expected) in expected {
            assert_eq!(ask(&table, request), *expected, "{request}\n{text}");
        }
        routes.reverse();
    }
}

#[test]
fn paths_by_precedence() {
    check(
        "
        route a
        /
        /shop
        =/shop/cart
        ~/shop/c.*
        /shop/cart/
        ~/shop/ca.*x
        ",
        &[
            ("GET h/", "a[0] by /"),
            ("GET h/shopping", "a[0] by /"),
            ("GET h/shop", "a[1] by /shop"),
            ("GET h/shop/", "a[1] by /shop"),
            ("GET h/shop/x", "a[1] by /shop"),
            ("GET h/shop/cart", "a[2]"),
            ("GET h/shop/cart/", "a[3]"),
            ("GET h/shop/cax", "a[5]"),
            ("GET h/x/shop/cart", "a[0] by /"),
        ],
    );
    check(
        "route a\n /shop\n =/",
        &[("GET h/", "a[1]"), ("GET h/x", "none"), ("GET h/shop", "a[0] by /shop")],
    );
}

#[test]
fn a_longer_prefix_that_does_not_fit_leaves_it_to_a_shorter_one() {
    check(
        "
        route a
        /a
        /a/b POST
        =/a/b/c version:2
        ",
        &[("GET h/a/b/c", "a[0] by /a"), ("POST h/a/b/c", "a[1] by /a/b"), ("GET h/a/b/c version:2", "a[2]")],
    );
}

#[test]
fn then_method_headers_and_query() {
    check(
        "
        route a
        /
        / ?q=1
        / ?q=1 ?r=2
        / v:1
        / v:1 w:2
        / v:1 ?q=1
        / POST
        / POST v:1
        ",
        &[
            ("GET h/", "a[0] by /"),
            ("GET h/?q=1", "a[1] by /"),
            ("GET h/?r=2&q=1", "a[2] by /"),
            ("GET h/?q=1&r=2 v:1", "a[5] by /"),
            ("GET h/ v:1", "a[3] by /"),
            ("GET h/?q=1&r=2 v:1 w:2", "a[4] by /"),
            ("POST h/?q=1&r=2 w:2", "a[6] by /"),
            ("POST h/?q=1&r=2 v:1 w:2", "a[7] by /"),
        ],
    );
}

#[test]
fn then_age_name_and_place() {
    check(
        "
        route b 2026-01-01T00:00:00Z
        /
        / x:1
        / x:1
        route a 2026-01-02T00:00:00Z
        /
        / x:1
        route unborn
        /
        / y:1
        ",
        &[("GET h/", "b[0] by /"), ("GET h/ x:1", "b[1] by /"), ("GET h/ y:1", "unborn[1] by /")],
    );
    check("route b\n /\n route a\n /", &[("GET h/", "a[0] by /")]);
    // The text `namespace/name` decides, in which `-` comes before `/`.
    check("route a/x\n /\n route a-b/y\n /", &[("GET h/", "y[0] by /")]);
}

#[test]
fn hostnames_come_first() {
    check(
        "
        route any
        =/a
        /only
        route wild *.test
        =/a
        route wilder *.shop.test
        /
        route exact www.shop.test b.test
        / x:1
        ",
        &[
            ("GET www.shop.test/a x:1", "exact[0] by /"),
            ("GET WWW.Shop.Test./a x:1", "exact[0] by /"),
            ("GET b.test/a x:1", "exact[0] by /"),
            // What none of the exact host's rules fits is left to the less specific ones.
            ("GET www.shop.test/a", "wilder[0] by /"),
            ("GET b.test/a", "wild[0]"),
            ("GET x.y.test/a", "wild[0]"),
            ("GET x.y.test/only/x", "any[1] by /only"),
            ("GET test/a", "any[0]"),
            ("GET shop/a", "any[0]"),
            ("GET shop/b", "none"),
        ],
    );
    check("route a a.test\n /", &[("GET a.test/", "a[0] by /"), ("GET b.test/", "none"), ("GET /", "none")]);
}

#[test]
fn grpc() {
    check(
        "
        route a
        /
        .Get
        .List x:1
        /shop.Cart
        =/shop.Cart/Get
        ~/bank[.].*/Get
        / x:1
        ",
        &[
            ("POST h/shop.Cart/Get", "a[4]"),
            ("POST h/shop.Cart/Add", "a[3] by /shop.Cart"),
            ("POST h/shop.Other/Get", "a[1]"),
            ("POST h/bank.Account/Get", "a[5]"),
            ("POST h/bank.Account/Set", "a[0] by /"),
            ("POST h/bank.Account/List x:1", "a[2]"),
            ("POST h/bank.Account/Set x:1", "a[6] by /"),
        ],
    );
}

#[test]
fn a_rule_of_several_matches_is_reached_by_each() {
    let matches = ["/a", "/b"].map(|path| Match { path: PathMatch::prefix(path), ..Match::default() });
    let rules = vec![(matches.into(), rule("a", 0)), (Vec::new(), rule("a", 1))];
    let table = HttpTable::new([RouteRules { hostnames: Vec::new(), created: None, rules }]);
    assert_eq!(ask(&table, "GET h/a/x"), "a[0] by /a");
    assert_eq!(ask(&table, "GET h/b"), "a[0] by /b");
    assert_eq!(ask(&table, "GET h/c"), "none");
}

#[test]
fn many_rules_cost_what_one_costs() {
    let steps = |count: usize, path: &str| {
        let exact = |number| PathMatch::Exact(format!("/exact-{number:05}/x").into());
        let prefix = |number| PathMatch::prefix(&format!("/prefix-{number:05}/x"));
        let paths = (0..count).flat_map(|number| [exact(number), prefix(number)]);
        let rules = paths.enumerate().map(|(index, path)| {
            (vec![Match { path, ..Match::default() }], rule(&format!("shop/r-{index}"), index))
        });
        let hostnames = vec![Hostname::parse("*.shop.test").unwrap(), Hostname::parse("shop").unwrap()];
        let table = HttpTable::new([RouteRules { hostnames, created: None, rules: rules.collect() }]);
        let headers = HeaderMap::new();
        let mut steps = 0;
        let request =
            RequestHead { method: &Method::GET, host: "a.shop.test", path, query: None, headers: &headers };
        let found = table.search(&request, &mut steps).is_some();
        assert_eq!(found, path.contains('0'), "{path}");
        steps
    };
    let deep = "/x".repeat(10_000);
    for path in ["/exact-00000/x", "/prefix-00000/x/y/z", "/nothing/of/it", &deep] {
        let (one, many) = (steps(1, path), steps(10_000, path));
        assert_eq!(one, many, "{path}");
        assert!(many < 10, "{path}: {many}");
    }
}

#[test]
fn weights() {
    let rule = |weights: &[u32]| {
        let backend = |(port, &weight): (u16, &u32)| Backend {
            weight,
            target: Target::Service { id: ObjectRef::new("shop", "web"), port },
            filters: Filters::default(),
        };
        Rule { backends: (0..).zip(weights).map(backend).collect(), ..(*rule("a", 0)).clone() }
    };
    let check = |weights: &[u32], expected: &[u32]| {
        // Random bits that are spread evenly, so that a share is exact to one in so many.
        const ASKED: u64 = 100_000;
        let rule = rule(weights);
        let mut counts = vec![0_u32; weights.len()];
        for number in 0..ASKED {
            if let Some(backend) = rule.backend(number * (u64::MAX / ASKED) + 1) {
                let Target::Service { port, .. } = backend.target else { panic!("{backend:?}") };
                counts[usize::from(port)] += 1;
            }
        }
        let close = counts.iter().zip(expected).all(|(count, expected)| count.abs_diff(*expected) <= 1);
        assert!(close && counts.len() == expected.len(), "{weights:?}: {counts:?}");
    };
    check(&[1], &[100_000]);
    check(&[1, 1], &[50_000, 50_000]);
    check(&[70, 30], &[70_000, 30_000]);
    check(&[9, 1, 0], &[90_000, 10_000, 0]);
    check(&[0, 1, 0, 3], &[0, 25_000, 0, 75_000]);
    check(&[u32::MAX, u32::MAX], &[50_000, 50_000]);
    check(&[0, 0], &[0, 0]);
    check(&[], &[]);
    for random in [0, 1, u64::MAX] {
        assert_eq!(rule(&[0, 5, 0]).backend(random).unwrap().weight, 5);
        assert_eq!(rule(&[0]).backend(random), None);
    }
}

proptest! {
    #[test]
    fn the_index_finds_what_a_scan_finds(
        routes in prop::collection::vec(any_route(), 0..6),
        requests in prop::collection::vec(any_request(), 1..20),
    ) {
        let table = HttpTable::new(routes);
        for (method, host, path, query, header) in requests {
            let mut headers = HeaderMap::new();
            if header {
                headers.insert("x", HeaderValue::from_static("1"));
            }
            let query = query.then_some("q=1");
            let request = RequestHead { method: &method, host: &host, path: &path, query, headers: &headers };
            let scanned = table.entries.iter().find(|entry| {
                entry.hostname.as_ref().is_none_or(|it| it.matches(&host)) && entry.matches.matches(&request)
            });
            let found = table.find(&request);
            // The very entry: its rule, and its prefix.
            let scanned = scanned.map(Entry::matched);
            prop_assert_eq!(found.map(|it| it.prefix), scanned.map(|it| it.prefix));
            prop_assert_eq!(
                found.map(|it| Arc::as_ptr(it.rule)),
                scanned.map(|it| Arc::as_ptr(it.rule)),
                "{:?}", request
            );
        }
    }

    #[test]
    fn no_order_of_the_routes_matters(mut routes in prop::collection::vec(any_route(), 0..5)) {
        for (number, route) in routes.iter_mut().enumerate() {
            for (index, (_, it)) in route.rules.iter_mut().enumerate() {
                *it = rule(&format!("r-{number}"), index);
            }
        }
        let table = HttpTable::new(routes.clone());
        routes.reverse();
        prop_assert_eq!(HttpTable::new(routes), table);
    }
}

fn any_route() -> impl Strategy<Value = RouteRules> {
    let hostname = prop::sample::select(vec!["a.test", "b.a.test", "*.test", "*.a.test", "test"])
        .prop_map(|text| Hostname::parse(text).unwrap());
    let rule = (prop::collection::vec(any_match(), 0..3), 0..100_usize)
        .prop_map(|(matches, number)| (matches, rule(&format!("r-{}", number / 10), number % 10)));
    let created = prop::option::of(0..3_i64).prop_map(|it| it.map(|it| Timestamp::from_second(it).unwrap()));
    (prop::collection::vec(hostname, 0..3), created, prop::collection::vec(rule, 0..5))
        .prop_map(|(hostnames, created, rules)| RouteRules { hostnames, created, rules })
}

fn any_match() -> impl Strategy<Value = Match> {
    let path = prop_oneof![
        any_path().prop_map(|path| PathMatch::Exact(path.into())),
        any_path().prop_map(|path| PathMatch::prefix(&path)),
        any_path().prop_map(|path| PathMatch::Regex(Pattern::new(&format!("{path}.?")).unwrap())),
        prop::sample::select(vec!["a", "b"]).prop_map(|method| PathMatch::GrpcMethod(method.into())),
    ];
    let method = prop::option::of(any_method());
    (path, method, any::<bool>(), any::<bool>()).prop_map(|(path, method, header, query)| {
        let value = || ValueMatch::Exact("1".into());
        let headers = header.then(|| HeaderMatch { name: HeaderName::from_static("x"), value: value() });
        let query = query.then(|| QueryMatch { name: "q".into(), value: value() });
        Match { path, method, headers: headers.into_iter().collect(), query: query.into_iter().collect() }
    })
}

fn any_request() -> impl Strategy<Value = (Method, String, String, bool, bool)> {
    let host = prop::sample::select(vec!["a.test", "b.a.test", "c.b.a.test", "test", "x", ""]);
    let path = prop_oneof![9 => any_path(), 1 => Just("*".to_owned()), 1 => Just(String::new())];
    (any_method(), host.prop_map(str::to_owned), path, any::<bool>(), any::<bool>())
}

fn any_method() -> impl Strategy<Value = Method> {
    prop::sample::select(vec![Method::GET, Method::POST])
}

/// Few enough segments that many rules meet one path.
fn any_path() -> impl Strategy<Value = String> {
    let segment = prop::sample::select(vec!["a", "b", "ab", ""]);
    prop::collection::vec(segment, 0..4).prop_map(|segments| format!("/{}", segments.join("/")))
}

#[test]
fn rules_that_nothing_falls_under_are_known() {
    let check = |text: &str, expected: &str| {
        let table = HttpTable::new(routes(text));
        let name = |rule: &Rule| format!("{}[{}]", rule.route.id.name, rule.index);
        let hidden = table.hidden();
        let hidden: Vec<_> =
            hidden.iter().map(|(rule, by)| format!("{} by {}", name(rule), name(by))).collect();
        assert_eq!(hidden.join(", "), expected, "{text}");
    };
    check("route a\n /a\n /b\n / GET", "");
    check("route a\n /a\n /a", "a[1] by a[0]");
    check("route a 2027-01-01T00:00:00Z\n /a\n route b 2026-01-01T00:00:00Z\n /a", "a[0] by b[0]");
    // The more specific comes first, and leaves something.
    check("route a\n /a\n /a GET\n /a x:1\n /a ?q=1", "");
    check("route a\n /a GET x:1\n /a GET x:1 ?q=1\n /a GET x:1", "a[2] by a[0]");
    check("route a\n ~/a.*\n ~/a.* GET\n ~/a.* GET", "a[2] by a[1]");
    check("route a one.shop\n /a\n route b two.shop\n /a\n route c\n /a", "");
    // One host that is left is enough.
    check("route a one.shop\n /a\n route b one.shop two.shop\n /a", "");
}

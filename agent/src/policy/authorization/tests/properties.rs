//! What holds whatever the policies and the questions are.

use proptest::prelude::*;
use proptest::sample::select;

use super::super::*;
use super::written::{Asked, Question, policy};

/// Few values of everything, so that much of it meets.
fn pick(values: &'static [&'static str], most: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(select(values), 0..=most).prop_map(|values| values.join(","))
}

fn field(name: &'static str, values: &'static [&'static str]) -> impl Strategy<Value = String> {
    (select(&["", "", "", "=", "=", "!="][..]), pick(values, 3)).prop_map(move |(operator, values)| {
        if operator.is_empty() || values.is_empty() {
            String::new()
        } else {
            format!(" {name}{operator}{values}")
        }
    })
}

fn sources() -> impl Strategy<Value = String> {
    let one = (
        field(
            "identities",
            &["spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/sh*", "*/sa/web", "*"],
        ),
        field("serviceAccounts", &["shop/web", "shop/api", "bank/web", "team-1/web"]),
        field("namespaces", &["shop", "bank", "team-*", "*op", "*"]),
        field("trustDomains", &["cluster.local", "other.*"]),
        field("ipBlocks", &["10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0", "fd00::/8", "::/0"]),
    );
    let one = one.prop_map(|(a, b, c, d, e)| format!(" from{a}{b}{c}{d}{e}"));
    proptest::collection::vec(one, 0..3).prop_map(|all| all.concat())
}

fn operations() -> impl Strategy<Value = String> {
    let grpc =
        (select(&["", "", " grpc=a.B/C", " grpc=a.B", " grpc=a.B/D,x.Y/Z"][..])).prop_map(str::to_owned);
    let one = (
        field("ports", &["80", "81"]),
        field("methods", &["GET", "POST", "P*", "*"]),
        field(
            "paths",
            &[
                "/", "/a", "/A", "/a/*", "/a/b", "/*", "*b", "*/B", "/a/{*}", "/A/{**}", "/{*}/b", "/a.B/*",
                "/{**}",
            ],
        ),
        field("hosts", &["shop", "SHOP:80", "*op", "*op:80", "sh*", "shop:8*", "*"]),
        grpc,
    );
    let one = one.prop_map(|(a, b, c, d, e)| format!(" to{a}{b}{c}{d}{e}"));
    proptest::collection::vec(one, 0..3).prop_map(|all| all.concat())
}

fn conditions() -> impl Strategy<Value = String> {
    let header = field("header:x", &["1", "2", "1*", "*"]);
    let other = field("header:y", &["1", "2"]);
    let claim = field("claim:g", &["1", "2", "*"]);
    (header, other, claim).prop_map(|(a, b, c)| format!(" when{a}{b}{c}"))
}

fn rule() -> impl Strategy<Value = String> {
    (sources(), operations(), conditions()).prop_map(|(from, to, when)| format!(" any{from}{to}{when} "))
}

/// Lines as the tables have them; the names are their places.
fn policies() -> impl Strategy<Value = Vec<String>> {
    let head = (
        select(&["allow", "allow", "deny", "audit", "dry allow", "dry deny", "dry audit"][..]),
        select(&["", "", "", " @80", " @81,82", " @80,81"][..]),
        select(&["", "", "", "", "", "", "", "", "", "(wrong)"][..]),
    );
    let one = (head, proptest::collection::vec(rule(), 0..12));
    proptest::collection::vec(one, 0..8).prop_map(|policies| {
        let lines = policies.into_iter().enumerate().map(|(place, ((action, ports, invalid), rules))| {
            format!("{action} p{place}{ports}{invalid}: {}", rules.join(" | "))
        });
        lines.collect()
    })
}

/// A policy that comes or takes another one's place, or that one goes.
fn change() -> impl Strategy<Value = Option<String>> {
    let head = (
        select(&["allow", "deny", "audit", "dry allow", "dry deny"][..]),
        select(&["", "", " @80", " @81,82"][..]),
        select(&["", "", "", "", "(wrong)"][..]),
    );
    let one =
        (head, proptest::collection::vec(rule(), 0..4)).prop_map(|((action, ports, invalid), rules)| {
            format!("{action} p {ports}{invalid}: {}", rules.join(" | "))
        });
    proptest::option::weighted(0.8, one)
}

fn question() -> impl Strategy<Value = Question> {
    let who = select(&["-", "shop/web", "shop/api", "bank/web", "team-1/web", "other.example:shop/web"][..]);
    let connection = (
        who,
        select(&["@80", "@81", "@9000"][..]),
        select(&["10.0.0.1", "10.1.1.1", "1.2.3.4", "::ffff:10.0.0.1", "fd00::1"][..]),
        select(&["", "", "connects", "speaks"][..]),
    );
    let request = (
        select(&["GET", "POST", "get"][..]),
        select(
            &[
                "/", "/a", "/A", "/a/", "/a/b", "/A/B", "/a/x", "/b", "/a.B/C", "/a.b/C", "/a.B/D", "/a.B/E",
                "/c",
            ][..],
        ),
        select(&["", "host=shop", "host=Shop:80", "host=shop.:80", "host=bishop:80", "host=s"][..]),
        select(&["", "h:x=1", "h:x=2 h:x=1", "h:x=12 h:y=1", "h:y=2"][..]),
        select(&["", "claims={}", "claims={\"g\":1}", "claims={\"g\":[\"2\"]}"][..]),
        select(&["", "grpc", "caseless", "grpc caseless"][..]),
    );
    (connection, request).prop_map(
        |((who, port, from, asked), (method, path, host, headers, claims, grpc))| {
            Question::parse(&format!(
                "{who} {port} from={from} {asked} {method} {path} {host} {headers} {claims} {grpc}"
            ))
        },
    )
}

fn set(lines: &[String]) -> Set {
    Set::new(lines.iter().map(|line| policy(line)).collect())
}

/// What one rule after the other says, of policies in the order of their names: the outcome, audits, and what would be.
fn scan(lines: &[String], question: &Question) -> (Verdict, Option<RuleRef>, Vec<RuleRef>, Option<Verdict>) {
    use super::super::facts::Facts;
    use super::super::matching::Match;
    let applied: Vec<Applied> = lines.iter().map(|line| policy(line)).collect();
    let here = |applied: &&Applied| applied.ports.as_ref().is_none_or(|ports| ports.contains(&question.port));
    let matching = |policy: &Policy| {
        let in_doubt = policy.action != Action::Allow;
        let request = (question.asked == Asked::Request).then(|| question.request());
        let facts = Facts { connection: question.connection(), request, in_doubt };
        let enough = if question.asked == Asked::Bytes && in_doubt { Match::Perhaps } else { Match::Yes };
        policy.rules.iter().position(|rule| rule.matches(&facts) >= enough)
    };
    let decide = |also_dry: bool| {
        let in_force = || {
            let policies = applied.iter().filter(here).map(|applied| &*applied.policy);
            policies.filter(move |policy| also_dry || !policy.dry_run)
        };
        let of = |action| in_force().filter(move |it| it.action == action && it.invalid.is_none());
        let named =
            |policy: &Policy| matching(policy).map(|rule| RuleRef { policy: policy.name.clone(), rule });
        if in_force().any(|policy| policy.invalid.is_some()) {
            return (Verdict::Denied, None);
        }
        if let Some(rule) = of(Action::Deny).find_map(named) {
            return (Verdict::Denied, Some(rule));
        }
        match of(Action::Allow).find_map(named) {
            Some(rule) => (Verdict::Allowed, Some(rule)),
            None if of(Action::Allow).next().is_some() => (Verdict::Denied, None),
            None => (Verdict::Allowed, None),
        }
    };
    let (verdict, by) = decide(false);
    let (with_dry, _) = decide(true);
    let audits = applied.iter().filter(here).map(|applied| &applied.policy);
    let audits = audits.filter(|it| it.action == Action::Audit && !it.dry_run && it.invalid.is_none());
    let audited = audits.filter_map(|it| Some(RuleRef { policy: it.name.clone(), rule: matching(it)? }));
    (verdict, by, audited.collect(), (with_dry != verdict).then_some(with_dry))
}

fn decided(set: &Set, question: &Question) -> Option<Decision> {
    match question.asked {
        Asked::Request => Some(set.request(&question.connection(), &question.request())),
        Asked::Bytes => Some(set.bytes(&question.connection())),
        Asked::Connection => match set.connection(&question.connection()) {
            OnConnection::Decided(decision) => Some(decision),
            OnConnection::ByRequest => None,
        },
    }
}

proptest! {
    /// The index finds what a plain scan finds, and nothing else.
    #[test]
    fn the_index_equals_a_plain_scan(lines in policies(), questions in proptest::collection::vec(question(), 8)) {
        let set = set(&lines);
        for question in questions {
            let Some(decision) = decided(&set, &question) else { continue };
            let (verdict, by, audited, dry) = scan(&lines, &question);
            prop_assert_eq!(decision.outcome.verdict(), verdict, "{:?}", question);
            let rule = match &decision.outcome {
                Outcome::Allowed(rule) | Outcome::Denied(rule) => Some(rule.clone()),
                _ => None,
            };
            // Of a policy that cannot be used and a rule that denies, either may be named.
            if !matches!(decision.outcome, Outcome::Invalid { .. }) && by.is_some() {
                prop_assert_eq!(rule, by);
            }
            prop_assert_eq!(decision.audited, audited);
            prop_assert_eq!(decision.dry.map(|dry| dry.verdict()), dry);
        }
    }

    /// So does the index of a set that has come about by changes, each of a few policies among others.
    #[test]
    fn what_has_changed_equals_what_is_made_anew(
        first in policies(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), change()), 1..16),
        questions in proptest::collection::vec(question(), 4),
    ) {
        let mut applied: Vec<Applied> = first.iter().map(|line| policy(line)).collect();
        let mut changed = Set::new(applied.clone());
        for (place, change) in changes {
            let place = place.index(applied.len() + 1);
            match (change, applied.get_mut(place)) {
                (Some(line), Some(one)) => *one = policy(&line.replace(" p ", &format!(" p{place} "))),
                (Some(line), None) => applied.push(policy(&line.replace(" p ", &format!(" p{place} ")))),
                (None, Some(_)) => drop(applied.remove(place)),
                (None, None) => applied.reverse(),
            }
            changed = changed.with(applied.clone());
            let anew = Set::new(applied.clone());
            prop_assert_eq!(changed.policies(), anew.policies());
            prop_assert_eq!(changed.can_deny(), anew.can_deny());
            prop_assert_eq!(changed.is_empty(), anew.is_empty());
            prop_assert_eq!(changed.is_about_requests(), anew.is_about_requests());
            for port in [80, 81, 82, 9_000] {
                prop_assert_eq!(changed.needs_requests(port), anew.needs_requests(port), "{}", port);
            }
            for question in &questions {
                let (changed, anew) = (decided(&changed, question), decided(&anew, question));
                prop_assert_eq!(changed.is_some(), anew.is_some());
                if let (Some(changed), Some(anew)) = (changed, anew) {
                    prop_assert_eq!(changed.outcome.verdict(), anew.outcome.verdict());
                    prop_assert_eq!(without_nearest(changed.outcome), without_nearest(anew.outcome));
                    prop_assert_eq!(changed.audited, anew.audited);
                    prop_assert_eq!(changed.dry.map(without_nearest), anew.dry.map(without_nearest));
                }
            }
        }
    }

    /// In whatever order policies come; and what denies denies, whatever else there is.
    #[test]
    fn deny_never_loses_to_the_order_of_policies(
        (lines, shuffled) in policies().prop_flat_map(|lines| (Just(lines.clone()), Just(lines).prop_shuffle())),
        denying in rule(),
        question in question(),
    ) {
        prop_assert_eq!(question.answer(&set(&lines)), question.answer(&set(&shuffled)));
        let alone = set(&[format!("deny zz:{denying}")]);
        let mut beside = shuffled;
        beside.insert(beside.len() / 2, format!("deny zz:{denying}"));
        let (alone, beside) = (decided(&alone, &question), decided(&set(&beside), &question));
        if let (Some(alone), Some(beside)) = (alone, beside) && !alone.is_allowed() {
            prop_assert!(!beside.is_allowed());
        }
    }

    /// What is tried out changes no outcome and no audit.
    #[test]
    fn what_is_tried_out_never_changes_a_verdict(lines in policies(), question in question()) {
        let in_force: Vec<_> = lines.iter().filter(|line| !line.starts_with("dry")).cloned().collect();
        let (with, without) = (decided(&set(&lines), &question), decided(&set(&in_force), &question));
        if let (Some(with), Some(without)) = (with, without) {
            prop_assert_eq!(with.outcome, without.outcome);
            prop_assert_eq!(with.audited, without.audited);
        }
    }

    /// What a connection decides is decided for every request on it, and only what may depend on one is left open.
    #[test]
    fn what_a_connection_decides_holds_for_its_requests(lines in policies(), question in question()) {
        let set = set(&lines);
        let request = set.request(&question.connection(), &question.request());
        match set.connection(&question.connection()) {
            OnConnection::Decided(decision) => {
                prop_assert_eq!(decision.outcome.verdict(), request.outcome.verdict());
                if decision.is_allowed() {
                    prop_assert_eq!(decision.audited, request.audited);
                    prop_assert_eq!(decision.dry.map(without_nearest), request.dry.map(without_nearest));
                }
            }
            OnConnection::ByRequest => prop_assert!(set.needs_requests(question.port)),
        }
    }

    /// What is said to do nothing does nothing.
    #[test]
    fn rules_that_never_match_do_not(
        head in select(&["allow", "deny", "audit", "allow", "deny @80,81", "allow @81"][..]),
        rules in proptest::collection::vec(rule_that_contradicts_itself(), 1..4),
        question in question(),
    ) {
        let (action, ports) = head.split_once(' ').unwrap_or((head, ""));
        let set = set(&[format!("{action} p {ports}: {}", rules.join(" | "))]);
        let request = question.request();
        let considered = set.considered(&question.connection(), Some(&request));
        for never in set.never().iter().filter(|_| considered[0].is_here) {
            prop_assert!(considered[0].rules[never.rule.rule] != Found::Matches, "{}: {:?}", never, question);
        }
    }

    /// What is not HTTP is let in by nothing that asks for more than its connection has.
    #[test]
    fn bytes_are_let_in_only_if_every_request_would_be(lines in policies(), question in question()) {
        let set = set(&lines);
        if set.bytes(&question.connection()).is_allowed() {
            prop_assert!(set.request(&question.connection(), &question.request()).is_allowed());
        }
    }
}

/// A rule that may take back what it means.
fn rule_that_contradicts_itself() -> impl Strategy<Value = String> {
    let identities = &["spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/sh*", "*"][..];
    let hosts = &["shop", "shop:80", "*op", "*op:80", "*:80", "sh*", "shop:8*", "*"][..];
    let lists = [
        ("from identities", identities),
        ("from serviceAccounts", &["shop/web", "bank/web"]),
        ("from namespaces", &["shop", "sh*", "*op", "*"]),
        ("from trustDomains", &["cluster.local", "*"]),
        ("from ipBlocks", &["10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0"]),
        ("to ports", &["80", "81", "82"]),
        ("to methods", &["GET", "G*", "*"]),
        ("to paths", &["/a", "/a/*", "/a/b", "/*", "*b", "/a/{*}"]),
        ("to hosts", hosts),
    ];
    select(lists.to_vec()).prop_flat_map(|(list, values)| {
        let some = || proptest::collection::vec(select(values), 1..3).prop_map(|values| values.join(","));
        (some(), some()).prop_map(move |(meant, left_out)| {
            let (section, name) = list.split_once(' ').expect("a list is of a section");
            format!(" {section} {name}={meant} {name}!={left_out} ")
        })
    })
}

/// The same but for the rule that was closest to allowing it, which is another one when more is known.
fn without_nearest(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::NotAllowed { policy, others, .. } => Outcome::NotAllowed { policy, others, nearest: None },
        outcome => outcome,
    }
}

/// Rules that many others share something with, as they come and go one after the other.
#[test]
fn what_comes_and_goes_among_many_is_found_while_it_is_there() {
    let one = |place: usize| {
        let (a, b, c) = (place % 10, place / 10 % 10, place / 100);
        policy(&format!(
            "deny p{place:04}: from namespaces=n{a} to methods=M{b} paths=/p{c}/* | from namespaces=x"
        ))
    };
    let ask = |set: &Set, place: usize| {
        let (a, b, c) = (place % 10, place / 10 % 10, place / 100);
        Question::parse(&format!("n{a}/x M{b} /p{c}/y")).answer(set)
    };
    let denied = |place: usize| format!("denied by p{place:04}, rule 1");
    let open = "allowed, for no policy says what is";
    let mut applied: Vec<Applied> = (0..1_000).step_by(2).map(one).collect();
    let mut set = Set::new(applied.clone());
    for place in (1..1_000).step_by(2) {
        assert_eq!(ask(&set, place), open);
        applied.push(one(place));
        set = set.with(applied.clone());
        assert_eq!(ask(&set, place), denied(place));
        assert_eq!(ask(&set, place - 1), denied(place - 1));
        assert_eq!(Question::parse("x/x GET /").answer(&set), "denied by p0000, rule 2");
    }
    for place in (0..1_000).rev().step_by(3) {
        applied.retain(|applied| *applied.policy.name != *format!("p{place:04}"));
        set = set.with(applied.clone());
        assert_eq!(ask(&set, place), open);
    }
    let left = |place: &usize| !(999 - place).is_multiple_of(3);
    (0..1_000).filter(left).for_each(|place| assert_eq!(ask(&set, place), denied(place)));
}

/// More rules of one kind than are kept in one list, so that lists are divided.
#[test]
fn what_many_rules_share_is_divided_further() {
    let rules: Vec<String> = (0..2_000)
        .map(|place| {
            let (a, b, c) = (place % 10, place / 10 % 10, place / 100);
            format!("from namespaces=n{a} to methods=M{b} paths=/p{c}/*")
        })
        .collect();
    let set = set(&[format!("deny a: {}", rules.join(" | "))]);
    for place in [0, 7, 99, 1_234, 1_999] {
        let (a, b, c) = (place % 10, place / 10 % 10, place / 100);
        let question = Question::parse(&format!("n{a}/x M{b} /p{c}/y"));
        assert_eq!(question.answer(&set), format!("denied by a, rule {}", place + 1));
    }
    let question = Question::parse("n10/x M1 /p1/y");
    assert_eq!(question.answer(&set), "allowed, for no policy says what is");
}

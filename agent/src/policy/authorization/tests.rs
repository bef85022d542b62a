//! What policies decide, as tables that people can read, and what holds for all of them.

mod properties;
mod written;

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::facts::Facts;
use super::matching::Match;
use super::*;
use written::{Question, policy};

/// Policies at the beginning of a line, and below them, indented, questions with their answers. An empty line ends both.
fn check(table: &str) {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for block in table.split("\n\n") {
        let lines = || block.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        let (questions, policies): (Vec<_>, Vec<_>) = lines().partition(|line| line.starts_with(' '));
        let set = Set::new(policies.into_iter().map(policy).collect());
        for line in questions {
            let (question, expected) = line.split_once(" => ").expect("a question has an answer");
            let answer = Question::parse(question).answer(&set);
            checked += 1;
            if answer != expected {
                wrong.push(format!("{block}\n\n{question}\n => {answer}\n not {expected}"));
            }
        }
    }
    assert!(checked > 0, "no question is asked");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n----\n\n"));
}

#[test]
fn deny_comes_before_allow_and_what_nothing_allows_is_denied() {
    check(include_str!("cases/order.txt"));
}

#[test]
fn who_somebody_is_and_who_proves_nothing() {
    check(include_str!("cases/sources.txt"));
}

#[test]
fn what_is_asked_for() {
    check(include_str!("cases/operations.txt"));
}

#[test]
fn what_must_hold_beside_it() {
    check(include_str!("cases/conditions.txt"));
}

/// What each policy makes of a question, and the rules that never let anything in.
fn check_considered(policies: &str, question: &str, expected: expect_test::Expect) {
    let set = Set::new(policies.lines().map(policy).collect());
    let question = Question::parse(question);
    let request = (question.asked == written::Asked::Request).then(|| question.request());
    let mut told = String::new();
    for Considered { applied, is_here, rules } in set.considered(&question.connection(), request.as_ref()) {
        let place = if is_here { "" } else { " is not for this port" };
        told += &format!("{}{place}\n", applied.policy.name);
        for (rule, found) in (1..).zip(rules) {
            told += &match found {
                Found::Matches => format!("  {rule} matches\n"),
                Found::Depends { on } => format!("  {rule} depends on {on}\n"),
                Found::Fails { failed } => format!("  {rule} fails: {failed}\n"),
            };
        }
    }
    for never in set.never() {
        told += &format!("{never}\n");
    }
    expected.assert_eq(&told);
}

#[test]
fn every_policy_says_what_it_makes_of_it() {
    let policies = "allow a: from namespaces=shop to methods=GET | to ports=81 | any\n\
                    allow none:\n\
                    dry deny b @81: any\n\
                    deny c: from namespaces!=shop\n\
                    allow broken(it is): any";
    check_considered(
        policies,
        "shop/web POST /",
        expect_test::expect![[r#"
        a
          1 fails: to: methods does not have "POST"
          2 fails: to: ports does not have 80
          3 matches
        b is not for this port
          1 matches
        broken
        c
          1 fails: from: notNamespaces has shop
        none
    "#]],
    );
    check_considered(
        policies,
        "- connects",
        expect_test::expect![[r#"
        a
          1 fails: from: namespaces needs an identity, and none is proven
          2 fails: to: ports does not have 80
          3 matches
        b is not for this port
          1 matches
        broken
        c
          1 matches
        none
    "#]],
    );
}

#[test]
fn rules_that_never_let_anything_in_are_known() {
    let check = |policies, expected| check_considered(policies, "- connects", expected);
    check(
        "allow a: from namespaces=shop | any\ndeny b: from namespaces=shop",
        expect_test::expect![[r#"
        a
          1 fails: from: namespaces needs an identity, and none is proven
          2 matches
        b
          1 fails: from: namespaces needs an identity, and none is proven
        a, rule 1 never lets anything in: b, rule 1 denies it all
    "#]],
    );
    check(
        "allow a: to methods=GET | to ports=80\ndeny b: any",
        expect_test::expect![[r#"
        a
          1 depends on to: methods needs a request, and there is none
          2 matches
        b
          1 matches
        a, rule 1 never lets anything in: b, rule 1 denies it all
        a, rule 2 never lets anything in: b, rule 1 denies it all
    "#]],
    );
    check(
        "allow a: any\ndry deny b: any\ndeny c @80: any",
        expect_test::expect![[r#"
        a
          1 matches
        b
          1 matches
        c
          1 matches
    "#]],
    );
    check(
        "allow a @80: any\ndeny c @80,81: any",
        expect_test::expect![[r#"
        a
          1 matches
        c
          1 matches
        a, rule 1 never lets anything in: c, rule 1 denies it all
    "#]],
    );
    check(
        "allow a: to paths=/a when header:x=1\ndeny b: to paths=/a when header:y=1",
        expect_test::expect![[r#"
        a
          1 depends on to: paths needs a request, and there is none
        b
          1 depends on to: paths needs a request, and there is none
    "#]],
    );
    check(
        "allow a @80: to ports=81 | to ports=80 | to ports!=80 | from namespaces=shop,sh* namespaces!=s* | from namespaces=shop namespaces!=web\n\
         deny b: from ipBlocks=10.0.0.0/8 ipBlocks!=10.0.0.0/7 from namespaces=shop | to methods=GET methods!=GET to paths=/a/* paths!=/*\n\
         audit c: to hosts=shop hosts!=* from ipBlocks=10.0.0.0/8 | to hosts=shop:80 hosts!=shop",
        expect_test::expect![[r#"
            a
              1 fails: to: ports does not have 80
              2 matches
              3 fails: to: notPorts has 80
              4 fails: from: namespaces needs an identity, and none is proven
              5 fails: from: namespaces needs an identity, and none is proven
            b
              1 fails: from: ipBlocks and notIpBlocks leave out 10.0.0.1
              2 depends on to: methods needs a request, and there is none
            c
              1 depends on to: hosts needs a request, and there is none
              2 depends on to: hosts needs a request, and there is none
            a, rule 1 never matches: to: it is for none of the ports that the policy is for
            a, rule 3 never matches: to: it is for none of the ports that the policy is for
            a, rule 4 never matches: from: notNamespaces takes back all that is meant
            b, rule 2 never matches: to: notMethods takes back all that is meant
            c, rule 1 never matches: to: notHosts takes back all that is meant
        "#]],
    );
}

#[test]
fn what_a_connection_decides_and_what_is_not_http() {
    check(include_str!("cases/connections.txt"));
}

#[test]
fn what_is_tried_out_changes_nothing_and_is_told() {
    check(include_str!("cases/dry_run.txt"));
}

#[test]
fn denials_tell_what_was_nearest() {
    check(include_str!("cases/nearest.txt"));
}

#[test]
fn ports_at_which_requests_matter() {
    let check = |policies: &[&str], expected: [bool; 3]| {
        let set = Set::new(policies.iter().map(|line| policy(line)).collect());
        assert_eq!([80, 443, 9000].map(|port| set.needs_requests(port)), expected, "{policies:?}");
    };
    check(&[], [false; 3]);
    check(&["allow a: from namespaces=shop to ports=80"], [false; 3]);
    check(&["allow a: to methods=GET"], [true; 3]);
    check(&["audit a: to ports=80 methods=GET"], [true, false, false]);
    check(&["dry deny a: to ports!=80 methods=GET"], [false, true, true]);
    check(&["deny a @443: when header:x=1"], [false, true, false]);
    check(&["deny a: to ports=80 when header:x=1", "allow b @443: to paths=/a"], [true, true, false]);
    check(&["deny a (broken): to methods=GET"], [false; 3]);
    check(&["dry audit a: to methods=GET"], [false; 3]);
}

#[test]
fn sets_are_empty_only_if_nothing_is_decided_or_told() {
    let check = |policies: &[&str], expected: bool| {
        let set = Set::new(policies.iter().map(|line| policy(line)).collect());
        assert_eq!(set.is_empty(), expected, "{policies:?}");
    };
    check(&[], true);
    check(&["deny a:"], true);
    check(&["dry audit a: any"], true);
    check(&["allow a:"], false);
    check(&["dry allow a:"], false);
    check(&["deny a (broken):"], false);
    check(&["audit a: any"], false);
}

/// What a request that is let in may cost among them, in an optimised build.
const FLOOR: Duration = Duration::from_micros(2);

/// And what one policy may that is another one.
const MOST_OF_A_CHANGE: Duration = Duration::from_millis(5);

/// 10,000 policies of ten rules each on one workload, in several shapes, and a request that few of them are about.
#[test]
#[ignore = "a measurement: cargo xtask bench --policies"]
fn what_ten_thousand_policies_cost() {
    println!(
        "ns per request among 100,000 rules   allowed   denied   connection   plain scan   made in   \
         one changed in   allowed then"
    );
    for (name, rule) in SHAPES {
        let lines: Vec<String> = (0..10_000)
            .map(|place| {
                let rules: Vec<String> = (0..10).map(|number| rule(place, number)).collect();
                let action = if place % 10 == 0 { "deny" } else { "allow" };
                format!("{action} p{place}: {}", rules.join(" | "))
            })
            .collect();
        let applied: Vec<Applied> = lines.iter().map(|line| policy(line)).collect();
        let start = Instant::now();
        let set = Set::new(applied.clone());
        let made = start.elapsed();

        // Callers that take turns, as they would: what is in the processor's caches is not what this one needs.
        let ask = |place: usize, suffix: &str| {
            let place = place * 7_919 % 10_000;
            let place = if place.is_multiple_of(10) { place + 1 } else { place };
            let line =
                format!("n{}{suffix}/s{place} G{} /api/v1/t{place}/orders/3/x?", place % 100, place % 5);
            Question::parse(line.trim_end_matches('?'))
        };
        let allowed: Vec<_> = (0..1_000).map(|place| ask(place, "")).collect();
        let denied: Vec<_> = (0..1_000).map(|place| ask(place, "x")).collect();
        let request = |question: &Question| set.request(&question.connection(), &question.request());
        assert!(allowed.iter().all(|question| request(question).is_allowed()), "{name}");
        assert!(!denied.iter().any(|question| request(question).is_allowed()), "{name}");
        let columns = [
            each(&allowed, 20, &|question| _ = black_box(request(question))),
            each(&denied, 20, &|question| _ = black_box(request(question))),
            each(&allowed, 20, &|question| _ = black_box(set.connection(&question.connection()))),
            each(&allowed[..20], 1, &|question| _ = black_box(scan(&applied, question))),
        ];
        let (set, changed) = with_changes(set, applied, &lines);
        let request = |question: &Question| set.request(&question.connection(), &question.request());
        let later = each(&allowed, 20, &|question| _ = black_box(request(question)));
        let (slowest, later) = (columns[0].max(later), later.as_nanos());
        let [allowed, denied, connection, scanned] = columns.map(|it| it.as_nanos());
        println!(
            "{name:36} {allowed:>8} {denied:>8} {connection:>12} {scanned:>12} {made:>9.0?} \
             {changed:>16.0?} {later:>14}"
        );
        let is_fast = slowest < FLOOR && changed < MOST_OF_A_CHANGE;
        assert!(
            cfg!(debug_assertions) || is_fast,
            "{name}: {slowest:?} of {FLOOR:?}, {changed:?} of {MOST_OF_A_CHANGE:?}"
        );
    }
}

/// What becomes of the set when one policy after the other is another one that says the same, and how long each takes.
fn with_changes(mut set: Set, mut applied: Vec<Applied>, lines: &[String]) -> (Set, Duration) {
    let mut took = Vec::new();
    for place in (5..lines.len()).step_by(100) {
        applied[place] = policy(&lines[place]);
        let changed = applied.clone();
        let start = Instant::now();
        set = set.with(changed);
        took.push(start.elapsed());
    }
    took.sort_unstable();
    (set, took[took.len() / 2])
}

/// How rules are told apart, and the rule of a number of the policy and one of its own.
type Shape = (&'static str, fn(usize, usize) -> String);

const SHAPES: [Shape; 5] = [
    ("by service account and path", |policy, rule| {
        format!("from serviceAccounts=n{}/s{policy} to paths=/api/v1/t{policy}/orders/{rule}/*", policy % 100)
    }),
    ("by service account alone", |policy, rule| {
        let method = if rule == 9 { "*".to_owned() } else { format!("X{rule}") };
        format!("from serviceAccounts=n{}/s{policy} to methods={method}", policy % 100)
    }),
    ("by prefixes of paths of all lengths", |policy, rule| {
        let path =
            if rule == 3 { format!("t{policy}/*") } else { format!("{}*", "abcdefghij".repeat(rule + 1)) };
        format!("from namespaces=n{} to paths=/api/v1/{path}", policy % 100)
    }),
    ("by namespace, method and template", |policy, rule| {
        format!(
            "from namespaces=n{} to methods=G{} paths=/api/v1/t{policy}/{{*}}/{rule}/x",
            policy % 100,
            policy % 5
        )
    }),
    ("by namespace and method; no other", |policy, rule| {
        format!("from namespaces=n{} namespaces!=n{policy}-{rule} to methods=G{}", policy % 100, policy % 5)
    }),
];

fn each(questions: &[Question], times: u32, ask: &dyn Fn(&Question)) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..times {
        let start = Instant::now();
        questions.iter().for_each(ask);
        best = best.min(start.elapsed());
    }
    best / questions.len() as u32
}

/// One rule after the other, until one matches.
fn scan(applied: &[Applied], question: &Question) -> bool {
    let matches = |action: Action| {
        let facts = Facts {
            connection: question.connection(),
            request: Some(question.request()),
            in_doubt: action != Action::Allow,
        };
        let policies = applied.iter().map(|applied| &applied.policy).filter(move |it| it.action == action);
        policies.flat_map(|policy| &policy.rules).any(|rule| rule.matches(&facts) == Match::Yes)
    };
    !matches(Action::Deny) && matches(Action::Allow)
}

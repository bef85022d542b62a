//! Endpoints that fail, and whether they are left alone, as tables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use expect_test::{Expect, expect};

use super::Verdict;
use crate::balance::tests::{chosen, ready_with, service};
use crate::balance::{AffinityTable, Carries, Request, kept, outlier, select, success_rate};
use crate::model::TrafficDistribution::Anywhere;
use crate::model::TrafficScope::Cluster;
use crate::model::{Outliers, ServicePort, SessionAffinity, Standing, SuccessRate, TrafficSettings};

/// Tells of verdicts on endpoints and asks where connections may go, as a table: `0 .1 gateway*5` are five gateway failures of
/// 10.1.0.1 at the start, `12 ?` asks for all choices of many at that second. The words are verdicts, the answer is what followed.
fn ejections(endpoints: usize, steps: &str, expect: Expect) {
    let lines: String = (1..=endpoints).map(|number| format!("10.1.0.{number}:80 ready\n")).collect();
    let service = service(Cluster, Anywhere, &lines);
    let (port, start) = (&service.ports[0], Instant::now());
    let mut shown = String::new();
    for step in steps.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = step.split(' ').collect();
        let now = start + Duration::from_secs_f64(words[0].parse().unwrap());
        let outcome = if words[1] == "?" {
            let (affinity, mut random) = (AffinityTable::new(0), fastrand::Rng::with_seed(1));
            let request = Request {
                client: "10.1.0.9".parse().unwrap(),
                dialled: "10.0.0.1:80".parse().unwrap(),
                excluding: &[],
                carries: Carries::Connection,
                hash: None,
            };
            let mut chosen: BTreeMap<SocketAddr, u32> = BTreeMap::new();
            for _ in 0..100 {
                let endpoint = select(&service, &request, &affinity, now, random.u64(..)).unwrap();
                *chosen.entry(endpoint.address).or_default() += 1;
            }
            let share = |(address, count): (&SocketAddr, &u32)| match count {
                1 => format!("{} once", address.ip()),
                _ => address.ip().to_string(),
            };
            chosen.iter().map(share).collect::<Vec<_>>().join(", ")
        } else {
            let address = format!("10.1.0{}:80", words[1]).parse().unwrap();
            let (verdict, times) = words[2].split_once('*').unwrap_or((words[2], "1"));
            let verdict = match verdict {
                "good" => Verdict::Good,
                "connected" => Verdict::Connected,
                "error" => Verdict::ServerError,
                "gateway" => Verdict::GatewayFailure,
                "refused" => Verdict::Refused,
                other => panic!("{other}"),
            };
            let endpoint = port.candidate(address).unwrap();
            let changes =
                (0..times.parse().unwrap()).filter_map(|_| outlier::judge(port, endpoint, verdict, now, 0.5));
            changes.map(|change| format!("{change:?}")).collect::<Vec<_>>().join(", ")
        };
        shown += &format!("{step}: {}\n", if outcome.is_empty() { "-" } else { &outcome });
    }
    expect.assert_eq(&shown);
}

#[test]
fn endpoints_that_fail_are_left_alone_and_tried_again_once() {
    ejections(
        3,
        "0 .1 error*4
         0 .1 good
         0 .1 error*5
         1 .1 gateway*9
         1 .1 good
         9 ?
         11 ?
         12 .1 gateway
         20 ?
         34 ?
         35 .1 good
         36 ?",
        expect![[r#"
            0 .1 error*4: -
            0 .1 good: -
            0 .1 error*5: Ejected { reason: ConsecutiveServerErrors, lasts: 10.5s }
            1 .1 gateway*9: -
            1 .1 good: -
            9 ?: 10.1.0.2, 10.1.0.3
            11 ?: 10.1.0.1 once, 10.1.0.2, 10.1.0.3
            12 .1 gateway: Ejected { reason: FailedProbe, lasts: 21s }
            20 ?: 10.1.0.2, 10.1.0.3
            34 ?: 10.1.0.1 once, 10.1.0.2, 10.1.0.3
            35 .1 good: Returned
            36 ?: 10.1.0.1, 10.1.0.2, 10.1.0.3
        "#]],
    );
}

#[test]
fn where_nobody_listens_nothing_more_is_sent_for_a_moment() {
    ejections(
        3,
        "0 .1 refused*2
         0.9 ?
         1.1 ?
         1.2 .1 connected
         2 .1 refused
         3.1 ?
         3.2 .1 refused
         4 .2 refused
         4.1 ?",
        expect![[r#"
            0 .1 refused*2: Ejected { reason: Refused, lasts: 1.05s }
            0.9 ?: 10.1.0.2, 10.1.0.3
            1.1 ?: 10.1.0.1 once, 10.1.0.2, 10.1.0.3
            1.2 .1 connected: Returned
            2 .1 refused: Ejected { reason: Refused, lasts: 1.05s }
            3.1 ?: 10.1.0.1 once, 10.1.0.2, 10.1.0.3
            3.2 .1 refused: Ejected { reason: FailedProbe, lasts: 10.5s }
            4 .2 refused: -
            4.1 ?: 10.1.0.2, 10.1.0.3
        "#]],
    );
}

#[test]
fn the_reason_is_what_all_of_the_failures_were() {
    ejections(
        6,
        "0 .1 gateway*4
         0 .1 error*1
         1 .2 error*1
         1 .2 gateway*5
         2 .3 gateway*4
         2 .3 connected
         2 .3 gateway*4
         3 ?",
        expect![[r#"
            0 .1 gateway*4: -
            0 .1 error*1: Ejected { reason: ConsecutiveServerErrors, lasts: 10.5s }
            1 .2 error*1: -
            1 .2 gateway*5: Ejected { reason: ConsecutiveServerErrors, lasts: 10.5s }
            2 .3 gateway*4: -
            2 .3 connected: -
            2 .3 gateway*4: -
            3 ?: 10.1.0.3, 10.1.0.4, 10.1.0.5, 10.1.0.6
        "#]],
    );
}

#[test]
fn no_more_than_half_is_left_alone() {
    ejections(
        1,
        "0 .1 error*20\n1 ?",
        expect![[r#"
        0 .1 error*20: -
        1 ?: 10.1.0.1
    "#]],
    );
    ejections(
        2,
        "0 .1 error*20\n0 .2 error*20\n1 ?",
        expect![[r#"
        0 .1 error*20: Ejected { reason: ConsecutiveServerErrors, lasts: 10.5s }
        0 .2 error*20: -
        1 ?: 10.1.0.2
    "#]],
    );
    ejections(
        3,
        "0 .1 error*20\n0 .2 error*20\n1 ?",
        expect![[r#"
        0 .1 error*20: Ejected { reason: ConsecutiveServerErrors, lasts: 10.5s }
        0 .2 error*20: -
        1 ?: 10.1.0.2, 10.1.0.3
    "#]],
    );
}

#[test]
fn ejections_grow_longer_until_they_are_forgiven() {
    let service = service(Cluster, Anywhere, "10.1.0.1:80 ready\n10.1.0.2:80 ready");
    let port = &service.ports[0];
    let mut now = Instant::now();
    let mut eject = |pause: u64, random: f64| {
        now += Duration::from_secs(pause);
        let judge = |verdict| outlier::judge(port, &port.endpoints[0], verdict, now, random);
        match (0..5).find_map(|_| judge(Verdict::ServerError)) {
            Some(outlier::Change::Ejected { lasts, .. }) => {
                now += lasts;
                assert_eq!(judge_at(port, now), Some(outlier::Change::Returned));
                lasts.as_secs_f64().round() as u64
            }
            other => panic!("{other:?}"),
        }
    };
    fn judge_at(port: &ServicePort, now: Instant) -> Option<outlier::Change> {
        outlier::judge(port, &port.endpoints[0], Verdict::Good, now, 0.0)
    }
    assert_eq!([eject(0, 0.0), eject(1, 0.0), eject(1, 1.0)], [10, 20, 33]);
    let last = (0..40).map(|_| eject(1, 0.0)).last();
    assert_eq!(last, Some(300));
    assert_eq!(eject(301, 0.0), 10, "it has behaved for five minutes");
}

/// More endpoints may turn out to be ejected than one Service would have let be: they are shared, and others leave.
#[test]
fn when_most_are_ejected_all_count() {
    let mut service = service(
        Cluster,
        Anywhere,
        "10.1.0.1:80 ready\n10.1.0.2:80 ready\n10.1.0.3:80 ready\n10.1.0.4:80 ready",
    );
    let start = Instant::now();
    for endpoint in &service.ports[0].endpoints[..2] {
        for _ in 0..5 {
            outlier::judge(&service.ports[0], endpoint, Verdict::GatewayFailure, start, 0.0);
        }
    }
    assert_eq!(chosen(&service, "10.0.0.1:80", &[]).unwrap(), ["10.1.0.3:80", "10.1.0.4:80"]);
    assert!(
        kept(&service.ports[0], "10.1.0.1:80".parse().unwrap(), Carries::Request, start).is_none(),
        "a session leaves it"
    );
    service.ports[0].candidates.v4 = [0, 1, 2].into();
    assert_eq!(chosen(&service, "10.0.0.1:80", &[]).unwrap(), ["10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"]);
    assert!(
        kept(&service.ports[0], "10.1.0.1:80".parse().unwrap(), Carries::Request, start).is_some(),
        "there is nowhere to go"
    );
    // What has failed this very request is worse than what is ejected.
    service.ports[0].candidates.v4 = [0, 3].into();
    let tried = ["10.1.0.4:80".parse().unwrap()];
    assert_eq!(chosen(&service, "10.0.0.1:80", &tried).unwrap(), ["10.1.0.1:80"]);
}

#[test]
fn sessions_leave_an_endpoint_that_is_ejected_and_stay_away() {
    let timeout = Duration::from_secs(60);
    let mut service = service(Cluster, Anywhere, "10.1.0.1:80 ready\n10.1.0.2:80 ready");
    service.session_affinity = SessionAffinity::ClientIp { timeout };
    let (affinity, start, mut random) =
        (AffinityTable::new(1_000), Instant::now(), fastrand::Rng::with_seed(1));
    let mut at = |seconds: u64| {
        let request = Request {
            client: "10.1.0.9".parse().unwrap(),
            dialled: "10.0.0.1:80".parse().unwrap(),
            excluding: &[],
            carries: Carries::Connection,
            hash: None,
        };
        select(&service, &request, &affinity, start + Duration::from_secs(seconds), random.u64(..))
            .unwrap()
            .clone()
    };
    let first = at(0);
    for _ in 0..5 {
        outlier::judge(&service.ports[0], &first, Verdict::ServerError, start, 0.0);
    }
    assert_eq!(first.load.standing(), Standing::Ejected);
    let second = at(1);
    assert_ne!(second.address, first.address);
    outlier::judge(&service.ports[0], &first, Verdict::Good, start + Duration::from_secs(10), 0.0);
    assert_eq!(first.load.standing(), Standing::Good);
    assert!((11..30).all(|seconds| at(seconds).address == second.address));
}

fn judged_by(outliers: Outliers) -> TrafficSettings {
    TrafficSettings { outliers, ..TrafficSettings::default() }
}

/// What follows from so many failures of the first of so many endpoints.
fn followed(outliers: Outliers, endpoints: usize, verdicts: &[(Verdict, usize)]) -> String {
    let service = ready_with(judged_by(outliers), endpoints);
    let (port, now) = (&service.ports[0], Instant::now());
    let verdicts = verdicts.iter().flat_map(|(verdict, times)| std::iter::repeat_n(*verdict, *times));
    let changes = verdicts.filter_map(|verdict| outlier::judge(port, &port.endpoints[0], verdict, now, 0.0));
    changes.map(|change| format!("{change:?}")).collect::<Vec<_>>().join(", ")
}

#[test]
fn a_port_says_for_itself_when_an_endpoint_is_left_alone() {
    let (error, gateway, refused) = (Verdict::ServerError, Verdict::GatewayFailure, Verdict::Refused);
    let (second, all) = (Duration::from_secs(1), Outliers::default());
    let errors = "Ejected { reason: ConsecutiveServerErrors, lasts: 10s }";
    let gateways = "Ejected { reason: ConsecutiveGatewayFailures, lasts: 10s }";
    let at_once = "Ejected { reason: Refused, lasts: 1s }";
    for (outliers, endpoints, verdicts, expected) in [
        (Outliers { consecutive_errors: 2, ..all.clone() }, 3, &[(error, 1)][..], ""),
        (Outliers { consecutive_errors: 2, ..all.clone() }, 3, &[(error, 2)], errors),
        (Outliers { consecutive_errors: 2, ..all.clone() }, 3, &[(gateway, 2)], errors),
        (Outliers { consecutive_errors: 0, ..all.clone() }, 3, &[(error, 99)], ""),
        (Outliers { consecutive_errors: 0, ..all.clone() }, 3, &[(gateway, 5)], gateways),
        (Outliers { consecutive_gateway_failures: 0, ..all.clone() }, 3, &[(gateway, 5)], errors),
        (Outliers { consecutive_gateway_failures: 3, ..all.clone() }, 3, &[(gateway, 2), (error, 1)], ""),
        (Outliers { consecutive_gateway_failures: 99, ..all.clone() }, 3, &[(refused, 1)], at_once),
        (Outliers { consecutive_gateway_failures: 0, ..all.clone() }, 3, &[(refused, 4)], ""),
        (Outliers { consecutive_gateway_failures: 0, ..all.clone() }, 3, &[(refused, 5)], errors),
        (
            Outliers { base_ejection: second * 90, longest_ejection: second * 60, ..all.clone() },
            3,
            &[(error, 5)],
            "Ejected { reason: ConsecutiveServerErrors, lasts: 60s }",
        ),
        (Outliers { most_ejected: 0, ..all.clone() }, 9, &[(error, 99)], ""),
        (Outliers { most_ejected: 10, ..all.clone() }, 9, &[(error, 99)], ""),
        (Outliers { most_ejected: 10, ..all.clone() }, 10, &[(error, 5)], errors),
        (Outliers { most_ejected: 100, ..all.clone() }, 2, &[(error, 5)], errors),
        (Outliers { most_ejected: 100, ..all.clone() }, 1, &[(error, 99)], ""),
    ] {
        assert_eq!(
            followed(outliers.clone(), endpoints, verdicts),
            expected,
            "{endpoints}: {outliers:?} {verdicts:?}"
        );
    }
}

#[test]
fn all_count_when_more_are_ejected_than_a_port_takes_for_their_fault() {
    for (panic_above, expected) in [(50, 4), (75, 1), (100, 1), (0, 4)] {
        let outliers = Outliers { most_ejected: 100, panic_above, ..Outliers::default() };
        let service = ready_with(judged_by(outliers), 4);
        let (port, now) = (&service.ports[0], Instant::now());
        for endpoint in &port.endpoints[..3] {
            (0..5).for_each(|_| _ = outlier::judge(port, endpoint, Verdict::GatewayFailure, now, 0.0));
        }
        assert_eq!(chosen(&service, "10.0.0.1:80", &[]).unwrap().len(), expected, "{panic_above}");
    }
}

#[test]
fn who_is_not_judged_any_more_comes_back_whatever_it_does() {
    let mut service = ready_with(TrafficSettings::default(), 3);
    let now = Instant::now();
    let probe = |service: &crate::model::Service| {
        let port = &service.ports[0];
        let after = now + Duration::from_secs(20);
        outlier::judge(port, &port.endpoints[0], Verdict::ServerError, after, 0.0)
    };
    for _ in 0..5 {
        outlier::judge(&service.ports[0], &service.ports[0].endpoints[0], Verdict::ServerError, now, 0.0);
    }
    let off = Outliers { consecutive_errors: 0, consecutive_gateway_failures: 0, ..Outliers::default() };
    service.ports[0].traffic = std::sync::Arc::new(judged_by(off));
    assert_eq!(probe(&service), Some(outlier::Change::Returned));
}

/// So many requests to each endpoint, of which so many of a hundred fail, in an interval; who is ejected for that.
fn ejected_by_rate(setting: SuccessRate, most_ejected: u8, figures: &[(u32, u32)]) -> Vec<String> {
    let outliers = Outliers {
        consecutive_errors: 0,
        consecutive_gateway_failures: 0,
        success_rate: Some(setting),
        most_ejected,
        ..Outliers::default()
    };
    let service = ready_with(judged_by(outliers), figures.len());
    let (port, start) = (&service.ports[0], Instant::now());
    // The first look is what the second one is compared with.
    assert_eq!(success_rate::compare(port, start, || 0.0), []);
    for (endpoint, (requests, failing)) in port.endpoints.iter().zip(figures) {
        for number in 0..*requests {
            let verdict = if number * failing / 100 == (number + 1) * failing / 100 {
                Verdict::Good
            } else {
                Verdict::ServerError
            };
            assert_eq!(outlier::judge(port, endpoint, verdict, start, 0.0), None);
        }
    }
    assert_eq!(success_rate::compare(port, start + setting.interval / 2, || 0.0), [], "it is too early");
    let changes = success_rate::compare(port, start + setting.interval, || 0.0);
    assert_eq!(
        success_rate::compare(port, start + setting.interval * 2, || 0.0),
        [],
        "nothing has come since"
    );
    for (address, change) in &changes {
        let standing = port.candidate(*address).unwrap().load.standing();
        assert_eq!(standing, Standing::Ejected, "{change:?}");
    }
    changes.into_iter().map(|(address, change)| format!("{} {change:?}", address.ip())).collect()
}

#[test]
fn an_endpoint_that_answers_well_less_often_than_the_others_is_left_alone() {
    let setting = SuccessRate::default();
    let out = |last: u8| format!("10.1.0.{last} Ejected {{ reason: LowSuccessRate, lasts: 10s }}");
    let with = |figures: &[(u32, u32)]| ejected_by_rate(setting, 50, figures);
    let good = [(200, 0); 6];
    assert_eq!(with(&good), [""; 0]);
    assert_eq!(with(&[&good[..5], &[(200, 50)]].concat()), [out(6)]);
    assert_eq!(with(&[&good[..5], &[(200, 3)]].concat()), [""; 0], "little worse is not an outlier");
    assert_eq!(with(&[&good[..5], &[(99, 50)]].concat()), [""; 0], "it has too few requests");
    assert_eq!(with(&[&good[..3], &[(200, 50)]].concat()), [""; 0], "they are too few");
    assert_eq!(with(&[(200, 50); 6]), [""; 0], "all are as bad");
    assert_eq!(
        with(&[(200, 20), (200, 30), (200, 40), (200, 50), (200, 60)]),
        [""; 0],
        "they are all different"
    );
    let two = [&[(200, 90), (200, 80)], &[(200, 0); 10][..]].concat();
    assert_eq!(with(&two), [out(1), out(2)]);
    assert_eq!(ejected_by_rate(setting, 10, &two), [out(1)], "no more than may be");
    let strict = SuccessRate { deviations: 500, least_endpoints: 2, least_requests: 10, ..setting };
    assert_eq!(ejected_by_rate(strict, 50, &[(10, 0), (10, 0), (10, 50)]), [out(3)]);
}

//! Connections and the endpoints that they get, as tables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use expect_test::{Expect, expect};

use super::outlier::Verdict;
use super::*;
use crate::model::{
    Endpoint, EndpointLoad, NodeInfo, ObjectRef, Service, ServicePort, SessionAffinity, Standing,
    TrafficDistribution, TrafficScope,
};

/// A Service on port 80 with these endpoints, one a line, seen from node n1 in zone z1. A line is an address and
/// words: `ready`, `serving`, `terminating`, `node=`, `zone=`, `for-node=`, `for-zone=`.
fn service(scope: TrafficScope, distribution: TrafficDistribution, endpoints: &str) -> Service {
    let mut endpoints: Vec<Endpoint> =
        endpoints.lines().map(str::trim).filter(|line| !line.is_empty()).map(endpoint).collect();
    endpoints.sort_by_key(|endpoint| endpoint.address);
    let node = NodeInfo { name: "n1".into(), zone: Some("z1".into()) };
    Service {
        id: ObjectRef::new("shop", "web"),
        addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            port: 80,
            app_protocol: None,
            candidates: candidates(&endpoints, scope, distribution, &node),
            traffic: std::sync::Arc::default(),
            endpoints: endpoints.into(),
        }],
        session_affinity: SessionAffinity::None,
        internal_traffic: scope,
        distribution,
        load: Default::default(),
    }
}

/// One with so many endpoints that are ready.
pub(super) fn ready(endpoints: usize) -> Service {
    let lines: String = (1..=endpoints).map(|number| format!("10.1.0.{number}:80 ready\n")).collect();
    service(Cluster, Anywhere, &lines)
}

fn endpoint(line: &str) -> Endpoint {
    let (address, words) = line.split_once(' ').unwrap_or((line, ""));
    let has = |word: &str| words.split(' ').any(|it| it == word);
    let value = |key: &str| words.split(' ').find_map(|it| it.strip_prefix(key));
    Endpoint {
        address: address.parse().unwrap(),
        ready: has("ready"),
        serving: has("ready") || has("serving"),
        terminating: has("terminating"),
        node: value("node=").map(Into::into),
        zone: value("zone=").map(Into::into),
        for_zones: value("for-zone=").map(Into::into).into_iter().collect(),
        for_nodes: value("for-node=").map(Into::into).into_iter().collect(),
        workload: None,
        load: EndpointLoad::default(),
    }
}

fn chosen(service: &Service, dialled: &str, excluding: &[SocketAddr]) -> Result<Vec<String>, NoEndpoint> {
    let affinity = AffinityTable::new(0);
    let request = Request {
        client: "10.1.0.1".parse().unwrap(),
        dialled: dialled.parse().unwrap(),
        excluding,
        carries: Carries::Connection,
    };
    let mut all = BTreeMap::new();
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..200 {
        let endpoint = select(service, &request, &affinity, Instant::now(), random.u64(..))?;
        *all.entry(endpoint.address).or_insert(0) += 1;
    }
    Ok(all.into_keys().map(|address| address.to_string()).collect())
}

/// Which endpoints are chosen, over many tries and for each of the dialled addresses.
fn check(scope: TrafficScope, distribution: TrafficDistribution, endpoints: &str, expected: Expect) {
    let service = service(scope, distribution, endpoints);
    let mut lines = String::new();
    for dialled in ["10.0.0.1:80", "[fd00::1]:80"] {
        let outcome = match chosen(&service, dialled, &[]) {
            Ok(all) => all.join(" "),
            Err(error) => error.to_string(),
        };
        lines += &format!("{dialled} -> {outcome}\n");
    }
    expected.assert_eq(&lines);
}

use TrafficDistribution::{Anywhere, PreferSameNode, PreferSameZone};
use TrafficScope::{Cluster, Local};

#[test]
fn readiness_and_family() {
    check(
        Cluster,
        Anywhere,
        "",
        expect![[r#"
        10.0.0.1:80 -> shop/web:80: the Service has no endpoints of the dialled address family
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
    check(
        Cluster,
        Anywhere,
        "10.1.0.1:8080 ready\n10.1.0.2:8080 serving terminating\n[fd01::1]:8080",
        expect![[r#"
            10.0.0.1:80 -> 10.1.0.1:8080
            [fd00::1]:80 -> shop/web:80: no endpoint is ready
        "#]],
    );
    check(
        Cluster,
        Anywhere,
        "10.1.0.1:8080\n10.1.0.2:8080 serving terminating\n10.1.0.3:8080 serving\n[fd01::1]:8080 ready",
        expect![[r#"
            10.0.0.1:80 -> 10.1.0.2:8080
            [fd00::1]:80 -> [fd01::1]:8080
        "#]],
    );
}

#[test]
fn local_traffic() {
    let two = "10.1.0.1:80 ready node=n1\n10.1.0.2:80 ready node=n2\n[fd01::2]:80 ready node=n2";
    check(
        Local,
        Anywhere,
        two,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80
        [fd00::1]:80 -> shop/web:80: internalTrafficPolicy is Local and no endpoint of this node is ready
    "#]],
    );
    let ending = "10.1.0.1:80 serving terminating node=n1\n10.1.0.2:80 ready node=n2";
    check(
        Local,
        PreferSameZone,
        ending,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
}

#[test]
fn distribution() {
    let three = "10.1.0.1:80 ready node=n1 zone=z1\n10.1.0.2:80 ready node=n2 zone=z1\n10.1.0.3:80 ready node=n3 zone=z2
        [fd01::3]:80 ready node=n3 zone=z2";
    check(
        Cluster,
        Anywhere,
        three,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80 10.1.0.2:80 10.1.0.3:80
        [fd00::1]:80 -> [fd01::3]:80
    "#]],
    );
    check(
        Cluster,
        PreferSameZone,
        three,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80 10.1.0.2:80
        [fd00::1]:80 -> [fd01::3]:80
    "#]],
    );
    check(
        Cluster,
        PreferSameNode,
        three,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80
        [fd00::1]:80 -> [fd01::3]:80
    "#]],
    );
}

#[test]
fn hints() {
    let zones = "10.1.0.1:80 ready node=n1 for-zone=z2\n10.1.0.2:80 ready for-zone=z1\n10.1.0.3:80 serving terminating";
    check(
        Cluster,
        PreferSameNode,
        zones,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.2:80
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
    let nodes = "10.1.0.1:80 ready for-zone=z1 for-node=n1\n10.1.0.2:80 ready for-zone=z1 for-node=n2";
    check(
        Cluster,
        Anywhere,
        nodes,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
    let not_all = "10.1.0.1:80 ready for-zone=z1\n10.1.0.2:80 ready";
    check(
        Cluster,
        Anywhere,
        not_all,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80 10.1.0.2:80
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
    let none_here = "10.1.0.1:80 ready for-zone=z8 zone=z1\n10.1.0.2:80 ready for-zone=z9";
    check(
        Cluster,
        PreferSameZone,
        none_here,
        expect![[r#"
        10.0.0.1:80 -> 10.1.0.1:80 10.1.0.2:80
        [fd00::1]:80 -> shop/web:80: the Service has no endpoints of the dialled address family
    "#]],
    );
}

#[test]
fn retries_go_elsewhere() {
    let service = service(Cluster, Anywhere, "10.1.0.1:80 ready\n10.1.0.2:80 ready\n10.1.0.3:80 ready");
    let tried: Vec<SocketAddr> =
        ["10.1.0.3:80", "10.1.0.1:80", "10.1.0.2:80"].map(|it| it.parse().unwrap()).into();
    assert_eq!(chosen(&service, "10.0.0.1:80", &tried[..1]).unwrap(), ["10.1.0.1:80", "10.1.0.2:80"]);
    assert_eq!(chosen(&service, "10.0.0.1:80", &tried[..2]).unwrap(), ["10.1.0.2:80"]);
    let error = |dialled| chosen(&service, dialled, &tried).unwrap_err().to_string();
    expect!["shop/web:80: every endpoint has been tried"].assert_eq(&error("[::ffff:10.0.0.1]:80"));
    expect!["shop/web:81: the Service has no such TCP port"].assert_eq(&error("10.0.0.1:81"));
}

/// Power of two choices: the spread stays within a few connections, which chance alone would not keep.
#[test]
fn connections_spread_evenly() {
    let endpoints: String = (1..=20).map(|number| format!("10.1.0.{number}:80 ready\n")).collect();
    let service = service(Cluster, Anywhere, &endpoints);
    let affinity = AffinityTable::new(0);
    let request = Request {
        client: "10.1.0.1".parse().unwrap(),
        dialled: "10.0.0.1:80".parse().unwrap(),
        excluding: &[],
        carries: Carries::Connection,
    };
    let mut random = fastrand::Rng::with_seed(1);
    let open: Vec<_> = (0..2_000)
        .map(|_| select(&service, &request, &affinity, Instant::now(), random.u64(..)).unwrap().load.enter())
        .collect();
    let loads: Vec<u32> = service.ports[0].endpoints.iter().map(|it| it.load.open()).collect();
    assert!(loads.iter().all(|load| (97..=103).contains(load)), "{loads:?}");
    drop(open);
    assert!(service.ports[0].endpoints.iter().all(|it| it.load.open() == 0));
}

#[test]
fn sessions() {
    let timeout = Duration::from_secs(60);
    let mut service = service(Cluster, Anywhere, "10.1.0.1:80 ready\n10.1.0.2:80 ready\n10.1.0.3:80 ready");
    service.session_affinity = SessionAffinity::ClientIp { timeout };
    let affinity = AffinityTable::new(1_000);
    let start = Instant::now();
    let mut random = fastrand::Rng::with_seed(1);
    let mut at = |service: &Service, seconds: u64, client: &str, excluding: &[SocketAddr]| {
        let request = Request {
            client: client.parse().unwrap(),
            dialled: "10.0.0.1:80".parse().unwrap(),
            excluding,
            carries: Carries::Connection,
        };
        let now = start + Duration::from_secs(seconds);
        select(service, &request, &affinity, now, random.u64(..)).unwrap().address
    };
    let first = at(&service, 0, "10.1.0.9", &[]);
    // Each connection renews the session.
    assert!((0..20).all(|step| at(&service, step * 50, "10.1.0.9", &[]) == first));
    assert!((0..20).any(|client| at(&service, 950, &format!("10.2.0.{client}"), &[]) != first));
    // After a failure, and from then on.
    let second = at(&service, 951, "10.1.0.9", &[first]);
    assert_ne!(first, second);
    assert_eq!(at(&service, 952, "10.1.0.9", &[]), second);
    // Its endpoint is gone.
    let index = service.ports[0].endpoints.iter().position(|it| it.address == second).unwrap() as u32;
    service.ports[0].candidates.v4 = (0..3).filter(|it| *it != index).collect();
    assert_ne!(at(&service, 953, "10.1.0.9", &[]), second);
    // Too long ago.
    service.ports[0].candidates.v4 = (0..3).collect();
    let sent: std::collections::BTreeSet<_> =
        (0..50).map(|step| at(&service, 10_000 + step * 61, "10.1.0.9", &[])).collect();
    assert_eq!(sent.len(), 3);
}

/// Several worker threads take the first connections of one client at the same time.
#[test]
fn a_clients_first_connections_are_decided_one_after_the_other() {
    let (table, id, now) = (AffinityTable::new(1_000), ObjectRef::new("shop", "web"), Instant::now());
    let client = (&id, 80, "10.1.0.9".parse().unwrap());
    let send = |choose: &dyn Fn(Option<SocketAddr>)| {
        let endpoint = endpoint("10.1.0.1:80 ready");
        let chosen = table.send(client, Duration::from_secs(60), now, |last| {
            choose(last);
            Some(&endpoint)
        });
        chosen.unwrap().address
    };
    let begun = std::sync::Barrier::new(2);
    let seen = std::sync::Mutex::new(None);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            begun.wait();
            send(&|last| *seen.lock().unwrap() = last)
        });
        let first = send(&|_| {
            begun.wait();
            // Time for the second one to be decided, if nothing held it.
            std::thread::sleep(Duration::from_millis(100));
        });
        second.join().unwrap();
        assert_eq!(*seen.lock().unwrap(), Some(first));
    });
}

#[test]
fn the_affinity_table_is_bounded() {
    let table = AffinityTable::new(1_000);
    let (id, now) = (ObjectRef::new("shop", "web"), Instant::now());
    let endpoint = endpoint("10.1.0.1:80 ready");
    let send = |client: u32, choose: fn(&Endpoint, Option<SocketAddr>) -> Option<&Endpoint>| {
        let client = (&id, 80, std::net::Ipv4Addr::from(client).into());
        table.send(client, Duration::from_secs(1), now, |last| choose(&endpoint, last)).is_some()
    };
    for client in 0..100_000 {
        assert!(send(client, |endpoint, _| Some(endpoint)));
    }
    assert!((400..=1_000).contains(&table.len()), "{}", table.len());
    assert!(send(99_999, |endpoint, last| last.map(|_| endpoint)), "the last one is remembered");
}

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

#[test]
fn requests_pass_over_what_is_full_and_fail_where_all_is() {
    let service = ready(2);
    let ask = |carries| {
        let request = Request {
            client: "10.1.0.9".parse().unwrap(),
            dialled: "10.0.0.1:80".parse().unwrap(),
            excluding: &[],
            carries,
        };
        let chosen = select(&service, &request, &AffinityTable::new(0), Instant::now(), 0);
        chosen.map(|endpoint| endpoint.address.to_string()).unwrap_or_else(|none| none.to_string())
    };
    let [one, two] = [0, 1].map(|index| &service.ports[0].endpoints[index].load);
    let mut first: Vec<_> = (0..MOST_WAITING).map(|_| one.wait()).collect();
    assert_eq!(ask(Carries::Request), "10.1.0.2:80");
    let second: Vec<_> = (0..MOST_WAITING).map(|_| two.wait()).collect();
    assert_eq!(ask(Carries::Request), "shop/web:80: too many requests wait for every endpoint");
    assert!(ask(Carries::Connection).ends_with(":80"), "connections are not concerned");
    first.pop();
    assert_eq!(ask(Carries::Request), "10.1.0.1:80");
    drop((first, second));
    assert_eq!([one.waiting(), two.waiting()], [0, 0]);
}

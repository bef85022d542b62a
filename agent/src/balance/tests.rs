//! Connections and the endpoints that they get, as tables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use expect_test::{Expect, expect};

use super::*;
use crate::model::{
    Endpoint, EndpointLoad, NodeInfo, ObjectRef, Service, ServicePort, SessionAffinity, TrafficDistribution,
    TrafficScope, TrafficSettings,
};

/// A Service on port 80 with these endpoints, one a line, seen from node n1 in zone z1. A line is an address and
/// words: `ready`, `serving`, `terminating`, `node=`, `zone=`, `for-node=`, `for-zone=`.
pub(super) fn service(scope: TrafficScope, distribution: TrafficDistribution, endpoints: &str) -> Service {
    service_with(TrafficSettings::default(), scope, distribution, endpoints)
}

/// One whose port is treated like this.
pub(super) fn service_with(
    traffic: TrafficSettings,
    scope: TrafficScope,
    distribution: TrafficDistribution,
    endpoints: &str,
) -> Service {
    let mut endpoints: Vec<Endpoint> =
        endpoints.lines().map(str::trim).filter(|line| !line.is_empty()).map(endpoint).collect();
    endpoints.sort_by_key(|endpoint| endpoint.address);
    let node = NodeInfo { name: "n1".into(), zone: Some("z1".into()) };
    let topology = Topology { scope, distribution, node: &node };
    Service {
        id: ObjectRef::new("shop", "web"),
        addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            port: 80,
            app_protocol: None,
            candidates: candidates(&endpoints, topology, &traffic.balancing, None),
            traffic: std::sync::Arc::new(traffic),
            endpoints: endpoints.into(),
            load: Default::default(),
        }],
        session_affinity: SessionAffinity::None,
        internal_traffic: scope,
        distribution,
        load: Default::default(),
    }
}

/// One with so many endpoints that are ready.
pub(super) fn ready(endpoints: usize) -> Service {
    ready_with(TrafficSettings::default(), endpoints)
}

/// One with so many endpoints that are ready, whose port is treated like this.
pub(super) fn ready_with(traffic: TrafficSettings, endpoints: usize) -> Service {
    let lines: String = (1..=endpoints).map(|number| format!("10.1.0.{number}:80 ready\n")).collect();
    service_with(traffic, Cluster, Anywhere, &lines)
}

pub(super) fn endpoint(line: &str) -> Endpoint {
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

pub(super) fn chosen(
    service: &Service,
    dialled: &str,
    excluding: &[SocketAddr],
) -> Result<Vec<String>, NoEndpoint> {
    let affinity = AffinityTable::new(0);
    let request = Request {
        client: "10.1.0.1".parse().unwrap(),
        dialled: dialled.parse().unwrap(),
        excluding,
        carries: Carries::Connection,
        hash: None,
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
        hash: None,
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
            hash: None,
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
    service.ports[0].candidates.v4 = (0..3).filter(|it| *it != index).collect::<Vec<_>>().into();
    assert_ne!(at(&service, 953, "10.1.0.9", &[]), second);
    // Too long ago.
    service.ports[0].candidates.v4 = [0, 1, 2].into();
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

#[test]
fn requests_pass_over_what_is_full_and_fail_where_all_is() {
    let service = ready(2);
    let ask = |carries| {
        let request = Request {
            client: "10.1.0.9".parse().unwrap(),
            dialled: "10.0.0.1:80".parse().unwrap(),
            excluding: &[],
            carries,
            hash: None,
        };
        let chosen = select(&service, &request, &AffinityTable::new(0), Instant::now(), 0);
        chosen.map(|endpoint| endpoint.address.to_string()).unwrap_or_else(|none| none.to_string())
    };
    let [one, two] = [0, 1].map(|index| &service.ports[0].endpoints[index].load);
    let mut first: Vec<_> = (0..1_024).map(|_| one.wait()).collect();
    assert_eq!(ask(Carries::Request), "10.1.0.2:80");
    let second: Vec<_> = (0..1_024).map(|_| two.wait()).collect();
    assert_eq!(ask(Carries::Request), "shop/web:80: too many requests wait for every endpoint");
    assert!(ask(Carries::Connection).ends_with(":80"), "connections are not concerned");
    first.pop();
    assert_eq!(ask(Carries::Request), "10.1.0.1:80");
    drop((first, second));
    assert_eq!([one.waiting(), two.waiting()], [0, 0]);
}

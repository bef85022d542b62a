//! The algorithms, one by one, and what is passed over by all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::balance::outlier::{Verdict, judge};
use crate::balance::tests::{ready_with, service_with};
use crate::balance::{Topology, candidates};
use crate::model::TrafficDistribution::{Anywhere, PreferSameNode, PreferSameZone};
use crate::model::TrafficScope::Cluster;
use crate::model::{Balancing, HashKey, NodeInfo, Outliers, TrafficDistribution, TrafficSettings};

fn by(algorithm: Algorithm) -> TrafficSettings {
    let balancing = Balancing { algorithm, ..Balancing::default() };
    TrafficSettings { balancing, ..TrafficSettings::default() }
}

fn by_hashes() -> TrafficSettings {
    by(Algorithm::ConsistentHash(vec![HashKey::SourceAddress]))
}

/// Somebody who asks, one time after the other.
struct Asker {
    affinity: AffinityTable,
    random: fastrand::Rng,
    now: Instant,
    carries: Carries,
}

impl Asker {
    fn of(carries: Carries) -> Self {
        let (affinity, random) = (AffinityTable::new(0), fastrand::Rng::with_seed(7));
        Self { affinity, random, now: Instant::now(), carries }
    }

    fn ask(&mut self, service: &Service, excluding: &[SocketAddr], hash: Option<u64>) -> SocketAddr {
        let (client, dialled) = ("10.1.0.9".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
        let request = Request { client, dialled, excluding, carries: self.carries, hash };
        select(service, &request, &self.affinity, self.now, self.random.u64(..)).unwrap().address
    }

    /// The last numbers of the addresses that so many get.
    fn turns(&mut self, service: &Service, count: usize) -> Vec<u8> {
        (0..count).map(|_| last_of(self.ask(service, &[], None))).collect()
    }

    fn counts(&mut self, service: &Service, count: usize) -> BTreeMap<u8, usize> {
        let mut counts = BTreeMap::new();
        self.turns(service, count).into_iter().for_each(|last| *counts.entry(last).or_default() += 1);
        counts
    }
}

fn last_of(address: SocketAddr) -> u8 {
    match address.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    }
}

fn eject(service: &Service, index: usize, now: Instant) {
    let port = &service.ports[0];
    let failures = port.traffic.outliers.consecutive_errors;
    for _ in 0..failures {
        judge(port, &port.endpoints[index], Verdict::ServerError, now, 0.0);
    }
    assert_eq!(port.endpoints[index].load.standing(), Standing::Ejected);
}

#[test]
fn turns_are_taken_by_all_however_endpoints_come_and_go() {
    let mut service = ready_with(by(Algorithm::RoundRobin), 4);
    let mut asker = Asker::of(Carries::Request);
    let turns = asker.turns(&service, 8);
    let begins = turns[0];
    let in_order = |begins: u8| (0..8).map(|step| (begins - 1 + step) % 4 + 1).collect::<Vec<u8>>();
    assert_eq!(turns, in_order(begins));
    // One goes, and comes back: nobody is asked twice for that, nor left out.
    while asker.turns(&service, 1) != [2] {}
    service.ports[0].candidates.v4 = [0, 1, 3].into();
    assert_eq!(asker.turns(&service, 4), [4, 1, 2, 4]);
    service.ports[0].candidates.v4 = [0, 1, 2, 3].into();
    assert_eq!(asker.turns(&service, 5), [1, 2, 3, 4, 1]);
    // A snapshot that comes meanwhile shares the figures.
    let newer = service.clone();
    assert_eq!(asker.turns(&newer, 2), [2, 3]);
    assert_eq!(asker.turns(&service, 2), [4, 1]);
    eject(&service, 1, asker.now);
    assert_eq!(asker.turns(&service, 4), [3, 4, 1, 3]);
    let tried = ["10.1.0.4:80".parse().unwrap()];
    assert_eq!(last_of(asker.ask(&service, &tried, None)), 1, "what was tried is passed over");
    // After its time it is tried once, and not again before there is a verdict.
    asker.now += Duration::from_secs(12);
    assert_eq!(asker.turns(&service, 5), [2, 3, 4, 1, 3]);
}

#[test]
fn whose_turn_it_is_before_one_that_is_to_be_tried_again_does_not_cost_that_its_chance() {
    for before in [1, 3, 4] {
        let service = ready_with(by(Algorithm::RoundRobin), 4);
        let mut asker = Asker::of(Carries::Request);
        eject(&service, 1, asker.now);
        while asker.turns(&service, 1) != [before] {}
        asker.now += Duration::from_secs(12);
        let turns = asker.turns(&service, 4);
        assert_eq!(turns.iter().filter(|turn| **turn == 2).count(), 1, "after {before}: {turns:?}");
    }
}

#[test]
fn two_threads_that_take_turns_share_the_port_evenly() {
    let service = ready_with(by(Algorithm::RoundRobin), 5);
    let counts = std::thread::scope(|scope| {
        let run = || Asker::of(Carries::Connection).counts(&service, 1_000);
        let running = [scope.spawn(run), scope.spawn(run)];
        running.map(|thread| thread.join().unwrap())
    });
    for last in 1..=5 {
        assert_eq!(counts[0][&last] + counts[1][&last], 400, "{counts:?}");
    }
}

#[test]
fn any_is_any() {
    let counts = Asker::of(Carries::Request).counts(&ready_with(by(Algorithm::Random), 4), 4_000);
    assert!(counts.len() == 4 && counts.values().all(|count| (900..1_100).contains(count)), "{counts:?}");
}

#[test]
fn the_least_busy_one_counts_requests_and_no_time() {
    let service = ready_with(by(Algorithm::LeastRequest), 3);
    let mut asker = Asker::of(Carries::Request);
    let [slow, busy, other] = [0, 1, 2].map(|index| &service.ports[0].endpoints[index].load);
    latency::observe(slow, Duration::from_secs(3), asker.now);
    let _open = [busy.enter(), busy.enter(), other.enter()];
    let counts = asker.counts(&service, 300);
    assert!(counts[&1] > 170 && counts[&3] > 70 && !counts.contains_key(&2), "{counts:?}");
}

#[test]
fn what_is_new_gets_less_by_every_algorithm_that_may_choose() {
    for algorithm in [Algorithm::LeastRequest, Algorithm::Random, Algorithm::RoundRobin] {
        for (slow_start, least, most) in [(60, 20, 130), (0, 300, 700)] {
            let mut settings = by(algorithm.clone());
            settings.balancing.slow_start = Duration::from_secs(slow_start);
            let service = ready_with(settings, 2);
            let mut asker = Asker::of(Carries::Request);
            service.ports[0].endpoints[0].load.first_seen(asker.now);
            asker.now += Duration::from_secs(60);
            let counts = asker.counts(&service, 1_000);
            let new = counts.get(&2).copied().unwrap_or_default();
            // Of those with the least requests it is never the one, as long as nothing is under way.
            let least = if algorithm == Algorithm::LeastRequest && slow_start > 0 { 0 } else { least };
            let most = if algorithm == Algorithm::LeastRequest && slow_start == 0 { 1_000 } else { most };
            assert!((least..=most).contains(&new), "{algorithm:?} {slow_start} s: {new} of 1,000");
        }
    }
}

#[test]
fn alike_requests_go_to_one_endpoint_and_the_others_stay_when_one_fails() {
    let service = ready_with(by_hashes(), 10);
    let mut asker = Asker::of(Carries::Request);
    let mut places = |service: &Service, excluding: &[SocketAddr]| -> Vec<SocketAddr> {
        (0..2_000)
            .map(|user| {
                asker.ask(service, excluding, Some(crate::balance::hash(&[user as u8, (user >> 8) as u8])))
            })
            .collect()
    };
    let before = places(&service, &[]);
    assert_eq!(before, places(&service, &[]), "twice the same");
    let bad = service.ports[0].endpoints[3].address;
    eject(&service, 3, Instant::now());
    let after = places(&service, &[]);
    let others = before.iter().zip(&after).filter(|(before, _)| **before != bad);
    assert!(others.clone().all(|(before, after)| before == after), "nobody else moves");
    let moved: Vec<_> =
        before.iter().zip(&after).filter(|(before, _)| **before == bad).map(|it| it.1).collect();
    let mut shares = BTreeMap::new();
    moved.iter().for_each(|address| *shares.entry(**address).or_insert(0) += 1);
    assert!(shares.len() == 9 && shares.values().all(|count| *count < moved.len() / 4), "{shares:?}");
    assert_eq!(after, places(&service, &[bad]), "one that was tried is passed over like one that is ejected");
    // Who has nothing that is hashed goes to any.
    let any: BTreeSet<_> = Asker::of(Carries::Connection).turns(&service, 400).into_iter().collect();
    assert_eq!(any.len(), 9);
}

#[test]
fn a_full_endpoint_is_passed_over_by_hashes_for_as_long_as_it_is() {
    let mut settings = by_hashes();
    settings.caps.pending = Some(2);
    let service = ready_with(settings, 3);
    let mut asker = Asker::of(Carries::Request);
    let first = asker.ask(&service, &[], Some(5));
    let load = &service.ports[0].candidate(first).unwrap().load;
    let waiting = [load.wait(), load.wait()];
    let second = asker.ask(&service, &[], Some(5));
    assert_ne!(first, second);
    assert!((0..9).all(|_| asker.ask(&service, &[], Some(5)) == second));
    drop(waiting);
    assert_eq!(asker.ask(&service, &[], Some(5)), first);
}

#[test]
fn a_table_is_made_for_those_who_want_it_and_kept_while_the_endpoints_are_the_same() {
    assert!(ready_with(TrafficSettings::default(), 3).ports[0].candidates.v4.table.is_none());
    let service = ready_with(by_hashes(), 3);
    let (port, node) = (&service.ports[0], NodeInfo { name: "n1".into(), zone: None });
    let topology = Topology { scope: Cluster, distribution: Anywhere, node: &node };
    let again = |endpoints: &[Endpoint]| {
        let made = candidates(endpoints, topology, &port.traffic.balancing, Some(&port.candidates));
        made.v4.table.unwrap()
    };
    let (old, same) = (port.candidates.v4.table.as_ref().unwrap(), again(&port.endpoints));
    assert!(std::sync::Arc::ptr_eq(&old.slots, &same.slots));
    assert!(!std::sync::Arc::ptr_eq(&old.slots, &again(&port.endpoints[..2]).slots));
    assert!(port.candidates.v6.table.is_none());
}

/// Of four near endpoints and two that are far away, which are used; and again with the first so many ejected.
fn used(distribution: TrafficDistribution, below: u8, near: &str, ejected: usize) -> Vec<u8> {
    let mut settings = by(Algorithm::Random);
    settings.balancing.spill_over_below = below;
    settings.outliers = Outliers { most_ejected: 100, panic_above: 100, ..Outliers::default() };
    let far = "10.1.0.8:80 ready node=n8 zone=z2\n10.1.0.9:80 ready node=n9 zone=z2";
    let service = service_with(settings, Cluster, distribution, &format!("{near}\n{far}"));
    let mut asker = Asker::of(Carries::Request);
    (0..ejected).for_each(|index| eject(&service, index, asker.now));
    asker.turns(&service, 400).into_iter().collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn what_is_far_away_helps_out_when_too_little_of_what_is_near_is_fit() {
    let four = "10.1.0.1:80 ready node=n1 zone=z1\n10.1.0.2:80 ready node=n1 zone=z1
        10.1.0.3:80 ready node=n1 zone=z1\n10.1.0.4:80 ready node=n1 zone=z1";
    let unready = |from: usize| {
        let lines = four.lines().enumerate();
        let lines =
            lines.map(|(index, line)| if index < from { line.into() } else { line.replace(" ready", "") });
        lines.collect::<Vec<_>>().join("\n")
    };
    let ending = unready(2)
        .replace("10.1.0.3:80", "10.1.0.3:80 terminating")
        .replace("10.1.0.4:80", "10.1.0.4:80 terminating");
    for distribution in [PreferSameZone, PreferSameNode] {
        for (below, near, ejected, expected) in [
            (70, four, 0, &[1, 2, 3, 4][..]),
            (70, four, 1, &[2, 3, 4]),
            (70, four, 2, &[3, 4, 8, 9]),
            (50, four, 2, &[3, 4]),
            (100, four, 1, &[2, 3, 4, 8, 9]),
            (0, four, 3, &[4]),
            // What is not ready is missed like what is ejected, but not what is on its way out.
            (70, &unready(3), 0, &[1, 2, 3]),
            (70, &unready(2), 0, &[1, 2, 8, 9]),
            (70, &unready(3), 1, &[2, 3, 8, 9]),
            (0, &unready(1), 0, &[1]),
            (70, &ending, 0, &[1, 2]),
            (70, &unready(0), 0, &[8, 9]),
        ] {
            assert_eq!(
                used(distribution, below, near, ejected),
                expected,
                "{distribution:?} {below} {near} {ejected}"
            );
        }
    }
    assert_eq!(used(Anywhere, 70, four, 3), [4, 8, 9], "nothing is near");
}

#[test]
fn who_was_sent_far_away_stays_there_and_others_come_back() {
    let mut settings = by(Algorithm::Random);
    settings.balancing.spill_over_below = 70;
    settings.outliers.most_ejected = 100;
    let lines = "10.1.0.1:80 ready zone=z1\n10.1.0.2:80 ready zone=z1\n10.1.0.8:80 ready zone=z2";
    let service = service_with(settings, Cluster, PreferSameZone, lines);
    let mut asker = Asker::of(Carries::Request);
    let port = &service.ports[0];
    eject(&service, 0, asker.now);
    assert!(asker.counts(&service, 100).contains_key(&8));
    let far = "10.1.0.8:80".parse().unwrap();
    judge(port, &port.endpoints[0], Verdict::Good, asker.now + Duration::from_secs(11), 0.0);
    assert!(!asker.counts(&service, 100).contains_key(&8));
    assert!(!port.load.is_wary(), "nobody looks at all endpoints any more");
    assert!(kept(port, far, Carries::Request, asker.now).is_some(), "a session");
    // One that another Service has ejected is found out by whoever meets it.
    eject(&service, 1, asker.now);
    port.load.set_wary(false);
    asker.counts(&service, 20);
    assert!(asker.counts(&service, 100).contains_key(&8));
}

#[test]
#[ignore = "a measurement"]
fn measure() {
    for (algorithm, hash) in [
        (Algorithm::PeakEwma, None),
        (Algorithm::LeastRequest, None),
        (Algorithm::RoundRobin, None),
        (Algorithm::Random, None),
        (Algorithm::ConsistentHash(vec![HashKey::SourceAddress]), Some(5)),
    ] {
        let (settings, began) = (by(algorithm.clone()), Instant::now());
        let service = ready_with(settings, 100);
        let (made, mut asker, began) = (began.elapsed(), Asker::of(Carries::Request), Instant::now());
        (0..1_000_000).for_each(|_| _ = std::hint::black_box(asker.ask(&service, &[], hash)));
        println!(
            "{algorithm:?}: {} ns to select one, {made:?} to make",
            began.elapsed().as_nanos() / 1_000_000
        );
    }
}

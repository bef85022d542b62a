//! Which of two endpoints is the better one for a request: how long they take to answer, times what they have to do.
//!
//! Peak EWMA, as Finagle and Linkerd have it: a moving average that a slow answer raises at once, and that time and fast answers
//! lower. It goes by what this node's own requests met.

use std::time::{Duration, Instant};

use super::slow_start::{age, weight};
use crate::model::{Endpoint, EndpointLoad, Latency};

/// In this time an answer comes to count a third of what it did.
const DECAY: Duration = Duration::from_secs(10);

/// What is added to the time of each: below it differences are those of the network and of schedulers, not of servers.
const FLOOR: f64 = 0.001;

/// Costs that differ by less are the same: then what there is to do decides, and else chance.
const ALIKE: f64 = 2.0;

/// Of so many pairs, one goes to the costlier of both: who is never asked would be thought slow for long after it is not.
const EXPLORED: u32 = 16;

/// What an answer counts at least that says that the endpoint has too much to do, or none: such come fast.
pub const OVERLOADED: Duration = Duration::from_secs(1);

/// What is given up after longer counts no more: that may be a stream on which nothing had happened yet.
const MOST_GIVEN_UP: Duration = Duration::from_secs(10);

/// The endpoint has answered after so long.
pub fn observe(load: &EndpointLoad, took: Duration, now: Instant) {
    let took = took.as_secs_f64();
    let at = age(load, now);
    load.change_latency(|before| {
        let Some(before) = before else { return Latency::new(took, at) };
        let keeps = decay(before, at);
        let decayed = before.seconds() * keeps;
        let seconds = if took > decayed { took } else { decayed + took * (1.0 - keeps) };
        Latency::new(seconds, at)
    });
}

/// The endpoint had not answered after so long, and is not waited for any longer: what is known is that it takes more. That counts where
/// less is thought of it, or one that answers nothing would seem as fast as one that nobody asks.
pub fn observe_at_least(load: &EndpointLoad, took: Duration, now: Instant) {
    let (took, at) = (took.min(MOST_GIVEN_UP).as_secs_f64(), age(load, now));
    load.change_latency(|before| match before {
        Some(before) if before.seconds() * decay(before, at) >= took => before,
        _ => Latency::new(took, at),
    });
}

/// The better of both for a request; `random` are fresh bits.
pub(super) fn better<'s>(
    first: &'s Endpoint,
    second: &'s Endpoint,
    slow_start: Duration,
    now: Instant,
    random: u32,
) -> &'s Endpoint {
    let [a, b] = [first, second].map(|endpoint| cost(&endpoint.load, slow_start, now));
    if a <= b * ALIKE && b <= a * ALIKE {
        return if second.load.open() < first.load.open() { second } else { first };
    }
    let (cheaper, costlier) = if a < b { (first, second) } else { (second, first) };
    if random.is_multiple_of(EXPLORED) { costlier } else { cheaper }
}

fn cost(load: &EndpointLoad, slow_start: Duration, now: Instant) -> f64 {
    let age = age(load, now);
    let seconds = load.latency().map_or(0.0, |latency| latency.seconds() * decay(latency, age));
    (seconds + FLOOR) * f64::from(load.open() + 1) / weight(load, slow_start, now)
}

/// What is left of a figure at this age of the endpoint.
fn decay(latency: Latency, age: Duration) -> f64 {
    (-age.saturating_sub(latency.at()).as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use super::*;
    use crate::balance::tests::ready;
    use crate::balance::{AffinityTable, Carries, Request, select};
    use crate::model::LoadGuard;

    const SLOW_START: Duration = Duration::from_secs(10);

    /// Requests at a rate for some seconds, to endpoints that take so many milliseconds each, give or take a half, if their clients
    /// are so patient; what share each endpoint got, in percent.
    fn shares(milliseconds: &[u64], patience: Duration, rate: f64, seconds: f64) -> Vec<f64> {
        let service = ready(milliseconds.len());
        let (affinity, mut random) = (AffinityTable::new(0), fastrand::Rng::with_seed(7));
        let start = Instant::now();
        let mut under_way: BinaryHeap<Reverse<(Duration, u64)>> = BinaryHeap::new();
        let mut guards: std::collections::HashMap<u64, (LoadGuard, usize, Duration)> = Default::default();
        let mut counts = vec![0u32; milliseconds.len()];
        let all = (rate * seconds) as u64;
        for number in 0..all {
            let clock = Duration::from_secs_f64(number as f64 / rate);
            while let Some(Reverse((ends, which))) = under_way.peek().copied().filter(|it| it.0.0 <= clock) {
                under_way.pop();
                let (guard, index, took) = guards.remove(&which).unwrap();
                let load = &service.ports[0].endpoints[index].load;
                let now = start + ends;
                if took < patience {
                    observe(load, took, now)
                } else {
                    observe_at_least(load, took, now)
                }
                drop(guard);
            }
            let request = Request {
                client: "10.1.0.9".parse().unwrap(),
                dialled: "10.0.0.1:80".parse().unwrap(),
                excluding: &[],
                carries: Carries::Request,
                hash: None,
            };
            let endpoint = select(&service, &request, &affinity, start + clock, random.u64(..)).unwrap();
            let index =
                service.ports[0].endpoints.iter().position(|it| it.address == endpoint.address).unwrap();
            let took = Duration::from_millis(milliseconds[index]).mul_f64(0.5 + random.f64()).min(patience);
            counts[index] += 1;
            guards.insert(number, (endpoint.load.enter(), index, took));
            under_way.push(Reverse((clock + took, number)));
        }
        counts.iter().map(|count| f64::from(*count) * 100.0 / all as f64).collect()
    }

    #[test]
    fn a_slow_endpoint_gets_a_small_share_and_equal_ones_get_equal_shares() {
        for (milliseconds, rate) in [
            (&[10; 10][..], 100.0),
            (&[10; 10], 5_000.0),
            (&[1; 3], 50.0),
            (&[100; 2], 1.0),
            (&[100; 2], 500.0),
        ] {
            let (shares, fair) =
                (shares(milliseconds, Duration::MAX, rate, 120.0), 100.0 / milliseconds.len() as f64);
            let is_even = |share: &f64| (share - fair).abs() < 0.2 * fair;
            assert!(shares.iter().all(is_even), "{milliseconds:?} at {rate}/s: {shares:?}");
        }
        for (count, others, rate, most) in [
            (10, 10, 100.0, 2.0),
            (10, 10, 5_000.0, 2.0),
            (10, 50, 2_000.0, 2.0),
            (3, 10, 200.0, 6.0),
            (2, 10, 100.0, 9.0),
        ] {
            let mut milliseconds = vec![others; count];
            milliseconds[0] = others * 10;
            let shares = shares(&milliseconds, Duration::MAX, rate, 120.0);
            assert!(shares[0] < most && shares[0] > 0.1, "one of {count} is slow, {rate}/s: {shares:?}");
        }
    }

    #[test]
    fn one_that_never_answers_gets_a_small_share_however_impatient_its_clients_are() {
        const NEVER: u64 = 3_600_000;
        for patience in [300, 1_000, 30_000].map(Duration::from_millis) {
            let shares = shares(&[NEVER, 50, 50], patience, 100.0, 120.0);
            assert!(shares[0] < 10.0, "given up after {patience:?}: {shares:?}");
        }
    }

    #[test]
    fn what_is_given_up_counts_only_where_less_is_known() {
        let (load, start) = (EndpointLoad::default(), Instant::now());
        let known = || load.latency().map_or(0, |latency| (latency.seconds() * 1_000.0).round() as u64);
        for (given_up_after, expected) in [(80, 80), (300, 300), (20, 300), (60_000, 10_000)] {
            observe_at_least(&load, Duration::from_millis(given_up_after), start);
            assert_eq!(known(), expected, "given up after {given_up_after} ms");
        }
    }

    #[test]
    fn slow_answers_count_at_once_and_are_forgotten_slowly() {
        let (load, start) = (EndpointLoad::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let milliseconds = |load: &EndpointLoad, now| {
            (cost(load, SLOW_START, now) * weight(load, SLOW_START, now) * 1_000.0).round()
        };
        assert_eq!(milliseconds(&load, at(0)), 1.0, "nothing is known");
        observe(&load, Duration::from_millis(10), at(0));
        assert_eq!(milliseconds(&load, at(0)), 11.0);
        observe(&load, Duration::from_millis(500), at(1));
        observe(&load, Duration::from_millis(10), at(1));
        assert_eq!(milliseconds(&load, at(1)), 501.0, "one fast answer does not make up for it");
        assert_eq!(milliseconds(&load, at(11)), 185.0);
        for second in 12..60 {
            observe(&load, Duration::from_millis(10), at(second));
        }
        assert!((11.0..16.0).contains(&milliseconds(&load, at(60))), "{}", milliseconds(&load, at(60)));
        assert_eq!(milliseconds(&load, at(4_000)), 1.0, "nothing is known any more");
        let _open = [load.enter(), load.enter()];
        assert_eq!(milliseconds(&load, at(4_000)), 3.0);
    }

    #[test]
    fn what_is_new_gets_its_share_little_by_little() {
        let service = ready(2);
        let [old, new] = [0, 1].map(|index| &service.ports[0].endpoints[index]);
        let (start, took) = (Instant::now(), Duration::from_millis(20));
        observe(&old.load, took, start);
        let mut shares = Vec::new();
        for second in [20, 25, 31] {
            let now = start + Duration::from_secs(second);
            observe(&old.load, took, now);
            observe(&new.load, took, now);
            // Each has one under way: as many as can be told apart.
            let _open = [old.load.enter(), new.load.enter()];
            let chosen = (0..1_600u32)
                .filter(|random| better(new, old, SLOW_START, now, *random).address == new.address);
            shares.push(chosen.count() * 100 / 1_600);
        }
        assert_eq!(shares, [6, 100, 100], "in percent, where it was thought of first");
    }

    #[test]
    #[ignore = "a measurement"]
    fn measure() {
        let (service, affinity, now) = (ready(100), AffinityTable::new(0), Instant::now());
        for endpoint in service.ports[0].endpoints.iter() {
            observe(&endpoint.load, Duration::from_millis(5), now);
        }
        let mut random = fastrand::Rng::with_seed(1);
        for carries in [Carries::Connection, Carries::Request] {
            let request = Request {
                client: "10.1.0.9".parse().unwrap(),
                dialled: "10.0.0.1:80".parse().unwrap(),
                excluding: &[],
                carries,
                hash: None,
            };
            let began = Instant::now();
            for _ in 0..1_000_000 {
                let endpoint = select(&service, &request, &affinity, Instant::now(), random.u64(..)).unwrap();
                std::hint::black_box(endpoint);
            }
            println!("{carries:?}: {} ns to select one", began.elapsed().as_nanos() / 1_000_000);
        }
        let began = Instant::now();
        for _ in 0..1_000_000 {
            observe(&service.ports[0].endpoints[0].load, Duration::from_millis(5), Instant::now());
        }
        println!("{} ns to observe", began.elapsed().as_nanos() / 1_000_000);
    }
}

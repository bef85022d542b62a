//! Who has called in plaintext: whom strict mutual TLS would keep out.
//!
//! What is kept is bounded, in number and in time, and says what it has missed. Callers that strict does not hurt (the kubelet's
//! probes) never come through the agent, and what is refused anyhow is not counted.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, ConnectionFacts, Reporter, Security};
use crate::model::{ObjectRef, Workload};

/// How often old callers are looked for: there are at most [`Plaintext::most`] of them.
const SWEEP: Duration = Duration::from_secs(60);

/// A workload without a pod here for so long, as one that restarts, has been watched all the same.
const GAP: Duration = Duration::from_secs(60);

/// The callers of this node's pods that came in plaintext.
#[derive(Debug)]
pub struct Plaintext {
    /// Since when this agent watches.
    began: Instant,
    most: usize,
    /// How long a caller is remembered after its last connection.
    keeps: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    callers: HashMap<PlaintextCaller, Calls>,
    watched: HashMap<ObjectRef, Watched>,
    missed: Option<Calls>,
    swept: Option<Instant>,
}

/// Who called whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlaintextCaller {
    /// The workload that was called.
    pub destination: ObjectRef,
    /// Its port.
    pub port: u16,
    /// Who called.
    pub source: PlaintextSource,
}

/// Who called, as far as an address tells.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PlaintextSource {
    /// The workload whose pod has the address.
    Workload(ObjectRef),
    /// No pod that is known.
    Address(IpAddr),
}

/// How often something happened, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    /// How many connections were opened.
    pub connections: u64,
    /// When the first was.
    pub first: Instant,
    /// When one was open last.
    pub last: Instant,
}

/// From when to when pods of a workload were enrolled on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// The beginning, or that of the time after the last gap.
    pub since: Instant,
    /// When it was looked at last.
    pub until: Instant,
}

/// What is known at one moment.
#[derive(Clone, Debug)]
pub struct PlaintextReport {
    /// Since when this agent watches.
    pub began: Instant,
    /// How long a caller is remembered after its last connection.
    pub keeps: Duration,
    /// Everybody who called, in order.
    pub callers: Vec<(PlaintextCaller, Calls)>,
    /// Every workload of which there is, or was, an enrolled pod here, in order.
    pub watched: Vec<(ObjectRef, Watched)>,
    /// Those for whom there was no place.
    pub missed: Option<Calls>,
}

impl Plaintext {
    pub(super) fn new(most: usize, keeps: Duration, now: Instant) -> Self {
        Self { began: now, most, keeps, kept: Mutex::default() }
    }

    /// A connection was opened.
    pub(super) fn opened(&self, facts: &ConnectionFacts, now: Instant) {
        self.note(facts, Calls { connections: 1, first: now, last: now });
    }

    /// A connection is still open, however long ago it was opened.
    pub(super) fn is_open(&self, connection: &Connection, now: Instant) {
        let first = now.checked_sub(connection.age()).unwrap_or(now);
        self.note(&connection.facts, Calls { connections: 0, first, last: now });
    }

    fn note(&self, facts: &ConnectionFacts, seen: Calls) {
        let Some(caller) = PlaintextCaller::of(facts) else { return };
        let mut kept = self.lock();
        if kept.callers.len() >= self.most {
            kept.sweep(self.keeps, seen.last);
        }
        let Kept { callers, missed, .. } = &mut *kept;
        let has_place = callers.len() < self.most || callers.contains_key(&caller);
        let calls = match has_place {
            true => callers.entry(caller).or_insert(Calls { connections: 0, ..seen }),
            false => missed.get_or_insert(Calls { connections: 0, ..seen }),
        };
        // One that is open and has been forgotten was counted once.
        calls.connections = (calls.connections + seen.connections).max(1);
        calls.last = calls.last.max(seen.last);
    }

    /// These workloads have enrolled pods here. To be told every few seconds.
    pub fn watches<'w>(&self, enrolled: impl IntoIterator<Item = &'w Workload>, now: Instant) {
        let mut kept = self.lock();
        for workload in enrolled {
            let watched =
                kept.watched.entry(workload.replica_of()).or_insert(Watched { since: now, until: now });
            if now.saturating_duration_since(watched.until) > GAP {
                watched.since = now;
            }
            watched.until = watched.until.max(now);
        }
        kept.sweep(self.keeps, now);
    }

    /// All that is known and young enough.
    pub(super) fn report(&self, now: Instant) -> PlaintextReport {
        let mut kept = self.lock();
        kept.swept = None;
        kept.sweep(self.keeps, now);
        let mut callers: Vec<_> =
            kept.callers.iter().map(|(caller, calls)| (caller.clone(), *calls)).collect();
        let mut watched: Vec<_> = kept.watched.iter().map(|(id, watched)| (id.clone(), *watched)).collect();
        let missed = kept.missed;
        drop(kept);
        callers.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        watched.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        PlaintextReport { began: self.began, keeps: self.keeps, callers, watched, missed }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Forgets what is too old. Most calls return at once.
    fn sweep(&mut self, keeps: Duration, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        let is_young = |last: Instant| now.saturating_duration_since(last) < keeps;
        self.callers.retain(|_, calls| is_young(calls.last));
        self.watched.retain(|_, watched| is_young(watched.until));
        self.missed = self.missed.filter(|missed| is_young(missed.last));
    }
}

impl PlaintextCaller {
    /// None if it is no caller of a pod of this node, or not in plaintext.
    fn of(facts: &ConnectionFacts) -> Option<Self> {
        let is_plaintext = facts.reporter == Reporter::Destination && facts.security == Security::Plaintext;
        let destination = facts.destination.workload.as_ref().filter(|_| is_plaintext)?;
        let source = match &facts.source.workload {
            Some(workload) => PlaintextSource::Workload(workload.replica_of()),
            None => PlaintextSource::Address(facts.source.address.ip().to_canonical()),
        };
        let port = facts.destination.address.port();
        Some(Self { destination: destination.replica_of(), port, source })
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::telemetry::Peer;

    const HOUR: u64 = 3_600;

    /// Each line is an hour and what happens in it: `1 web -> pay:8080`, `1 10.0.0.9 -> pay:8080`, `1 watches pay`.
    fn check(most: usize, asked: u64, lines: &[&str], expected: Expect) {
        let began = Instant::now();
        let at = |hour: &str| began + Duration::from_secs(HOUR * hour.parse::<u64>().unwrap());
        let plaintext = Plaintext::new(most, Duration::from_secs(24 * HOUR), began);
        for line in lines {
            let (hour, what) = line.split_once(' ').unwrap();
            match what.strip_prefix("watches ") {
                Some(name) => plaintext.watches([&*workload(name)], at(hour)),
                None => plaintext.opened(&facts(what), at(hour)),
            }
        }
        let hour = |moment: Instant| moment.duration_since(began).as_secs() / HOUR;
        let calls = |it: &Calls| format!("{} from {} to {}", it.connections, hour(it.first), hour(it.last));
        let report = plaintext.report(at(&asked.to_string()));
        let callers = report.callers.iter().map(|(caller, seen)| {
            let source = match &caller.source {
                PlaintextSource::Workload(id) => id.to_string(),
                PlaintextSource::Address(address) => address.to_string(),
            };
            format!("{source} -> {}:{}: {}\n", caller.destination, caller.port, calls(seen))
        });
        let watched = report.watched.iter().map(|(id, watched)| {
            format!("{id} watched from {} to {}\n", hour(watched.since), hour(watched.until))
        });
        let missed = report.missed.iter().map(|missed| format!("missed {}\n", calls(missed)));
        expected.assert_eq(&callers.chain(watched).chain(missed).collect::<String>());
    }

    fn workload(name: &str) -> std::sync::Arc<Workload> {
        std::sync::Arc::new(Workload {
            uid: name.into(),
            pod: ObjectRef::new("shop", format!("{name}-0")),
            workload: name.into(),
            addresses: Vec::new(),
            node: None,
            ..Workload::example()
        })
    }

    fn facts(call: &str) -> ConnectionFacts {
        let (source, destination) = call.split_once(" -> ").unwrap();
        let (destination, port) = destination.split_once(':').unwrap();
        let at = |address: &str, port: &str| format!("{address}:{port}").parse().unwrap();
        let source = match source.parse::<IpAddr>() {
            Ok(_) => Peer { workload: None, identity: None, address: at(source, "40000") },
            Err(_) => {
                Peer { workload: Some(workload(source)), identity: None, address: at("10.0.0.1", "40000") }
            }
        };
        let address = at("10.0.0.2", port);
        ConnectionFacts {
            reporter: Reporter::Destination,
            client: source.address,
            source,
            destination: Peer { workload: Some(workload(destination)), identity: None, address },
            service: None,
            security: Security::Plaintext,
            dialled: address,
            upstream: None,
            ruling: None,
        }
    }

    #[test]
    fn callers_are_told_apart_by_workload_or_address_and_by_what_they_call() {
        check(
            10,
            3,
            &[
                "0 web -> pay:80",
                "1 10.0.0.9 -> pay:80",
                "2 web -> pay:80",
                "2 web -> pay:81",
                "3 web -> db:80",
            ],
            expect![[r#"
                shop/web -> shop/db:80: 1 from 3 to 3
                shop/web -> shop/pay:80: 2 from 0 to 2
                10.0.0.9 -> shop/pay:80: 1 from 1 to 1
                shop/web -> shop/pay:81: 1 from 2 to 2
            "#]],
        );
    }

    #[test]
    fn who_has_not_called_for_a_day_is_forgotten() {
        check(
            10,
            25,
            &["0 web -> pay:80", "1 web -> db:80", "2 web -> db:80"],
            expect![[r#"
            shop/web -> shop/db:80: 2 from 1 to 2
        "#]],
        );
    }

    #[test]
    fn what_has_no_place_is_counted_as_long_as_it_matters() {
        let lines = ["0 a -> pay:80", "1 b -> pay:80", "1 c -> pay:80", "2 a -> pay:80", "2 d -> pay:80"];
        check(
            2,
            2,
            &lines,
            expect![[r#"
            shop/a -> shop/pay:80: 2 from 0 to 2
            shop/b -> shop/pay:80: 1 from 1 to 1
            missed 2 from 1 to 2
        "#]],
        );
        check(2, 26, &lines, expect![[""]]);
        // The oldest makes room.
        check(
            2,
            25,
            &["0 a -> pay:80", "1 b -> pay:80", "25 c -> pay:80"],
            expect![[r#"
            shop/c -> shop/pay:80: 1 from 25 to 25
        "#]],
        );
    }

    #[test]
    fn a_workload_that_was_away_is_watched_anew() {
        check(
            2,
            4,
            &["0 watches pay", "0 watches db", "3 watches pay"],
            expect![[r#"
            shop/db watched from 0 to 0
            shop/pay watched from 3 to 3
        "#]],
        );
        check(2, 25, &["0 watches pay", "1 watches db"], expect![[""]]);
    }

    #[test]
    fn only_plaintext_that_comes_to_this_nodes_pods_counts() {
        let now = Instant::now();
        let plaintext = Plaintext::new(10, Duration::from_secs(HOUR), now);
        for (reporter, security) in [
            (Reporter::Source, Security::Plaintext),
            (Reporter::Destination, Security::MutualTls),
            (Reporter::Destination, Security::SameNode),
        ] {
            plaintext.opened(&ConnectionFacts { reporter, security, ..facts("web -> pay:80") }, now);
        }
        assert!(plaintext.report(now).callers.is_empty());
    }
}

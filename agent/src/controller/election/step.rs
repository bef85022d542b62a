//! Who leads, decided from what was read of the lease.
//!
//! No clock is compared with another's: a lease has run out when it has not changed for its whole length by the clock of
//! who looks at it, and a leader stops by its own clock well before that.

use std::time::{Duration, Instant};

/// How long a lease holds without being renewed.
pub(super) const LEASE: Duration = Duration::from_secs(15);
/// After that long without a renewal a leader stops. Less than the lease, so that there are never two.
pub(super) const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// A lease as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Empty if it was given back.
    pub(super) holder: String,
    /// When its holder last renewed it, by the holder's clock: it counts only whether it changes.
    pub(super) renewed: String,
    /// How long its holder wants it to hold.
    pub(super) length: Duration,
}

/// What to do with the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is none: make it, and hold it.
    Create,
    /// It is nobody's any more: take it.
    Take,
    /// It is ours: say that we are still here.
    Renew,
    /// It is another's.
    Wait,
}

/// One who stands for election.
#[derive(Debug)]
pub(super) struct Candidate {
    name: String,
    /// The lease as it was read last, and since when it has been like that.
    observed: Option<(Record, Instant)>,
    /// When the last renewal that succeeded was begun; `None` for who does not lead.
    renewed_at: Option<Instant>,
}

impl Candidate {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), observed: None, renewed_at: None }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What to do about the lease as it is.
    pub(super) fn step(&mut self, lease: Option<Record>, now: Instant) -> Step {
        let Some(lease) = lease else {
            self.observed = None;
            return Step::Create;
        };
        if lease.holder == self.name {
            return Step::Renew;
        }
        // Somebody else has it, or nobody: whatever we believed before.
        self.renewed_at = None;
        if lease.holder.is_empty() {
            return Step::Take;
        }
        let since = match &self.observed {
            Some((known, since)) if *known == lease => *since,
            _ => now,
        };
        let length = lease.length;
        self.observed = Some((lease, since));
        match now.duration_since(since) >= length {
            true => Step::Take,
            false => Step::Wait,
        }
    }

    /// The lease was written; `began` is from before the request was sent.
    pub(super) fn wrote(&mut self, began: Instant) {
        self.renewed_at = Some(began);
    }

    /// True if nobody else can have the lease yet.
    pub(super) fn leads(&self, now: Instant) -> bool {
        self.stops_at().is_some_and(|deadline| now < deadline)
    }

    /// When it stops leading unless it renews the lease.
    pub(super) fn stops_at(&self) -> Option<Instant> {
        self.renewed_at.map(|renewed| renewed + RENEW_DEADLINE)
    }

    /// It does not lead any more.
    pub(super) fn stop(&mut self) {
        self.renewed_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, renewed: u32) -> Option<Record> {
        Some(Record { holder: holder.into(), renewed: renewed.to_string(), length: LEASE })
    }

    #[test]
    fn a_lease_is_taken_when_it_has_stood_still_for_its_whole_length() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut b = Candidate::new("b");
        assert_eq!(b.step(None, after(0)), Step::Create);
        assert_eq!(b.step(lease("a", 1), after(0)), Step::Wait);
        assert_eq!(b.step(lease("a", 1), after(14)), Step::Wait);
        assert_eq!(b.step(lease("a", 2), after(14)), Step::Wait, "it was renewed");
        assert_eq!(b.step(lease("a", 2), after(28)), Step::Wait);
        assert_eq!(b.step(lease("a", 2), after(29)), Step::Take);
        // Its holder was faster after all.
        assert_eq!(b.step(lease("a", 3), after(29)), Step::Wait);
        assert_eq!(b.step(lease("", 4), after(30)), Step::Take, "given back");
        assert!(!b.leads(after(30)), "taking is not having");
        b.wrote(after(30));
        assert_eq!(b.step(lease("b", 5), after(32)), Step::Renew);
    }

    #[test]
    fn a_leader_stops_before_anybody_else_may_begin() {
        let start = Instant::now();
        let after = |millis: u64| start + Duration::from_millis(millis);
        let (mut a, mut b) = (Candidate::new("a"), Candidate::new("b"));
        a.wrote(after(0));
        assert_eq!(b.step(lease("a", 1), after(0)), Step::Wait);
        assert!(a.leads(after(9_999)) && !a.leads(after(10_000)));
        assert_eq!(b.step(lease("a", 1), after(14_999)), Step::Wait);
        assert_eq!(b.step(lease("a", 1), after(15_000)), Step::Take);
        b.wrote(after(15_000));
        // Back from its pause it sees whose it is now.
        a.wrote(after(14_000));
        assert_eq!(a.step(lease("b", 2), after(15_100)), Step::Wait);
        assert!(!a.leads(after(15_100)) && b.leads(after(15_100)));
        // A restart of the same pod goes on at once.
        assert_eq!(Candidate::new("b").step(lease("b", 2), after(16_000)), Step::Renew);
        b.stop();
        assert!(!b.leads(after(15_100)));
    }
    /// As it was when another one led, or when there was none yet.
    #[test]
    fn a_lease_from_a_backup_has_one_leader_again() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let (mut a, mut b) = (Candidate::new("a"), Candidate::new("b"));
        assert_eq!(a.step(None, after(0)), Step::Create);
        a.wrote(after(0));
        assert_eq!(b.step(lease("a", 9), after(1)), Step::Wait);
        // What stood in the lease when the backup was made: its holder is still there,
        assert_eq!(a.step(lease("b", 1), after(2)), Step::Wait);
        assert!(!a.leads(after(2)));
        assert_eq!(b.step(lease("b", 1), after(3)), Step::Renew);
        b.wrote(after(3));
        // or has gone by now.
        assert_eq!(a.step(lease("c", 1), after(4)), Step::Wait);
        assert_eq!(b.step(lease("c", 1), after(4)), Step::Wait);
        assert!(!b.leads(after(4)));
        assert_eq!(a.step(lease("c", 1), after(19)), Step::Take);
        a.wrote(after(19));
        assert_eq!(b.step(lease("a", 2), after(19)), Step::Wait);
        // There was none.
        assert_eq!(b.step(None, after(20)), Step::Create);
    }
}

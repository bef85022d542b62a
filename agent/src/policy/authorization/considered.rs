//! Every policy of a workload, rule by rule: for people who wonder what decides, and what never will.
//!
//! It decides nothing, and costs what there is to tell: connections and requests are never held up by it.

use super::RuleRef;
use super::facts::{Connection, Facts, Request};
use super::matching::Match;
use super::nearest::failed;
use super::rule::{Action, Applied, Rule};
use super::set::Set;

/// What a policy makes of a connection or a request.
#[derive(Clone, Debug)]
pub struct Considered<'s> {
    /// The policy, and the ports that it is for.
    pub applied: &'s Applied,
    /// Whether it is for the port at all.
    pub is_here: bool,
    /// What each of its rules does, in their order; none where the policy cannot be used.
    pub rules: Vec<Found>,
}

/// What a rule makes of a connection or a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It matches.
    Matches,
    /// It depends on the request, of which nothing is known.
    Depends {
        /// On what.
        on: String,
    },
    /// It does not match.
    Fails {
        /// What does not hold.
        failed: String,
    },
}

impl Set {
    /// What each policy makes of it, tried-out ones among them, in the order of their names.
    pub fn considered(
        &self,
        connection: &Connection<'_>,
        request: Option<&Request<'_>>,
    ) -> Vec<Considered<'_>> {
        let consider = |applied| Considered::of(applied, *connection, request.copied());
        self.policies().iter().map(consider).collect()
    }

    /// Rules that allow and never will, for a rule that denies takes all that they match; each with that one.
    pub fn covered(&self) -> Vec<(RuleRef, RuleRef)> {
        let of = |action: Action| {
            let policies = self
                .policies()
                .iter()
                .filter(move |it| it.policy.action == action && it.policy.invalid.is_none());
            policies.flat_map(|applied| {
                let rules = applied.policy.rules.iter().enumerate();
                rules.map(move |(place, rule)| {
                    (applied, rule, RuleRef { policy: applied.policy.name.clone(), rule: place })
                })
            })
        };
        let in_force: Vec<_> = of(Action::Deny).filter(|(applied, ..)| !applied.policy.dry_run).collect();
        let taken_by = |allowed: &Applied, rule: &Rule| {
            let mut all = in_force.iter();
            let found = all.find(|(denied, denies, _)| reaches(denied, allowed) && denies.takes_all_of(rule));
            found.map(|(.., name)| name.clone())
        };
        of(Action::Allow).filter_map(|(applied, rule, name)| Some((name, taken_by(applied, rule)?))).collect()
    }
}

/// Whether the one is for all the ports that the other is for.
fn reaches(denied: &Applied, allowed: &Applied) -> bool {
    match (&denied.ports, &allowed.ports) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(all), Some(ports)) => ports.iter().all(|port| all.contains(port)),
    }
}

impl Rule {
    /// Whether it matches whatever the other one does, as far as that shows without looking into its lists.
    fn takes_all_of(&self, other: &Self) -> bool {
        (self.from.is_empty() || self.from == other.from)
            && (self.to.is_empty() || self.to == other.to)
            && self.when.iter().all(|condition| other.when.contains(condition))
    }
}

impl<'s> Considered<'s> {
    fn of(applied: &'s Applied, connection: Connection<'_>, request: Option<Request<'_>>) -> Self {
        let Applied { policy, ports } = applied;
        let is_here = ports.as_ref().is_none_or(|ports| ports.contains(&connection.port));
        let facts = Facts { connection, request, in_doubt: policy.action != Action::Allow };
        let usable = if policy.invalid.is_none() { policy.rules.as_slice() } else { &[] };
        Self { applied, is_here, rules: usable.iter().map(|rule| Found::of(rule, &facts)).collect() }
    }
}

impl Found {
    fn of(rule: &Rule, facts: &Facts<'_>) -> Self {
        match rule.matches(facts) {
            Match::Yes => Self::Matches,
            Match::Perhaps => Self::Depends { on: failed(rule, facts).unwrap_or_default() },
            Match::No => Self::Fails { failed: failed(rule, facts).unwrap_or_default() },
        }
    }
}

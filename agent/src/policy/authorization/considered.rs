//! Every policy of a workload, rule by rule: for people who wonder what decides.
//!
//! It decides nothing, and costs what there is to tell: connections and requests are never held up by it.

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

//! The rules of policies of one action, each at a place that it keeps while other policies come and go.

use std::sync::Arc;

use super::decision::{Outcome, RuleRef};
use super::facts::Facts;
use super::keys::{Clause, clauses};
use super::matching::Match;
use super::ports::Ports;
use super::rule::{Action, Applied, Matcher, Rule};

/// A rule's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The number of its policy.
    policy: u32,
    rule: u32,
}

/// Policies of one action, in the order of their names.
#[derive(Clone, Debug, Default)]
pub(super) struct Members {
    /// By their numbers, which are in no order. Whatever goes leaves a gap.
    policies: Vec<Option<Applied>>,
    /// The numbers of those that are there, in order.
    order: Vec<u32>,
    /// Where in that each number is.
    ranks: Vec<u32>,
}

/// A rule, where it is attached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'m> {
    applied: &'m Applied,
    /// None: the policy cannot be used, and this is what stands for it.
    place: Option<usize>,
}

/// What has become of members.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// The numbers of those that go.
    pub(super) gone: Vec<u32>,
    /// And of those that come.
    pub(super) come: Vec<u32>,
}

/// Matches everything.
static EVERYTHING: Rule = Rule { from: Vec::new(), to: Vec::new(), when: Vec::new() };

impl Members {
    /// Numbers those that come, and orders them all; `applied` are those that are to be there, in order. What goes is still there.
    pub(super) fn change(&mut self, applied: &[&Applied]) -> Changes {
        let mut changes = Changes::default();
        let before = std::mem::take(&mut self.order);
        let mut before = before.into_iter().peekable();
        for new in applied {
            let mut same = None;
            while let Some(number) = before.peek().copied()
                && let Some(old) = self.applied(number)
            {
                if old.is_same(new) {
                    same = before.next();
                    break;
                }
                if old.order() > new.order() {
                    break;
                }
                changes.gone.extend(before.next());
            }
            let number = same.unwrap_or_else(|| {
                let number = self.policies.len() as u32;
                self.policies.push(Some((*new).clone()));
                changes.come.push(number);
                number
            });
            self.order.push(number);
        }
        changes.gone.extend(before);
        self.ranks.resize(self.policies.len(), 0);
        for (rank, number) in (0..).zip(&self.order) {
            self.ranks[*number as usize] = rank;
        }
        changes
    }

    /// Takes the policy out.
    pub(super) fn forget(&mut self, number: u32) {
        if let Some(policy) = self.policies.get_mut(number as usize) {
            *policy = None;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// All rules, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = (Place, Entry<'_>)> {
        self.order.iter().flat_map(|number| self.of(*number))
    }

    /// The rules of one policy, in order.
    pub(super) fn of(&self, number: u32) -> impl Iterator<Item = (Place, Entry<'_>)> {
        let applied = self.applied(number).into_iter();
        let rules = applied.flat_map(|applied| 0..applied.rules() as u32);
        rules.filter_map(move |rule| {
            let place = Place { policy: number, rule };
            Some((place, self.get(place)?))
        })
    }

    /// How many rules there are.
    pub(super) fn rules(&self) -> usize {
        self.order.iter().filter_map(|number| self.applied(*number)).map(Applied::rules).sum()
    }

    /// The ports at which any of them says something of requests, of which there are so many `at_most`: when they are found, the others
    /// are not looked at.
    pub(super) fn requests(&self, at_most: usize) -> Ports {
        let mut requests = Ports::default();
        _ = self.all().all(|(_, entry)| {
            entry.add_requests(&mut requests);
            requests.len() < at_most
        });
        requests
    }

    pub(super) fn get(&self, Place { policy, rule }: Place) -> Option<Entry<'_>> {
        let applied = self.applied(policy)?;
        Some(Entry { applied, place: applied.policy.invalid.is_none().then_some(rule as usize) })
    }

    /// By what rules are ordered.
    pub(super) fn order(&self, place: Place) -> (u32, u32) {
        (self.ranks.get(place.policy as usize).copied().unwrap_or_default(), place.rule)
    }

    fn applied(&self, number: u32) -> Option<&Applied> {
        self.policies.get(number as usize)?.as_ref()
    }
}

impl Applied {
    /// By what policies are ordered.
    pub(super) fn order(&self) -> (&str, Option<&[u16]>) {
        (&self.policy.name, self.ports.as_deref())
    }

    /// How many rules stand for it.
    pub(super) fn rules(&self) -> usize {
        if self.policy.invalid.is_some() { 1 } else { self.policy.rules.len() }
    }

    /// Whether it is the very same policy, at the same ports.
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.policy, &other.policy) && self.ports == other.ports
    }
}

impl<'m> Entry<'m> {
    pub(super) fn rule(&self) -> &'m Rule {
        self.place.and_then(|place| self.applied.policy.rules.get(place)).unwrap_or(&EVERYTHING)
    }

    /// Whether it is for this port.
    pub(super) fn is_at(&self, port: u16) -> bool {
        self.applied.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }

    /// None where it stands for a policy that cannot be used.
    pub(super) fn named(&self) -> Option<RuleRef> {
        self.place.map(|rule| RuleRef { policy: self.applied.policy.name.clone(), rule })
    }

    pub(super) fn matches(&self, facts: &Facts<'_>) -> Match {
        if self.is_at(facts.connection.port) { self.rule().matches(facts) } else { Match::No }
    }

    /// What becomes of what it matches.
    pub(super) fn outcome(&self) -> Outcome {
        let policy = &self.applied.policy;
        match (self.named(), policy.action) {
            (Some(rule), Action::Allow) => Outcome::Allowed(rule),
            (Some(rule), _) => Outcome::Denied(rule),
            (None, _) => Outcome::Invalid {
                policy: policy.name.clone(),
                problem: policy.invalid.clone().unwrap_or_default(),
            },
        }
    }

    pub(super) fn clauses(&self, has_requests: bool) -> Vec<Clause> {
        clauses(self.rule(), self.applied.ports.as_deref(), has_requests)
    }

    /// Adds the ports at which it says something of requests.
    pub(super) fn add_requests(&self, requests: &mut Ports) {
        let (rule, only) = (self.rule(), self.applied.ports.as_deref());
        let mut add = |ports: &Matcher<u16>| requests.add(ports, only);
        if !rule.when.is_empty() && rule.to.is_empty() {
            add(&Matcher::default());
        }
        for operation in &rule.to {
            if !rule.when.is_empty() || operation.is_of_requests() {
                add(&operation.ports);
            }
        }
    }
}

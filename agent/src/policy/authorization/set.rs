//! The policies of a workload, made ready to be asked.
//!
//! What denies comes before what allows, and the order of policies is that of their names: it makes no difference to a verdict.

use std::collections::HashMap;
use std::sync::Arc;

use super::decision::{Decision, OnConnection, Outcome, RuleRef};
use super::facts::{Connection, Facts, Request};
use super::index::Index;
use super::keys::{Clause, clauses};
use super::matching::Match;
use super::nearest::nearest;
use super::ports::Ports;
use super::rule::{Action, Applied, Matcher, Policy, Rule};
use crate::model::Name;

/// The policies of one workload. Immutable; asking it costs a matter of how many rules resemble what is asked about.
#[derive(Debug, Default)]
pub struct Set {
    policies: Vec<Applied>,
    deny: Group,
    allow: Group,
    audit: Group,
    dry_deny: Group,
    dry_allow: Group,
    /// Where something has to be allowed to be let in.
    closed: Closed,
    dry_closed: Closed,
    /// Where it matters what is asked for.
    requests: Ports,
}

/// The rules of policies of one action.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// In the order of the policies' names, and of the rules in them.
    pub(super) rules: Vec<Entry>,
    /// All of them, by everything that is known of a request.
    pub(super) by_request: Index,
    /// Those that may match whatever is asked for, by what is known of a connection.
    certain: Index,
    /// Those that say something of requests, likewise.
    possible: Index,
    in_doubt: bool,
}

/// A rule, where it is attached.
#[derive(Debug)]
pub(super) struct Entry {
    policy: Arc<Policy>,
    /// None: the policy cannot be used, and this is what stands for it.
    place: Option<usize>,
    ports: Option<Arc<[u16]>>,
}

/// The policies that allow, by where they do.
#[derive(Debug, Default)]
struct Closed {
    everywhere: Option<Allowing>,
    at: HashMap<u16, Option<Allowing>>,
}

/// Policies that allow.
#[derive(Clone, Debug, PartialEq)]
struct Allowing {
    first: Name,
    last: Name,
    others: usize,
}

/// What is asked about.
#[derive(Clone, Copy, Debug)]
struct Question<'f> {
    connection: Connection<'f>,
    known: Known<'f>,
}

/// What is known beside the connection.
#[derive(Clone, Copy, Debug)]
enum Known<'f> {
    /// A request.
    Request(Request<'f>),
    /// Nothing yet: requests are still to come.
    Nothing,
    /// That there are no requests.
    Bytes,
}

/// Matches everything.
static EVERYTHING: Rule = Rule { from: Vec::new(), to: Vec::new(), when: Vec::new() };

impl Set {
    /// Makes policies ready. In which order they come makes no difference.
    pub fn new(mut applied: Vec<Applied>) -> Self {
        applied.sort_by(|a, b| (&a.policy.name, &a.ports).cmp(&(&b.policy.name, &b.ports)));
        let mut set = Self::default();
        let mut groups: HashMap<(Action, bool), Vec<Entry>> = HashMap::new();
        for Applied { policy, ports } in &applied {
            // Nothing would be reported of it, neither now nor if it were in force: it decides nothing.
            let is_idle = policy.action == Action::Audit && policy.dry_run && policy.invalid.is_none();
            if is_idle || ports.as_ref().is_some_and(|ports| ports.is_empty()) {
                continue;
            }
            let is_valid = policy.invalid.is_none();
            let action = if is_valid { policy.action } else { Action::Deny };
            if action == Action::Allow {
                let closed = if policy.dry_run { &mut set.dry_closed } else { &mut set.closed };
                closed.add(&policy.name, ports.as_deref());
            }
            let group = groups.entry((action, policy.dry_run)).or_default();
            let places: Vec<_> =
                if is_valid { (0..policy.rules.len()).map(Some).collect() } else { vec![None] };
            for place in places {
                let entry = Entry { policy: policy.clone(), place, ports: ports.clone() };
                entry.add_requests(&mut set.requests);
                group.push(entry);
            }
        }
        let mut group = |action, is_dry| {
            Group::new(groups.remove(&(action, is_dry)).unwrap_or_default(), action != Action::Allow)
        };
        set.deny = group(Action::Deny, false);
        set.allow = group(Action::Allow, false);
        set.audit = group(Action::Audit, false);
        set.dry_deny = group(Action::Deny, true);
        set.dry_allow = group(Action::Allow, true);
        set.policies = applied;
        set
    }

    /// What it was made of, in the order of the policies' names.
    pub fn policies(&self) -> &[Applied] {
        &self.policies
    }

    /// Whether there is anything that it might deny.
    pub fn can_deny(&self) -> bool {
        !self.deny.rules.is_empty() || !self.closed.is_empty()
    }

    /// Whether everything is let in, and nothing is reported.
    pub fn is_empty(&self) -> bool {
        let groups = [&self.deny, &self.allow, &self.audit, &self.dry_deny, &self.dry_allow];
        groups.into_iter().all(|group| group.rules.is_empty())
            && self.closed.is_empty()
            && self.dry_closed.is_empty()
    }

    /// Whether anything at this port, a report among it, can depend on what is asked for.
    pub fn needs_requests(&self, port: u16) -> bool {
        self.requests.has(port)
    }

    /// Whether anything at some port, a report among it, can depend on what is asked for.
    pub fn is_about_requests(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Decides about a connection, as far as that is possible before the first request. What could never be allowed is denied.
    pub fn connection(&self, connection: &Connection<'_>) -> OnConnection {
        let question = Question { connection: *connection, known: Known::Nothing };
        if self.needs_requests(connection.port) && self.is_open(question) {
            return OnConnection::ByRequest;
        }
        OnConnection::Decided(self.decide(question))
    }

    /// Decides about a connection on which something else is spoken than HTTP. What would need a request to allow it does not, and
    /// what would need one to deny it does.
    pub fn bytes(&self, connection: &Connection<'_>) -> Decision {
        self.decide(Question { connection: *connection, known: Known::Bytes })
    }

    /// Decides about a request.
    pub fn request(&self, connection: &Connection<'_>, request: &Request<'_>) -> Decision {
        self.decide(Question { connection: *connection, known: Known::Request(*request) })
    }

    /// Whether something about the connection depends on its requests.
    fn is_open(&self, question: Question<'_>) -> bool {
        let may_decide = |group: &Group| group.matches_perhaps(question);
        if self.deny.first(question).is_some() {
            return false;
        }
        if self.closed.covers(question.connection.port) && self.allow.first(question).is_none() {
            return may_decide(&self.allow);
        }
        [&self.deny, &self.audit, &self.dry_deny, &self.dry_allow].into_iter().any(may_decide)
    }

    fn decide(&self, question: Question<'_>) -> Decision {
        let decisive = self.deny.first(question).or_else(|| self.allow.first(question));
        let outcome = (decisive.map(Entry::outcome))
            .or_else(|| self.closed.not_allowed(question, &self.allow))
            .unwrap_or(Outcome::Open);
        let dry = match &outcome {
            Outcome::Denied(_) | Outcome::Invalid { .. } => None,
            Outcome::Allowed(_) => self.dry_deny.first(question).map(Entry::outcome),
            Outcome::Open => match (self.dry_deny.first(question), self.dry_allow.first(question)) {
                (Some(denied), _) => Some(denied.outcome()),
                (None, Some(_)) => None,
                (None, None) => self.dry_closed.not_allowed(question, &self.dry_allow),
            },
            Outcome::NotAllowed { .. } => match self.dry_deny.first(question) {
                Some(_) => None,
                None => self.dry_allow.first(question).map(Entry::outcome),
            },
        };
        Decision { outcome, audited: self.audit.all(question), dry }
    }
}

impl Group {
    fn new(rules: Vec<Entry>, in_doubt: bool) -> Self {
        let index = |has_requests: bool, is_in: &dyn Fn(&Rule) -> bool| {
            let numbered = (0..).zip(&rules).filter(|(_, entry)| is_in(entry.rule()));
            let keyed = numbered.map(|(number, entry)| (number, entry.clauses(has_requests)));
            Index::new(&keyed.collect::<Vec<_>>())
        };
        let by_request = index(true, &|_| true);
        let certain = index(false, &Rule::can_be_certain);
        let possible = index(false, &Rule::is_of_requests);
        Self { by_request, certain, possible, in_doubt, rules }
    }

    fn facts<'f>(&self, Question { connection, known }: Question<'f>) -> Facts<'f> {
        let request = if let Known::Request(request) = known { Some(request) } else { None };
        Facts { connection, request, in_doubt: self.in_doubt }
    }

    /// The first rule that matches.
    fn first(&self, question: Question<'_>) -> Option<&Entry> {
        let mut first = u32::MAX;
        self.visit(question, |number, matches| {
            // Lists are ascending: behind this one, or one that was found already, nothing of this list is the first.
            if number < first && matches() {
                first = number;
            }
            number < first
        });
        self.rules.get(first as usize)
    }

    /// Of each policy the first rule that matches.
    fn all(&self, question: Question<'_>) -> Vec<RuleRef> {
        let mut matching = Vec::new();
        self.visit(question, |number, matches| {
            if matches() {
                matching.push(number);
            }
            true
        });
        matching.sort_unstable();
        let mut found: Vec<_> =
            matching.into_iter().filter_map(|it| self.rules[it as usize].named()).collect();
        found.dedup_by(|next, kept| next.policy == kept.policy);
        found
    }

    /// Whether there is a rule that may match some request.
    fn matches_perhaps(&self, question: Question<'_>) -> bool {
        let facts = self.facts(question);
        let mut found = false;
        self.possible.visit(&facts, &mut |number| {
            found = found || self.rules[number as usize].matches(&facts) >= Match::Perhaps;
            !found
        });
        found
    }

    /// Shows the rules that could match, and whether they do, until told to stop; see [`Index::visit`].
    fn visit(&self, question: Question<'_>, mut goes_on: impl FnMut(u32, &dyn Fn() -> bool) -> bool) {
        let facts = self.facts(question);
        let mut visit = |index: &Index, enough: Match| {
            index.visit(&facts, &mut |number| {
                goes_on(number, &|| self.rules[number as usize].matches(&facts) >= enough)
            });
        };
        match question.known {
            Known::Request(_) => visit(&self.by_request, Match::Yes),
            Known::Nothing => visit(&self.certain, Match::Yes),
            Known::Bytes => {
                visit(&self.certain, Match::Yes);
                if self.in_doubt {
                    visit(&self.possible, Match::Perhaps);
                }
            }
        }
    }
}

impl Entry {
    pub(super) fn rule(&self) -> &Rule {
        self.place.and_then(|place| self.policy.rules.get(place)).unwrap_or(&EVERYTHING)
    }

    /// Whether it is for this port.
    pub(super) fn is_at(&self, port: u16) -> bool {
        self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }

    /// None where it stands for a policy that cannot be used.
    pub(super) fn named(&self) -> Option<RuleRef> {
        self.place.map(|rule| RuleRef { policy: self.policy.name.clone(), rule })
    }

    pub(super) fn matches(&self, facts: &Facts<'_>) -> Match {
        if self.is_at(facts.connection.port) { self.rule().matches(facts) } else { Match::No }
    }

    /// What becomes of what it matches.
    fn outcome(&self) -> Outcome {
        match (self.named(), self.policy.action) {
            (Some(rule), Action::Allow) => Outcome::Allowed(rule),
            (Some(rule), _) => Outcome::Denied(rule),
            (None, _) => Outcome::Invalid {
                policy: self.policy.name.clone(),
                problem: self.policy.invalid.clone().unwrap_or_default(),
            },
        }
    }

    fn clauses(&self, has_requests: bool) -> Vec<Clause> {
        clauses(self.rule(), self.ports.as_deref(), has_requests)
    }

    /// Adds the ports at which it says something of requests.
    fn add_requests(&self, requests: &mut Ports) {
        let rule = self.rule();
        let mut add = |ports: &Matcher<u16>| requests.add(ports, self.ports.as_deref());
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

impl Closed {
    fn is_empty(&self) -> bool {
        self.everywhere.is_none() && self.at.is_empty()
    }

    /// Policies come in the order of their names; one may come several times.
    fn add(&mut self, name: &Name, ports: Option<&[u16]>) {
        let add = |allowing: &mut Option<Allowing>| match allowing {
            Some(allowing) if allowing.last == *name => {}
            Some(allowing) => {
                allowing.last = name.clone();
                allowing.others += 1;
            }
            None => *allowing = Some(Allowing { first: name.clone(), last: name.clone(), others: 0 }),
        };
        match ports {
            Some(ports) => ports.iter().for_each(|port| add(self.at.entry(*port).or_default())),
            None => add(&mut self.everywhere),
        }
    }

    /// Whether something has to allow what comes to this port.
    fn covers(&self, port: u16) -> bool {
        self.everywhere.is_some() || self.at.contains_key(&port)
    }

    /// What becomes of what none of the rules allows, unless it need not be.
    fn not_allowed(&self, question: Question<'_>, group: &Group) -> Option<Outcome> {
        let Allowing { first, others, .. } = self.at(question.connection.port)?;
        let nearest = nearest(group, &group.facts(question));
        Some(Outcome::NotAllowed { policy: first, others, nearest })
    }

    fn at(&self, port: u16) -> Option<Allowing> {
        match (self.everywhere.clone(), self.at.get(&port).cloned().flatten()) {
            (Some(a), Some(b)) => {
                let others = a.others + b.others + 1;
                Some(Allowing { first: a.first.min(b.first), last: a.last.max(b.last), others })
            }
            (a, b) => a.or(b),
        }
    }
}

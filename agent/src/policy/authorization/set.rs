//! The policies of a workload, made ready to be asked.
//!
//! What denies comes before what allows, and the order of policies is that of their names: it makes no difference to a verdict.

use std::collections::HashMap;
use std::sync::Arc;

use super::decision::{Decision, OnConnection, Outcome, RuleRef};
use super::facts::{Connection, Facts, Request};
use super::index::{Index, Indexed};
use super::matching::Match;
use super::members::{Entry, Members, Place};
use super::nearest::nearest;
use super::ports::{self, Ports};
use super::rule::{Action, Applied, Rule};
use crate::model::Name;

/// The policies of one workload. Immutable; asking it costs a matter of how many rules resemble what is asked about.
#[derive(Debug, Default)]
pub struct Set {
    policies: Vec<Applied>,
    deny: Arc<Group>,
    allow: Arc<Group>,
    audit: Arc<Group>,
    dry_deny: Arc<Group>,
    dry_allow: Arc<Group>,
    /// Where something has to be allowed to be let in.
    closed: Closed,
    dry_closed: Closed,
}

/// The rules of policies of one action.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    pub(super) members: Members,
    /// All of them, by everything that is known of a request.
    pub(super) by_request: Index,
    /// Those that may match whatever is asked for, by what is known of a connection.
    certain: Index,
    /// Those that say something of requests, likewise.
    possible: Index,
    /// Where it matters what is asked for.
    requests: Ports,
    in_doubt: bool,
    /// Rules that have come and gone since all of it was made.
    changed: usize,
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

impl Set {
    /// Makes policies ready. In which order they come makes no difference.
    pub fn new(applied: Vec<Applied>) -> Self {
        Self::default().with(applied)
    }

    /// Makes these ready instead. What this one has of the same policies stays, so that the cost is a matter of those that are others.
    pub fn with(&self, mut applied: Vec<Applied>) -> Self {
        applied.sort_by(|a, b| a.order().cmp(&b.order()));
        let (mut closed, mut dry_closed) = (Closed::default(), Closed::default());
        let mut groups: HashMap<(Action, bool), Vec<&Applied>> = HashMap::new();
        for one in &applied {
            let Applied { policy, ports } = one;
            // Nothing would be reported of it, neither now nor if it were in force: it decides nothing.
            let is_idle = policy.action == Action::Audit && policy.dry_run && policy.invalid.is_none();
            if is_idle || ports.as_ref().is_some_and(|ports| ports.is_empty()) {
                continue;
            }
            let action = if policy.invalid.is_none() { policy.action } else { Action::Deny };
            if action == Action::Allow {
                let closed = if policy.dry_run { &mut dry_closed } else { &mut closed };
                closed.add(&policy.name, ports.as_deref());
            }
            if one.rules() > 0 {
                groups.entry((action, policy.dry_run)).or_default().push(one);
            }
        }
        let mut group = |before: &Arc<Group>, action, is_dry| {
            let members = groups.remove(&(action, is_dry)).unwrap_or_default();
            Group::with(before, &members, action != Action::Allow)
        };
        Self {
            deny: group(&self.deny, Action::Deny, false),
            allow: group(&self.allow, Action::Allow, false),
            audit: group(&self.audit, Action::Audit, false),
            dry_deny: group(&self.dry_deny, Action::Deny, true),
            dry_allow: group(&self.dry_allow, Action::Allow, true),
            closed,
            dry_closed,
            policies: applied,
        }
    }

    /// What it was made of, in the order of the policies' names.
    pub fn policies(&self) -> &[Applied] {
        &self.policies
    }

    /// Whether there is anything that it might deny.
    pub fn can_deny(&self) -> bool {
        !self.deny.members.is_empty() || !self.closed.is_empty()
    }

    /// Whether everything is let in, and nothing is reported.
    pub fn is_empty(&self) -> bool {
        self.groups().into_iter().all(|group| group.members.is_empty())
            && self.closed.is_empty()
            && self.dry_closed.is_empty()
    }

    /// Whether anything at this port, a report among it, can depend on what is asked for.
    pub fn needs_requests(&self, port: u16) -> bool {
        self.groups().into_iter().any(|group| group.requests.has(port))
    }

    /// Whether anything at some port, a report among it, can depend on what is asked for.
    pub fn is_about_requests(&self) -> bool {
        self.groups().into_iter().any(|group| !group.requests.is_empty())
    }

    fn groups(&self) -> [&Group; 5] {
        [&self.deny, &self.allow, &self.audit, &self.dry_deny, &self.dry_allow]
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
        let may_decide = |group: &Arc<Group>| group.matches_perhaps(question);
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
        let outcome = (decisive.map(|rule| rule.outcome()))
            .or_else(|| self.closed.not_allowed(question, &self.allow))
            .unwrap_or(Outcome::Open);
        let dry = match &outcome {
            Outcome::Denied(_) | Outcome::Invalid { .. } => None,
            Outcome::Allowed(_) => self.dry_deny.first(question).map(|rule| rule.outcome()),
            Outcome::Open => match (self.dry_deny.first(question), self.dry_allow.first(question)) {
                (Some(denied), _) => Some(denied.outcome()),
                (None, Some(_)) => None,
                (None, None) => self.dry_closed.not_allowed(question, &self.dry_allow),
            },
            Outcome::NotAllowed { .. } => match self.dry_deny.first(question) {
                Some(_) => None,
                None => self.dry_allow.first(question).map(|rule| rule.outcome()),
            },
        };
        Decision { outcome, audited: self.audit.all(question), dry }
    }
}

impl Group {
    /// That of these members, who come in the order of their names. What is known of the same ones stays as it is.
    fn with(before: &Arc<Self>, applied: &[&Applied], in_doubt: bool) -> Arc<Self> {
        let mut next = Self { in_doubt, ..(**before).clone() };
        let changes = next.members.change(applied);
        if changes.gone.is_empty() && changes.come.is_empty() {
            return before.clone();
        }
        let numbers = changes.gone.iter().chain(&changes.come);
        next.changed += numbers.map(|number| next.members.of(*number).count()).sum::<usize>();
        // By and by what is made in steps is worse than what is made as a whole.
        if next.changed > next.members.rules() / 2 {
            return Arc::new(Self::new(applied, in_doubt));
        }
        let is_of_requests =
            |number: &u32| next.members.of(*number).any(|(_, it)| it.rule().is_of_requests());
        let may_need_less = changes.gone.iter().any(is_of_requests);
        for number in changes.gone {
            next.take_out(number);
            next.members.forget(number);
        }
        changes.come.into_iter().for_each(|number| next.add(number));
        if may_need_less {
            next.requests = next.members.requests(next.requests.len());
        }
        Arc::new(next)
    }

    fn new(applied: &[&Applied], in_doubt: bool) -> Self {
        let mut members = Members::default();
        members.change(applied);
        let requests = members.requests(ports::ALL);
        let index = |has_requests: bool, is_in: &dyn Fn(&Rule) -> bool| {
            let rules = members.all().filter(|(_, entry)| is_in(entry.rule()));
            Index::new(rules.map(|(place, entry)| (place, entry.clauses(has_requests))).collect())
        };
        let by_request = index(true, &|_| true);
        let certain = index(false, &Rule::can_be_certain);
        let possible = index(false, &Rule::is_of_requests);
        Self { members, by_request, certain, possible, requests, in_doubt, changed: 0 }
    }

    fn add(&mut self, number: u32) {
        let Self { members, by_request, certain, possible, requests, .. } = self;
        for (place, entry) in members.of(number) {
            entry.add_requests(requests);
            by_request.add(place, &entry.clauses(true), &Indexed { members, has_requests: true });
            let (clauses, indexed) = (entry.clauses(false), Indexed { members, has_requests: false });
            if entry.rule().can_be_certain() {
                certain.add(place, &clauses, &indexed);
            }
            if entry.rule().is_of_requests() {
                possible.add(place, &clauses, &indexed);
            }
        }
    }

    fn take_out(&mut self, number: u32) {
        let Self { members, by_request, certain, possible, .. } = self;
        for (place, entry) in members.of(number) {
            by_request.take_out(place, &entry.clauses(true));
            let clauses = entry.clauses(false);
            if entry.rule().can_be_certain() {
                certain.take_out(place, &clauses);
            }
            if entry.rule().is_of_requests() {
                possible.take_out(place, &clauses);
            }
        }
    }

    fn facts<'f>(&self, Question { connection, known }: Question<'f>) -> Facts<'f> {
        let request = if let Known::Request(request) = known { Some(request) } else { None };
        Facts { connection, request, in_doubt: self.in_doubt }
    }

    /// The first rule that matches.
    fn first(&self, question: Question<'_>) -> Option<Entry<'_>> {
        let (mut first, mut found) = ((u32::MAX, u32::MAX), None);
        self.visit(question, |place, matches| {
            let order = self.members.order(place);
            // Lists are ascending: behind this one, or one that was found already, nothing of this list is the first.
            if order < first && matches() {
                (first, found) = (order, Some(place));
            }
            order < first
        });
        self.members.get(found?)
    }

    /// Of each policy the first rule that matches.
    fn all(&self, question: Question<'_>) -> Vec<RuleRef> {
        let mut matching = Vec::new();
        self.visit(question, |place, matches| {
            if matches() {
                matching.push(place);
            }
            true
        });
        matching.sort_unstable_by_key(|place| self.members.order(*place));
        let mut found: Vec<_> =
            matching.into_iter().filter_map(|place| self.members.get(place)?.named()).collect();
        found.dedup_by(|next, kept| next.policy == kept.policy);
        found
    }

    /// Whether there is a rule that may match some request.
    fn matches_perhaps(&self, question: Question<'_>) -> bool {
        let facts = self.facts(question);
        let mut found = false;
        self.possible.visit(&facts, &mut |place| {
            found = found || self.matches(place, &facts) >= Match::Perhaps;
            !found
        });
        found
    }

    /// Shows the rules that could match, and whether they do, until told to stop; see [`Index::visit`].
    fn visit(&self, question: Question<'_>, mut goes_on: impl FnMut(Place, &dyn Fn() -> bool) -> bool) {
        let facts = self.facts(question);
        let mut visit = |index: &Index, enough: Match| {
            index.visit(&facts, &mut |place| goes_on(place, &|| self.matches(place, &facts) >= enough));
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

    fn matches(&self, place: Place, facts: &Facts<'_>) -> Match {
        self.members.get(place).map_or(Match::No, |entry| entry.matches(facts))
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

//! Rules that can never match, or never let anything in, whatever is asked for: for people who wonder why one does nothing.
//!
//! It knows what shows from the lists alone, and is silent where it would have to try.

use std::fmt;

use super::RuleRef;
use super::ports::Ports;
use super::rule::{Action, Applied, Condition, Matcher, Operation, PathPattern, Pattern, Rule, Source};
use super::set::Set;

/// A rule that does nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Never {
    /// Which one.
    pub rule: RuleRef,
    /// Why it does nothing.
    pub why: NeverWhy,
}

/// Why a rule does nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NeverWhy {
    /// This of it leaves nothing to match.
    Void(String),
    /// It allows, and this one denies all that it matches.
    Covered(RuleRef),
}

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            NeverWhy::Void(why) => write!(f, "{} never matches: {why}", self.rule),
            NeverWhy::Covered(by) => write!(f, "{} never lets anything in: {by} denies it all", self.rule),
        }
    }
}

/// A rule, and what it is of.
struct Placed<'s> {
    applied: &'s Applied,
    rule: &'s Rule,
    place: usize,
}

impl Set {
    /// Its rules that do nothing.
    pub fn never(&self) -> Vec<Never> {
        let is_in_force =
            |it: &Placed<'_>| it.applied.policy.action == Action::Deny && !it.applied.policy.dry_run;
        let denying: Vec<_> = self.placed().filter(is_in_force).collect();
        let why = |it: &Placed<'_>| match it.rule.void(it.applied.ports.as_deref()) {
            Some(why) => Some(NeverWhy::Void(why)),
            None if it.applied.policy.action == Action::Allow => {
                denying.iter().find(|by| by.takes_all_of(it)).map(|by| NeverWhy::Covered(by.named()))
            }
            None => None,
        };
        self.placed().filter_map(|it| Some(Never { why: why(&it)?, rule: it.named() })).collect()
    }

    /// The rules of all policies that can be used.
    fn placed(&self) -> impl Iterator<Item = Placed<'_>> {
        let usable = self.policies().iter().filter(|applied| applied.policy.invalid.is_none());
        usable.flat_map(|applied| {
            let rules = applied.policy.rules.iter().enumerate();
            rules.map(move |(place, rule)| Placed { applied, rule, place })
        })
    }
}

impl Placed<'_> {
    fn named(&self) -> RuleRef {
        RuleRef { policy: self.applied.policy.name.clone(), rule: self.place }
    }

    /// Whether it matches whatever the other one does, as far as that shows without looking into its lists.
    fn takes_all_of(&self, other: &Self) -> bool {
        let is_there = match (&self.applied.ports, &other.applied.ports) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(all), Some(ports)) => ports.iter().all(|port| all.contains(port)),
        };
        let (rule, other) = (self.rule, other.rule);
        is_there
            && (rule.from.is_empty() || rule.from == other.from)
            && (rule.to.is_empty() || rule.to == other.to)
            && rule.when.iter().all(|condition| other.when.contains(condition))
    }
}

impl Rule {
    /// What of it leaves nothing to match, where the policy is for these ports, or for all.
    fn void(&self, ports: Option<&[u16]>) -> Option<String> {
        let from = self.from.iter().map(Source::void).collect::<Option<Vec<_>>>();
        let to = self.to.iter().map(|to| to.void(ports)).collect::<Option<Vec<_>>>();
        let first = |part: &str, voids: Option<Vec<String>>| Some(format!("{part}: {}", voids?.first()?));
        let when = self.when.iter().find_map(Condition::void).map(|why| format!("when: {why}"));
        first("from", from).or_else(|| first("to", to)).or(when)
    }
}

impl Source {
    fn void(&self) -> Option<String> {
        let Self { identities, service_accounts, namespaces, trust_domains, ip_blocks } = self;
        let void = [
            ("notIdentities", identities.is_void(Pattern::takes_all_of)),
            ("notServiceAccounts", service_accounts.is_void(PartialEq::eq)),
            ("notNamespaces", namespaces.is_void(Pattern::takes_all_of)),
            ("notTrustDomains", trust_domains.is_void(Pattern::takes_all_of)),
            ("notIpBlocks", ip_blocks.is_void(|all, one| all.contains(one))),
        ];
        left_out(void)
    }
}

impl Operation {
    fn void(&self, only: Option<&[u16]>) -> Option<String> {
        let Self { ports, methods, paths, hosts, grpc: _ } = self;
        let mut meant = Ports::default();
        meant.add(ports, only);
        if meant.is_empty() {
            return Some("it is for none of the ports that the policy is for".to_owned());
        }
        left_out([
            ("notMethods", methods.is_void(Pattern::takes_all_of)),
            ("notPaths", paths.is_void(PathPattern::takes_all_of)),
            // Ports in hosts and the dot at their end make more of it than a comparison of texts.
            ("notHosts", hosts.is_void(|all, one| *all == Pattern::Present || all == one)),
        ])
    }
}

impl Condition {
    fn void(&self) -> Option<String> {
        let (what, values) = match self {
            Self::Header { name, values } => (format!("the header {name}"), values),
            Self::Claim { path, values } => (format!("the claim {}", path.join(".")), values),
            Self::Cel(_) => return None,
        };
        values.is_void(Pattern::takes_all_of).then(|| format!("notValues takes back every value of {what}"))
    }
}

fn left_out<const N: usize>(void: [(&str, bool); N]) -> Option<String> {
    let (list, _) = void.into_iter().find(|(_, is_void)| *is_void)?;
    Some(format!("{list} takes back all that is meant"))
}

impl<T> Matcher<T> {
    /// Whether all that is meant is left out.
    fn is_void(&self, takes_all_of: impl Fn(&T, &T) -> bool) -> bool {
        let is_left_out = |one| self.none_of.iter().any(|all| takes_all_of(all, one));
        !self.any_of.is_empty() && self.any_of.iter().all(is_left_out)
    }
}

impl Pattern {
    /// Whether it matches whatever the other does.
    fn takes_all_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Present, _) => true,
            (Self::Exact(all), Self::Exact(one)) => all == one,
            (Self::Prefix(all), Self::Exact(one) | Self::Prefix(one)) => one.starts_with(&**all),
            (Self::Suffix(all), Self::Exact(one) | Self::Suffix(one)) => one.ends_with(&**all),
            _ => false,
        }
    }
}

impl PathPattern {
    /// Whether it matches whatever the other does, as far as that shows.
    fn takes_all_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Prefix(all), Self::Exact(one) | Self::Prefix(one)) => one.starts_with(&**all),
            (Self::Suffix(all), Self::Exact(one) | Self::Suffix(one)) => one.ends_with(&**all),
            (all, one) => all == one,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_whose_values_are_all_left_out_never_holds() {
        let matcher = |none_of: &str| Matcher {
            any_of: vec![Pattern::Exact("a".into()), Pattern::Prefix("ab".into())],
            none_of: vec![Pattern::Prefix(none_of.into())],
        };
        let claim = |none_of| Condition::Claim {
            path: vec!["realm".into(), "roles".into()],
            values: matcher(none_of),
        };
        let rule = |condition| Rule { when: vec![condition], ..Rule::default() };
        let why = "when: notValues takes back every value of the claim realm.roles";
        assert_eq!(rule(claim("a")).void(None).as_deref(), Some(why));
        assert_eq!(rule(claim("ab")).void(None), None);
    }
}

//! What is decided, and why, in sentences.

use std::fmt;

use crate::model::Name;

/// What becomes of a connection or a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is let in, and why.
    pub outcome: Outcome,
    /// What asks for it to be written to the audit log: of each policy the first rule that matches.
    pub audited: Vec<RuleRef>,
    /// What the outcome would be if the policies that are tried out were in force beside the others, where that is another verdict.
    pub dry: Option<Outcome>,
}

/// Whether something is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is.
    Allowed,
    /// It is not.
    Denied,
}

/// A verdict with its reason. It prints as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is let in: there is no policy that allows, hence none that would have to.
    Open,
    /// It is let in by a rule.
    Allowed(RuleRef),
    /// It is denied by a rule, whatever else allows it.
    Denied(RuleRef),
    /// It is denied since this policy cannot be used.
    Invalid {
        /// The policy.
        policy: Name,
        /// What is wrong with it.
        problem: Name,
    },
    /// It is denied for want of a rule that allows it.
    NotAllowed {
        /// The first of the policies that allow.
        policy: Name,
        /// How many more there are.
        others: usize,
        /// The rule that was closest to allowing it.
        nearest: Option<NearMiss>,
    },
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleRef {
    /// As people know the policy: `AuthorizationPolicy shop/only-web`.
    pub policy: Name,
    /// The place of the rule in it, from 0 on. It is printed from 1 on.
    pub rule: usize,
}

/// A rule that would have allowed something, had a little been different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleRef,
    /// What of it does not hold: `from: namespaces does not have "web"`. It says nothing of the values of headers and claims.
    pub failed: String,
}

/// What is known when a connection begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnConnection {
    /// It is decided, for every request on it as well.
    Decided(Decision),
    /// It depends on the requests, of which some could be let in: [`Set::request`](super::Set::request) decides about each, and
    /// [`Set::bytes`](super::Set::bytes) about what turns out to have none.
    ByRequest,
}

impl Decision {
    /// Whether it is let in.
    pub fn is_allowed(&self) -> bool {
        self.outcome.verdict() == Verdict::Allowed
    }
}

impl Outcome {
    /// The verdict alone.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Open | Self::Allowed(_) => Verdict::Allowed,
            Self::Denied(_) | Self::Invalid { .. } | Self::NotAllowed { .. } => Verdict::Denied,
        }
    }

    /// The policy that decided it. Of several that allow and did not, the first.
    pub fn policy(&self) -> Option<&Name> {
        match self {
            Self::Open => None,
            Self::Allowed(rule) | Self::Denied(rule) => Some(&rule.policy),
            Self::Invalid { policy, .. } | Self::NotAllowed { policy, .. } => Some(policy),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("allowed, for no policy says what is"),
            Self::Allowed(rule) => write!(f, "allowed by {rule}"),
            Self::Denied(rule) => write!(f, "denied by {rule}"),
            Self::Invalid { policy, problem } => {
                write!(f, "denied by {policy}, which cannot be used: {problem}")
            }
            Self::NotAllowed { policy, others, nearest } => {
                match others {
                    0 => write!(f, "no rule of {policy} allows it")?,
                    1 => write!(f, "no rule of {policy} or of another one allows it")?,
                    others => write!(f, "no rule of {policy} or of {others} others allows it")?,
                }
                match nearest {
                    Some(NearMiss { rule, failed }) if rule.policy == *policy => {
                        write!(f, "; nearest is rule {}: {failed}", rule.rule + 1)
                    }
                    Some(NearMiss { rule, failed }) => write!(f, "; nearest is {rule}: {failed}"),
                    None => Ok(()),
                }
            }
        }
    }
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, rule {}", self.policy, self.rule + 1)
    }
}

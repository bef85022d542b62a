//! What policies have said of connections and requests: for the access log, the audit log, and counted.
//!
//! Whoever asks the policies says what came of it; nothing here knows how one is evaluated.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::Name;

/// What policies have said of a connection or a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruling {
    /// It was not let in.
    pub is_denied: bool,
    /// The policy that decided, and which of its rules, counted from 1, if it was one.
    pub by: Option<(Name, Option<usize>)>,
    /// Of what was denied, what was in the way.
    pub detail: Option<String>,
    /// Policies that want to know of it.
    pub audited: Vec<Name>,
    /// What would have become of it if policies that are tried out were in force, and by which; None where that is no other verdict.
    pub tried: Option<(Name, Tried)>,
}

/// What policies that are tried out would have made of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tried {
    /// It would have been denied, and was not.
    WouldDeny,
    /// It would have been let in, and was not.
    WouldAllow,
}

/// What a policy has come to, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Outcome {
    Denied,
    Audited,
    WouldDeny,
    WouldAllow,
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Audited => "audited",
            Self::WouldDeny => "would_deny",
            Self::WouldAllow => "would_allow",
        }
    }
}

impl Tried {
    /// The stable name in logs.
    pub fn as_str(self) -> &'static str {
        Outcome::from(self).as_str()
    }
}

impl From<Tried> for Outcome {
    fn from(tried: Tried) -> Self {
        match tried {
            Tried::WouldDeny => Self::WouldDeny,
            Tried::WouldAllow => Self::WouldAllow,
        }
    }
}

impl Ruling {
    /// Whether it is for the audit log.
    pub(super) fn is_notable(&self) -> bool {
        self.is_denied || !self.audited.is_empty() || self.tried.is_some()
    }
}

/// Policies that are counted by name; what comes beyond them is counted under `other`.
const MOST_POLICIES: usize = 10_000;

/// How often each policy came to what.
#[derive(Debug, Default)]
pub(super) struct Rulings(Mutex<BTreeMap<(Name, Outcome), u64>>);

impl Rulings {
    /// Counts what is notable of it.
    pub(super) fn count(&self, ruling: &Ruling) {
        if !ruling.is_notable() {
            return;
        }
        let denied = ruling.is_denied.then(|| {
            let by = ruling.by.as_ref().map_or_else(|| Name::from(""), |(policy, _)| policy.clone());
            (by, Outcome::Denied)
        });
        let audited = ruling.audited.iter().map(|policy| (policy.clone(), Outcome::Audited));
        let tried = ruling.tried.as_ref().map(|(policy, tried)| (policy.clone(), Outcome::from(*tried)));
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for key in denied.into_iter().chain(audited).chain(tried) {
            let is_known = counted.len() < MOST_POLICIES || counted.contains_key(&key);
            let key = if is_known { key } else { ("other".into(), key.1) };
            *counted.entry(key).or_default() += 1;
        }
    }

    /// All that were counted.
    pub(super) fn all(&self) -> BTreeMap<(Name, Outcome), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// As connections and requests carry it: most have none.
pub type RulingOf = Option<Arc<Ruling>>;

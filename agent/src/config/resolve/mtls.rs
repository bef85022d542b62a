//! Whether a pod takes plaintext, by all that speak of it: the most specific has the word, and of several that are as specific, for
//! each port whichever is strict.

use std::collections::BTreeSet;

use crate::config::Key;
use crate::config::document::{MeshPolicy, Mtls};
use crate::model::{MtlsMode, MtlsSource, Opened};

/// Those who are as specific as each other.
#[derive(Debug)]
pub(in crate::config) enum Level<'a> {
    /// MeshPolicies with what they say.
    Policies(Vec<(&'a Key, &'a Mtls)>),
    /// The annotation of the pod, or of its namespace.
    Annotation(Option<MtlsMode>, MtlsSource),
}

/// What it comes to.
#[derive(Debug, Default, PartialEq)]
pub(in crate::config) struct Verdict {
    pub(in crate::config) mode: MtlsMode,
    /// The ports for which it is another one, ascending.
    pub(in crate::config) ports: Vec<(u16, MtlsMode)>,
    /// Who says so, of the mode first.
    pub(in crate::config) by: Vec<MtlsSource>,
    /// What takes plaintext that less specific ones want refused, where that has been looked for.
    pub(in crate::config) opened: Option<Opened>,
}

impl Verdict {
    /// The same, with what is more open by it than by those that would have the word without the most specific ones.
    pub(in crate::config) fn beside(self, others: &Self) -> Self {
        let opened = Opened::between((others.mode, &others.ports), (self.mode, &self.ports));
        Self { opened, ..self }
    }
}

/// What the levels come to, the most specific first; `default` is for what none of them speaks of.
pub(in crate::config) fn mtls(levels: &[Level<'_>], default: MtlsMode) -> Verdict {
    let mut verdict = Verdict { mode: default, ..Verdict::default() };
    if let Some((mode, by)) = levels.iter().find_map(|level| level.says(None)) {
        verdict.mode = mode;
        verdict.by.push(by);
    }
    let named: BTreeSet<u16> = levels.iter().flat_map(Level::named).collect();
    for port in named {
        let Some((mode, by)) = levels.iter().find_map(|level| level.says(Some(port))) else { continue };
        if mode != verdict.mode {
            verdict.ports.push((port, mode));
            if !verdict.by.contains(&by) {
                verdict.by.push(by);
            }
        }
    }
    verdict
}

/// Of policies that are as specific as each other, the one that has the word on tokens: one that says something of them which cannot be
/// used, else the first by name.
pub(in crate::config) fn tokens<'a>(
    policies: impl Iterator<Item = &'a MeshPolicy>,
) -> Option<&'a MeshPolicy> {
    let policies = policies.filter_map(|policy| Some((policy.jwt.as_ref()?.invalid.is_none(), policy)));
    Some(policies.min_by_key(|(is_usable, policy)| (*is_usable, &policy.key))?.1)
}

/// Where the policy wants plaintext let in and another one that is as specific does not, or where it speaks of tokens in vain: what is to
/// be said to its author.
pub(in crate::config) fn conflict<'a>(
    policy: &MeshPolicy,
    others: impl Iterator<Item = &'a MeshPolicy>,
) -> Option<String> {
    let own = policy.mtls.as_ref()?;
    let mut said = Vec::new();
    for other in others.filter(|other| other.key != policy.key) {
        if policy.jwt.is_some() && tokens([policy, other].into_iter()) == Some(other) {
            said.push(format!("{} is as specific and says what holds of tokens", other.key));
        }
        let Some(theirs) = &other.mtls else { continue };
        let ports = own.ports.keys().chain(theirs.ports.keys()).map(|port| Some(*port));
        let asked: BTreeSet<Option<u16>> = ports.chain([None]).collect();
        let loses = |port: &Option<u16>| {
            own.of(*port) == Some(MtlsMode::Permissive) && theirs.of(*port) == Some(MtlsMode::Strict)
        };
        let lost: Vec<Option<u16>> = asked.into_iter().filter(loses).collect();
        let ports: Vec<String> = lost.iter().flatten().map(u16::to_string).collect();
        match (lost.contains(&None), ports.is_empty()) {
            (true, _) => said.push(format!("{} is as specific and says Strict", other.key)),
            (false, false) => said.push(format!(
                "{} is as specific and says Strict for the port {}",
                other.key,
                ports.join(", ")
            )),
            (false, true) => {}
        }
    }
    (!said.is_empty()).then(|| format!("{}, which wins", said.join("; ")))
}

impl Level<'_> {
    /// What is said of a port, or of all that nobody names, and who says it: of several the first by name.
    fn says(&self, port: Option<u16>) -> Option<(MtlsMode, MtlsSource)> {
        match self {
            Self::Annotation(mode, source) => mode.map(|mode| (mode, source.clone())),
            Self::Policies(policies) => {
                let said = policies.iter().filter_map(|(key, mtls)| Some((mtls.of(port)?, *key)));
                let (mode, key) = said.min_by_key(|(mode, key)| (*mode == MtlsMode::Permissive, *key))?;
                Some((mode, MtlsSource::Policy(key.to_string().into())))
            }
        }
    }

    fn named(&self) -> impl Iterator<Item = u16> {
        let policies = match self {
            Self::Policies(policies) => policies.as_slice(),
            Self::Annotation(..) => &[],
        };
        policies.iter().flat_map(|(_, mtls)| mtls.ports.keys().copied())
    }
}

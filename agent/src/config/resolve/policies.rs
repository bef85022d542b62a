//! Which policy each port of a Service goes by, and what that comes to.
//!
//! For a port of which several of one kind speak, the one that names it goes before one that names the Service alone, then the
//! older one, then the first by name (GEP-713): the same on every node, and whoever comes later takes nothing from anybody.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Reason, Refusal, ports_of};
use crate::config::document::{self, Policy, Says, Target};
use crate::config::{FieldPath, Key, Kind, Problem};
use crate::model::{BackendTls, Name, ObjectRef, TrafficSettings};

/// What the policies of a Service come to.
#[derive(Debug, Default, PartialEq)]
pub(in crate::config) struct Settled {
    /// How the ports are treated of which a policy speaks.
    pub(in crate::config) ports: BTreeMap<u16, Arc<TrafficSettings>>,
    /// What is to be said to the policies' authors.
    pub(in crate::config) remarks: Vec<Remark>,
}

/// Something that a policy's author is to know of one of its targets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::config) struct Remark {
    pub(in crate::config) policy: Key,
    /// The target's place in `targetRefs`.
    pub(in crate::config) target: usize,
    /// The field of the target that it is about; None for the target as a whole.
    field: Option<&'static str>,
    /// Why the policy is not in force there; None where it is, with exceptions.
    refused_for: Option<Reason>,
    message: String,
}

/// How a policy stands with one of its targets: what its status says.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetStatus {
    /// The target's place in `targetRefs`.
    pub index: usize,
    /// The condition `Accepted`.
    pub accepted: Result<(), Refusal>,
    /// The condition `ResolvedRefs`, of a kind that refers to something.
    pub resolved_refs: Option<Result<(), Refusal>>,
}

/// A policy that wants ports of the Service, by one of its targets.
struct Contender<'a> {
    policy: &'a Policy,
    target: &'a Target,
    says: &'a Says,
    ports: Vec<u16>,
}

/// What the policies come to for the Service of this name, if it is there. `tls` is what a BackendTLSPolicy comes to.
pub(in crate::config) fn settle<'a>(
    id: &ObjectRef,
    service: Option<&document::Service>,
    policies: impl Iterator<Item = &'a Policy>,
    tls: impl Fn(&Key) -> Option<Result<Arc<BackendTls>, Name>>,
) -> Settled {
    let mut settled = Settled::default();
    let mut contenders = Vec::new();
    for policy in policies {
        let Some(spec) = &policy.spec else { continue };
        for target in spec.targets.iter().filter(|target| target.service == *id) {
            match ports_of(service, id, target.section.as_ref(), None, "policy") {
                Ok(ports) => contenders.push(Contender { policy, target, says: &spec.says, ports }),
                Err((field, message)) => settled.remarks.push(Remark {
                    policy: policy.key.clone(),
                    target: target.index,
                    field,
                    refused_for: Some(Reason::TargetNotFound),
                    message,
                }),
            }
        }
    }
    contenders.sort_by_key(Contender::rank);
    let mut winners: BTreeMap<(u16, Kind), &Contender<'_>> = BTreeMap::new();
    for contender in &contenders {
        for port in &contender.ports {
            winners.entry((*port, contender.policy.key.kind)).or_insert(contender);
        }
    }
    settled.remarks.extend(contenders.iter().filter_map(|contender| contender.lost(&winners)));
    settled.remarks.sort();
    let mut of_ports: BTreeMap<u16, Vec<&Contender<'_>>> = BTreeMap::new();
    for ((port, _), winner) in winners {
        of_ports.entry(port).or_default().push(winner);
    }
    let merged = |(port, winners): (u16, Vec<_>)| (port, Arc::new(merged(&winners, &tls)));
    settled.ports = of_ports.into_iter().map(merged).collect();
    settled
}

/// What the policies of one port, of different kinds, say together.
fn merged(
    winners: &[&Contender<'_>],
    tls: impl Fn(&Key) -> Option<Result<Arc<BackendTls>, Name>>,
) -> TrafficSettings {
    let mut all = TrafficSettings::default();
    let mut is_budget_set = false;
    for winner in winners {
        if let Says::Traffic { settings, has_budget } = winner.says {
            all = (**settings).clone();
            is_budget_set = *has_budget;
        }
    }
    for winner in winners {
        if let Says::Backend { budget, session } = winner.says {
            if let Some(budget) = budget.filter(|_| !is_budget_set) {
                all.retries.budget = budget;
            }
            all.session = session.clone();
        }
        if let Says::Tls(_) = winner.says {
            all.tls = tls(&winner.policy.key);
        }
    }
    all.policies = winners.iter().map(|winner| winner.policy.key.to_string().into()).collect();
    all
}

impl Contender<'_> {
    /// The lowest has the port.
    fn rank(&self) -> (bool, bool, Option<jiff::Timestamp>, Key) {
        let created = self.policy.created;
        (self.target.section.is_none(), created.is_none(), created, self.policy.key.clone())
    }

    /// What is to be said of the ports that others have: nothing of those that have been left to a policy that names them, as
    /// long as others are left.
    fn lost(&self, winners: &BTreeMap<(u16, Kind), &Contender<'_>>) -> Option<Remark> {
        let key = &self.policy.key;
        let winner = |port: &u16| winners.get(&(*port, key.kind)).filter(|winner| winner.policy.key != *key);
        let lost: Vec<_> = self.ports.iter().filter_map(|port| Some((port, *winner(port)?))).collect();
        let has_none = lost.len() == self.ports.len();
        let is_worth_saying = |winner: &Contender<'_>| {
            has_none || winner.target.section.is_some() == self.target.section.is_some()
        };
        let said = lost.iter().filter(|(_, winner)| is_worth_saying(winner)).map(|(port, winner)| {
            let why = match () {
                () if winner.target.section.is_some() != self.target.section.is_some() => "names the port",
                () if winner.policy.created != self.policy.created => "is older",
                () => "comes first by its name",
            };
            format!("the port {port} goes by {}, which {why}", winner.policy.key)
        });
        let message = said.collect::<Vec<_>>().join("; ");
        (!message.is_empty()).then(|| Remark {
            policy: key.clone(),
            target: self.target.index,
            field: None,
            refused_for: has_none.then_some(Reason::Conflicted),
            message,
        })
    }
}

impl Remark {
    /// For whoever reads what is wrong.
    pub(in crate::config) fn problem(&self) -> Problem {
        let field = FieldPath::new(["spec", "targetRefs"]).index(self.target);
        Problem::new(self.field.iter().fold(field, |field, key| field.key(key)), self.message.clone())
    }

    /// For the status, if the policy is not in force at the target.
    pub(in crate::config) fn refusal(&self) -> Option<Refusal> {
        self.refused_for.map(|reason| Refusal { reason, message: self.message.clone() })
    }
}

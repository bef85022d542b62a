//! What an endpoint of this node takes, and from whom: asked wherever something is about to reach it.
//!
//! Policies first, then limits. Who calls is what its certificate or this node's own knowledge of its pods says, and never what it
//! says of itself.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use crate::model::{Limited, Name, SpiffeId, WorkloadUid};
use crate::policy::authorization::{Connection, Decision, OnConnection, Outcome, Set};
use crate::policy::jwt::Rules;
use crate::policy::{self, Admission, Limits};
use crate::snapshot::Snapshot;
use crate::telemetry::{RefuseReason, Ruling, RulingOf, Tried};

/// Who is at the other end, as far as that is proven.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// None where it calls in plaintext.
    pub(super) identity: Option<SpiffeId>,
    /// Its address, or that of the node that speaks for it.
    pub(super) address: IpAddr,
}

/// An endpoint of this node: a pod, and the address and port at it.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub(super) pod: WorkloadUid,
    pub(super) address: SocketAddr,
}

/// What a connection is let in by.
#[derive(Debug, Default)]
pub(super) struct Entry {
    /// What travels on it is to be looked at, request by request.
    pub(super) by_request: bool,
    /// What policies said.
    pub(super) ruling: RulingOf,
    /// The policies that said it, where the pod has any.
    pub(super) policies: Option<Arc<Set>>,
}

/// A connection that an endpoint does not take.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) reason: RefuseReason,
    /// What policies said.
    pub(super) ruling: RulingOf,
}

impl Caller {
    /// What it is held to limits as: the identity that it has proven, else its address. Of IPv6 that is the network that is one's own, as
    /// a rule, for a host may have all of its addresses.
    pub(super) fn source(&self) -> Name {
        if let Some(identity) = &self.identity {
            return identity.to_name();
        }
        match self.address.to_canonical() {
            IpAddr::V4(address) => address.to_string().into(),
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                format!("{}/64", Ipv6Addr::from_bits(network)).into()
            }
        }
    }

    /// It, at the port, as policies see it.
    pub(super) fn at(&self, port: u16) -> Connection<'_> {
        Connection { identity: self.identity.as_ref(), address: self.address, port }
    }
}

impl Door {
    /// The policies of the pod, if it has any.
    pub(super) fn policies<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Set>> {
        snapshot.access.get(&self.pod)
    }

    /// What holds of tokens that the pod is shown, if anything does.
    pub(super) fn tokens<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Rules>> {
        snapshot.tokens.get(&self.pod)
    }

    /// Whether it is known who may call the pod. Of one that was deleted and still runs it is not any more.
    pub(super) fn is_known(&self, snapshot: &Snapshot) -> bool {
        snapshot.workloads.contains_key(&self.pod)
    }

    /// Whether the endpoint takes a connection of the caller.
    pub(super) fn enter(&self, snapshot: &Snapshot, caller: &Caller) -> Result<Entry, Refused> {
        if !self.is_known(snapshot) {
            return Err(Refused { reason: RefuseReason::UnknownDestination, ruling: None });
        }
        let is_limited = is_limited(snapshot, self.address, Limited::Requests);
        let (mut by_request, mut ruling) = (is_limited || self.tokens(snapshot).is_some(), None);
        let policies = self.policies(snapshot);
        if let Some(policies) = policies {
            match policies.connection(&caller.at(self.address.port())) {
                OnConnection::ByRequest => by_request = true,
                OnConnection::Decided(decision) => {
                    ruling = of(&decision);
                    if !decision.is_allowed() {
                        return Err(Refused { reason: RefuseReason::Denied, ruling });
                    }
                }
            }
        }
        match admit(snapshot, self.address, Limited::Connections, || caller.source()) {
            Admission::Admitted(_) => Ok(Entry { by_request, ruling, policies: policies.cloned() }),
            Admission::Refused { .. } => Err(Refused { reason: RefuseReason::RateLimited, ruling }),
        }
    }

    /// What policies say of a connection that carries something else than requests.
    pub(super) fn of_bytes(&self, snapshot: &Snapshot, caller: &Caller) -> RulingOf {
        self.policies(snapshot).and_then(|policies| of(&policies.bytes(&caller.at(self.address.port()))))
    }
}

/// Whether anything of this kind is limited there.
pub(super) fn is_limited(snapshot: &Snapshot, endpoint: SocketAddr, what: Limited) -> bool {
    limits(snapshot, endpoint).iter().any(|limits| limits.count(what))
}

/// Asks for one more of it.
pub(super) fn admit(
    snapshot: &Snapshot,
    endpoint: SocketAddr,
    what: Limited,
    source: impl FnOnce() -> Name,
) -> Admission {
    let limits = limits(snapshot, endpoint);
    if limits.is_empty() {
        return Admission::Admitted(None);
    }
    policy::admit(limits, what, &source(), Instant::now())
}

fn limits(snapshot: &Snapshot, endpoint: SocketAddr) -> &[Arc<Limits>] {
    snapshot.limits.get(&endpoint).map_or(&[], Vec::as_slice)
}

/// What a policy denies that is not asked rule by rule.
pub(super) fn denied(policy: &Name, why: &str) -> Arc<Ruling> {
    let detail = Some(format!("denied by {policy}: {why}"));
    Arc::new(Ruling { is_denied: true, by: Some((policy.clone(), None)), detail, ..Ruling::default() })
}

/// As telemetry is told of it; nothing where no policy had a say.
pub(super) fn of(decision: &Decision) -> RulingOf {
    let Decision { outcome, audited, dry } = decision;
    if *outcome == Outcome::Open && audited.is_empty() && dry.is_none() {
        return None;
    }
    let rule = match outcome {
        Outcome::Allowed(rule) | Outcome::Denied(rule) => Some(rule.rule + 1),
        Outcome::Open | Outcome::Invalid { .. } | Outcome::NotAllowed { .. } => None,
    };
    let is_denied = !decision.is_allowed();
    Some(Arc::new(Ruling {
        is_denied,
        by: outcome.policy().map(|policy| (policy.clone(), rule)),
        detail: is_denied.then(|| outcome.to_string()),
        audited: audited.iter().map(|rule| rule.policy.clone()).collect(),
        tried: dry.as_ref().map(|dry| {
            let tried = if is_denied { Tried::WouldAllow } else { Tried::WouldDeny };
            (dry.policy().cloned().unwrap_or_else(|| "".into()), tried)
        }),
    }))
}

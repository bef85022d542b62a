//! Who owns an address when several objects say that it is theirs.

use std::collections::HashMap;
use std::net::IpAddr;

use jiff::Timestamp;

use crate::config::document::Pod;
use crate::model::ObjectRef;

/// Everyone who claims an address. Its owner is the first by this order: Services before pods, then the higher rank,
/// then the name.
#[derive(Debug, Default)]
pub(crate) struct Claims(HashMap<IpAddr, Vec<(Claimant, Rank)>>);

/// An object that says it has an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Claimant {
    Service(ObjectRef),
    Pod(ObjectRef),
}

/// Which of two pods has the address: the newer one, to which the network gave it again before the end of the older
/// one was heard of; of two as old, the one that is not about to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(super) created: Option<Timestamp>,
    pub(super) stays: bool,
}

impl Rank {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self { created: pod.created, stays: !pod.terminating }
    }
}

impl Claims {
    pub(crate) fn claim(&mut self, address: IpAddr, claimant: Claimant, rank: Rank) {
        let claims = self.0.entry(address).or_default();
        claims.retain(|(other, _)| *other != claimant);
        claims.push((claimant, rank));
        let service_first = |claimant: &Claimant| matches!(claimant, Claimant::Pod(_));
        claims.sort_by(|(a, a_rank), (b, b_rank)| {
            (service_first(a).cmp(&service_first(b))).then(b_rank.cmp(a_rank)).then_with(|| a.cmp(b))
        });
    }

    pub(crate) fn release(&mut self, address: IpAddr, claimant: &Claimant) {
        if let Some(claims) = self.0.get_mut(&address) {
            claims.retain(|(other, _)| other != claimant);
            if claims.is_empty() {
                self.0.remove(&address);
            }
        }
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<&Claimant> {
        self.0.get(&address)?.first().map(|(claimant, _)| claimant)
    }

    /// The pods that claim the address; the first of them has it, unless a Service does.
    pub(crate) fn pods(&self, address: IpAddr) -> impl Iterator<Item = &ObjectRef> {
        self.0.get(&address).into_iter().flatten().filter_map(|(claimant, _)| match claimant {
            Claimant::Pod(id) => Some(id),
            Claimant::Service(_) => None,
        })
    }
}

//! What an endpoint of this node takes, asked wherever something is about to reach it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use crate::model::{Limited, Name};
use crate::policy::{self, Admission, Limits};
use crate::snapshot::Snapshot;

/// Whether anything of this kind is limited there.
pub(super) fn is_limited(snapshot: &Snapshot, endpoint: SocketAddr, what: Limited) -> bool {
    limits(snapshot, endpoint).iter().any(|limits| limits.count(what))
}

/// Whether the endpoint takes one more connection of the source.
pub(super) fn takes_connection(
    snapshot: &Snapshot,
    endpoint: SocketAddr,
    source: impl FnOnce() -> Name,
) -> bool {
    matches!(admit(snapshot, endpoint, Limited::Connections, source), Admission::Admitted(_))
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

/// What a client is held to limits as that has proven no identity: its address. Of IPv6 it is the network that is one's own, as a rule,
/// for a host may have all of its addresses.
pub(super) fn unproven(client: IpAddr) -> Name {
    match client.to_canonical() {
        IpAddr::V4(address) => address.to_string().into(),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            format!("{}/64", Ipv6Addr::from_bits(network)).into()
        }
    }
}

fn limits(snapshot: &Snapshot, endpoint: SocketAddr) -> &[Arc<Limits>] {
    snapshot.limits.get(&endpoint).map_or(&[], Vec::as_slice)
}

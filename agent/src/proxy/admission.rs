//! What an endpoint of this node takes, asked wherever something is about to reach it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::model::{Limited, Name};
use crate::policy::{Admission, Limits, Standing};
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

/// Asks for one more of it. Where several Services limit the endpoint, all must let it in.
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
    let (source, now) = (source(), Instant::now());
    let mut least: Option<Standing> = None;
    for limits in limits {
        match limits.admit(what, &source, now) {
            Admission::Admitted(standing) => {
                least = [least, standing].into_iter().flatten().min_by_key(|standing| standing.left);
            }
            refused @ Admission::Refused { .. } => return refused,
        }
    }
    Admission::Admitted(least)
}

fn limits(snapshot: &Snapshot, endpoint: SocketAddr) -> &[Arc<Limits>] {
    snapshot.limits.get(&endpoint).map_or(&[], Vec::as_slice)
}

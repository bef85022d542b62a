//! Which endpoints a connection from this node may go to at all, by the rules of Kubernetes.

use super::hashing;
use crate::model::{
    Algorithm, Balancing, Candidates, Endpoint, NodeInfo, Reachable, Spill, TrafficDistribution, TrafficScope,
};

/// What decides which endpoints are near enough.
#[derive(Clone, Copy, Debug)]
pub struct Topology<'a> {
    /// `internalTrafficPolicy`.
    pub scope: TrafficScope,
    /// `trafficDistribution`.
    pub distribution: TrafficDistribution,
    /// The node that the connections are from.
    pub node: &'a NodeInfo,
}

/// The endpoints that connections from the node may go to, decided for each address family on its own as kube-proxy
/// does (`pkg/proxy/topology.go`):
///
/// - those that are ready; if none is, those that terminate but still serve (KEP-1669);
/// - with `internalTrafficPolicy: Local` only those of the node, and no regard to topology;
/// - else those that the hints allot to the node or to its zone, if all ready endpoints have such hints and some are
///   allotted here; where no hints are given, the nearest ones that `trafficDistribution` asks for;
/// - and where the port wants it, all that are ready, once too few of the near ones are fit.
///
/// `old` is what was worked out before, of which it takes the tables that are still the same.
pub fn candidates(
    endpoints: &[Endpoint],
    topology: Topology<'_>,
    balancing: &Balancing,
    old: Option<&Candidates>,
) -> Candidates {
    let Topology { scope, node, .. } = topology;
    let family = |is_ipv4: bool, old: Option<&Reachable>| {
        let reachable: Vec<u32> = (0..)
            .zip(endpoints)
            .filter(|(_, it)| it.address.is_ipv4() == is_ipv4)
            .filter(|(_, it)| scope == TrafficScope::Cluster || it.node.as_ref() == Some(&node.name))
            .map(|(index, _)| index)
            .collect();
        let pick = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<u32> {
            reachable.iter().copied().filter(|&index| wanted(&endpoints[index as usize])).collect()
        };
        let ready = pick(&|it| it.ready);
        let mut picked = if ready.is_empty() {
            Reachable::from(pick(&|it| it.serving && it.terminating))
        } else if scope == TrafficScope::Local {
            Reachable::from(ready)
        } else {
            spilling(endpoints, &reachable, ready, topology, balancing.spill_over_below)
        };
        if let Algorithm::ConsistentHash(_) = balancing.algorithm {
            let near = picked.near.iter().map(|&index| &endpoints[index as usize]);
            picked.table = hashing::table(near, old.and_then(|old| old.table.as_ref()));
        }
        picked
    };
    Candidates { v4: family(true, old.map(|old| &old.v4)), v6: family(false, old.map(|old| &old.v6)) }
}

/// The near ones of those that are ready, and all for when less than this share of the near ones, in percent, is fit.
fn spilling(
    endpoints: &[Endpoint],
    reachable: &[u32],
    ready: Vec<u32>,
    topology: Topology<'_>,
    below: u8,
) -> Reachable {
    let Some((near, reach)) = nearest(endpoints, &ready, topology) else { return Reachable::from(ready) };
    if below == 0 || near.len() == ready.len() {
        return Reachable::from(near);
    }
    let NodeInfo { name, zone } = topology.node;
    // Those that are on their way out are not missed: others come in their place.
    let is_missed = |it: &Endpoint| {
        let is_near = match reach {
            Reach::Node => it.node.as_ref() == Some(name),
            Reach::Zone => it.zone == *zone,
        };
        is_near && !it.ready && !it.terminating
    };
    let missed = reachable.iter().filter(|&&index| is_missed(&endpoints[index as usize])).count();
    let least = ((near.len() + missed) * usize::from(below)).div_ceil(100);
    match near.len() < least {
        true => Reachable::from(ready),
        false => Reachable { spill: Some(Spill { all: ready.into(), least }), ..Reachable::from(near) },
    }
}

/// How far away the endpoints are at most that are near.
#[derive(Clone, Copy, Debug)]
enum Reach {
    Node,
    Zone,
}

/// The part of `ready` that is near enough; None: all of it, wherever it is.
fn nearest(endpoints: &[Endpoint], ready: &[u32], topology: Topology<'_>) -> Option<(Vec<u32>, Reach)> {
    let Topology { distribution, node, .. } = topology;
    let all = |fits: &dyn Fn(&Endpoint) -> bool| ready.iter().all(|&index| fits(&endpoints[index as usize]));
    let only = |reach: Reach, fits: &dyn Fn(&Endpoint) -> bool| {
        let some: Vec<u32> =
            ready.iter().copied().filter(|&index| fits(&endpoints[index as usize])).collect();
        (!some.is_empty()).then_some((some, reach))
    };
    let in_zone = |zone: &Option<_>| node.zone.is_some() && *zone == node.zone;

    let hinted_to_nodes = all(&|it| !it.for_nodes.is_empty());
    let hinted_to_zones = all(&|it| !it.for_zones.is_empty());
    if hinted_to_nodes || hinted_to_zones {
        let for_node =
            || only(Reach::Node, &|it| it.for_nodes.contains(&node.name)).filter(|_| hinted_to_nodes);
        let for_zone = || {
            let zone = node.zone.as_ref().filter(|_| hinted_to_zones)?;
            only(Reach::Zone, &|it| it.for_zones.contains(zone))
        };
        return for_node().or_else(for_zone);
    }
    let same_node = || only(Reach::Node, &|it| it.node.as_ref() == Some(&node.name));
    let same_zone = || only(Reach::Zone, &|it| in_zone(&it.zone));
    match distribution {
        TrafficDistribution::Anywhere => None,
        TrafficDistribution::PreferSameZone => same_zone(),
        TrafficDistribution::PreferSameNode => same_node().or_else(same_zone),
    }
}

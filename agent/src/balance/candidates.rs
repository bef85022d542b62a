//! Which endpoints a connection from this node may go to at all, by the rules of Kubernetes.

use crate::model::{Candidates, Endpoint, NodeInfo, TrafficDistribution, TrafficScope};

/// The endpoints that connections from `node` may go to, decided for each address family on its own as kube-proxy
/// does (`pkg/proxy/topology.go`):
///
/// - those that are ready; if none is, those that terminate but still serve (KEP-1669);
/// - with `internalTrafficPolicy: Local` only those of the node, and no regard to topology;
/// - else those that the hints allot to the node or to its zone, if all ready endpoints have such hints and some are
///   allotted here; where no hints are given, the nearest ones that `trafficDistribution` asks for.
pub fn candidates(
    endpoints: &[Endpoint],
    scope: TrafficScope,
    distribution: TrafficDistribution,
    node: &NodeInfo,
) -> Candidates {
    let family = |is_ipv4: bool| {
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
        let picked = if ready.is_empty() {
            pick(&|it| it.serving && it.terminating)
        } else if scope == TrafficScope::Local {
            ready
        } else {
            nearest(endpoints, ready, distribution, node)
        };
        picked.into_boxed_slice()
    };
    Candidates { v4: family(true), v6: family(false) }
}

/// The part of `ready` that is near enough.
fn nearest(
    endpoints: &[Endpoint],
    ready: Vec<u32>,
    distribution: TrafficDistribution,
    node: &NodeInfo,
) -> Vec<u32> {
    let all = |fits: &dyn Fn(&Endpoint) -> bool| ready.iter().all(|&index| fits(&endpoints[index as usize]));
    let only = |fits: &dyn Fn(&Endpoint) -> bool| {
        let some: Vec<u32> =
            ready.iter().copied().filter(|&index| fits(&endpoints[index as usize])).collect();
        (!some.is_empty()).then_some(some)
    };
    let in_zone = |zone: &Option<_>| node.zone.is_some() && *zone == node.zone;

    let hinted_to_nodes = all(&|it| !it.for_nodes.is_empty());
    let hinted_to_zones = all(&|it| !it.for_zones.is_empty());
    let near = if hinted_to_nodes || hinted_to_zones {
        let for_node = || only(&|it| it.for_nodes.contains(&node.name)).filter(|_| hinted_to_nodes);
        let for_zone = || {
            let zone = node.zone.as_ref().filter(|_| hinted_to_zones)?;
            only(&|it| it.for_zones.contains(zone))
        };
        for_node().or_else(for_zone)
    } else {
        let same_node = || only(&|it| it.node.as_ref() == Some(&node.name));
        let same_zone = || only(&|it| in_zone(&it.zone));
        match distribution {
            TrafficDistribution::Anywhere => None,
            TrafficDistribution::PreferSameZone => same_zone(),
            TrafficDistribution::PreferSameNode => same_node().or_else(same_zone),
        }
    };
    near.unwrap_or(ready)
}

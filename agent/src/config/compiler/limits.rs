//! The rate limits of this node's endpoints. What has been admitted stays known for as long as a Service has the endpoint and
//! limits it as before.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use imbl::OrdMap;

use crate::model::{Declared, Endpoint, Limited, NodeInfo, ObjectRef, RateLimit, Service};
use crate::policy::Limits;

/// By endpoint, those of each Service that has it.
pub(super) type LimitsByEndpoint = OrdMap<SocketAddr, Vec<Arc<Limits>>>;

/// Brings them up to date with a Service that has come, changed or gone.
pub(super) fn update(
    limits: &mut LimitsByEndpoint,
    node: &NodeInfo,
    old: Option<&Service>,
    new: Option<&Service>,
) {
    let Some(service) = new.or(old) else { return };
    let now = new.map(|new| limited(new, node)).unwrap_or_default();
    let before = old.map(|old| limited(old, node)).unwrap_or_default();
    for (address, _) in before.iter().filter(|(address, _)| !now.contains_key(address)) {
        take_out(limits, *address, &service.id);
    }
    for (address, rules) in now {
        let those = limits.entry(address).or_default();
        match those.iter_mut().find(|it| *it.service() == service.id) {
            Some(same) if same.are_of(&rules) => {}
            Some(other) => *other = Arc::new(Limits::new(service.id.clone(), &rules)),
            None => those.push(Arc::new(Limits::new(service.id.clone(), &rules))),
        }
    }
}

fn take_out(limits: &mut LimitsByEndpoint, address: SocketAddr, service: &ObjectRef) {
    let Some(those) = limits.get_mut(&address) else { return };
    those.retain(|it| it.service() != service);
    if those.is_empty() {
        limits.remove(&address);
    }
}

/// The endpoints of this node that the Service limits. Where two of its ports lead to one, the first one's limits are the endpoint's.
/// A port that is said to carry something else has no requests, and nobody is to look for some.
fn limited(service: &Service, node: &NodeInfo) -> BTreeMap<SocketAddr, Arc<[RateLimit]>> {
    let is_here = |endpoint: &&Endpoint| endpoint.node.as_ref().is_none_or(|name| *name == node.name);
    let mut limited = BTreeMap::new();
    for port in service.ports.iter().filter(|port| !port.traffic.rate_limits.is_empty()) {
        let is_of_port =
            |limit: &&RateLimit| limit.of == Limited::Connections || port.declared() != Declared::Opaque;
        let rules: Arc<[RateLimit]> = port.traffic.rate_limits.iter().filter(is_of_port).cloned().collect();
        if !rules.is_empty() {
            for endpoint in port.endpoints.iter().filter(is_here) {
                limited.entry(endpoint.address).or_insert_with(|| rules.clone());
            }
        }
    }
    limited
}

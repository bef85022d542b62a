//! The Services of each endpoint, for clients that dial pods and mean the Services that these are of. Known only while a pod of
//! this node is such a client: it is an entry for every endpoint of the cluster, of some 170 bytes.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

use crate::model::{DialledPods, Endpoint, Front, NodeInfo, ObjectRef, Service, Workload};

/// The pods of this node that are such clients.
#[derive(Debug, Default)]
pub(super) struct Askers(HashSet<ObjectRef>);

impl Askers {
    /// Notes what has become of the pod. The first one that asks has the index made, and with the last one it goes.
    pub(super) fn note(
        &mut self,
        id: &ObjectRef,
        workload: Option<&Workload>,
        node: &NodeInfo,
        services: &OrdMap<ObjectRef, Arc<Service>>,
        fronts: &mut OrdSet<Front>,
    ) {
        let asks = workload.is_some_and(|it| {
            it.dialled_pods == DialledPods::Service
                && it.enrolment.is_wanted()
                && it.node.as_ref() == Some(&node.name)
        });
        if asks {
            if self.0.insert(id.clone()) && self.0.len() == 1 {
                *fronts = services.values().flat_map(|service| fronts_of(service)).collect();
            }
        } else if self.0.remove(id) && self.0.is_empty() {
            *fronts = OrdSet::new();
        }
    }

    /// Brings the index up to date with a Service that has come, changed or gone.
    pub(super) fn update(&self, fronts: &mut OrdSet<Front>, old: Option<&Service>, new: Option<&Service>) {
        if self.0.is_empty() {
            return;
        }
        let of = |service: Option<&Service>| -> BTreeSet<Front> {
            service.into_iter().flat_map(fronts_of).collect()
        };
        let (before, now) = (of(old), of(new));
        for gone in before.difference(&now) {
            fronts.remove(gone);
        }
        for come in now.difference(&before) {
            fronts.insert(come.clone());
        }
    }
}

/// Of pods in its own namespace alone: with a handwritten EndpointSlice, a Service would else get what others' pods are sent.
fn fronts_of(service: &Service) -> impl Iterator<Item = Front> {
    let is_own = |endpoint: &&Endpoint| {
        endpoint.workload.as_ref().is_some_and(|pod| pod.pod.namespace == service.id.namespace)
    };
    service.ports.iter().flat_map(move |port| {
        port.endpoints.iter().filter(is_own).map(|endpoint| Front {
            endpoint: endpoint.address,
            service: service.id.clone(),
            port: port.port,
        })
    })
}

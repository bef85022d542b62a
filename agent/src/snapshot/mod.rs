//! The whole of what is known at one moment: the world, and what is to be done in it.
//!
//! A value made by `config` and read by everybody who decides something for a connection. It knows no document and decides
//! nothing itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

use crate::model::{Front, ObjectRef, Service, Workload, WorkloadUid};
use crate::policy::authorization::Set;
use crate::policy::{Limits, jwt};
use crate::route::{InvalidBackend, ServiceRoutes, Target};

/// Everything that a connection's decisions are made from, immutable. The maps are persistent: the next snapshot
/// shares all that did not change, so one change costs the logarithm of the cluster's size.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts the snapshots of this process, from 1; 0 is the empty one before the first.
    pub generation: u64,
    /// What stands behind each address that the mesh has heard of: pods and cluster IPs, captured or not.
    pub destinations: OrdMap<IpAddr, Destination>,
    /// Every pod that has not finished, with or without an address.
    pub workloads: OrdMap<WorkloadUid, Arc<Workload>>,
    /// The addresses known to the mesh, hence captured: those of pods that want enrolment, and of Services with at
    /// least one such endpoint, with a route or with TLS to begin. Never that of the API server's own Service (`default/kubernetes`).
    pub captured: OrdSet<IpAddr>,
    /// The Services with a cluster IP, by name: what the backends of routes refer to.
    pub services: OrdMap<ObjectRef, Arc<Service>>,
    /// The routes in force, by the Service that they are attached to.
    pub routes: OrdMap<ObjectRef, Arc<ServiceRoutes>>,
    /// How much the endpoints of this node take, each by what the Services say that have it.
    pub limits: OrdMap<SocketAddr, Vec<Arc<Limits>>>,
    /// Who may call the pods of this node, where policies say something of that.
    pub access: OrdMap<WorkloadUid, Arc<Set>>,
    /// What holds of tokens that the pods of this node are shown, where policies say something of that.
    pub tokens: OrdMap<WorkloadUid, Arc<jwt::Rules>>,
    /// The Services of each endpoint, while a pod of this node wants those that it dials to be taken for them; else empty.
    pub fronts: OrdSet<Front>,
}

/// What a destination address stands for.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A pod's own address.
    Workload(Arc<Workload>),
    /// A Service's cluster IP.
    Service(Arc<Service>),
}

impl Snapshot {
    /// What the address stands for, if the mesh has heard of it.
    pub fn destination(&self, address: IpAddr) -> Option<&Destination> {
        self.destinations.get(&address.to_canonical())
    }

    /// The Service that has the address.
    pub fn service(&self, address: IpAddr) -> Option<&Service> {
        match self.destination(address) {
            Some(Destination::Service(service)) => Some(service),
            _ => None,
        }
    }

    /// The Service of a backend, and its port.
    ///
    /// # Errors
    /// When nothing can be sent there: what was in the way when the route was resolved, or that the Service has gone since.
    pub fn backend(&self, target: &Target) -> Result<(&Service, u16), InvalidBackend> {
        match target {
            Target::Service { id, port } => match self.services.get(id) {
                Some(service) => Ok((service, *port)),
                None => Err(InvalidBackend::NoSuchService(id.clone())),
            },
            Target::Invalid(why) => Err(why.clone()),
        }
    }

    /// The Service port that the endpoint is one of; of several the first. Found only while somebody asks for it
    /// ([`Self::fronts`]).
    pub fn front(&self, endpoint: SocketAddr) -> Option<&Front> {
        let first = Front { endpoint, service: ObjectRef::new("", ""), port: 0 };
        self.fronts.range(first..).next().filter(|front| front.endpoint == endpoint)
    }

    /// The pod that has the address.
    pub fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        match self.destination(address) {
            Some(Destination::Workload(workload)) => Some(workload),
            _ => None,
        }
    }
}

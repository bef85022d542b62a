//! The pods of this node as the machine has them: which network namespace and which cgroup is whose.
//!
//! Pods are known here by their uid alone. What the API server says of them, and whether they are to be in the mesh, is
//! for others to know.

mod addresses;
pub mod cgroups;
mod namespaces;

use std::net::IpAddr;

use crate::model::{PodPaths, WorkloadUid};

/// Where a pod of this node lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its network namespace and cgroup.
    pub paths: PodPaths,
    /// The addresses of its interfaces. They are there before the API server has been told of them.
    pub addresses: Vec<IpAddr>,
}

/// What has been found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// The pod is there.
    Found(WorkloadUid, Place),
    /// It is not there any more.
    Gone(WorkloadUid),
}

//! The pods of this node as the machine has them: which network namespace and which cgroup is whose.
//!
//! Pods are known here by their uid alone. What the API server says of them, and whether they are to be in the mesh, is
//! for others to know.

mod addresses;
pub mod cgroups;
mod namespaces;
pub mod nri;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::model::{PodPaths, WorkloadUid};

/// Where a pod of this node lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its network namespace and cgroup.
    pub paths: PodPaths,
    /// The addresses of its interfaces. They are there before the API server has been told of them.
    pub addresses: Vec<IpAddr>,
}

/// A pod that has just come, and that runs nothing before it is decided what becomes of it.
#[derive(Debug)]
pub struct Arrival {
    /// The pod.
    pub uid: WorkloadUid,
    /// Its network namespace. A pod gets another one when its sandbox is made anew, and is the same pod.
    pub netns: PathBuf,
    /// How long is waited for the decision; then it starts anyway.
    pub patience: Duration,
    /// It may start, or it may not, for this reason.
    pub decide: oneshot::Sender<Result<(), String>>,
}

/// What has been found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// The pod is there.
    Found(WorkloadUid, Place),
    /// It is not there any more.
    Gone(WorkloadUid),
}

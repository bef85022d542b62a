//! What the agent knows of the world: workloads, Services and their endpoints.
//!
//! These types are plain values. They never touch a socket, a clock or a log, and they do not know which
//! documents they were made from (`config` does) nor how they reach the kernel (`capture` does).

mod backend_tls;
mod endpoint_load;
mod front;
mod node;
mod port_load;
mod probers;
mod service;
mod service_load;
mod session;
mod spiffe;
mod traffic;
mod workload;

pub use backend_tls::{AltName, Authorities, BackendTls};
pub use endpoint_load::{Ejection, EndpointLoad, Health, Latency, LoadGuard, Outcomes, Standing, WaitGuard};
pub use front::Front;
pub use node::NodeInfo;
pub use port_load::{Looked, PortGuard, PortLoad, UnderWay};
pub use probers::Probers;
pub use service::{
    Candidates, Declared, Endpoint, HashTable, Reachable, Service, ServicePort, SessionAffinity, Spill,
    TrafficDistribution, TrafficScope,
};
pub use service_load::{RetryTokens, ServiceEvent, ServiceLoad};
pub use session::{SessionKind, SessionLifetime, SessionPersistence};
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain};
pub use traffic::{
    Algorithm, Balancing, Caps, Fault, HashKey, Limited, Outliers, RateLimit, RetryBudget, RetrySettings,
    SharedBy, SuccessRate, TrafficSettings, TrafficTimeouts,
};
pub use workload::{
    DialledPods, Enrolment, MtlsMode, MtlsSource, Opened, PodPaths, PublishedPod, SameNode, Workload,
    WorkloadUid,
};

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// An interned name: cloning it costs a reference count.
pub type Name = Arc<str>;

/// The namespace and name of a Kubernetes object, printed as `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectRef {
    /// The object's namespace.
    pub namespace: Name,
    /// The object's name.
    pub name: Name,
}

impl ObjectRef {
    /// Names an object.
    pub fn new(namespace: impl Into<Name>, name: impl Into<Name>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

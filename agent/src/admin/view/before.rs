//! `/debug/before`: connections that pods of this node had before they were enrolled, and still have.

use serde::{Deserialize, Serialize};

/// The page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BeforeView {
    /// The pods that have any.
    pub pods: Vec<PodBeforeView>,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodBeforeView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The connections that nobody carries.
    pub connections: Vec<EarlierView>,
}

/// A connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EarlierView {
    /// `inbound` where the pod was called, `outbound` where it called a destination of the mesh.
    pub direction: String,
    /// The pod's own address and port.
    pub local_address: String,
    /// The other end's, as the pod knows it.
    pub peer_address: String,
    /// The pod or the Service that has that address now.
    pub peer: Option<String>,
}

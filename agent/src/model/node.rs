//! The node that the agent runs on.

use super::Name;

/// Which node this is. Every client of this agent is a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// The node's name, as in `spec.nodeName` of its pods.
    pub name: Name,
    /// Its label `topology.kubernetes.io/zone`, where it is known.
    pub zone: Option<Name>,
}

//! The spec of a MeshPolicy as it is written. From these types comes its CustomResourceDefinition, and from their comments what
//! `kubectl explain` says; what a type does not tell stands in `crd`.

#[cfg(test)]
use schemars::JsonSchema;
use serde::Deserialize;

use super::super::selector;

/// What pods ask of their callers. Of several that speak of a pod the most specific has the word: one that selects it, then the pod's
/// annotation, then one for its namespace, then the namespace's annotation, then one for the mesh, then the agent's settings.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Spec {
    /// Which pods of the policy's own namespace it is for. Without it, it is for all of them; in the namespace that the mesh is
    /// installed in, for all pods of the mesh.
    pub(super) selector: Option<selector::Wire>,
    /// Whether callers must be in the mesh. At least one of its fields.
    pub(super) mtls: Option<Mtls>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Mtls {
    /// Strict: plaintext from outside of the mesh is refused. Permissive: it is let in. Left to less specific policies unless given.
    pub(super) mode: Option<String>,
    /// Ports with a mode of their own, which wins over mode.
    pub(super) ports: Option<Vec<Port>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Port {
    /// The port of the pod, not of the Service.
    pub(super) port: i64,
    /// Strict or Permissive.
    pub(super) mode: String,
}

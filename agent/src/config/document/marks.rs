//! The marks that a user puts on a Pod or a Namespace to say what the mesh is to do with it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::super::{FieldPath, Problem};
use crate::model::{DialledPods, MtlsMode};

const MESH: &str = "undermesh.io/mesh";
const MTLS: &str = "undermesh.io/mtls";
const DIALLED_PODS: &str = "undermesh.io/dialled-pods";

/// What a Pod or a Namespace says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// Label `undermesh.io/mesh`.
    pub mesh: Option<MeshLabel>,
    /// Annotation `undermesh.io/mtls`.
    pub mtls: Option<MtlsMode>,
    /// Annotation `undermesh.io/dialled-pods`.
    pub dialled_pods: Option<DialledPods>,
}

/// The label `undermesh.io/mesh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MeshLabel {
    /// `enabled`.
    Enabled,
    /// `disabled`, or a value that means nothing: a pod is never enrolled by a typing error.
    Disabled,
}

impl Marks {
    pub(super) fn read(meta: &ObjectMeta, problems: &mut Vec<Problem>) -> Self {
        let value = |map: &Option<std::collections::BTreeMap<String, String>>, key: &str| {
            map.as_ref().and_then(|map| map.get(key)).cloned()
        };
        let mut refuse = |part: &str, key: &str, value: &str, expected: &str| {
            let field = FieldPath::new(["metadata", part, key]);
            problems.push(Problem::new(field, format!("expected {expected}, found {value:?}")));
        };

        let mesh = value(&meta.labels, MESH).map(|value| match value.as_str() {
            "enabled" => MeshLabel::Enabled,
            "disabled" => MeshLabel::Disabled,
            other => {
                refuse("labels", MESH, other, "enabled or disabled");
                MeshLabel::Disabled
            }
        });
        let mtls = value(&meta.annotations, MTLS).map(|value| match value.as_str() {
            "permissive" => MtlsMode::Permissive,
            "strict" => MtlsMode::Strict,
            other => {
                // Whoever wrote it wanted something other than the default: fail closed.
                refuse("annotations", MTLS, other, "permissive or strict (strict is in force until then)");
                MtlsMode::Strict
            }
        });
        let dialled_pods = value(&meta.annotations, DIALLED_PODS).map(|value| match value.as_str() {
            "pod" => DialledPods::Pod,
            "service" => DialledPods::Service,
            other => {
                refuse("annotations", DIALLED_PODS, other, "pod or service (pod is in force until then)");
                DialledPods::Pod
            }
        });
        Self { mesh, mtls, dialled_pods }
    }
}

//! Kubernetes objects with what the controller looks at and nothing else: of tens of thousands of pods, the rest is
//! neither parsed into anything nor kept.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Resource;
use kube::core::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

/// A pod: where it runs, as whom, and whether it is over.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct SlimPod {
    #[serde(default)]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: SlimPodSpec,
    #[serde(default)]
    pub(super) status: SlimPodStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SlimPodSpec {
    pub(super) node_name: String,
    pub(super) service_account_name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SlimPodStatus {
    pub(super) phase: String,
}

/// A node: its taints, as they are, for fields that we do not know must survive a patch of ours.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct SlimNode {
    #[serde(default)]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: SlimNodeSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SlimNodeSpec {
    pub(super) taints: Vec<Value>,
}

/// Says of one type what another one says.
macro_rules! resource_as {
    ($slim:ty, $whole:ty) => {
        impl Resource for $slim {
            type DynamicType = ();
            type Scope = <$whole as Resource>::Scope;

            fn kind(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::kind(&())
            }

            fn group(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::group(&())
            }

            fn version(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::version(&())
            }

            fn plural(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource_as!(SlimPod, Pod);
resource_as!(SlimNode, Node);

//! What the tests of this module share: pods and settings.

use std::time::Duration;

use serde_json::json;

use super::settings::{ControllerSettings, RootSettings, ServiceAccount};
use super::slim::SlimPod;

/// A running pod: its UID, its node and its service account.
pub(super) fn pod(uid: &str, node: &str, account: &str) -> SlimPod {
    with_phase(uid, node, account, "Running")
}

/// The same when it is over.
pub(super) fn finished(uid: &str, node: &str, account: &str) -> SlimPod {
    with_phase(uid, node, account, "Succeeded")
}

fn with_phase(uid: &str, node: &str, account: &str, phase: &str) -> SlimPod {
    let account: ServiceAccount = account.parse().unwrap();
    let pod = json!({
        "metadata": {"uid": uid, "name": format!("pod-{uid}"), "namespace": account.namespace},
        "spec": {"nodeName": node, "serviceAccountName": account.name, "containers": [{"image": "x"}]},
        "status": {"phase": phase, "hostIP": "10.0.0.1"},
    });
    serde_json::from_value(pod).unwrap()
}

pub(super) fn settings() -> ControllerSettings {
    ControllerSettings {
        namespace: "undermesh-system".into(),
        pod_name: "controller-0".into(),
        ca_listen: "127.0.0.1:0".parse().unwrap(),
        ca_names: vec!["ca.test".into()],
        admin_address: "127.0.0.1:0".parse().unwrap(),
        certificate_lifetime: Duration::from_secs(3_600),
        root: RootSettings {
            trust_domain: "cluster.local".parse().unwrap(),
            secret: "undermesh-root".into(),
            life: Duration::from_secs(100 * 86_400),
            overlap: Duration::from_secs(3_600),
        },
        bundle_config_map: "undermesh-root-bundle".into(),
        webhook: None,
        token_audience: "undermesh.io".into(),
        agent: "undermesh-system/undermesh-agent".parse().unwrap(),
        settle: Duration::from_secs(3),
    }
}

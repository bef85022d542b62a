//! AuthorizationPolicies and MeshPolicies at a real API server: what their definitions let in, refuse and keep, what the webhook adds
//! to that, and what the status says. What they do to traffic is for `access`, and is tested without a cluster.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::eventually;

use crate::installed::{A_WHILE, SYSTEM, chart};
use crate::policies::refused;

pub(crate) const AUTHORIZATION: &str = "AuthorizationPolicy";
pub(crate) const MESH: &str = "MeshPolicy";

/// Specs that are well written.
const GOOD: [(&str, &str); 7] = [
    (AUTHORIZATION, "{}"),
    (
        AUTHORIZATION,
        r#"{"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], "action": "Deny", "rules": [{}]}"#,
    ),
    (
        AUTHORIZATION,
        r#"{"selector": {"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]},
            {"key": "c", "operator": "Exists"}]}, "action": "Audit", "dryRun": true}"#,
    ),
    (
        AUTHORIZATION,
        r#"{"rules": [{"from": [{"identities": ["*"], "notNamespaces": ["a"], "ipBlocks": ["10.0.0.0/8"]}, {"serviceAccounts": ["a/b"]}],
            "to": [{"ports": [80], "methods": ["GET"], "paths": ["/a/{*}/{**}"], "hosts": ["*.a"]}, {"grpc": [{"service": "a.B"}]}],
            "when": [{"header": {"name": "a", "values": ["*"]}}, {"claim": {"path": ["a"], "notValues": ["b"]}}]}]}"#,
    ),
    (MESH, "{}"),
    (MESH, r#"{"mtls": {"mode": "Strict"}}"#),
    (
        MESH,
        r#"{"selector": {"matchLabels": {"app": "web"}}, "mtls": {"ports": [{"port": 1, "mode": "Strict"}, {"port": 2, "mode": "Permissive"}]}}"#,
    ),
];

/// What is refused, and of the answer what says why.
const BAD: [(&str, &str, &str); 12] = [
    (
        AUTHORIZATION,
        r#"{"selector": {"matchLabels": {"a": "b"}}, "targetRefs": [{"group": "", "kind": "Service", "name": "web"}]}"#,
        "selector and targetRefs exclude each other",
    ),
    (
        AUTHORIZATION,
        r#"{"targetRefs": [{"group": "", "kind": "Service", "name": "a"}, {"group": "", "kind": "Service", "name": "a"}]}"#,
        "each target may be named once",
    ),
    (AUTHORIZATION, r#"{"selector": {}}"#, "should have at least 1 properties"),
    (
        AUTHORIZATION,
        r#"{"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}"#,
        "values are for In and NotIn",
    ),
    (AUTHORIZATION, r#"{"action": "Block"}"#, "spec.action: Unsupported value"),
    (AUTHORIZATION, r#"{"rules": [{"from": []}]}"#, "should have at least 1 items"),
    (AUTHORIZATION, r#"{"rules": [{"to": [{}]}]}"#, "should have at least 1 properties"),
    (AUTHORIZATION, r#"{"rules": [{"to": [{"ports": [65536]}]}]}"#, "should be less than or equal to 65535"),
    (
        AUTHORIZATION,
        r#"{"rules": [{"when": [{"header": {"name": "a", "values": ["b"]}, "expression": "true"}]}]}"#,
        "must have at most 1",
    ),
    (MESH, r#"{"mtls": {}}"#, "should have at least 1 properties"),
    (MESH, r#"{"mtls": {"mode": "Off"}}"#, "spec.mtls.mode: Unsupported value"),
    (
        MESH,
        r#"{"mtls": {"ports": [{"port": 1, "mode": "Strict"}, {"port": 1, "mode": "Strict"}]}}"#,
        "Duplicate value",
    ),
];

/// The definitions, at an API server where nothing of the mesh is.
pub(crate) fn the_definitions_refuse_what_makes_no_sense(cluster: &Cluster) -> Result<()> {
    let crds = chart().join("crds");
    cluster.kubectl(&["apply", "--server-side", "--filename", &crds.display().to_string()])?;
    for plural in ["authorizationpolicies", "meshpolicies"] {
        let name = format!("customresourcedefinition/{plural}.undermesh.io");
        cluster.kubectl(&["wait", "--for=condition=Established", &name, "--timeout=30s"])?;
        let structural = cluster.get(&[&name])?["status"]["conditions"].to_string();
        ensure!(!structural.contains("NonStructuralSchema"), "{structural}");
    }
    // Their paths are served in their own time.
    eventually(A_WHILE, "policies are served", || cluster.kubectl(&["get", "azpol,mpol"]))?;
    for (kind, spec) in GOOD {
        cluster.apply(&policy(kind, "default", spec)?.to_string())?;
    }
    for (kind, spec, why) in BAD {
        // Of another name: what kubectl applies onto an object that is there, it adds to it.
        let mut policy = policy(kind, "default", spec)?;
        policy["metadata"]["name"] = json!("two");
        refused(cluster, &policy, why)?;
    }
    // What it does not know it keeps, so that agents refuse it: without it the rule would match everything.
    let misspelt = policy(AUTHORIZATION, "default", r#"{"rules": [{"form": [{"namespaces": ["a"]}]}]}"#)?;
    cluster.apply(&misspelt.to_string())?;
    let kept = cluster.get(&["azpol", "one"])?;
    ensure!(kept["spec"]["rules"] == misspelt["spec"]["rules"], "{}", kept["spec"]);
    let shown = cluster.kubectl(&["get", "azpol", "one", "--no-headers"])?;
    ensure!(shown.contains("Allow") && shown.contains("false"), "the columns are {shown:?}");
    cluster.kubectl(&["delete", "--filename", &crds.display().to_string()])?;
    Ok(())
}

/// What the mesh says of policies, once it is installed.
pub(crate) fn the_status_and_the_webhook_say_what_is_wrong(cluster: &Cluster) -> Result<()> {
    let misspelt = policy(AUTHORIZATION, "default", r#"{"rules": [{"form": [{"namespaces": ["a"]}]}]}"#)?;
    let why = "denied the request: spec.rules[0].form: there is no such field";
    eventually(A_WHILE, "the webhook refuses it", || refused(cluster, &misspelt, why))?;

    let redis = r#"{"targetRefs": [{"group": "", "kind": "Service", "name": "redis"}], "rules": [{"to": [{"methods": ["GET"]}]}]}"#;
    cluster.apply(&policy(AUTHORIZATION, "default", redis)?.to_string())?;
    says(cluster, "azpol", "default", ["TargetNotFound", ""])?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "redis", "namespace": "default" },
        "spec": { "ports": [{ "name": "redis", "port": 6379 }] },
    });
    cluster.apply(&service.to_string())?;
    says(cluster, "azpol", "default", ["Accepted", "NotHttp"])?;
    let selecting = r#"{"selector": {"matchLabels": {"app": "nobody"}}}"#;
    cluster.kubectl(&["delete", "azpol/one", "service/redis"])?;
    cluster.apply(&policy(AUTHORIZATION, "default", selecting)?.to_string())?;
    let told = says(cluster, "azpol", "default", ["Accepted", ""])?;
    ensure!(told.contains("it selects no pod now"), "{told}");

    let mut strict = policy(MESH, SYSTEM, r#"{"mtls": {"ports": [{"port": 9, "mode": "Strict"}]}}"#)?;
    let lax = r#"{"mtls": {"ports": [{"port": 9, "mode": "Permissive"}]}}"#;
    cluster.apply(&policy(MESH, SYSTEM, lax)?.to_string())?;
    says(cluster, "mpol", SYSTEM, ["Accepted", ""])?;
    strict["metadata"]["name"] = json!("two");
    cluster.apply(&strict.to_string())?;
    says(cluster, "mpol", SYSTEM, ["Conflicted", ""])?;
    cluster.kubectl(&["delete", "azpol/one"])?;
    cluster.kubectl(&["delete", "mpol/one", "mpol/two", "--namespace", SYSTEM])?;
    Ok(())
}

pub(crate) fn policy(kind: &str, namespace: &str, spec: &str) -> Result<Value> {
    Ok(json!({
        "apiVersion": "undermesh.io/v1alpha1", "kind": kind, "metadata": { "name": "one", "namespace": namespace },
        "spec": serde_json::from_str::<Value>(spec)?,
    }))
}

/// Waits until the conditions Accepted and Enforced of the latest generation have these reasons; the message of the former.
pub(crate) fn says(cluster: &Cluster, kind: &str, namespace: &str, reasons: [&str; 2]) -> Result<String> {
    eventually(A_WHILE, "the policy's status says so", || {
        let policy = cluster.get(&[kind, "one", "--namespace", namespace])?;
        let conditions = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let of = |name: &str| {
            let mut found = conditions.iter().filter(|condition| condition["type"] == name);
            found.next().cloned().unwrap_or_default()
        };
        let found = ["Accepted", "Enforced"].map(of);
        let is_told = found
            .iter()
            .zip(reasons)
            .all(|(condition, reason)| condition["reason"].as_str().unwrap_or_default() == reason);
        ensure!(is_told, "{}", policy["status"]);
        let [accepted, _] = found;
        ensure!(accepted["observedGeneration"] == policy["metadata"]["generation"], "{}", policy["status"]);
        Ok(accepted["message"].as_str().unwrap_or_default().to_owned())
    })
}

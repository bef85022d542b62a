//! TrafficPolicies at a real API server: what its definition lets in and refuses, what the webhook adds to that, and what the status
//! says. What they do to traffic is tested without a cluster.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::eventually;

use crate::installed::{A_WHILE, chart};

/// Specs that are well written, without their targets.
const GOOD: [&str; 4] = [
    "{}",
    r#"{"loadBalancing": {"algorithm": "ConsistentHash", "slowStart": "0s", "spillOverBelow": 70,
        "hashOn": [{"header": "x-user"}, {"cookie": "id"}, {"query": "q"}, {"sourceAddress": {}}]}}"#,
    r#"{"outlierDetection": {"consecutiveErrors": 0, "successRate": {"deviations": "1.9", "interval": "10s"}, "baseEjection": "1m"},
        "limits": {"maxConnections": 1}, "retry": {"attempts": 2, "codes": [503], "budget": {"percent": 10, "perSecond": 1}}}"#,
    r#"{"timeouts": {"request": "1s", "perTry": "500ms", "idle": "1h"},
        "rateLimits": [{"requests": 100, "per": "1s", "by": "Source"}, {"connections": 10, "per": "1m", "burst": 20}],
        "faults": [{"match": {"headers": [{"name": "x-fail", "value": "yes"}]}, "percent": 0.5, "delay": "2s", "abort": {"status": 503}}]}"#,
];

/// What is refused, and of the answer what says why.
const BAD: [(&str, &str); 13] = [
    (r#"{"loadBalancing": {"algorithm": "Maglev"}}"#, "spec.loadBalancing.algorithm: Unsupported value"),
    (r#"{"loadBalancing": {"algorithm": "ConsistentHash"}}"#, "hashOn is for the algorithm ConsistentHash"),
    (r#"{"loadBalancing": {"hashOn": [{"header": "a"}]}}"#, "hashOn is for the algorithm ConsistentHash"),
    (
        r#"{"loadBalancing": {"algorithm": "ConsistentHash", "hashOn": [{"header": "a", "query": "b"}]}}"#,
        "must have at most 1",
    ),
    (r#"{"loadBalancing": {"slowStart": "2h"}}"#, "expected a duration from 0s to 1h"),
    (r#"{"outlierDetection": {"baseEjection": "10m", "maxEjection": "5m"}}"#, "maxEjection may be no less"),
    (r#"{"outlierDetection": {"successRate": {"deviations": "0.0"}}}"#, "expected a number above 0"),
    (r#"{"limits": {"maxRequests": 0}}"#, "spec.limits.maxRequests"),
    (r#"{"retry": {"codes": [503]}}"#, "without attempts nothing is sent again"),
    (r#"{"timeouts": {"request": "1s", "perTry": "2s"}}"#, "perTry may be no longer than request"),
    (
        r#"{"rateLimits": [{"requests": 1, "connections": 1, "per": "1s"}]}"#,
        "expected either requests or connections",
    ),
    (r#"{"faults": [{"percent": 1}]}"#, "expected a delay, an abort or both"),
    (r#"{"timeout": {}}"#, "unknown field \"spec.timeout\""),
];

/// The definition, at an API server where nothing of the mesh is.
pub(crate) fn the_definition_refuses_what_makes_no_sense(cluster: &Cluster) -> Result<()> {
    let crds = chart().join("crds");
    cluster.kubectl(&["apply", "--server-side", "--filename", &crds.display().to_string()])?;
    let name = "customresourcedefinition/trafficpolicies.undermesh.io";
    cluster.kubectl(&["wait", "--for=condition=Established", name, "--timeout=30s"])?;
    let structural = cluster.get(&[name])?["status"]["conditions"].to_string();
    ensure!(!structural.contains("NonStructuralSchema"), "{structural}");
    // Its path is served in its own time.
    eventually(A_WHILE, "policies are served", || cluster.kubectl(&["get", "tpol"]))?;
    for spec in GOOD {
        cluster.apply(&policy(spec)?.to_string())?;
    }
    for (spec, why) in BAD {
        refused(cluster, &policy(spec)?, why)?;
    }
    let target = |kind: &str| json!({ "group": "", "kind": kind, "name": "web" });
    for (targets, why) in [
        (json!([]), "should have at least 1 items"),
        (json!([target("Deployment")]), "spec.targetRefs[0].kind: Unsupported value"),
        (json!([target("Service"), target("Service")]), "each target may be named once"),
    ] {
        let mut policy = policy("{}")?;
        policy["spec"]["targetRefs"] = targets;
        refused(cluster, &policy, why)?;
    }
    let found = cluster.kubectl(&["get", "undermesh", "--no-headers"])?;
    ensure!(found.contains("web"), "the category has {found:?}");
    let kept = cluster.get(&["tpol", "web"])?;
    ensure!(kept["spec"]["limits"].is_null(), "what was not said is filled in: {}", kept["spec"]);
    cluster.kubectl(&["delete", "--filename", &crds.display().to_string()])?;
    Ok(())
}

/// What the mesh says of a policy, once it is installed.
pub(crate) fn the_status_and_the_webhook_say_what_is_wrong(cluster: &Cluster) -> Result<()> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": { "ports": [{ "port": 80 }] },
    });
    let first = policy("{}")?;
    cluster.apply(&first.to_string())?;
    says(cluster, "web", "TargetNotFound")?;
    cluster.apply(&service.to_string())?;
    says(cluster, "web", "Accepted")?;
    // Of the same second, and later by name.
    let mut second = first.clone();
    second["metadata"]["name"] = json!("webb");
    cluster.apply(&second.to_string())?;
    says(cluster, "webb", "Conflicted")?;
    cluster.kubectl(&["delete", "tpol", "web"])?;
    says(cluster, "webb", "Accepted")?;
    // A header that no schema knows to be none.
    let fault = r#"{"faults": [{"match": {"headers": [{"name": "a", "value": "\n"}]}, "delay": "1s"}]}"#;
    let why =
        "denied the request: spec.faults[0].match.headers[0].value: expected a value that a header may have";
    eventually(A_WHILE, "the webhook refuses it", || refused(cluster, &policy(fault)?, why))?;
    cluster.kubectl(&["delete", "tpol/webb", "service/web"])?;
    Ok(())
}

fn policy(spec: &str) -> Result<Value> {
    let mut spec: Value = serde_json::from_str(spec)?;
    spec["targetRefs"] = json!([{ "group": "", "kind": "Service", "name": "web" }]);
    Ok(json!({
        "apiVersion": "undermesh.io/v1alpha1", "kind": "TrafficPolicy",
        "metadata": { "name": "web", "namespace": "default" }, "spec": spec,
    }))
}

/// The API server lets it in not even for a try, for this reason.
pub(crate) fn refused(cluster: &Cluster, policy: &Value, why: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), policy.to_string())?;
    let path = file.path().display().to_string();
    let told =
        cluster.try_kubectl(&["apply", "--validate=strict", "--dry-run=server", "--filename", &path])?;
    let Err(error) = told.success() else { anyhow::bail!("it is let in: {policy}") };
    let error = format!("{error:#}");
    ensure!(error.contains(why), "{policy} is refused for another reason than {why}: {error}");
    Ok(())
}

/// Waits until the policy's status says this of its only target, of its latest generation.
fn says(cluster: &Cluster, name: &str, reason: &str) -> Result<()> {
    eventually(A_WHILE, "the policy's status says so", || {
        let policy = cluster.get(&["tpol", name])?;
        let ancestor = &policy["status"]["ancestors"][0];
        let condition = &ancestor["conditions"][0];
        ensure!(ancestor["controllerName"] == "undermesh.io/mesh", "{}", policy["status"]);
        ensure!(condition["observedGeneration"] == policy["metadata"]["generation"], "{}", policy["status"]);
        ensure!(condition["reason"] == reason, "{}", policy["status"]);
        Ok(())
    })
}

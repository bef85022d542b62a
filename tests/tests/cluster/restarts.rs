//! A Service whose pods are replaced one after the other, as `kubectl rollout restart` does it, while it is asked for much.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::app::REQUESTS;

use crate::installed::{SHOP, container, joins, pod, ran};

const REPLICAS: usize = 3;
const RESTARTS: usize = 2;
/// Requests a second that all clients send at least. They send some 500 and more where the machine has nothing else to do;
/// on two cores, with two kubelets that replace containers, it may be slower.
const RATE: f64 = 200.0;
/// Each with its protocol, and the Service's port for that.
const CLIENTS: [(&str, u16, &[&str]); 2] = [("ask-http1", 80, &[]), ("ask-http2", 81, &["--http2"])];

/// The servers end as servers should: they answer what they have been asked. All else is the mesh's to do.
pub(crate) fn a_rolling_restart_loses_no_request(cluster: &Cluster) -> Result<()> {
    serve(cluster)?;
    let service = cluster.get(&["service", "api", "--namespace", SHOP])?;
    let address = service["spec"]["clusterIP"].as_str().context("a Service without an address")?;
    for ((name, port, protocol), node) in CLIENTS.iter().zip(cluster.nodes()) {
        let url = format!("http://{address}:{port}/");
        let ask = [REQUESTS, "ask", "--count", "1000000", "--connections", "24", "--pause-ms", "20", &url];
        cluster.apply(&pod(name, node.name(), &[&ask[..], *protocol].concat()).to_string())?;
        joins(cluster, name)?;
    }
    let begun = Instant::now();
    for _ in 0..RESTARTS {
        cluster.kubectl(&["rollout", "restart", "deployment/api", "--namespace", SHOP])?;
        rolled_out(cluster)?;
    }
    let asked: usize = CLIENTS.iter().map(|(name, ..)| lost_none(cluster, name)).sum::<Result<_>>()?;
    let rate = asked as f64 / begun.elapsed().as_secs_f64();
    eprintln!("{asked} requests over {RESTARTS} rolling restarts, {rate:.0} a second");
    ensure!(rate > RATE, "only {rate:.0} requests a second");
    cluster.kubectl(&["delete", "deployment/api", "service/api", "--namespace", SHOP])?;
    Ok(())
}

fn serve(cluster: &Cluster) -> Result<()> {
    let labels = json!({ "app": "api" });
    // Kubernetes puts the pod's name in.
    let mut server = container(&[REQUESTS, "serve", "--graceful", "--name", "$(POD)"]);
    server["env"] = json!([{ "name": "POD", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }]);
    server["readinessProbe"] = json!({ "httpGet": { "path": "/", "port": 8080 }, "periodSeconds": 1 });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "api", "namespace": SHOP },
        "spec": {
            "replicas": REPLICAS, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": { "containers": [server] } },
        },
    });
    let port = |name: &str, port: u16, protocol: &str| json!({ "name": name, "port": port, "targetPort": 8080, "appProtocol": protocol });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "api", "namespace": SHOP },
        "spec": { "selector": labels, "ports": [port("one", 80, "http"), port("two", 81, "kubernetes.io/h2c")] },
    });
    cluster.apply(&deployment.to_string())?;
    cluster.apply(&service.to_string())?;
    rolled_out(cluster)
}

fn rolled_out(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["rollout", "status", "deployment/api", "--namespace", SHOP, "--timeout=120s"])?;
    Ok(())
}

/// Ends the client, which has to have been answered by every pod that there was; how much it has asked for.
fn lost_none(cluster: &Cluster, client: &str) -> Result<usize> {
    let ran = ran(cluster, client)?;
    let servers = ran["by_server"].as_object().context("no servers")?;
    ensure!(ran["failed"] == json!({}), "{client}: {ran}");
    ensure!(ran["by_status"].as_object().is_some_and(|all| all.keys().eq(["200"])), "{client}: {ran}");
    ensure!(servers.len() == REPLICAS * (RESTARTS + 1), "{client}: {ran}");
    Ok(servers.values().filter_map(Value::as_u64).sum::<u64>() as usize)
}

//! A cluster with the mesh installed from its chart, and a shop on it: what the tests of the mesh have in common.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use undermesh_tests::cluster::app::{self, APP, TRAFFIC};
use undermesh_tests::cluster::{Cluster, Kube};
use undermesh_tests::lab::{Metrics, binary, eventually, run_here};

pub(crate) const SYSTEM: &str = "undermesh-system";
pub(crate) const SHOP: &str = "shop";
pub(crate) const PORT: u16 = 7000;

/// The label of the pods of each component of the mesh.
pub(crate) const AGENT: &str = "app.kubernetes.io/component=agent";
pub(crate) const CONTROLLER: &str = "app.kubernetes.io/component=controller";

/// What agents count of connections.
pub(crate) const OPENED: &str = "undermesh_tcp_connections_opened_total";

pub(crate) const ENROLLED: &str = "undermesh.io/enrolled";

/// Everything but what this machine's runtime cannot grant.
const CAPABILITIES: &str = "agent.capabilities={BPF,NET_ADMIN,SYS_ADMIN,SYS_PTRACE}";

/// For what comes of something in a cluster.
pub(crate) const A_WHILE: Duration = Duration::from_secs(30);

/// How long a program of ours may take for a small thing.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Installs the mesh on a cluster that is made here.
pub(crate) fn install(cluster: &Cluster, values: &[&str]) -> Result<()> {
    import_images(cluster)?;
    install_by_helm(cluster, &[&[CAPABILITIES], values].concat())
}

/// Installs the mesh as a user does, and waits until it is ready.
pub(crate) fn install_by_helm(cluster: &Kube, values: &[&str]) -> Result<()> {
    let begun = Instant::now();
    let mut helm = cluster.helm();
    helm.args(["install", "undermesh"]).arg(chart()).args(["--namespace", SYSTEM, "--create-namespace"]);
    for value in values {
        helm.args(["--set", value]);
    }
    run_here(helm, LIMIT)?.success()?;
    is_ready(cluster)?;
    eprintln!("the mesh is installed and ready after {:.1} s", begun.elapsed().as_secs_f32());
    Ok(())
}

/// Waits until controllers and agents are.
pub(crate) fn is_ready(cluster: &Kube) -> Result<()> {
    for what in ["deployment/undermesh-controller", "daemonset/undermesh-agent"] {
        rolled_out(cluster, what)?;
    }
    Ok(())
}

/// A namespace with a server on every node and a Service in front of them.
pub(crate) fn open_shop(cluster: &Kube) -> Result<()> {
    let labels = json!({ "app": "web" });
    let serve = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "web", "namespace": SHOP },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [container(&[TRAFFIC, "serve", "--name", "web", "--port", &PORT.to_string()])],
            } },
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": SHOP },
        "spec": { "selector": labels, "ports": [{ "port": 80, "targetPort": PORT }] },
    });
    cluster.kubectl(&["create", "namespace", SHOP])?;
    cluster.apply(&serve.to_string())?;
    cluster.apply(&service.to_string())?;
    cluster.kubectl(&["rollout", "status", "daemonset/web", "--namespace", SHOP, "--timeout=60s"])?;
    Ok(())
}

/// A pod of the shop on this node.
pub(crate) fn pod(name: &str, node: &str, command: &[&str]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": SHOP },
        "spec": {
            "nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
            "containers": [container(command)],
        },
    })
}

/// A server of the shop on this node that takes no plaintext.
pub(crate) fn strict(node: &str) -> Value {
    let mut pod = pod("strict", node, &[TRAFFIC, "serve", "--name", "strict", "--port", &PORT.to_string()]);
    pod["metadata"]["annotations"] = json!({ "undermesh.io/mtls": "strict" });
    pod
}

/// A pod of the shop that runs this traffic; returns when it is in the mesh.
pub(crate) fn start(cluster: &Kube, name: &str, node: &str, arguments: &[&str]) -> Result<()> {
    let command = [&[TRAFFIC], arguments].concat();
    cluster.apply(&pod(name, node, &command).to_string())?;
    joins(cluster, name)
}

/// Waits until the pod runs, and is in the mesh.
pub(crate) fn joins(cluster: &Kube, name: &str) -> Result<()> {
    eventually(A_WHILE, "it is in the mesh", || {
        let pod = cluster.get(&["pod", name, "--namespace", SHOP])?;
        ensure!(
            condition(&pod)["status"] == "True" && pod["status"]["phase"] == "Running",
            "{}",
            pod["status"]
        );
        Ok(())
    })
}

/// Ends traffic, and returns what it says of itself.
pub(crate) fn ran(cluster: &Kube, name: &str) -> Result<Value> {
    // The container may have ended before kubectl has heard of its shell's end, and then that has failed.
    let _ = cluster.kubectl(&["exec", "--namespace", SHOP, name, "--", "sh", "-c", "kill -TERM 1"]);
    eventually(A_WHILE, "it has ended", || {
        let pod = cluster.get(&["pod", name, "--namespace", SHOP])?;
        ensure!(pod["status"]["phase"] == "Succeeded", "{}", pod["status"]["phase"]);
        Ok(())
    })?;
    let told = cluster.kubectl(&["logs", "--namespace", SHOP, name, "--tail=1"])?;
    serde_json::from_str(&told).with_context(|| told.clone())
}

pub(crate) fn container(command: &[&str]) -> Value {
    json!({ "name": "main", "image": APP, "imagePullPolicy": "Never", "command": command })
}

/// Puts the shop into the mesh; how long it takes until every pod says that it is in.
pub(crate) fn join(cluster: &Kube) -> Result<Duration> {
    join_within(cluster, Duration::from_secs(20))
}

/// The same, where there are so many pods that it may take so long.
pub(crate) fn join_within(cluster: &Kube, limit: Duration) -> Result<Duration> {
    let begun = Instant::now();
    cluster.kubectl(&["label", "namespace", SHOP, "undermesh.io/mesh=enabled"])?;
    eventually(limit, "every pod is enrolled", || {
        let pods = cluster.get(&["pods", "--namespace", SHOP])?;
        for pod in pods["items"].as_array().into_iter().flatten() {
            ensure!(condition(pod)["status"] == "True", "{}: {}", pod["metadata"]["name"], condition(pod));
            ensure!(pod["metadata"]["annotations"][ENROLLED] == "open", "{}", pod["metadata"]);
        }
        Ok(())
    })?;
    Ok(begun.elapsed())
}

/// The condition by which the agent says how the pod stands.
pub(crate) fn condition(pod: &Value) -> Value {
    let conditions = pod["status"]["conditions"].as_array();
    let ours = conditions.into_iter().flatten().find(|condition| condition["type"] == ENROLLED);
    ours.cloned().unwrap_or_default()
}

/// The servers' names and addresses, in the order of the nodes.
pub(crate) fn servers(cluster: &Kube) -> Result<Vec<(String, String)>> {
    let pods = cluster.get(&["pods", "--namespace", SHOP, "--selector=app=web"])?;
    let of = |node: &str| -> Result<(String, String)> {
        let mut pods = pods["items"].as_array().into_iter().flatten();
        let pod = pods.find(|pod| pod["spec"]["nodeName"] == node).context("no server")?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
        Ok((text(&pod["metadata"]["name"])?, text(&pod["status"]["podIP"])?))
    };
    cluster.node_names()?.iter().map(|node| of(node)).collect()
}

/// The address and port of the Service in front of the servers.
pub(crate) fn service(cluster: &Kube) -> Result<String> {
    let service = cluster.get(&["service", "web", "--namespace", SHOP])?;
    Ok(format!("{}:80", service["spec"]["clusterIP"].as_str().context("a Service without an address")?))
}

/// Connections from a pod of the shop, each of which must be served.
pub(crate) fn dial(cluster: &Kube, from: &str, to: &str, count: usize) -> Result<()> {
    let told = told(cluster, from, &[TRAFFIC, "dial", "--count", &count.to_string(), to])?;
    ensure!(told["failed"].as_object().is_some_and(|failed| failed.is_empty()), "{from} to {to}: {told}");
    Ok(())
}

/// What a program of ours says that is run in a pod of the shop.
pub(crate) fn told(cluster: &Kube, pod: &str, command: &[&str]) -> Result<Value> {
    let told = cluster.kubectl(&[&["exec", "--namespace", SHOP, pod, "--"], command].concat())?;
    serde_json::from_str(&told).with_context(|| told.clone())
}

/// Whoever writes a mark that means nothing is told so.
pub(crate) fn a_typing_error_is_warned_of(cluster: &Kube) -> Result<()> {
    let label = ["label", "namespace", "default", "undermesh.io/mesh=on", "--dry-run=server", "--overwrite"];
    let said = cluster.try_kubectl(&label)?;
    let expected =
        r#"Warning: undermesh: metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "on""#;
    ensure!(said.stderr.contains(expected), "{said:?}");
    said.success().map(drop)
}

/// The pods of the agents.
pub(crate) fn agents(cluster: &Kube) -> Result<Vec<Value>> {
    pods_of(cluster, AGENT)
}

/// The pods of a component of the mesh.
fn pods_of(cluster: &Kube, component: &str) -> Result<Vec<Value>> {
    let mut pods = cluster.get(&["pods", "--namespace", SYSTEM, "--selector", component])?;
    Ok(pods["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
}

/// A page of an agent or a controller.
pub(crate) fn page(cluster: &Kube, pod: &Value, page: &str) -> Result<String> {
    let pod = pod["metadata"]["name"].as_str().context("a pod without a name")?;
    cluster.kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:15020/proxy/{page}")])
}

/// What all agents that run now have counted.
pub(crate) fn counted(cluster: &Kube, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    Ok(metrics(cluster, AGENT)?.sum(name, labels))
}

/// The metrics of all pods of a component that run now.
pub(crate) fn metrics(cluster: &Kube, component: &str) -> Result<Metrics> {
    let pages = pods_of(cluster, component)?.into_iter().map(|pod| page(cluster, &pod, "metrics"));
    Ok(Metrics::parse(&pages.collect::<Result<String>>()?))
}

/// Tells what agents and controllers take: what requests of resources are about.
pub(crate) fn tell_what_is_taken(cluster: &Kube, when: &str) -> Result<()> {
    let pods = cluster.get(&["pods", "--namespace", SYSTEM])?;
    for pod in pods["items"].as_array().context("no pods")? {
        let metrics = Metrics::parse(&page(cluster, pod, "metrics")?);
        eprintln!(
            "{when}, {}: {:.1} MiB resident, {:.1} s of CPU since it began",
            pod["metadata"]["name"],
            metrics.sum("process_resident_memory_bytes", &[]) / f64::from(1 << 20),
            metrics.sum("process_cpu_seconds_total", &[]),
        );
    }
    Ok(())
}

/// The clock of the traffic's figures.
pub(crate) fn monotonic_ns() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

pub(crate) fn rolled_out(cluster: &Kube, what: &str) -> Result<()> {
    cluster
        .kubectl(&["rollout", "status", what, "--namespace", SYSTEM, "--timeout=110s"])
        .map(drop)
        .with_context(|| {
            let pods = cluster.kubectl(&["describe", "pods", "--namespace", SYSTEM]).unwrap_or_default();
            format!("{what} is not ready:\n{pods}")
        })
}

/// Gives all nodes the images of the mesh and of its users.
pub(crate) fn import_images(cluster: &Cluster) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let undermesh = binary("undermesh")?;
    let programs = undermesh.parent().context("a program in no folder")?;
    for tar in app::write_images(folder.path(), programs)? {
        cluster.import(&tar)?;
    }
    Ok(())
}

pub(crate) fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/undermesh")
}

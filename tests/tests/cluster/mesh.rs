//! The mesh on a real Kubernetes, installed from its chart: what its users do, and what happens to them.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use undermesh_tests::cluster::app::TRAFFIC;
use undermesh_tests::cluster::{Cluster, Kube};
use undermesh_tests::lab::{binary, eventually, patient};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{
    self, A_WHILE, ENROLLED, OPENED, PORT, SHOP, SYSTEM, condition, container, counted, dial, join, ran,
    servers, start,
};
use crate::{kinds, kit, kustomize, policies, restarts, security};

/// How soon running pods are to be in the mesh after their namespace has asked for it.
const SOON: Duration = Duration::from_secs(2);

#[test]
fn a_label_takes_running_pods_in_and_out() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-label", 2, |cluster| {
        // Nodes that boot are registered with it, so that nothing runs there before the agent does.
        for node in cluster.nodes() {
            cluster.kubectl(&["taint", "node", node.name(), "undermesh.io/agent-not-ready=:NoSchedule"])?;
        }
        installed::install(cluster, &[])?;
        the_startup_taint_goes(cluster)?;
        // The API server hears in its own time which roots to trust.
        eventually(A_WHILE, "a typing error is warned of", || {
            installed::a_typing_error_is_warned_of(cluster)
        })?;
        policies::the_status_and_the_webhook_say_what_is_wrong(cluster)?;
        security::the_status_and_the_webhook_say_what_is_wrong(cluster)?;
        installed::open_shop(cluster)?;
        running_pods_join(cluster)?;
        commands_ask_all_nodes(cluster)?;
        a_policy_that_closes_the_tunnel_is_told_of(cluster)?;
        pods_that_take_no_plaintext_pass_their_probes(cluster)?;
        callers_from_outside_reach_pods_that_take_plaintext(cluster)?;
        traffic_goes_on_without_api_server_and_controller(cluster)?;
        running_pods_leave(cluster)
    })
}

fn the_startup_taint_goes(cluster: &Cluster) -> Result<()> {
    eventually(A_WHILE, "the controller lifts the startup taint", || {
        let nodes = cluster.get(&["nodes"])?;
        for node in nodes["items"].as_array().into_iter().flatten() {
            ensure!(node["spec"]["taints"].is_null(), "{}", node["spec"]["taints"]);
        }
        Ok(())
    })
}

pub(crate) fn running_pods_join(cluster: &Kube) -> Result<()> {
    let before = cluster.get(&["pods", "--namespace", SHOP])?;
    let took = join(cluster)?;
    eprintln!("the pods of the namespace are in the mesh after {} ms", took.as_millis());
    ensure!(took < patient(SOON), "it took {took:?}");
    let after = cluster.get(&["pods", "--namespace", SHOP])?;
    for (before, after) in
        before["items"].as_array().into_iter().flatten().zip(after["items"].as_array().into_iter().flatten())
    {
        let started = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
        ensure!(started(before) == started(after), "a container was restarted: {after:#}");
        ensure!(after["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled", "{after:#}");
        ensure!(condition(after)["reason"] == "Enrolled", "{after:#}");
    }
    eventually(A_WHILE, "an event tells of it", || {
        let events =
            cluster.kubectl(&["get", "events", "--namespace", SHOP, "--field-selector=reason=Enrolled"])?;
        ensure!(events.contains("the pod is in the mesh"), "{events}");
        Ok(())
    })?;

    let servers = servers(cluster)?;
    let [(_, near), (_, far)] = &servers[..] else { anyhow::bail!("{servers:?}") };
    // A pod's talk with itself is not the mesh's, so somebody else on the node calls.
    start(cluster, "caller", &cluster.node_names()?[0], &["serve", "--name", "caller"])?;
    dial(cluster, "caller", &format!("{near}:{PORT}"), 5)?;
    dial(cluster, "caller", &format!("{far}:{PORT}"), 5)?;
    let identity = "spiffe://cluster.local/ns/shop/sa/default";
    let mut opened = 0.0;
    for security in ["same_node", "mutual_tls"] {
        let labels = [
            ("reporter", "destination"),
            ("security", security),
            ("source_identity", identity),
            ("destination_identity", identity),
        ];
        let by = counted(cluster, OPENED, &labels)?;
        ensure!(by == 5.0, "{by} connections of 5 by {security}");
        opened += by;
    }
    dial(cluster, "caller", &installed::service(cluster)?, 10)?;
    let all = counted(cluster, OPENED, &[("reporter", "destination")])?;
    ensure!(all == opened + 10.0, "{} connections of 10 to the Service", all - opened);
    cluster.kubectl(&["delete", "pod", "caller", "--namespace", SHOP, "--wait"])?;
    let plaintext = counted(cluster, OPENED, &[("security", "plaintext")])?;
    ensure!(plaintext == 0.0, "{plaintext} connections in plaintext");
    Ok(())
}

/// As whoever has the kubeconfig, through the API server.
fn commands_ask_all_nodes(cluster: &Kube) -> Result<()> {
    let said = |args: &[&str]| -> Result<(Option<i32>, Value)> {
        let mut command = cluster.command(binary("undermesh")?);
        command.args(args).args(["--all-nodes", "--mesh-namespace", SYSTEM, "-o", "json"]);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let said = serde_json::from_str(&said).with_context(|| format!("{args:?} says {said}"))?;
        Ok((output.status.code(), said))
    };
    let nodes = cluster.node_names()?;
    for command in ["status", "connections", "certs"] {
        let (code, said) = said(&[command])?;
        let asked: Vec<_> = said["nodes"].as_array().into_iter().flatten().map(|it| &it["node"]).collect();
        ensure!(code == Some(0) && asked == nodes.iter().collect::<Vec<_>>(), "{command}: {code:?} {said:#}");
    }
    let (code, readiness) = said(&["mtls", "readiness", SHOP, "--window", "1s"])?;
    let workloads = readiness["workloads"].as_array().map(Vec::len);
    ensure!(code == Some(0) && workloads > Some(0), "{code:?} {readiness:#}");
    let (_, from) = &servers(cluster)?[0];
    let (code, explained) =
        said(&["explain", "--from", &format!("{SHOP}/web"), "--to", &format!("{from}:{PORT}")])?;
    ensure!(code == Some(0) && explained["verdict"] == "allowed", "{code:?} {explained:#}");
    Ok(())
}

pub(crate) fn a_policy_that_closes_the_tunnel_is_told_of(cluster: &Kube) -> Result<()> {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": "only-web", "namespace": SHOP },
        "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"],
            "ingress": [{ "ports": [{ "port": PORT }] }] },
    });
    let status = || {
        let agent = ["exec", "--namespace", SYSTEM, "daemonset/undermesh-agent", "--", "undermesh", "status"];
        cluster.kubectl(&agent)
    };
    let tells = |told: bool| {
        eventually(A_WHILE, "the status tells of it", || {
            let status = status()?;
            ensure!((status.contains("shop/only-web") && status.contains("15008")) == told, "{status}");
            Ok(())
        })
    };
    cluster.apply(&policy.to_string())?;
    tells(true)?;
    cluster.kubectl(&["delete", "networkpolicy", "only-web", "--namespace", SHOP])?;
    tells(false)
}

/// A probe comes from the node's address, as does whoever runs on the node.
fn pods_that_take_no_plaintext_pass_their_probes(cluster: &Cluster) -> Result<()> {
    let node = &cluster.nodes()[0];
    let mut strict = installed::strict(node.name());
    let probe = json!({ "tcpSocket": { "port": PORT }, "periodSeconds": 1, "failureThreshold": 2 });
    strict["spec"]["containers"][0]["readinessProbe"] = probe.clone();
    strict["spec"]["containers"][0]["livenessProbe"] = probe;
    cluster.apply(&strict.to_string())?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/strict",
        "--namespace",
        SHOP,
        "--timeout=30s",
    ])?;
    let found = cluster.get(&["pod", "strict", "--namespace", SHOP])?;
    let ip = found["status"]["podIP"].as_str().context("no address")?;

    let from_node =
        node.run(&["timeout", "3", "bash", "-c", &format!("exec 3<>/dev/tcp/{ip}/{PORT}")], A_WHILE)?;
    ensure!(from_node.success().is_err(), "the node got through in plaintext");
    for (server, _) in servers(cluster)? {
        dial(cluster, &server, &format!("{ip}:{PORT}"), 2)?;
    }
    // Long enough for probes to have failed.
    std::thread::sleep(Duration::from_secs(3));
    let found = cluster.get(&["pod", "strict", "--namespace", SHOP])?;
    let status = &found["status"]["containerStatuses"][0];
    ensure!(status["ready"] == true && status["restartCount"] == 0, "{status:#}");
    cluster.kubectl(&["delete", "pod", "strict", "--namespace", SHOP, "--wait"])?;
    Ok(())
}

/// By a NodePort, from another host and so with the node's address, and by an external address.
fn callers_from_outside_reach_pods_that_take_plaintext(cluster: &Cluster) -> Result<()> {
    const EXTERNAL: &str = "203.0.113.7";
    let node = &cluster.nodes()[0];
    let mut strict = installed::strict(node.name());
    strict["metadata"]["labels"] = json!({ "app": "strict" });
    cluster.apply(&strict.to_string())?;
    installed::joins(cluster, "strict")?;
    for (app, node_port) in [("web", 30_700), ("strict", 30_701)] {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": format!("{app}-outside"), "namespace": SHOP },
            "spec": { "type": "NodePort", "selector": { "app": app }, "externalIPs": [EXTERNAL],
                "ports": [{ "port": node_port, "targetPort": PORT, "nodePort": node_port }] },
        });
        cluster.apply(&service.to_string())?;
    }
    let outside = |port: u16, count: u32| -> Result<Value> {
        let mut traffic = Command::new(binary("traffic")?);
        let to = format!("{}:{port}", node.addresses()[0]);
        traffic.args(["dial", "--limit-ms", "2000", "--count", &count.to_string(), &to]);
        Ok(serde_json::from_str(&cluster.run(traffic, A_WHILE)?.success()?)?)
    };
    eventually(A_WHILE, "the NodePort leads to the servers", || {
        let told = outside(30_700, 8)?;
        ensure!(told["served"]["web"] == 8, "{told}");
        Ok(())
    })?;
    let external = format!("exec 3<>/dev/tcp/{EXTERNAL}/30700 && read -t 3 -u 3 line && echo $line");
    let served = node.run(&["timeout", "5", "bash", "-c", &external], A_WHILE)?.success()?;
    ensure!(served.starts_with("web "), "{served}");

    let refused =
        || counted(cluster, "undermesh_kernel_refused_connections_total", &[("reason", "plaintext")]);
    let before = refused()?;
    eventually(A_WHILE, "the NodePort of a strict pod leads to a refusal", || {
        let told = outside(30_701, 1)?;
        ensure!(told["failed"]["ECONNREFUSED"] == 1, "{told}");
        Ok(())
    })?;
    ensure!(refused()? > before, "a refusal was not counted");
    for what in ["pod/strict", "service/web-outside", "service/strict-outside"] {
        cluster.kubectl(&["delete", what, "--namespace", SHOP, "--wait"])?;
    }
    Ok(())
}

fn traffic_goes_on_without_api_server_and_controller(cluster: &mut Cluster) -> Result<()> {
    let servers = servers(cluster)?;
    let nodes: Vec<_> = cluster.nodes().iter().map(|node| node.name().to_owned()).collect();
    let far: SocketAddr = format!("{}:{PORT}", servers[1].1).parse()?;
    start(cluster, "run", &nodes[0], &["run", &far.to_string()])?;
    cluster.kubectl(&["scale", "deployment/undermesh-controller", "--namespace", SYSTEM, "--replicas=0"])?;
    cluster.control_program("kube-apiserver")?.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(20));
    cluster.control_program("kube-apiserver")?.signal(Signal::SIGCONT);
    eventually(Duration::from_secs(60), "the API server answers", || {
        cluster.kubectl(&["get", "nodes"]).map(drop)
    })?;
    let ran = ran(cluster, "run")?;
    ensure!(ran["failed_in_all"] == 0 && ran["made"].as_u64() > Some(100), "{ran}");
    eprintln!("without API server and controller: {} connections, none failed", ran["made"]);
    cluster.kubectl(&["scale", "deployment/undermesh-controller", "--namespace", SYSTEM, "--replicas=2"])?;
    installed::rolled_out(cluster, "deployment/undermesh-controller")
}

/// A client's new connections go on meanwhile: nobody stops to take tunnels before those who would come through one know of it.
pub(crate) fn running_pods_leave(cluster: &Kube) -> Result<()> {
    let node = cluster.node_names()?.remove(0);
    let far = format!("{}:{PORT}", servers(cluster)?[1].1);
    start(cluster, "run-leaving", &node, &["run", "--clients", "2", "--pause-ms", "5", &far])?;
    cluster.kubectl(&["label", "namespace", SHOP, "undermesh.io/mesh-"])?;
    eventually(A_WHILE, "every pod says that it has left", || {
        let pods = cluster.get(&["pods", "--namespace", SHOP, "--selector=app=web"])?;
        for pod in pods["items"].as_array().into_iter().flatten() {
            ensure!(condition(pod)["status"] == "False" && condition(pod)["reason"] == "Left", "{pod:#}");
            ensure!(pod["metadata"]["annotations"][ENROLLED].is_null(), "{}", pod["metadata"]);
        }
        Ok(())
    })?;
    let ran = ran(cluster, "run-leaving")?;
    ensure!(ran["failed_in_all"] == 0 && ran["made"].as_u64() > Some(30), "{ran}");
    let servers = servers(cluster)?;
    // What was on its way when they left is still steered for a moment.
    eventually(A_WHILE, "the mesh carries nothing of theirs any more", || {
        let before = counted(cluster, OPENED, &[])?;
        dial(cluster, &servers[0].0, &format!("{}:{PORT}", servers[1].1), 5)?;
        let now = counted(cluster, OPENED, &[])?;
        ensure!(now == before, "{} of 5", now - before);
        Ok(())
    })?;
    Ok(())
}

/// Containers whose first act is to connect: their pods are in the mesh before they exist.
#[test]
fn nothing_of_a_new_pod_goes_out_unprotected() -> Result<()> {
    const PODS: u32 = 200;
    require!(ACluster);
    kit::on_cluster("um-e2e-race", 2, |cluster| {
        kustomize::install(cluster)?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        jobs_call_before_they_begin_and_complete(cluster)?;
        let to = format!("{}:{PORT}", servers(cluster)?[1].1);
        let mut command = container(&[TRAFFIC, "dial", "--count", "1", &to]);
        command["name"] = json!("first");
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "race", "namespace": SHOP },
            "spec": { "completions": PODS, "parallelism": 10, "template": { "spec": {
                "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [command],
            } } },
        });
        let begun = Instant::now();
        cluster.apply(&job.to_string())?;
        eventually(Duration::from_secs(600), "all have run", || {
            std::thread::sleep(Duration::from_secs(1));
            let job = cluster.get(&["job", "race", "--namespace", SHOP])?;
            ensure!(job["status"]["succeeded"] == PODS, "{}", job["status"]);
            Ok(())
        })?;
        let by = |security: &str| {
            let labels =
                [("reporter", "destination"), ("destination_workload", "web"), ("security", security)];
            counted(cluster, OPENED, &labels)
        };
        let (tunnelled, near) = (by("mutual_tls")?, by("same_node")?);
        let plaintext = counted(cluster, OPENED, &[("reporter", "destination"), ("security", "plaintext")])?;
        eprintln!(
            "{PODS} pods in {:.0} s: {tunnelled} connections by mutual TLS, {near} on the node, {plaintext} in plaintext",
            begun.elapsed().as_secs_f32()
        );
        ensure!(plaintext == 0.0 && tunnelled + near == f64::from(PODS), "not all were protected");
        // They have come to their end in the mesh, and that is what is told of them.
        let pods = cluster.get(&["pods", "--namespace", SHOP, "--selector=job-name=race"])?;
        for pod in pods["items"].as_array().into_iter().flatten() {
            ensure!(condition(pod)["reason"] == "Enrolled", "{pod:#}");
        }
        Ok(())
    })
}

/// Of a Job on each node its init container and then its own one call a pod that takes no plaintext, once and as their first act.
fn jobs_call_before_they_begin_and_complete(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes();
    cluster.apply(&installed::strict(nodes[1].name()).to_string())?;
    installed::joins(cluster, "strict")?;
    let strict = cluster.get(&["pod", "strict", "--namespace", SHOP])?;
    let to = format!("{}:{PORT}", strict["status"]["podIP"].as_str().context("no address")?);
    let main = container(&[TRAFFIC, "dial", "--count", "1", &to]);
    let mut prepare = main.clone();
    prepare["name"] = json!("prepare");
    for node in nodes {
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": node.name(), "namespace": SHOP },
            "spec": { "backoffLimit": 0, "template": { "spec": {
                "nodeName": node.name(), "restartPolicy": "Never",
                "initContainers": [prepare], "containers": [main],
            } } },
        });
        cluster.apply(&job.to_string())?;
    }
    for (node, security) in nodes.iter().zip(["mutual_tls", "same_node"]) {
        let job = format!("job/{}", node.name());
        cluster.kubectl(&["wait", "--for=condition=Complete", &job, "--namespace", SHOP, "--timeout=60s"])?;
        for container in ["prepare", "main"] {
            let told = cluster.kubectl(&["logs", &job, "--container", container, "--namespace", SHOP])?;
            let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
            ensure!(told["served"] == json!({ "strict": 1 }), "{job}, {container}: {told}");
        }
        let labels =
            [("reporter", "destination"), ("destination_workload", "strict"), ("security", security)];
        let opened = counted(cluster, OPENED, &labels)?;
        ensure!(opened == 2.0, "{opened} connections of {job} by {security}");
    }
    cluster.kubectl(&["delete", "pod", "strict", "--namespace", SHOP, "--wait"])?;
    Ok(())
}

#[test]
fn updating_the_agents_fails_no_connection() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-update", 2, |cluster| {
        kinds::define(cluster)?;
        installed::install(cluster, &["agent.drainSeconds=5"])?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        let servers = servers(cluster)?;
        let nodes: Vec<_> = cluster.nodes().iter().map(|node| node.name().to_owned()).collect();
        let to =
            [servers[1].1.clone() + ":7000", servers[0].1.clone() + ":7000", installed::service(cluster)?];
        let runs = ["run-far", "run-near", "run-service"];
        for ((name, to), node) in runs.iter().zip(&to).zip([&nodes[0], &nodes[0], &nodes[1]]) {
            start(cluster, name, node, &["run", "--clients", "2", to])?;
        }
        for _ in 0..5 {
            cluster.kubectl(&["rollout", "restart", "daemonset/undermesh-agent", "--namespace", SYSTEM])?;
            installed::rolled_out(cluster, "daemonset/undermesh-agent")?;
        }
        for name in runs {
            let ran = ran(cluster, name)?;
            eprintln!("{name}: {} connections over five updates", ran["made"]);
            ensure!(ran["failed_in_all"] == 0 && ran["made"].as_u64() > Some(100), "{name}: {ran}");
        }
        restarts::a_rolling_restart_loses_no_request(cluster)?;
        kinds::each_is_in_force_and_told_of(cluster)
    })
}

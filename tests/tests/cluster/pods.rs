//! Pods on a cluster of two nodes: that it is a cluster, before anything is installed on it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::eventually;
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::{kit, kustomize, policies, security};

/// Serves a page, says so, and ends when it is asked to.
const SERVE: &str =
    "trap 'echo ends; exit 0' TERM; httpd -p 8080 -h /www; echo serves; while :; do sleep 1 & wait $!; done";

#[test]
fn pods_reach_each_other_and_nodes_come_back_and_nothing_is_left() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-kube", 2, |cluster| {
        kit::import_image(cluster)?;
        let nodes: Vec<_> = cluster.nodes().iter().map(|node| node.name().to_owned()).collect();
        start_pods(cluster, &nodes)?;
        pods_reach_each_other(cluster)?;
        the_api_server_calls_webhooks(cluster)?;
        policies::the_definition_refuses_what_makes_no_sense(cluster)?;
        security::the_definitions_refuse_what_makes_no_sense(cluster)?;
        kustomize::every_folder_is_taken(cluster)?;
        privileged_pods_see_their_node(cluster, &nodes[0])?;
        print_memory(cluster)?;
        a_node_that_was_unplugged_comes_back(cluster)?;

        let begun = Instant::now();
        cluster.kubectl(&["delete", "pod", "server", "--wait", "--timeout=60s"])?;
        eprintln!("a pod has ended after {:.1} s", begun.elapsed().as_secs_f32());
        Ok(())
    })
}

fn start_pods(cluster: &Cluster, nodes: &[String]) -> Result<()> {
    let begun = Instant::now();
    cluster.apply(&kit::pod("client", &nodes[0], SERVE).to_string())?;
    cluster.apply(&kit::pod("server", &nodes[1], SERVE).to_string())?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "server", "namespace": "default" },
        "spec": { "selector": { "app": "server" }, "ports": [{ "port": 80, "targetPort": 8080 }],
            "ipFamilyPolicy": "RequireDualStack" },
    });
    cluster.apply(&service.to_string())?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/client", "pod/server", "--timeout=60s"])?;
    eprintln!("both pods are ready after {:.1} s", begun.elapsed().as_secs_f32());
    Ok(())
}

fn pods_reach_each_other(cluster: &Cluster) -> Result<()> {
    let get = |url: &str| cluster.kubectl(&["exec", "client", "--", "wget", "-q", "-O", "-", url]);
    let server = cluster.get(&["pod", "server"])?;
    let ips = server["status"]["podIPs"].as_array().context("a pod without addresses")?;
    let service = cluster.get(&["service", "server"])?;
    let cluster_ips = service["spec"]["clusterIPs"].as_array().context("a Service without addresses")?;
    for ip in ips {
        let ip: std::net::IpAddr = ip["ip"].as_str().context("an address")?.parse()?;
        ensure!(get(&format!("http://{}/", std::net::SocketAddr::new(ip, 8080)))? == "a page\n");
    }
    for ip in cluster_ips {
        let ip: std::net::IpAddr = ip.as_str().context("an address")?.parse()?;
        // kube-proxy hears of the Service in its own time.
        eventually(Duration::from_secs(20), "the Service leads to the pod", || {
            ensure!(get(&format!("http://{}/", std::net::SocketAddr::new(ip, 80)))? == "a page\n");
            Ok(())
        })?;
    }
    let found = cluster.kubectl(&["exec", "client", "--", "nslookup", "server.default.svc.cluster.local"])?;
    ensure!(
        cluster_ips.iter().all(|ip| ip.as_str().is_some_and(|ip| found.contains(ip))),
        "DNS says {found}"
    );
    ensure!(cluster.kubectl(&["logs", "server"])?.contains("serves"));
    let page = cluster.kubectl(&["get", "--raw", "/api/v1/namespaces/default/pods/server:8080/proxy/"])?;
    ensure!(page == "a page\n", "the API server was answered {page:?}");
    Ok(())
}

/// The pod does not speak TLS, which the API server can only know if it has reached it by the Service's name.
fn the_api_server_calls_webhooks(cluster: &Cluster) -> Result<()> {
    let hook = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": "hook" }, "webhooks": [{
            "name": "hook.um.test", "admissionReviewVersions": ["v1"], "sideEffects": "None", "timeoutSeconds": 5,
            "clientConfig": { "service": { "name": "server", "namespace": "default", "port": 80 } },
            "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                "resources": ["configmaps"] }],
        }],
    });
    cluster.apply(&hook.to_string())?;
    let create = || cluster.kubectl(&["create", "configmap", "any", "--dry-run=server"]);
    eventually(Duration::from_secs(20), "the webhook is called", || {
        let refused = create().err().context("it is not called yet")?.to_string();
        ensure!(refused.contains("server gave HTTP response to HTTPS client"), "{refused}");
        Ok(())
    })?;
    cluster.kubectl(&["delete", "validatingwebhookconfiguration", "hook"])?;
    Ok(())
}

/// What an agent of a mesh needs of its node: the cgroups of the pods, a BPF file system, the namespaces of pods that
/// are made later than itself, the runtime's socket, the node's processes.
fn privileged_pods_see_their_node(cluster: &Cluster, node: &str) -> Result<()> {
    let mut agent = kit::pod("agent", node, SERVE);
    let spec = agent["spec"].as_object_mut().context("a pod's spec")?;
    spec.insert("hostPID".into(), true.into());
    spec.insert("hostNetwork".into(), true.into());
    let paths = ["/sys/fs/cgroup", "/sys/fs/bpf", "/run/netns", "/run/nri"];
    let name = |path: &str| path.trim_start_matches('/').replace('/', "-");
    let volumes: Vec<_> =
        paths.iter().map(|path| json!({ "name": name(path), "hostPath": { "path": path } })).collect();
    spec.insert("volumes".into(), volumes.into());
    let mounts: Vec<_> = paths
        .iter()
        .map(|path| json!({ "name": name(path), "mountPath": path, "mountPropagation": "HostToContainer" }))
        .collect();
    let container = &mut spec["containers"][0];
    container["volumeMounts"] = mounts.into();
    container["securityContext"] = json!({ "privileged": true });
    // The port is the node's, and free there.
    cluster.apply(&agent.to_string())?;
    cluster.apply(&kit::pod("later", node, SERVE).to_string())?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/agent", "--timeout=60s"])?;
    cluster.apply(&kit::pod("latest", node, SERVE).to_string())?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/later", "pod/latest", "--timeout=60s"])?;

    let see = |script: &str| cluster.kubectl(&["exec", "agent", "--", "sh", "-c", script]);
    let uid = cluster.get(&["pod", "latest"])?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    let cgroup = format!("/sys/fs/cgroup/kubepods/besteffort/pod{uid}");
    ensure!(
        see(&format!("cat {cgroup}/*/cgroup.procs"))?.lines().count() >= 2,
        "a pod's processes in its cgroup"
    );
    let ip = cluster.get(&["pod", "latest"])?["status"]["podIP"].as_str().context("an address")?.to_owned();
    let found = see(&format!(
        "for ns in /run/netns/*; do nsenter --net=$ns cat /proc/net/fib_trie 2>/dev/null | grep -qF '{ip}' && echo $ns; done; true"
    ))?;
    ensure!(found.starts_with("/run/netns/"), "no namespace of the later pod: {found:?}");
    see("mount | grep -q '^bpf on /sys/fs/bpf type bpf'").context("no BPF file system")?;
    see("ls /run/nri/nri.sock").context("no socket of NRI")?;
    see("grep -q kubelet /proc/*/comm").context("no kubelet among the node's processes")?;
    Ok(())
}

/// Its pods come back with it, and so do the rules that lead to them.
fn a_node_that_was_unplugged_comes_back(cluster: &mut Cluster) -> Result<()> {
    let started = "jsonpath={.status.containerStatuses[0].state.running.startedAt}";
    let since = |cluster: &Cluster| cluster.kubectl(&["get", "pod", "server", "--output", started]);
    let before = since(cluster)?;
    cluster.node_mut(1).stop()?;
    let begun = Instant::now();
    cluster.node_mut(1).start()?;
    eventually(Duration::from_secs(90), "the pod runs again", || {
        let now = since(cluster)?;
        ensure!(!now.is_empty() && now != before, "it is the one of {now}");
        Ok(())
    })?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/server", "--timeout=60s"])?;
    eprintln!("a node and its pod are back after {:.1} s", begun.elapsed().as_secs_f32());
    pods_reach_each_other(cluster)
}

fn print_memory(cluster: &mut Cluster) -> Result<()> {
    for name in ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
        let bytes = cluster.control_program(name)?.resident_bytes()?;
        eprintln!("{name}: {} MiB", bytes >> 20);
    }
    let list = cluster.nodes()[0]
        .run(&["sh", "-c", "grep -H VmRSS /proc/[0-9]*/status"], Duration::from_secs(10))?;
    let resident = |line: &str| line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok());
    let sum: u64 = list.stdout.lines().filter_map(resident).sum();
    eprintln!("all processes of {}: {} MiB", cluster.nodes()[0].name(), sum >> 10);
    Ok(())
}

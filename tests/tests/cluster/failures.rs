//! What fails in a cluster, and what its connections notice of that.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::{eventually, patient};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{
    self, A_WHILE, OPENED, PORT, SHOP, SYSTEM, agents, counted, dial, join, monotonic_ns, page, ran, servers,
    start,
};
use crate::kit;

const RENEWALS: &str = "undermesh_certificate_renewals_total";

#[test]
fn connections_survive_what_fails_around_them() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-failures", 2, |cluster| {
        installed::install(cluster, &["identity.certificateLifetime=60s", "controller.rootOverlap=15s"])?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        a_new_root_and_absent_controllers_fail_nothing(cluster)?;
        a_killed_agent_is_felt_for_a_moment(cluster)?;
        a_pod_of_the_same_name_is_another_pod(cluster)?;
        a_node_that_boots_has_its_pods_in_the_mesh(cluster)
    })
}

/// Certificates live a minute, so they are renewed every half of one.
fn a_new_root_and_absent_controllers_fail_nothing(cluster: &Cluster) -> Result<()> {
    let far = servers(cluster)?[1].1.clone() + ":7000";
    start(cluster, "run-renewal", cluster.nodes()[0].name(), &["run", "--clients", "2", &far])?;
    let before = issuers(cluster)?;
    let rotate = ["undermesh", "ca", "rotate", "--kubernetes", "--namespace", SYSTEM];
    let controller = ["exec", "--namespace", SYSTEM, "deployment/undermesh-controller", "--"];
    cluster.kubectl(&[&controller[..], &rotate].concat())?;
    eventually(Duration::from_secs(80), "the new root signs for every node", || {
        sleep(Duration::from_secs(1));
        let now = issuers(cluster)?;
        ensure!(now.iter().all(|issuer| !before.contains(issuer)), "{before:?} and then {now:?}");
        Ok(())
    })?;

    cluster.kubectl(&["scale", "deployment/undermesh-controller", "--namespace", SYSTEM, "--replicas=0"])?;
    eventually(Duration::from_secs(60), "the agents miss the authority", || {
        sleep(Duration::from_secs(1));
        let missed = counted(cluster, RENEWALS, &[("result", "unavailable")])?;
        ensure!(missed >= 2.0, "{missed} renewals failed");
        Ok(())
    })?;
    // Its webhook is asked in vain, and blocks nobody.
    cluster.kubectl(&[
        "label",
        "namespace",
        SHOP,
        "undermesh.io/mesh=on",
        "--dry-run=server",
        "--overwrite",
    ])?;
    cluster.kubectl(&["scale", "deployment/undermesh-controller", "--namespace", SYSTEM, "--replicas=2"])?;
    let renewed = counted(cluster, RENEWALS, &[("result", "success")])?;
    eventually(A_WHILE, "the API server trusts the webhook", || {
        installed::a_typing_error_is_warned_of(cluster)
    })?;
    eventually(Duration::from_secs(60), "certificates are renewed again", || {
        sleep(Duration::from_secs(1));
        ensure!(counted(cluster, RENEWALS, &[("result", "success")])? >= renewed + 2.0);
        Ok(())
    })?;
    let ran = ran(cluster, "run-renewal")?;
    ensure!(ran["failed_in_all"] == 0 && ran["made"].as_u64() > Some(100), "{ran}");
    eprintln!("a new root, and no controller over a renewal: {} connections, none failed", ran["made"]);
    Ok(())
}

/// Who signed the certificates of each node.
fn issuers(cluster: &Cluster) -> Result<Vec<String>> {
    let issuer = |agent: &Value| {
        let certificates: Value = serde_json::from_str(&page(cluster, agent, "debug/certs")?)?;
        let issuer = certificates["certificates"][0]["issuer"].as_str();
        Ok(issuer.with_context(|| certificates.to_string())?.to_owned())
    };
    agents(cluster)?.iter().map(issuer).collect()
}

/// As by the kernel when memory runs out.
fn a_killed_agent_is_felt_for_a_moment(cluster: &Cluster) -> Result<()> {
    let node = &cluster.nodes()[0];
    let far = servers(cluster)?[1].1.clone() + ":7000";
    start(cluster, "run-kill", node.name(), &["run", "--clients", "2", &far])?;
    let kill = "for pid in $(pidof undermesh); do
                    tr '\\0' ' ' < /proc/$pid/cmdline | grep -q ' agent ' && kill -KILL $pid && echo $pid; done";
    let killed_ns = monotonic_ns()?;
    let killed = node.run(&["sh", "-c", kill], A_WHILE)?;
    ensure!(killed.stdout.lines().count() == 1, "killed: {killed:?}");
    eventually(A_WHILE, "the agent runs again", || {
        let restarted = |pod: &&Value| pod["status"]["containerStatuses"][0]["restartCount"] == 1;
        let agents = agents(cluster)?;
        let pod = agents.iter().find(restarted).context("not restarted")?;
        ensure!(pod["status"]["containerStatuses"][0]["ready"] == true, "{}", pod["status"]);
        Ok(())
    })?;
    // Long enough for what the new one does wrong.
    sleep(Duration::from_secs(3));
    let ran = ran(cluster, "run-kill")?;
    let failed: Vec<_> = ran["failed"].as_array().into_iter().flatten().collect();
    let last = failed.iter().filter_map(|failure| failure["began_ns"].as_i64()).max().unwrap_or(killed_ns);
    let felt = Duration::from_nanos(u64::try_from(last - killed_ns).unwrap_or_default());
    eprintln!(
        "an agent was killed: {} of {} connections failed, the last one after {felt:?}",
        failed.len(),
        ran["made"]
    );
    ensure!(felt < patient(Duration::from_secs(1)) && failed.len() < 50, "{ran}");
    goes_through_tunnels(cluster, "caller-kill")
}

/// Deleted by force, so that the next one may be there before the runtime has taken the first one apart.
fn a_pod_of_the_same_name_is_another_pod(cluster: &Cluster) -> Result<()> {
    let node = cluster.nodes()[1].name();
    let serve = ["serve", "--name", "again"];
    let mut uids = Vec::new();
    for _ in 0..4 {
        start(cluster, "again", node, &serve)?;
        let pod = cluster.get(&["pod", "again", "--namespace", SHOP])?;
        uids.push(pod["metadata"]["uid"].to_string());
        let address = pod["status"]["podIP"].as_str().context("no address")?.to_owned();
        dial(cluster, &servers(cluster)?[0].0, &format!("{address}:{PORT}"), 3)?;
        cluster.kubectl(&["delete", "pod", "again", "--namespace", SHOP, "--force", "--grace-period=0"])?;
    }
    uids.sort_unstable();
    uids.dedup();
    ensure!(uids.len() == 4, "{uids:?}");
    Ok(())
}

/// Its pods start when its agent does, or before.
fn a_node_that_boots_has_its_pods_in_the_mesh(cluster: &mut Cluster) -> Result<()> {
    let started = |cluster: &Cluster| -> Result<String> {
        let pods = cluster.get(&["pods", "--all-namespaces"])?;
        let node = cluster.nodes()[1].name();
        let of_node =
            |pod: &&Value| pod["spec"]["nodeName"] == node && pod["metadata"]["namespace"] != "kube-system";
        let all = pods["items"].as_array().into_iter().flatten().filter(of_node).map(|pod| {
            let status = &pod["status"]["containerStatuses"][0];
            ensure!(status["ready"] == true, "{}", pod["metadata"]["name"]);
            Ok(format!("{} {}\n", pod["metadata"]["name"], status["containerID"]))
        });
        all.collect()
    };
    let before = started(cluster)?;
    cluster.node_mut(1).stop()?;
    cluster.node_mut(1).start()?;
    eventually(Duration::from_secs(90), "every pod of the node runs anew", || {
        sleep(Duration::from_millis(500));
        let now = started(cluster)?;
        ensure!(now.lines().all(|line| !before.contains(line)), "{now}");
        Ok(())
    })?;
    goes_through_tunnels(cluster, "caller-boot")
}

/// What a new pod on the first node sends to the server on the second one goes through tunnels.
fn goes_through_tunnels(cluster: &Cluster, caller: &str) -> Result<()> {
    const COUNT: u8 = 5;
    start(cluster, caller, cluster.nodes()[0].name(), &["serve", "--name", caller])?;
    let far = servers(cluster)?[1].1.clone() + ":7000";
    eventually(A_WHILE, "it goes through tunnels", || {
        let opened = || counted(cluster, OPENED, &[("reporter", "destination"), ("security", "mutual_tls")]);
        let before = opened()?;
        dial(cluster, caller, &far, COUNT.into())?;
        let by_tunnel = opened()? - before;
        ensure!(by_tunnel == f64::from(COUNT), "{by_tunnel} of {COUNT}");
        Ok(())
    })
}

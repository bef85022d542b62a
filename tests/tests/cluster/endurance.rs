//! What takes too long for every day: a namespace of many real pods, an API server that is away for long.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::app::TRAFFIC;
use undermesh_tests::lab::eventually;
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{
    self, LIMIT, PORT, SHOP, container, counted, join, join_within, joins, pod, ran, start,
};
use crate::kit;

/// On each of the two nodes. With what else is there it is as many as a node has addresses for.
const CROWD: usize = 250;

const AWAY: Duration = Duration::from_secs(600);

#[test]
#[ignore = "it takes many minutes: cargo xtask scale"]
fn five_hundred_pods_are_labelled_at_once() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-crowd", 2, |cluster| {
        installed::install(cluster, &[])?;
        let begun = Instant::now();
        gather(cluster)?;
        eprintln!("{} pods run after {:.0} s", 2 * CROWD, begun.elapsed().as_secs_f32());
        installed::tell_what_is_taken(cluster, "before the label")?;
        let took = join_within(cluster, LIMIT)?;
        let enrolled = counted(cluster, "undermesh_pods_enrolled", &[])?;
        ensure!(enrolled == (2 * CROWD) as f64, "{enrolled} pods are enrolled");
        eprintln!(
            "{enrolled} pods were in the mesh, and said so at the API server, {:.1} s after the label",
            took.as_secs_f32()
        );
        installed::tell_what_is_taken(cluster, "after it")
    })
}

#[test]
#[ignore = "it takes many minutes: cargo xtask scale"]
fn connections_go_on_while_the_api_server_is_away_for_ten_minutes() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-away", 2, |cluster| {
        // Certificates are to be renewed just before it is back.
        let life = format!("identity.certificateLifetime={}s", AWAY.as_secs() * 9 / 5);
        installed::install(cluster, &[&life])?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        let node = cluster.nodes()[0].name().to_owned();
        start(cluster, "run", &node, &["run", "--pause-ms", "20", &installed::service(cluster)?])?;
        cluster.control_program("kube-apiserver")?.signal(Signal::SIGSTOP);
        sleep(AWAY);
        cluster.control_program("kube-apiserver")?.signal(Signal::SIGCONT);
        let back = Instant::now();
        eventually(Duration::from_secs(60), "the API server answers", || cluster.get(&["nodes"]).map(drop))?;
        cluster.apply(
            &pod("late", &node, &[TRAFFIC, "serve", "--name", "late", "--port", &PORT.to_string()])
                .to_string(),
        )?;
        joins(cluster, "late")?;
        eprintln!(
            "a pod was made and in the mesh {:.1} s after the API server was back",
            back.elapsed().as_secs_f32()
        );
        let ran = ran(cluster, "run")?;
        ensure!(ran["failed_in_all"] == 0, "{ran}");
        eprintln!("none of {} connections failed", ran["made"]);
        Ok(())
    })
}

/// Starts the pods, each node's own, and waits until they run.
fn gather(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["create", "namespace", SHOP])?;
    for node in cluster.nodes() {
        let labels = json!({ "crowd": node.name() });
        let crowd = json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": format!("crowd-{}", node.name()), "namespace": SHOP },
            "spec": {
                "replicas": CROWD,
                "selector": { "matchLabels": labels },
                "template": { "metadata": { "labels": labels }, "spec": {
                    "nodeName": node.name(), "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
                    "containers": [container(&[TRAFFIC, "serve", "--name", "crowd", "--port", &PORT.to_string()])],
                } },
            },
        });
        cluster.apply(&crowd.to_string())?;
    }
    eventually(Duration::from_secs(1800), "all pods run", || {
        sleep(Duration::from_secs(5));
        let pods = cluster.get(&["pods", "--namespace", SHOP, "--field-selector=status.phase=Running"])?;
        let running = pods["items"].as_array().map_or(0, Vec::len);
        ensure!(running == 2 * CROWD, "{running} pods run");
        Ok(())
    })
}

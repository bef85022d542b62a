//! An API server that is slow, one that is away while an agent starts, and one that comes back from a backup.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::{Metrics, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{self, A_WHILE, OPENED, SHOP, agents, join, page, ran, servers, start};
use crate::kit;

const FILE: &str = "/var/lib/undermesh/last-known";

#[test]
fn an_api_server_may_be_away_and_come_back_older() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-absence", 2, |cluster| {
        installed::install(cluster, &[])?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        a_slow_api_server_delays_what_is_new(cluster)?;
        an_agent_begins_without_an_api_server(cluster)?;
        what_a_backup_lacks_leaves_the_mesh(cluster)
    })
}

/// It answers, but for nine tenths of each second it does nothing.
fn a_slow_api_server_delays_what_is_new(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.nodes()[0].name().to_owned();
    let far = servers(cluster)?[1].1.clone() + ":7000";
    start(cluster, "run-slow", &node, &["run", "--clients", "2", &far])?;
    let server = cluster.control_program("kube-apiserver")?.group();
    let is_over = AtomicBool::new(false);
    let took = scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for (signal, then) in [(Signal::SIGSTOP, 900), (Signal::SIGCONT, 100)] {
                    let _ = killpg(server, signal);
                    sleep(Duration::from_millis(then));
                }
            }
        });
        let begun = Instant::now();
        let started = start(cluster, "meanwhile", &node, &["serve", "--name", "meanwhile"]);
        is_over.store(true, Ordering::Relaxed);
        started.map(|()| begun.elapsed())
    })?;
    eprintln!("a pod was made and in the mesh {took:.1?} after a slow API server had been asked for it");
    let agents = agents(cluster)?;
    let ready = |agent: &&Value| agent["status"]["containerStatuses"][0]["ready"] == true;
    ensure!(agents.iter().filter(ready).count() == 2, "{agents:?}");
    let ran = ran(cluster, "run-slow")?;
    ensure!(ran["failed_in_all"] == 0 && ran["made"].as_u64() > Some(100), "{ran}");
    Ok(())
}

/// Killed while no API server answers, it comes back with the pods of its node, and with certificates for them.
fn an_agent_begins_without_an_api_server(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.nodes()[0].name().to_owned();
    let far = servers(cluster)?[1].1.clone() + ":7000";
    start(cluster, "run-absence", &node, &["run", "--clients", "2", &far])?;
    let written = |cluster: &Cluster| {
        let file = cluster.nodes()[0].run(&["cat", FILE], A_WHILE)?.success()?;
        ensure!(file.contains("run-absence"), "not yet");
        Ok(())
    };
    eventually(Duration::from_secs(150), "what the API server says is written down", || {
        written(cluster).inspect_err(|_| sleep(Duration::from_secs(2)))
    })?;
    let agents = agents(cluster)?;
    let agent = agents.iter().find(|agent| agent["spec"]["nodeName"] == *node).context("no agent")?;
    let address = agent["status"]["podIP"].as_str().context("no address")?.to_owned();
    // Nobody passes anything on.
    let asked = |cluster: &Cluster, path: &str| -> Result<String> {
        let ask = format!(
            "exec 3<>/dev/tcp/{address}/15020 && printf 'GET /{path} HTTP/1.0\\r\\nhost: a\\r\\n\\r\\n' >&3 && timeout 5 cat <&3"
        );
        let answer = cluster.nodes()[0].run(&["bash", "-c", &ask], A_WHILE)?.success()?;
        Ok(answer.split_once("\r\n\r\n").context("no answer")?.1.to_owned())
    };
    let status =
        |cluster: &Cluster| -> Result<Value> { Ok(serde_json::from_str(&asked(cluster, "debug/status")?)?) };
    ensure!(status(cluster)?["as_of"].is_null(), "{}", status(cluster)?);

    cluster.control_program("kube-apiserver")?.signal(Signal::SIGSTOP);
    let kill = "for pid in $(pidof undermesh); do
                    tr '\\0' ' ' < /proc/$pid/cmdline | grep -q ' agent ' && kill -KILL $pid && echo $pid; done";
    let killed = cluster.nodes()[0].run(&["sh", "-c", kill], A_WHILE)?;
    ensure!(killed.stdout.lines().count() == 1, "killed: {killed:?}");
    let began = Instant::now();
    eventually(Duration::from_secs(90), "it has its pods, as they were", || {
        sleep(Duration::from_millis(500));
        let status = status(cluster)?;
        let pods = status["pods"].as_array().context("no pods")?;
        let is_enrolled = |pod: &&Value| pod["name"] == "run-absence" && pod["state"] == "enrolled";
        ensure!(status["as_of"].is_string() && pods.iter().any(|pod| is_enrolled(&pod)), "{status:#}");
        Ok(())
    })?;
    eprintln!("an agent without an API server had its pods after {:.1?}", began.elapsed());
    let opened = |cluster: &Cluster| -> Result<f64> {
        Ok(Metrics::parse(&asked(cluster, "metrics")?).sum(OPENED, &[("security", "mutual_tls")]))
    };
    let before = opened(cluster)?;
    sleep(Duration::from_secs(5));
    let carried = opened(cluster)? - before;
    ensure!(carried > 10.0, "{carried} connections in tunnels");
    let metrics = Metrics::parse(&asked(cluster, "metrics")?);
    ensure!(metrics.sum("undermesh_config_recalled_age_seconds", &[]) > 0.0, "its age is not told");

    cluster.control_program("kube-apiserver")?.signal(Signal::SIGCONT);
    eventually(Duration::from_secs(90), "what the API server says is in force", || {
        sleep(Duration::from_millis(500));
        ensure!(status(cluster)?["as_of"].is_null(), "{}", status(cluster)?);
        Ok(())
    })?;
    let ran = ran(cluster, "run-absence")?;
    let failed = ran["failed"].as_array().map_or(0, Vec::len);
    eprintln!("around it {failed} of {} connections failed", ran["made"]);
    ensure!(failed < 50, "{ran}");
    Ok(())
}

/// Two hundred revisions are lost, and a pod with them.
fn what_a_backup_lacks_leaves_the_mesh(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.nodes()[0].name().to_owned();
    let answers = |cluster: &Cluster| {
        eventually(Duration::from_secs(90), "the API server answers", || {
            cluster
                .kubectl(&["get", "--raw=/readyz"])
                .map(drop)
                .inspect_err(|_| sleep(Duration::from_millis(250)))
        })
    };
    cluster.back_up_etcd()?;
    answers(cluster)?;
    start(cluster, "later", &node, &["serve", "--name", "later", "--port", "7001"])?;
    let noise: Vec<_> = (0..200)
        .map(|i| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": format!("noise-{i}"), "namespace": SHOP } }))
        .collect();
    cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": noise }).to_string())?;
    let known = |cluster: &Cluster| -> Result<usize> {
        let mut known = 0;
        for agent in agents(cluster)? {
            known += usize::from(page(cluster, &agent, "debug/config")?.contains("\"later\""));
        }
        Ok(known)
    };
    ensure!(known(cluster)? == 2, "{} agents know of the pod", known(cluster)?);
    cluster.restore_etcd()?;
    answers(cluster)?;
    let began = Instant::now();
    eventually(Duration::from_secs(90), "no agent knows of the pod", || {
        sleep(Duration::from_millis(500));
        let known = known(cluster)?;
        ensure!(known == 0, "{known} agents do");
        Ok(())
    })?;
    eprintln!("what a backup lacks had left the mesh after {:.1?}", began.elapsed());
    Ok(())
}

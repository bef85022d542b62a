//! The lab itself: pods reach each other before any agent runs, and nothing stays behind.

use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Lab, Manifest, Pod, PodSpec, leftovers, patient, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn pods_on_two_nodes_reach_each_other_and_leave_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Program("socat"));
    let name = "um-e2e-reach";
    let lab = Lab::create(name)?;
    let (node1, node2) = (lab.add_node()?, lab.add_node()?);
    lab.apply(&Manifest::namespace("shop").label("undermesh.io/mesh", "enabled"))?;
    let client = node1.add_pod(PodSpec::new("shop", "client"))?;
    let near = node1.add_pod(PodSpec::new("shop", "near").second_network())?;
    let far = node2.add_pod(PodSpec::new("shop", "far").second_network())?;
    for server in [&near, &far] {
        let mut socat = Command::new("socat");
        socat.args(["TCP6-LISTEN:7000,fork,reuseaddr,ipv6only=0", "SYSTEM:echo here"]);
        let _server = server.spawn(socat)?;
        server.wait_listening(7000)?;
        for ip in [server.ip(), server.ip6()].into_iter().chain(server.second_ips().into_iter().flatten()) {
            dial(&client, ip)?;
        }
    }
    for cluster_ip in ["10.96.0.10", "fd96::10"] {
        ensure!(dial(&client, cluster_ip.parse()?).is_err(), "{cluster_ip} leads somewhere");
    }
    drop(lab);
    ensure!(leftovers(name)?.is_empty(), "left behind: {:?}", leftovers(name)?);
    Ok(())
}

#[test]
fn a_node_that_is_cut_off_answers_nothing_until_it_is_healed() -> Result<()> {
    require!(Feature::Lab, Feature::Program("socat"));
    let lab = Lab::create("um-e2e-cut")?;
    let (node1, node2) = (lab.add_node()?, lab.add_node()?);
    let client = node1.add_pod(PodSpec::new("shop", "client"))?;
    let far = node2.add_pod(PodSpec::new("shop", "far"))?;
    let mut socat = Command::new("socat");
    socat.args(["TCP6-LISTEN:7000,fork,reuseaddr,ipv6only=0", "SYSTEM:echo here"]);
    let _server = far.spawn(socat)?;
    far.wait_listening(7000)?;
    for ip in [far.ip(), far.ip6()] {
        dial(&client, ip)?;
        lab.cut(&node2)?;
        ensure!(dial(&client, ip).is_err(), "{ip} answers though its node is cut off");
        lab.heal(&node2)?;
        dial(&client, ip)?;
    }
    Ok(())
}

#[test]
fn a_hundred_pods_come_and_go_in_seconds() -> Result<()> {
    require!(Feature::Lab);
    let lab = Lab::create("um-e2e-hundred")?;
    let node = lab.add_node()?;
    let began = Instant::now();
    let pods = (0..100).map(|n| node.add_pod(PodSpec::new("many", &format!("pod-{n}"))));
    let pods = pods.collect::<Result<Vec<Pod>>>()?;
    let made = began.elapsed();
    for pod in pods {
        pod.remove()?;
    }
    eprintln!("100 pods made in {made:?}, removed in {:?}", began.elapsed() - made);
    ensure!(made < patient(Duration::from_secs(30)), "100 pods took {made:?}");
    ensure!(std::fs::read_dir(lab.config_dir())?.count() == 0, "manifests stay");
    Ok(())
}

#[test]
fn what_a_killed_run_leaves_the_next_one_sweeps() -> Result<()> {
    require!(Feature::Lab);
    let (name, sleep) = ("um-e2e-killed", "87654321");
    let mut victim = Command::new(std::env::current_exe()?);
    victim.args(["--exact", "lab::dies_with_a_lab", "--ignored", "--nocapture"]).env("DIE_WITH_A_LAB", name);
    let output = run_here(victim, LIMIT)?;
    ensure!(!output.status.success() && !leftovers(name)?.is_empty(), "nothing was left: {output:?}");
    Lab::sweep(name)?;
    ensure!(leftovers(name)?.is_empty(), "left behind: {:?}", leftovers(name)?);
    let mut ps = Command::new("ps");
    ps.arg("ax");
    let processes = run_here(ps, LIMIT)?.success()?;
    ensure!(!processes.contains(sleep), "a process is left");
    Ok(())
}

/// Not a test but a victim: see above.
#[test]
#[ignore = "run by what_a_killed_run_leaves_the_next_one_sweeps"]
fn dies_with_a_lab() -> Result<()> {
    let Some(name) = std::env::var_os("DIE_WITH_A_LAB") else { return Ok(()) };
    let lab = Lab::create(&name.to_string_lossy())?;
    let pod = lab.add_node()?.add_pod(PodSpec::new("shop", "victim"))?;
    let mut sleep = Command::new("setsid");
    sleep.args(["sh", "-c", "sleep 87654321 & wait"]);
    let _process = pod.spawn(sleep)?;
    std::process::abort();
}

/// What the pod's server on port 7000 says; an error if it says nothing.
fn dial(client: &Pod, ip: IpAddr) -> Result<String> {
    let to = match ip {
        IpAddr::V4(ip) => format!("TCP4:{ip}:7000,connect-timeout=2"),
        IpAddr::V6(ip) => format!("TCP6:[{ip}]:7000,connect-timeout=2"),
    };
    let mut socat = Command::new("socat");
    socat.args(["-u", &to, "-"]);
    let answer = client.run(socat, LIMIT)?.success()?;
    ensure!(!answer.trim().is_empty(), "{ip} closed without a word");
    Ok(answer)
}

//! The lab itself: pods reach each other before any agent runs, and nothing stays behind.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Lab, Manifest, PodSpec, leftovers};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn pods_on_two_nodes_reach_each_other_and_leave_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Program("socat"));
    let name = "um-e2e-lab";
    {
        let lab = Lab::create(name)?;
        let (node1, node2) = (lab.add_node()?, lab.add_node()?);
        lab.apply(&Manifest::namespace("shop").label("undermesh.io/mesh", "enabled"))?;
        let client = node1.add_pod(PodSpec::new("shop", "client").second_network())?;
        let near = node1.add_pod(PodSpec::new("shop", "near").second_network())?;
        let far = node2.add_pod(PodSpec::new("shop", "far").second_network())?;
        for server in [&near, &far] {
            let mut socat = Command::new("socat");
            socat.args(["TCP6-LISTEN:7000,fork,reuseaddr,ipv6only=0", "SYSTEM:echo $SOCAT_PEERADDR"]);
            let _server = server.spawn(socat)?;
            server.wait_listening(7000)?;
            for ip in [server.ip(), server.ip6()].into_iter().chain(server.second_ips().into_iter().flatten())
            {
                let answer = client.run(dial(&ip.to_string(), ip.is_ipv6()), LIMIT)?.success()?;
                ensure!(!answer.trim().is_empty(), "no answer from {ip}");
            }
        }
        lab.cut(&node2)?;
        let mut unreachable = dial(&far.ip().to_string(), false);
        unreachable.env("UNUSED", "");
        ensure!(client.run(unreachable, LIMIT)?.success().is_err(), "a cut node answers");
        lab.heal(&node2)?;
        near.remove()?;
    }
    ensure!(leftovers(name)?.is_empty(), "left behind: {:?}", leftovers(name)?);
    Ok(())
}

fn dial(ip: &str, v6: bool) -> Command {
    let to = if v6 {
        format!("TCP6:[{ip}]:7000,connect-timeout=2")
    } else {
        format!("TCP4:{ip}:7000,connect-timeout=2")
    };
    let mut command = Command::new("socat");
    command.args(["-u", &to, "-"]);
    command
}

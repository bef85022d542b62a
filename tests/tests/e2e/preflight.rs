//! An agent that cannot start says in one sentence what is amiss and what to do, and ends with exit code 1.

use std::process::Command;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{ADMIN_ADDRESS, Lab, Node, binary};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kernel::map_entries;
use crate::kit::{Mesh, SOON, Talk, serve};

/// Starts an agent as the command says and compares the one sentence that it leaves.
fn check(lab: &Lab, node: &Node, prefix: &[&str], args: &[(&str, &str)], expected: &[&str]) -> Result<()> {
    let (dir, pins) = (lab.config_dir().display().to_string(), node.pins().display().to_string());
    let defaults = [("--node-name", node.name()), ("--config-dir", &dir), ("--bpffs", &pins)];
    let given = |flag: &str| args.iter().any(|(name, _)| *name == flag);
    let all = defaults.iter().filter(|(flag, _)| !given(flag)).chain(args);
    let agent = binary("undermesh")?;
    let mut words: Vec<String> = prefix.iter().map(|word| (*word).to_owned()).collect();
    words.extend([agent.display().to_string(), "agent".to_owned()]);
    words.extend(all.flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env("UNDERMESH_LOG", "error");
    let output = node.run(command, SOON)?;
    ensure!(output.status.code() == Some(1), "`{}` ended with {}", output.what, output.status);
    ensure!(
        output.stdout.is_empty() && output.stderr.lines().count() == 1,
        "more than one line: {}",
        output.stderr
    );
    for part in expected {
        ensure!(output.stderr.contains(part), "`{part}` is not in: {}", output.stderr);
    }
    Ok(())
}

#[test]
fn a_lack_is_named_with_its_remedy() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("setpriv"));
    let lab = Lab::create("um-e2e-preflight")?;
    let node = lab.add_node()?;
    let without = |capabilities: &str| ["setpriv".to_owned(), format!("--bounding-set={capabilities}")];
    for (drop, expected) in [
        ("-bpf,-sys_admin", ["CAP_BPF is missing", "run it as root or grant it"]),
        ("-net_admin", ["CAP_NET_ADMIN is missing", "run it as root or grant it"]),
        ("-sys_admin", ["CAP_SYS_ADMIN is missing", "run it as root or grant it"]),
    ] {
        check(&lab, &node, &without(drop).each_ref().map(String::as_str), &[], &expected)?;
    }
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    check(&lab, &node, &nobody, &[], &["is missing", "run it as root or grant it"])?;
    let no_bpffs = ["/tmp/um-no-bpffs is not on a bpffs", "mount -t bpf bpf /sys/fs/bpf"];
    check(&lab, &node, &[], &[("--bpffs", "/tmp/um-no-bpffs")], &no_bpffs)?;
    let missing = ["cannot read the directory of manifests /run/um-none", "No such file or directory"];
    check(&lab, &node, &[], &[("--config-dir", "/run/um-none")], &missing)?;
    let foreign = ["192.0.2.1:15020", "--admin-address"];
    check(&lab, &node, &[], &[("--admin-address", "192.0.2.1:15020")], &foreign)
}

/// cgroup2 is hidden from the agent alone, in a mount namespace of its own.
#[test]
fn a_machine_without_cgroup2_is_told_to_mount_it() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("unshare"));
    let lab = Lab::create("um-e2e-nocgroup")?;
    let node = lab.add_node()?;
    let root = undermesh_tests::lab::cgroup_root()?;
    let hide = format!("umount --lazy {} && exec \"$@\"", root.display());
    let prefix = ["unshare", "--mount", "sh", "-c", &hide, "sh"];
    check(&lab, &node, &prefix, &[], &["no cgroup2 is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"])
}

#[test]
fn a_second_agent_ends_and_leaves_the_first_one_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    let mut mesh = Mesh::start("um-e2e-second", 1, &[])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let mut talk = Talk::begin(&client, server.ip())?;
    let before = map_entries(&mesh.nodes[0])?;
    check(&mesh.lab, &mesh.nodes[0], &[], &[], &[ADMIN_ADDRESS, "--admin-address"])?;
    let after = map_entries(&mesh.nodes[0])?;
    ensure!(before == after && after["vouched"] == 1, "the maps held {before:?} and hold {after:?}");
    talk.goes_on()?;
    talk.end()
}

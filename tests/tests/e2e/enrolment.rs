//! Pods join and leave the mesh while they run, and nothing of ours is on those that are not in it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use undermesh_tests::lab::{Agent, Pod, PodSpec, eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kernel::programs;
use crate::kit::{Mesh, SHOP, SOON, Talk, dial, namespace, serve, undermesh};
use crate::leaks::lets_go;

/// The agent has tidied up after pods that have left.
const TIDIED: Duration = Duration::from_secs(5);

const OPENED: &str = "undermesh_tcp_connections_opened_total";

#[test]
fn running_pods_join_and_leave_and_keep_their_connections() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::start("um-e2e-join", 2, &[])?;
    mesh.lab.apply(&namespace(false))?;
    let add = |node: usize, name: &str| mesh.nodes[node].add_pod(PodSpec::new(SHOP, name));
    let (client, near, far) = (add(0, "client")?, add(0, "near")?, add(1, "far")?);
    let _servers = [serve(&near)?, serve(&far)?];
    let mut talks = Talks::default();

    // By the pod's own label.
    talks.begin(&client, [&near, &far])?;
    for pod in [&client, &near, &far] {
        pod.set_mesh(true)?;
    }
    mesh.wait_enrolled(0, 2)?;
    mesh.wait_enrolled(1, 1)?;
    ensure!(
        captured(&mesh.agents[0], &client, [&near, &far])?,
        "enrolled, but connections go past the agent"
    );
    talks.go_on()?;

    // And out again.
    talks.begin(&client, [&near, &far])?;
    for pod in [&client, &near, &far] {
        pod.set_label("undermesh.io/mesh", None)?;
    }
    mesh.wait_enrolled(0, 0)?;
    mesh.wait_enrolled(1, 0)?;
    ensure!(!captured(&mesh.agents[0], &client, [&near, &far])?, "not enrolled, but still captured");
    talks.go_on()?;

    // By the label of their namespace, against which the pod's own wins.
    far.set_mesh(false)?;
    mesh.lab.apply(&namespace(true))?;
    mesh.wait_enrolled(0, 2)?;
    ensure!(captured(&mesh.agents[0], &client, [&near])?, "the label of the namespace is not heard");
    ensure!(!captured(&mesh.agents[0], &client, [&far])?, "captured to a pod that is not in the mesh");
    mesh.wait_enrolled(1, 0)?;
    talks.go_on()?;
    mesh.lab.apply(&namespace(false))?;
    mesh.wait_enrolled(0, 0)?;
    talks.go_on()?;
    // Nothing is left of this enrolment; the connections of the one before still need what they have in common.
    sleep(TIDIED);
    talks.go_on()?;
    talks.end()
}

/// Connections of different ages, both directions busy.
#[derive(Default)]
struct Talks(Vec<Talk>);

impl Talks {
    fn begin<const N: usize>(&mut self, client: &Pod, servers: [&Pod; N]) -> Result<()> {
        for server in servers {
            self.0.push(Talk::begin(client, server.ip())?);
            self.0.push(Talk::begin(client, server.ip6())?);
        }
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        self.0.iter_mut().enumerate().try_for_each(|(number, talk)| {
            talk.goes_on().with_context(|| format!("connection {number} that was open before the change"))
        })
    }

    fn end(self) -> Result<()> {
        self.0.into_iter().try_for_each(Talk::end)
    }
}

/// Whether new connections from the client go through its agent: all or none of them.
pub fn captured<const N: usize>(agent: &Agent, client: &Pod, servers: [&Pod; N]) -> Result<bool> {
    let opened = || -> Result<f64> {
        Ok(agent.metrics()?.sum(OPENED, &[("reporter", "source"), ("source_workload", client.name())]))
    };
    let before = opened()?;
    for server in servers {
        for ip in [server.ip(), server.ip6()] {
            dial(client, ip, 1)?.all_served()?;
        }
    }
    let (seen, made) = (opened()? - before, (2 * N) as f64);
    ensure!(seen == 0.0 || seen == made, "{seen} of {made} connections were captured");
    Ok(seen == made)
}

/// As with `kubectl delete --force`: a pod is forgotten before its processes end.
#[test]
fn a_deleted_pod_is_in_the_mesh_until_its_last_process_has_exited() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-forced", 2, &[])?;
    let (client, far, outsider) =
        (mesh.pod(0, "client")?, mesh.pod(1, "far")?, mesh.outsider(0, "outsider")?);
    let (_server, runs) = (serve(&far)?, serve(&client)?);
    mesh.ready()?;
    let talk = Talk::begin(&client, far.ip6())?;
    let namespace = fs::metadata(client.netns())?.ino();
    client.delete()?;
    let agent = &mesh.agents[0];
    eventually(SOON, "the pod is not published", || {
        let published = agent.published()?;
        ensure!(published == 0, "{published} pods are");
        Ok(())
    })?;
    sleep(TIDIED);
    mesh.wait_enrolled(0, 1)?;
    ensure!(captured(agent, &client, [&far])?, "what still runs goes past the agent");
    // Who may call it is not known any more.
    ensure!(dial(&outsider, client.ip(), 1)?.served.is_empty(), "it lets somebody new in");

    talk.end()?;
    drop(runs);
    mesh.wait_enrolled(0, 0)?;
    nothing_is_pinned(&mesh)?;
    eventually(SOON, "the agent lets the namespace go", || lets_go(agent, &BTreeSet::from([namespace])))
}

#[test]
fn who_has_the_place_of_a_deleted_pod_that_runs_is_in_the_mesh_instead() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-heir", 1, &[])?;
    let (former, server) = (mesh.pod(0, "former")?, mesh.pod(0, "server")?);
    let (_server, _runs) = (serve(&server)?, serve(&former)?);
    mesh.ready()?;
    former.delete()?;
    let agent = &mesh.agents[0];
    let published = |count: usize| {
        eventually(SOON, "the right pods are published", || {
            let published = agent.published()?;
            ensure!(published == count, "{published} pods are");
            Ok(())
        })
    };
    published(1)?;
    mesh.wait_enrolled(0, 2)?;
    former.update(|manifest| {
        manifest.set("metadata.name", json!("heir"));
        manifest.set("metadata.uid", json!("heir-1"));
    })?;
    published(2)?;
    mesh.wait_enrolled(0, 2)?;
    dial(&former, server.ip(), 1)?.all_served()?;
    let of_heir = agent.metrics()?.sum(OPENED, &[("reporter", "source"), ("source_workload", "heir")]);
    ensure!(of_heir == 1.0, "{of_heir} connections are the heir's");
    // Both ways.
    dial(&server, former.ip(), 1)?.all_served().map(drop)
}

fn nothing_is_pinned(mesh: &Mesh) -> Result<()> {
    eventually(SOON, "no pod is pinned", || {
        let pins = fs::read_dir(mesh.nodes[0].pins().join("pods"))?.count();
        ensure!(pins == 0, "{pins} pods are");
        Ok(())
    })
}

#[test]
fn programs_are_on_enrolled_pods_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    let mut mesh = Mesh::start("um-e2e-tree", 1, &[])?;
    let (one, two) = (mesh.pod(0, "one")?, mesh.pod(0, "two")?);
    let outside = mesh.outsider(0, "outside")?;
    mesh.ready()?;
    mesh.wait_enrolled(0, 2)?;
    let node = &mesh.nodes[0];
    let agent = node.cgroup().join("agent");
    let pod_programs: BTreeSet<String> =
        ["watch_tcp", "getpeername4", "getpeername6", "getsockname4", "getsockname6", "connect4", "connect6"]
            .map(str::to_owned)
            .into();
    let check = |enrolled: &[&Pod]| -> Result<()> {
        let expected: BTreeSet<_> = enrolled
            .iter()
            .flat_map(|pod| pod_programs.iter().map(|name| (pod.cgroup().clone(), name.clone())))
            .chain([(agent.clone(), "vouch_dial".to_owned())])
            .collect();
        // A pod that leaves keeps some of them for a moment, for what is on its way to the agent.
        eventually(SOON, "programs are on the enrolled pods alone", || {
            let found = programs(node)?;
            ensure!(found == expected, "the cgroups have {found:#?}, not {expected:#?}");
            Ok(())
        })
    };
    check(&[&one, &two])?;
    two.set_mesh(false)?;
    mesh.wait_enrolled(0, 1)?;
    check(&[&one])?;
    outside.set_mesh(true)?;
    mesh.wait_enrolled(0, 2)?;
    check(&[&one, &outside])?;

    mesh.agents[0].terminate(SOON)?;
    let detached = undermesh(node, &["detach", "--bpffs", &node.pins().display().to_string()])?.success()?;
    ensure!(detached.starts_with("detached 2 pods"), "detach says: {detached}");
    ensure!(!node.pins().exists() && programs(node)?.is_empty(), "detach left {:#?}", programs(node)?);
    let again = undermesh(node, &["detach", "--bpffs", &node.pins().display().to_string()])?.success()?;
    ensure!(again.starts_with("nothing to detach"), "detach says: {again}");
    Ok(())
}

#[test]
fn maps_show_field_names() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("bpftool"));
    let mut mesh = Mesh::start("um-e2e-maps", 1, &[])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let talk = Talk::begin(&client, server.ip())?;
    let maps = mesh.nodes[0].pins().join("maps");
    let dump = |name: &str| -> Result<String> {
        let mut command = Command::new("bpftool");
        command.args(["map", "dump", "pinned"]).arg(maps.join(name));
        run_here(command, SOON)?.success()
    };
    let expected: [(&str, &[&str]); 6] = [
        ("agents", &["heartbeat_ns", "layout", "closed_when_down"]),
        ("destinations", &["octets", "code"]),
        ("codes", &["key", "octets"]),
        ("pods", &["addresses", "interface", "strict"]),
        ("vouched", &["source", "destination", "source_port", "destination_port", "address", "port"]),
        ("counters", &["captured", "bypassed_agent_down", "inbound_refused_strict", "tcp_retransmits"]),
    ];
    for (map, fields) in expected {
        let dump = dump(map)?;
        for field in fields {
            ensure!(dump.contains(&format!("\"{field}\"")), "{map} does not show `{field}`:\n{dump}");
        }
    }
    // The kernel takes no types for a map of sockets: two listeners in each of two pods, as bytes.
    let listeners = dump("listeners")?;
    ensure!(listeners.matches("key:").count() == 4, "listeners holds\n{listeners}");
    // `dials` is empty but for the microseconds of a dial; its types are all the same there.
    let mut command = Command::new("bpftool");
    command.args(["btf", "dump", "map", "pinned"]).arg(maps.join("dials"));
    let types = run_here(command, SOON)?.success()?;
    ensure!(types.contains("Endpoint") && types.contains("'port'"), "dials has the types {types}");
    talk.end()
}

#[test]
fn a_pod_that_cannot_be_enrolled_is_reported_until_it_can() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-amiss", 1, &[])?;
    let (no_cgroup, no_netns) = (mesh.pod(0, "no-cgroup")?, mesh.pod(0, "no-netns")?);
    mesh.ready()?;
    mesh.wait_enrolled(0, 2)?;
    no_cgroup.set_mesh(false)?;
    no_netns.set_mesh(false)?;
    mesh.wait_enrolled(0, 0)?;

    let cgroup = no_cgroup.cgroup().with_file_name("later");
    let netns = mesh.lab.dir().join("later-netns");
    let place = |pod: &Pod, annotation: &str, path: &Path| {
        pod.update(|manifest| {
            manifest.set_annotation(annotation, Some(&path.display().to_string()));
            manifest.set_label("undermesh.io/mesh", Some("enabled"));
        })
    };
    place(&no_cgroup, "undermesh.io/cgroup", &cgroup)?;
    place(&no_netns, "undermesh.io/netns", &netns)?;
    let agent = &mesh.agents[0];
    for reason in ["cgroup_unavailable", "netns_unavailable"] {
        let labels = [("reason", reason)];
        agent.wait_metrics(SOON, reason, |m| m.sum("undermesh_pods_not_enrolled", &labels) == 1.0)?;
    }
    // Ready all the same: the pods have a reported reason.
    agent.get("/readyz")?.ok()?;
    let status = undermesh(&mesh.nodes[0], &["status"])?.success()?;
    for (pod, path) in [("no-cgroup", &cgroup), ("no-netns", &netns)] {
        let line = status.lines().find(|line| line.contains(pod)).unwrap_or_default();
        let told = line.contains("not_enrolled") && line.contains(&path.display().to_string());
        ensure!(told, "{pod} is not reported with its path:\n{status}");
    }
    let said: Vec<_> =
        agent.process().output().lines().filter(|l| l.contains("cannot enrol")).map(str::to_owned).collect();
    ensure!(said.len() == 2, "one warning for each pod, not {said:#?}");

    // What is said of a pod becomes true without any further change to its manifest.
    fs::create_dir(&cgroup)?;
    fs::File::create(&netns)?;
    let mut mount = Command::new("mount");
    mount.arg("--bind").arg(no_netns.netns()).arg(&netns);
    run_here(mount, SOON)?.success()?;
    let enrolled = mesh.wait_enrolled(0, 2);
    let mut umount = Command::new("umount");
    // The agent holds the namespace open through it.
    umount.arg("--lazy").arg(&netns);
    run_here(umount, SOON)?.success()?;
    enrolled
}

#[test]
fn an_enrolment_that_fails_leaves_older_connections_their_way() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-obstacle", 1, &[])?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let mut talk = Talk::begin(&client, server.ip6())?;
    client.set_mesh(false)?;
    mesh.wait_enrolled(0, 1)?;
    sleep(TIDIED);

    // Where its pins are to be there is no folder, and none can be made.
    let pins = mesh.nodes[0].pins().join("pods");
    let aside = pins.with_file_name("aside");
    fs::rename(&pins, &aside)?;
    std::os::unix::fs::symlink("nowhere", &pins)?;
    client.set_mesh(true)?;
    let labels = [("reason", "attach_failed")];
    mesh.agents[0].wait_metrics(SOON, "the enrolment fails", |metrics| {
        metrics.sum("undermesh_pods_not_enrolled", &labels) == 1.0
    })?;
    talk.goes_on()?;

    fs::remove_file(&pins)?;
    fs::rename(&aside, &pins)?;
    mesh.wait_enrolled(0, 2)?;
    talk.goes_on()?;
    talk.end()
}

#[test]
fn pods_whose_names_differ_by_a_dot_alone_are_both_captured() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-dots", 1, &[])?;
    let (dotted, dashed, server) = (mesh.pod(0, "web.a")?, mesh.pod(0, "web-a")?, mesh.pod(0, "server")?);
    let _server = serve(&server)?;
    mesh.ready()?;
    let both_captured = |mesh: &Mesh| -> Result<()> {
        for client in [&dotted, &dashed] {
            ensure!(captured(&mesh.agents[0], client, [&server])?, "{} is not captured", client.name());
        }
        Ok(())
    };
    both_captured(&mesh)?;

    // An agent before this one called the pod with the dot as it calls the other one now.
    mesh.agents[0].kill();
    let pins = mesh.nodes[0].pins().join("pods");
    let label_of = |prefix: &str| -> Result<String> {
        let labels = fs::read_dir(&pins)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
        let labels = labels.collect::<Result<Vec<_>>>()?;
        labels.into_iter().find(|label| label.starts_with(prefix)).with_context(|| format!("no {prefix}"))
    };
    let label = label_of("shop_web+a_")?;
    fs::rename(pins.join(&label), pins.join(label.replace('+', "-")))?;
    mesh.restart(0, &[])?;
    eventually(SOON, "the pins of before are gone", || {
        let count = fs::read_dir(&pins)?.count();
        ensure!(count == 3, "{count} pods are pinned");
        Ok(())
    })?;
    both_captured(&mesh)
}

#[test]
fn a_pod_without_paths_says_which_annotations_it_lacks() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::start("um-e2e-nopath", 1, &[])?;
    let pod = mesh.nodes[0].add_pod(PodSpec::new(SHOP, "bare"))?;
    pod.update(|manifest| manifest.set("metadata.annotations", json!({})))?;
    eventually(SOON, "the pod is reported", || {
        let status = undermesh(&mesh.nodes[0], &["status"])?.success()?;
        let line = status.lines().find(|line| line.contains("bare")).unwrap_or_default();
        let told = line.contains("undermesh.io/netns") && line.contains("undermesh.io/cgroup");
        ensure!(told, "the status is:\n{status}");
        Ok(())
    })
}

//! Who is let in to pods as the kubelet: at which ports, with an agent and without, and what becomes of it where the kubelet is not
//! known.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, binary, cgroup_root, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::attacker::{end, lead_node_port};
use crate::kit::{self, SHOP, SOON};
use crate::mesh::{KERNEL_REFUSED, PORT, REFUSED, at, counted, listen, names, witness};

/// The pods' probes are here, and what they serve is at [`PORT`].
const PROBED: u16 = 7005;
const LIMIT: Duration = Duration::from_secs(30);
const KUBELET: &str = "kubelet";
const SERVED: &str = "served";

/// A pod that takes no plaintext and one that lets in nobody, both with probes at [`PROBED`]; and one whose probe names the first one's
/// other port, which a new Kubernetes refuses only where somebody asks it to.
struct Scene {
    mesh: kit::Mesh,
    strict: Pod,
    guarded: Pod,
    /// Outside of the mesh, on their node and on the other one.
    near: Pod,
    far: Pod,
    _servers: Vec<Process>,
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
enum Caller {
    Kubelet,
    /// Another process of the node, as of a pod on its network.
    Node,
    Stranger,
    /// One of another node, by a NodePort: with an address of the node.
    NodePort,
}

use Caller::{Kubelet, Node, NodePort, Stranger};

impl Scene {
    fn set(name: &str, args: &[&str]) -> Result<Self> {
        let arguments = Self::arguments(name, args)?;
        let mut mesh = kit::Mesh::start(name, 2, &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let strict = mesh.add(0, PodSpec::new(SHOP, "strict").annotation("undermesh.io/mtls", "strict"))?;
        let guarded = mesh.pod(0, "guarded")?;
        let deputy = mesh.pod(0, "deputy")?;
        let (near, far) = (mesh.outsider(0, "near")?, mesh.outsider(1, "far")?);
        for pod in [&strict, &guarded] {
            probe(pod, json!({ "port": "health" }))?;
        }
        probe(&deputy, json!({ "host": strict.ip(), "port": PORT }))?;
        mesh.lab.apply(
            &Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), "nobody").with(
                "spec",
                json!({ "selector": { "matchLabels": { "app": "guarded" } },
                    "rules": [{ "from": [{ "serviceAccounts": ["nobody"] }] }] }),
            ),
        )?;
        let mut servers = Vec::new();
        for pod in [&strict, &guarded] {
            for port in [PORT, PROBED] {
                servers.push(listen(pod, port, &[])?);
            }
            lead_node_port(&mesh.nodes[0], node_port(pod), pod, PROBED)?;
        }
        mesh.ready()?;
        let scene = Self { mesh, strict, guarded, near, far, _servers: servers };
        // The policy is in force, and so is what was written before.
        scene.gets(Stranger, PORT, ["ECONNREFUSED", "ECONNRESET"])?;
        Ok(scene)
    }

    /// Those that name the kubelet's cgroup on the first node, and others.
    fn arguments(name: &str, args: &[&str]) -> Result<Vec<String>> {
        let node = cgroup_root()?.join(name).join("node1");
        let own = [("--cgroup-root", node.clone()), ("--kubelet-cgroup", node.join(KUBELET))];
        let own = own.map(|(flag, value)| format!("{flag}={}", value.display()));
        Ok(own.into_iter().chain(args.iter().map(|arg| arg.to_string())).collect())
    }

    fn restart(&mut self, args: &[&str]) -> Result<()> {
        let arguments = Self::arguments(self.mesh.lab.name(), args)?;
        self.mesh.restart(0, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn kubelet_cgroup(&self) -> PathBuf {
        self.mesh.nodes[0].cgroup().join(KUBELET)
    }

    /// Waits until the caller gets this at the strict and at the guarded pod's port, by both families.
    fn gets(&self, caller: Caller, port: u16, expected: [&str; 2]) -> Result<()> {
        for (pod, expected) in [&self.strict, &self.guarded].into_iter().zip(expected) {
            for (family, to) in [pod.ip(), pod.ip6()].into_iter().enumerate() {
                let what = format!("{caller:?} gets {expected} from {} at {}", pod.name(), at(to, port));
                eventually(SOON, &what, || {
                    let to = match caller {
                        NodePort => at(self.mesh.nodes[0].addresses()[family], node_port(pod)),
                        _ => at(to, port),
                    };
                    let told = self.call(caller, &to)?;
                    let end = if names(&told).is_ok() { SERVED.to_owned() } else { end(&told) };
                    ensure!(end == expected, "{told}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    fn call(&self, caller: Caller, to: &str) -> Result<Value> {
        let node = &self.mesh.nodes[0];
        let command = || -> Result<Command> {
            let mut command = Command::new(binary("witness")?);
            command.args(["connect", to]);
            Ok(command)
        };
        let told = match caller {
            Kubelet => node.run_as(KUBELET, command()?, LIMIT)?,
            Node => node.run(command()?, LIMIT)?,
            Stranger => return witness(&self.near, &["connect", to]),
            NodePort => return witness(&self.far, &["connect", to]),
        };
        Ok(serde_json::from_str(&told.success()?)?)
    }

    /// Who passes for the kubelet, as the metrics have it.
    fn wait_probers(&self, who: &str) -> Result<()> {
        let what = format!("the probes are those of {who}");
        let is_so = |metrics: &undermesh_tests::lab::Metrics| {
            metrics.sum("undermesh_probe_callers", &[("who", who)]) == 1.0
                && metrics.sum("undermesh_probe_callers", &[]) == 1.0
        };
        self.mesh.agents[0].wait_metrics(SOON, &what, is_so).map(drop)
    }
}

#[test]
fn the_kubelet_is_let_in_where_pods_are_probed_and_nowhere_else() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let mut scene = Scene::set("um-e2e-probes", &[])?;
    fs::create_dir(scene.kubelet_cgroup())?;
    scene.wait_probers("kubelet")?;
    let others = [Node, Stranger, NodePort];
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;
    for other in others {
        scene.gets(other, PROBED, ["ECONNREFUSED", "ECONNRESET"])?;
    }
    let refused = |scene: &Scene| -> Result<[f64; 2]> {
        let metrics = scene.mesh.agents[0].metrics()?;
        let denied = metrics.sum(REFUSED, &[("reason", "denied"), ("reporter", "destination")]);
        Ok([counted(&metrics, KERNEL_REFUSED, "not_probed"), denied])
    };
    let before = refused(&scene)?;
    ensure!(before[0] == 0.0, "{before:?}");
    // What a pod names in its probes of another one counts for nobody.
    scene.gets(Kubelet, PORT, ["ECONNREFUSED", "ECONNRESET"])?;
    eventually(SOON, "it is told of", || {
        let now = refused(&scene)?;
        ensure!(now == [2.0, before[1] + 2.0], "{now:?}, {before:?} before");
        Ok(())
    })?;

    scene.mesh.agents[0].kill();
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;
    scene.gets(Kubelet, PORT, ["ECONNREFUSED"; 2])?;
    for other in others {
        scene.gets(other, PROBED, ["ECONNREFUSED"; 2])?;
    }
    scene.restart(&[])?;
    ensure!(refused(&scene)?[0] == 4.0, "{:?} of 4", refused(&scene)?);
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;

    for pod in [&scene.strict, &scene.guarded] {
        pod.update(|manifest| manifest.set("spec.containers", json!([{ "name": "main", "image": "none" }])))?;
    }
    scene.gets(Kubelet, PROBED, ["ECONNREFUSED", "ECONNRESET"])
}

#[test]
fn who_passes_for_a_kubelet_that_is_not_known_is_told() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    let mut scene = Scene::set("um-e2e-probes-fallback", &[])?;
    scene.wait_probers("node")?;
    let told = scene.mesh.agents[0].get("/debug/status")?.ok()?;
    ensure!(told.contains("whoever is on the node's own network is let in"), "{told}");
    let node_alone = |scene: &Scene, denied: &str| {
        scene.gets(Node, PROBED, [SERVED; 2])?;
        scene.gets(Node, PORT, ["ECONNREFUSED", denied])?;
        for other in [Stranger, NodePort] {
            scene.gets(other, PROBED, ["ECONNREFUSED", denied])?;
        }
        Ok::<_, anyhow::Error>(())
    };
    node_alone(&scene, "ECONNRESET")?;
    scene.mesh.agents[0].kill();
    node_alone(&scene, "ECONNREFUSED")?;
    scene.restart(&[])?;
    node_alone(&scene, "ECONNRESET")?;

    fs::create_dir(scene.kubelet_cgroup())?;
    scene.wait_probers("kubelet")?;
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;
    scene.gets(Node, PROBED, ["ECONNREFUSED", "ECONNRESET"])?;
    let told = scene.mesh.agents[0].get("/debug/status")?.ok()?;
    ensure!(!told.contains("whoever is on the node's own network"), "{told}");

    // As when it restarts: nobody passes for it in between.
    forsake(&scene)?;
    scene.gets(Node, PROBED, ["ECONNREFUSED", "ECONNRESET"])?;
    fs::create_dir(scene.kubelet_cgroup())?;
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;
    scene.wait_probers("kubelet")
}

#[test]
fn nobody_passes_for_a_kubelet_that_is_not_known_where_the_user_says_so() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iptables"));
    // What an agent has left that was told otherwise does not stay.
    let mut scene = Scene::set("um-e2e-probes-closed", &[])?;
    scene.gets(Node, PROBED, [SERVED; 2])?;
    scene.mesh.agents[0].kill();
    let arguments = Scene::arguments(scene.mesh.lab.name(), &["--on-kubelet-unknown=closed"])?;
    let options = kit::options(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    scene.mesh.agents[0] = scene.mesh.nodes[0].spawn_agent(options)?;
    eventually(SOON, "the agent says why it is not ready", || {
        let why = scene.mesh.agents[0].get("/readyz")?;
        ensure!(why.status == 503 && why.body.contains("fail their probes"), "{why:?}");
        Ok(())
    })?;
    scene.wait_probers("nobody")?;
    scene.mesh.wait_enrolled(0, 3)?;
    for caller in [Node, Stranger, NodePort] {
        scene.gets(caller, PROBED, ["ECONNREFUSED", "ECONNRESET"])?;
    }
    fs::create_dir(scene.kubelet_cgroup())?;
    scene.wait_probers("kubelet")?;
    scene.mesh.ready()?;
    scene.gets(Kubelet, PROBED, [SERVED; 2])?;
    scene.gets(Node, PROBED, ["ECONNREFUSED", "ECONNRESET"])
}

/// Gives the pod's container a port that is called `health` and a probe of this.
fn probe(pod: &Pod, of: Value) -> Result<()> {
    let container = json!({ "name": "main", "image": "none",
        "ports": [{ "name": "health", "containerPort": PROBED }], "readinessProbe": { "tcpSocket": of } });
    pod.update(|manifest| manifest.set("spec.containers", json!([container])))
}

/// The NodePort that leads to the pod's probed port.
fn node_port(pod: &Pod) -> u16 {
    if pod.name() == "strict" { 30_705 } else { 30_706 }
}

/// Takes the kubelet's cgroup away, whose last process may just have ended.
fn forsake(scene: &Scene) -> Result<()> {
    let cgroup = scene.kubelet_cgroup();
    eventually(SOON, "the kubelet's cgroup goes", || fs::remove_dir(&cgroup).context("it is in use"))
}

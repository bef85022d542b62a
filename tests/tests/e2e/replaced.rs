//! A pod's cgroup or network namespace is replaced under its path, and nobody tells the agent.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Agent, Pod, PodSpec, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::enrolment::captured;
use crate::kit::{Mesh, PORT, Run, SHOP, SOON, dial, serve, undermesh};
use crate::leaks::lets_go;

/// The agent looks a second after the kernel told of it.
const WITHIN: Duration = Duration::from_secs(3);

/// A strict pod, a server of the mesh on another node, and a pod outside of the mesh.
struct Scene {
    mesh: Mesh,
    strict: Pod,
    far: Pod,
    outsider: Pod,
    _server: Process,
}

impl Scene {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        let strict = PodSpec::new(SHOP, "strict").annotation("undermesh.io/mtls", "strict");
        let (strict, far) = (mesh.add(0, strict)?, mesh.pod(1, "far")?);
        let outsider = mesh.outsider(0, "outsider")?;
        let server = serve(&far)?;
        mesh.ready()?;
        mesh.agents[0].wait_metrics(SOON, "far is known", |_| dial(&strict, far.ip(), 1).is_ok())?;
        Ok(Self { mesh, strict, far, outsider, _server: server })
    }

    fn agent(&self) -> &Agent {
        &self.mesh.agents[0]
    }

    /// Waits until the pod is in the mesh again, both ways; a server must run in it.
    fn is_back(&self) -> Result<()> {
        eventually(WITHIN, "what the pod dials is captured", || {
            let captured = captured(self.agent(), &self.strict, [&self.far])?;
            ensure!(captured, "it goes past the agent");
            Ok(())
        })?;
        for ip in [self.strict.ip(), self.strict.ip6()] {
            dial(&self.outsider, ip, 3)?.all_failed("ECONNREFUSED")?;
            eventually(SOON, "pods of the mesh get through", || dial(&self.far, ip, 1)?.all_served())?;
        }
        let status = undermesh(&self.mesh.nodes[0], &["status"])?.success()?;
        ensure!(!status.contains("not_enrolled"), "the status is:\n{status}");
        Ok(())
    }

    /// Waits until the pod is not enrolled, for this reason and for everybody.
    fn is_out(&self, reason: &str) -> Result<()> {
        self.agent().wait_metrics(SOON, reason, |metrics| {
            metrics.sum("undermesh_pods_not_enrolled", &[("reason", reason)]) == 1.0
                && metrics.sum("undermesh_pods_enrolled", &[]) == 0.0
        })?;
        eventually(SOON, "the pod is not published", || {
            let published = self.agent().published()?;
            ensure!(published == 0, "{published} pods are");
            Ok(())
        })
    }

    /// A server in the pod's network namespace that is not in its cgroup.
    fn serve_beside(&self) -> Result<Process> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.strict.netns().display()));
        command.arg(binary("traffic")?).args(["serve", "--name", "beside", "--port", &PORT.to_string()]);
        let server = self.mesh.nodes[0].spawn(command)?;
        self.strict.wait_listening(PORT)?;
        Ok(server)
    }
}

#[test]
fn a_pod_with_another_cgroup_at_its_path_is_captured_again() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("nsenter"));
    let scene = Scene::set("um-e2e-cgroup")?;
    let _server = scene.serve_beside()?;
    scene.is_back()?;
    // The namespace is the same, so there is no moment in which plaintext gets in.
    let run = Run::begin(&scene.outsider, scene.strict.ip(), 4)?;
    scene.strict.lose_cgroup()?;
    scene.strict.regain_cgroup()?;
    scene.is_back()?;

    scene.strict.lose_cgroup()?;
    scene.is_out("cgroup_unavailable")?;
    scene.strict.regain_cgroup()?;
    scene.is_back()?;

    scene.strict.lose_cgroup()?;
    scene.is_out("cgroup_unavailable")?;
    let ran = run.end()?;
    ensure!(ran.made == ran.failed_in_all, "{} of {} got through", ran.made - ran.failed_in_all, ran.made);
    // Nothing of ours stays on a pod that is to leave meanwhile.
    scene.strict.set_mesh(false)?;
    eventually(SOON, "the pod is let go", || {
        let pins = fs::read_dir(scene.mesh.nodes[0].pins().join("pods"))?.count();
        ensure!(pins == 0, "{pins} pods are pinned");
        Ok(())
    })?;
    dial(&scene.outsider, scene.strict.ip(), 1)?.all_served().map(drop)
}

#[test]
fn a_pod_with_another_network_namespace_at_its_path_is_captured_again() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let scene = Scene::set("um-e2e-netns")?;
    let mut server = serve(&scene.strict)?;
    scene.is_back()?;
    let mut namespaces = BTreeSet::new();
    let lose = |namespaces: &mut BTreeSet<u64>, server: &mut Process| -> Result<()> {
        namespaces.insert(fs::metadata(scene.strict.netns())?.ino());
        server.kill();
        scene.strict.lose_netns()
    };

    lose(&mut namespaces, &mut server)?;
    scene.strict.regain_netns()?;
    server = serve(&scene.strict)?;
    scene.is_back()?;

    lose(&mut namespaces, &mut server)?;
    scene.is_out("netns_unavailable")?;
    // The numbers of namespaces that are gone are given away again.
    eventually(SOON, "the agent lets the namespaces go", || lets_go(scene.agent(), &namespaces))?;
    scene.strict.regain_netns()?;
    let _server = serve(&scene.strict)?;
    scene.is_back()
}

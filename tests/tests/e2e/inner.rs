//! A network namespace of the application's own, inside the pod's cgroup (Docker in Docker): a code leads nowhere
//! there, so its connections go their direct way, or nowhere in closed mode, and are counted.

use anyhow::{Result, ensure};
use undermesh_tests::lab::{Pod, PodSpec};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{BYPASSED, KERNEL_REFUSED, Mesh, OPENED, PORT, at, counted, names};

#[test]
fn an_inner_namespace_connects_past_the_mesh_and_is_counted() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-inner")?;
    let inner = inner(&mesh)?;
    let without = dials(&mesh, &inner)?.into_iter().map(|seen| names(&seen)).collect::<Result<Vec<_>>>()?;
    mesh.start(&[])?;
    let with = dials(&mesh, &inner)?.into_iter().map(|seen| names(&seen)).collect::<Result<Vec<_>>>()?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    let metrics = mesh.agent().metrics()?;
    let bypassed = counted(&metrics, BYPASSED, "inner_netns");
    ensure!(bypassed == with.len() as f64, "{bypassed} of {} connections were counted", with.len());
    let captured = metrics.sum(OPENED, &[("reporter", "source")]);
    ensure!(captured == 0.0, "{captured} connections were captured");
    Ok(())
}

#[test]
fn an_inner_namespace_is_refused_in_closed_mode() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-inner-closed")?;
    let inner = inner(&mesh)?;
    mesh.start(&["--on-agent-down", "closed"])?;
    let seen = dials(&mesh, &inner)?;
    for one in &seen {
        ensure!(one[0]["connect"] == "EPERM", "it was not refused: {one}");
    }
    let metrics = mesh.agent().metrics()?;
    let refused = counted(&metrics, KERNEL_REFUSED, "inner_netns");
    ensure!(refused == seen.len() as f64, "{refused} of {} connections were counted", seen.len());
    // What is not of the mesh stays reachable.
    let stranger = mesh.nodes[0].add_pod(PodSpec::new("wild", "stranger"))?;
    let _server = crate::mesh::listen(&stranger, PORT, &[])?;
    let netns = inner.netns().display().to_string();
    names(&mesh.client(&["connect", &at(stranger.ip(), PORT), "--netns", &netns])?)?;
    Ok(())
}

/// A namespace with a way to the servers that is not the pod's; its cgroup is left unused.
fn inner(mesh: &Mesh) -> Result<Pod> {
    mesh.nodes[0].add_pod(PodSpec::new("wild", "inner"))
}

/// Dials every server from the client's cgroup and the inner namespace.
fn dials(mesh: &Mesh, inner: &Pod) -> Result<Vec<serde_json::Value>> {
    let netns = inner.netns().display().to_string();
    let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
    ips.map(|ip| mesh.client(&["connect", &at(ip, PORT), "--netns", &netns])).collect()
}

//! On a cluster that is there already: what its users do first, with the mesh installed for it and removed again.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use undermesh_tests::cluster::Kube;
use undermesh_tests::lab::{eventually, run_here};

use crate::installed::{self, A_WHILE, LIMIT, SHOP, SYSTEM, install_by_helm};
use crate::mesh;

#[test]
#[ignore = "on the cluster of a kubeconfig: cargo xtask e2e --kubeconfig FILE"]
fn a_cluster_that_is_there_gets_the_mesh_and_loses_it_again() -> Result<()> {
    let kubeconfig =
        std::env::var_os("UNDERMESH_E2E_KUBECONFIG").context("UNDERMESH_E2E_KUBECONFIG is not set")?;
    let values = std::env::var("UNDERMESH_E2E_VALUES").unwrap_or_default();
    let home = tempfile::tempdir()?;
    let kube = Kube::existing(Path::new(&kubeconfig), home.path())?;
    let nodes = kube.node_names()?;
    ensure!(
        nodes.len() == 2,
        "this test is for two nodes that take pods, and the cluster has {}",
        nodes.join(", ")
    );
    for namespace in [SYSTEM, SHOP] {
        let found = kube.kubectl(&["get", "namespace", namespace, "--ignore-not-found"])?;
        ensure!(found.is_empty(), "the namespace {namespace} is there already; nothing was changed");
    }
    let played = play(&kube, &values.lines().collect::<Vec<_>>());
    let removed = remove(&kube);
    played?;
    removed
}

fn play(kube: &Kube, values: &[&str]) -> Result<()> {
    install_by_helm(kube, values)?;
    eventually(A_WHILE, "a typing error is warned of", || installed::a_typing_error_is_warned_of(kube))?;
    installed::open_shop(kube)?;
    mesh::running_pods_join(kube)?;
    mesh::a_policy_that_closes_the_tunnel_is_told_of(kube)?;
    mesh::running_pods_leave(kube)
}

fn remove(kube: &Kube) -> Result<()> {
    kube.kubectl(&["delete", "namespace", SHOP, "--ignore-not-found", "--wait"])?;
    let mut helm = kube.helm();
    helm.args(["uninstall", "undermesh", "--namespace", SYSTEM, "--ignore-not-found", "--wait"]);
    run_here(helm, LIMIT)?.success()?;
    kube.kubectl(&["delete", "namespace", SYSTEM, "--ignore-not-found", "--wait"])?;
    // Helm leaves them.
    let crds = installed::chart().join("crds").display().to_string();
    kube.kubectl(&["delete", "--filename", &crds, "--ignore-not-found", "--wait"])?;
    Ok(())
}

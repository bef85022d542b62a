//! What there is for those who do not use Helm: the API server takes it, and what comes of it is a mesh.

use std::path::Path;

use anyhow::{Result, ensure};
use undermesh_tests::cluster::{Cluster, Kube};

use crate::installed::{self, SYSTEM};

/// The folders that users apply.
const FOLDERS: [&str; 3] =
    ["deploy/kustomize", "deploy/kustomize/overlays/minimal", "deploy/kustomize/overlays/kind"];

/// Whether the API server would take every object of every folder, on a cluster that has nothing of the mesh.
pub(crate) fn every_folder_is_taken(cluster: &Kube) -> Result<()> {
    // Without it there would be no place for what is in it, for nothing is made here.
    cluster.kubectl(&["create", "namespace", SYSTEM])?;
    for folder in FOLDERS {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../").to_owned() + folder;
        let objects = cluster.kubectl(&["kustomize", &folder])?;
        let objects = objects.lines().filter(|line| line.starts_with("kind: ")).count();
        let said = cluster.try_kubectl(&["apply", "--server-side", "--dry-run=server", "-k", &folder])?;
        let taken = said.stdout.lines().filter(|line| line.ends_with("serverside-applied (server dry run)"));
        ensure!(
            taken.count() == objects && said.stderr.is_empty(),
            "{folder}, of {objects} objects: {said:?}"
        );
        said.success()?;
    }
    cluster.kubectl(&["delete", "namespace", SYSTEM])?;
    Ok(())
}

/// Installs the mesh on a cluster that is made here, and waits until it is ready.
pub(crate) fn install(cluster: &Cluster) -> Result<()> {
    installed::import_images(cluster)?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/kustomize");
    cluster.kubectl(&["apply", "--server-side", "-k", &folder.to_string_lossy()])?;
    installed::is_ready(cluster)
}

//! Where a cluster's programs are: built by `cargo xtask cluster` and `cargo xtask e2e`, found by the tests. It builds
//! nothing.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Names the folder of the programs, for tests.
pub const PROGRAMS_VARIABLE: &str = "UNDERMESH_CLUSTER_PROGRAMS";

/// A folder with all programs of a cluster.
#[derive(Clone, Debug)]
pub struct Tools {
    dir: PathBuf,
}

/// What a cluster is made of, and what is run on it.
pub const PROGRAMS: [&str; 24] = [
    "bridge",
    "conformance",
    "containerd",
    "containerd-shim-runc-v2",
    "coredns",
    "ctr",
    "echo-client",
    "echo-server",
    "etcd",
    "gateway-api-experimental.yaml",
    "gateway-api.yaml",
    "helm",
    "host-local",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "loopback",
    "pause",
    "portmap",
    "runc",
    "runc-partial",
];

impl Tools {
    /// Those in this folder.
    pub fn in_folder(dir: &Path) -> Result<Self> {
        let missing: Vec<_> = PROGRAMS.into_iter().filter(|name| !dir.join(name).is_file()).collect();
        if !missing.is_empty() {
            bail!("{} lacks {}: cargo xtask cluster builds them", dir.display(), missing.join(", "));
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// Those that the environment names.
    pub fn of_environment() -> Result<Self> {
        match std::env::var_os(PROGRAMS_VARIABLE) {
            Some(dir) => Self::in_folder(Path::new(&dir)),
            None => {
                bail!("{PROGRAMS_VARIABLE} names no folder of a cluster's programs: cargo xtask e2e sets it")
            }
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// One of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

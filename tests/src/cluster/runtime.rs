//! The container runtimes that a node may have, containerd and CRI-O: their configuration, and how they get images.
//!
//! Which one a node has is told by the programs at hand. Where this machine cannot give a node all that it would have, the
//! configuration says why.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::init::PROGRAMS;
use super::tools::Tools;

/// The image of the containers that hold pods' namespaces.
pub(super) const PAUSE_IMAGE: &str = "um.test/pause:1";

/// A node's container runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runtime {
    Containerd,
    CriO,
}

impl Runtime {
    /// CRI-O where its programs are.
    pub(super) fn of(tools: &Tools) -> Self {
        if tools.program("crio").is_file() { Self::CriO } else { Self::Containerd }
    }

    /// The name of its service, which is that of its program.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::CriO => "crio",
        }
    }

    /// Where it serves, on the node.
    pub(super) fn socket(self) -> &'static str {
        match self {
            Self::Containerd => "/run/containerd/containerd.sock",
            Self::CriO => "/run/crio/crio.sock",
        }
    }

    /// The arguments of its program.
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Containerd => &["--config=/var/lib/containerd.toml"],
            Self::CriO => &["--config=/var/lib/crio.toml", "--config-dir="],
        }
    }

    /// Its files, in the node's `/var/lib`.
    pub(super) fn write_files(self, lib: &Path, lacks_controllers: bool) -> Result<()> {
        let (file, text) = match self {
            Self::Containerd => ("containerd.toml", containerd_config(lacks_controllers)),
            Self::CriO => {
                let policy = json!({ "default": [{ "type": "insecureAcceptAnything" }] });
                fs::write(lib.join("policy.json"), policy.to_string())?;
                ("crio.toml", crio_config())
            }
        };
        fs::write(lib.join(file), text).context("a node's file")
    }

    /// What imports an image of this name from a tar, on the node.
    pub(super) fn import(self, name: &str, tar: &str) -> Vec<String> {
        let words = match self {
            Self::Containerd => {
                format!("ctr --address={} --namespace=k8s.io images import {tar}", self.socket())
            }
            Self::CriO => format!(
                "copyimg --root={STORAGE} --runroot={RUN_STORAGE} --storage-driver={} \
                 --signature-policy=/var/lib/policy.json --import-from=docker-archive:{tar} --image-name={name}",
                storage_driver()
            ),
        };
        words.split_whitespace().map(str::to_owned).collect()
    }
}

/// Where CRI-O keeps images, and what of them is in use; `copyimg` is to put them there.
const STORAGE: &str = "/var/lib/containers/storage";
const RUN_STORAGE: &str = "/run/containers/storage";

fn storage_driver() -> &'static str {
    if knows_overlay() { "overlay" } else { "vfs" }
}

fn knows_overlay() -> bool {
    fs::read_to_string("/proc/filesystems").is_ok_and(|known| known.contains("\toverlay\n"))
}

/// As containerd comes, but for what this machine, or a node within it, has not.
fn containerd_config(lacks_controllers: bool) -> String {
    let runc = if lacks_controllers { "runc-partial" } else { "runc" };
    let socket = Runtime::Containerd.socket();
    let snapshotter = if knows_overlay() { "overlayfs" } else { "native" };
    format!(
        r#"version = 3
[grpc]
address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
# Not even root may lower the score where CAP_SYS_RESOURCE has been taken away.
restrict_oom_score_adj = true
# Profiles are the machine's, not a node's.
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{PROGRAMS}/{runc}"
SystemdCgroup = false
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{PROGRAMS}"]
conf_dir = "/var/lib/cni/net.d"
"#
    )
}

/// As CRI-O comes, which drops the process that would hold a pod's namespaces, but for the same.
fn crio_config() -> String {
    let (socket, driver) = (Runtime::CriO.socket(), storage_driver());
    format!(
        r#"[crio]
root = "{STORAGE}"
runroot = "{RUN_STORAGE}"
storage_driver = "{driver}"
[crio.api]
listen = "{socket}"
[crio.image]
pause_image = "{PAUSE_IMAGE}"
signature_policy = "/var/lib/policy.json"
[crio.network]
network_dir = "/var/lib/cni/net.d"
plugin_dirs = ["{PROGRAMS}"]
[crio.runtime]
# There is no systemd in a node.
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
pinns_path = "{PROGRAMS}/pinns"
# Profiles are the machine's, not a node's.
apparmor_profile = "unconfined"
default_runtime = "runc"
[crio.runtime.runtimes.runc]
# Where nothing is missing it is runc.
runtime_path = "{PROGRAMS}/runc-partial"
runtime_root = "/run/runc"
monitor_cgroup = "pod"
"#
    )
}

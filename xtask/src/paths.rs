//! Where things are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    let chosen = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    workspace().join(chosen)
}

/// The folder of the built programs.
pub fn programs(release: bool) -> PathBuf {
    target().join(if release { "release" } else { "debug" })
}

/// The kernel programs, as the agent's build script embeds them.
pub fn ebpf_object() -> PathBuf {
    target().join("ebpf/undermesh.bpf.o")
}

/// What `setup` installs for us alone, each thing in a folder with its version.
pub fn cache() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("UNDERMESH_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("undermesh")))
        .or_else(|| Some(var("HOME")?.join(".cache/undermesh")))
        .context("set UNDERMESH_CACHE: there is no HOME to keep tools in")
}

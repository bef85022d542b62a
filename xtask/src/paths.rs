//! Where things are.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result};

/// The workspace's folder: that of the cargo that runs us. Two checkouts may share a target folder, and then the
/// path at compile time may be the other's.
pub fn workspace() -> &'static Path {
    static WORKSPACE: LazyLock<PathBuf> = LazyLock::new(|| {
        let own = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        Path::new(&own).parent().expect("xtask lies in the workspace").to_owned()
    });
    &WORKSPACE
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

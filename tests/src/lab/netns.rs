//! Network namespaces with a name under /run/netns, as `ip netns` makes them.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::network::ip;

/// The file that opens the namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

pub(crate) fn create(name: &str) -> Result<()> {
    ip(None, &format!("netns add {name}"))
}

/// Takes the namespace's name away; the namespace ends with its last process and socket.
pub(crate) fn delete(path: &Path) -> Result<()> {
    match path.file_name().filter(|_| path.exists()) {
        Some(name) => ip(None, &format!("netns del {}", name.to_string_lossy())),
        None => Ok(()),
    }
}

/// Calls `f` on a thread of its own inside the namespace. Sockets made there stay there, whoever uses them later.
pub fn enter<T: Send>(netns: &Path, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(netns).with_context(|| format!("no namespace {}", netns.display()))?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).context("a namespace cannot be entered")?;
            f()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

//! From a process to a path that opens its network namespace for as long as the pod is there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where runtimes pin the namespaces of pods: containerd by its CNI library, CRI-O by `pinns`.
const PINS: &str = "/run/netns";

/// Whether processes that are not our own can be looked at.
pub(super) fn can_look() -> io::Result<()> {
    id(Path::new("/proc/1/ns/net")).map(drop)
}

/// A path to the namespace of a process, and not the node's own: `None` for one on the host's network. The runtime's
/// pin, if there is one, outlives the process; else the way is through the process.
///
/// # Errors
/// When the process is gone, or may not be looked at.
pub(super) fn of_process(pid: u32) -> io::Result<Option<PathBuf>> {
    let through = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let namespace = id(&through)?;
    if namespace == id(Path::new("/proc/1/ns/net"))? {
        return Ok(None);
    }
    Ok(Some(pinned(namespace).unwrap_or(through)))
}

/// A runtime's path to a pin as it is read here: `/var/run` is `/run`, by a link that a container may not have.
pub(super) fn spelt_as_here(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run/netns").map_or_else(|_| path.to_owned(), |pin| Path::new(PINS).join(pin))
}

fn pinned(namespace: (u64, u64)) -> Option<PathBuf> {
    let entries = fs::read_dir(PINS).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).find(|path| id(path).is_ok_and(|other| other == namespace))
}

/// A namespace is a file of the kernel's, wherever it is mounted.
fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

//! From a process to a path that opens its network namespace for as long as the pod is there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where runtimes pin the namespaces of pods: containerd and CRI-O, by their CNI libraries.
const PINS: [&str; 2] = ["/run/netns", "/var/run/netns"];

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

fn pinned(namespace: (u64, u64)) -> Option<PathBuf> {
    let entries = PINS.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).find(|path| id(path).is_ok_and(|other| other == namespace))
}

/// A namespace is a file of the kernel's, wherever it is mounted.
fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

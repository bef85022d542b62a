//! cgroup2 directories: a pod's, and the agent's own.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

/// Opens a directory of a cgroup2 tree.
pub fn open(path: &Path) -> io::Result<File> {
    let dir = File::open(path)?;
    if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a cgroup2 directory; on a machine with cgroup v1 and v2 name the one in the cgroup2 mount",
        ));
    }
    Ok(dir)
}

/// Whether any process is left in the cgroup or below it. One that cannot be read has been removed.
pub fn is_populated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// The directory and all below it, by what sockets know cgroups by: the numbers of their directories.
pub fn ids_below(path: &Path) -> HashSet<u64> {
    let mut ids = HashSet::new();
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        ids.extend(fs::metadata(&directory).map(|metadata| metadata.ino()));
        directories.extend(directories_in(&directory));
    }
    ids
}

fn directories_in(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path())
}

/// The directory of the calling process.
///
/// In a container with a cgroup namespace the kernel tells the way from the container's own directory, which is `/`, while
/// what is mounted may be the machine's tree: there the process is looked for.
pub fn own() -> io::Result<PathBuf> {
    let memberships = fs::read_to_string("/proc/self/cgroup")?;
    let inside = memberships
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| io::Error::other("this process is in no cgroup2 tree"))?;
    let root = mount_point()?;
    let told = root.join(inside);
    if has_process(&told, std::process::id()) {
        return Ok(told);
    }
    find_process(&root, std::process::id()).ok_or_else(|| {
        let root = root.display();
        io::Error::other(format!(
            "this process is in no cgroup of {root}: in a container, mount the machine's tree there and share its process \
             ids (hostPID)"
        ))
    })
}

fn has_process(directory: &Path, pid: u32) -> bool {
    let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    processes.lines().any(|line| line.parse() == Ok(pid))
}

/// Whether it is the root of the machine's tree, which alone has no state of its own (cgroup-v2.rst, "Core Interface
/// Files"). A container may see its own cgroup as the root of a tree.
pub fn is_root(directory: &Path) -> bool {
    !directory.join("cgroup.events").exists()
}

/// The directory of another process.
pub fn find_process(root: &Path, pid: u32) -> Option<PathBuf> {
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        if has_process(&directory, pid) {
            return Some(directory);
        }
        directories.extend(directories_in(&directory));
    }
    None
}

/// Where a cgroup2 tree is mounted.
pub fn mount_point() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            let (fields, kind) = line.split_once(" - ")?;
            kind.starts_with("cgroup2 ").then(|| fields.split(' ').nth(4).map(PathBuf::from))?
        })
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "no cgroup2 is mounted; mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup",
            )
        })
}

//! The cgroup2 tree, wherever this machine has it mounted, and the BPF file system.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::MsFlags;
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;

use super::{eventually, signals};

const BPFFS: &str = "/sys/fs/bpf";

/// Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid machine.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mount_point(&mounts, "cgroup2").context(
        "no cgroup2 is mounted here: mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd's default",
    )
}

/// Mounts the BPF file system where the machine has not.
pub(crate) fn ensure_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    if mount_point(&mounts, "bpf").is_some_and(|at| at == Path::new(BPFFS)) {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("the BPF file system cannot be mounted at {BPFFS}"))
}

pub(crate) fn create(path: &Path) -> Result<()> {
    let _gate = signals::gate();
    fs::create_dir_all(path).with_context(|| format!("the cgroup {} cannot be made", path.display()))
}

/// Lets the groups below this one have these controllers.
pub(crate) fn give_controllers(path: &Path, names: &[String]) -> Result<()> {
    let _gate = signals::gate();
    for name in names {
        fs::write(path.join("cgroup.subtree_control"), format!("+{name}"))
            .with_context(|| format!("the controller {name} cannot be given to {}", path.display()))?;
    }
    Ok(())
}

/// The controllers that this group may hand on.
pub(crate) fn controllers(path: &Path) -> Result<Vec<String>> {
    let file = path.join("cgroup.controllers");
    let names = fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

/// Takes a controller, named as if it were a child, back from the groups below its parent, unless another of them
/// still uses it.
pub(crate) fn withhold_controller(path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    match fs::write(parent.join("cgroup.subtree_control"), format!("-{}", name.display())) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(()),
        other => Ok(other?),
    }
}

/// Kills every process in the group and below, and waits until none is left.
pub(crate) fn kill(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    eventually(Duration::from_secs(10), "the processes of a cgroup end", || {
        // cgroup.kill (Linux 5.14) takes the whole subtree at once, forks in progress included.
        if fs::write(path.join("cgroup.kill"), "1").is_err() {
            kill_one_by_one(path)?;
        }
        if fs::read_to_string(path.join("cgroup.events"))?.contains("populated 1") {
            bail!("{} still has processes", path.display());
        }
        Ok(())
    })
}

/// Removes an empty group and all below it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    for child in children(path)? {
        remove(&child)?;
    }
    // A process that has just died may keep the group busy for a moment.
    eventually(Duration::from_secs(5), "a cgroup is let go", || match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => Ok(other?),
    })
}

fn kill_one_by_one(path: &Path) -> Result<()> {
    for child in children(path)? {
        kill_one_by_one(&child)?;
    }
    for pid in fs::read_to_string(path.join("cgroup.procs"))?.lines() {
        // Gone between the list and the signal is as good as killed.
        let _ = send(Pid::from_raw(pid.parse()?), Signal::SIGKILL);
    }
    Ok(())
}

fn children(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    Ok(entries.into_iter().map(|e| e.path()).filter(|p| p.is_dir()).collect())
}

/// The first mount point of a file system of this type that shows its root.
fn mount_point(mountinfo: &str, fs_type: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        let found = source.split(' ').next()? == fs_type && (root == "/" || fs_type != "bpf");
        found.then(|| PathBuf::from(at.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
38 31 0:35 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
40 23 0:30 / /sys/fs/bpf rw,relatime shared:9 - bpf bpf rw,mode=700";

    #[test]
    fn finds_cgroup2_on_a_hybrid_machine() {
        assert_eq!(mount_point(HYBRID, "cgroup2"), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point(HYBRID, "bpf"), Some(PathBuf::from(BPFFS)));
        assert_eq!(mount_point(HYBRID, "devpts"), None);
    }

    #[test]
    fn finds_cgroup2_as_the_only_hierarchy() {
        let mounts = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(mount_point(mounts, "cgroup2"), Some(PathBuf::from("/sys/fs/cgroup")));
    }
}

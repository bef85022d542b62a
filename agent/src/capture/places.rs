//! Tells when something may be at another place than it was: a pod's cgroup or network namespace, or the kubelet's cgroup.
//!
//! The kernel tells of what comes and goes in the folders of these paths. It does not tell of `/proc`, nor of a namespace that
//! is mounted over another one: for these somebody has to look.

use std::collections::HashSet;
use std::path::Path;

use inotify::WatchMask;
use tracing::warn;

use crate::folders::Folders;

/// Watches places.
#[derive(Debug)]
pub(super) struct Places {
    /// None where the kernel does not tell.
    folders: Option<Folders>,
    is_complete: bool,
}

impl Places {
    pub(super) fn new() -> Self {
        let folders = Folders::new(WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE);
        let told = "pods whose cgroup or network namespace is replaced are looked for every second: raise \
                    fs.inotify.max_user_instances";
        let folders = folders.inspect_err(|error| warn!(%error, "{told}")).ok();
        Self { folders, is_complete: false }
    }

    /// Watches these and no others.
    pub(super) fn watch<'a>(&mut self, paths: impl Iterator<Item = &'a Path>) {
        let (untold, told): (Vec<_>, Vec<_>) = paths.partition(|path| path.starts_with("/proc"));
        let parents: HashSet<&Path> = told.into_iter().filter_map(Path::parent).collect();
        let is_watched = self.folders.as_mut().is_some_and(|folders| folders.watch(parents).is_ok());
        self.is_complete = is_watched && untold.is_empty();
    }

    /// Whether the kernel tells of all of them.
    pub(super) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Returns when one of them may be another one. Cancelling it loses nothing.
    pub(super) async fn stirred(&mut self) {
        match &mut self.folders {
            Some(folders) => folders.stirred().await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, remove_dir};
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_place_that_is_made_anew_is_told_of_and_one_in_proc_is_not() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("pod");
        create_dir(&place).unwrap();
        let mut places = Places::new();
        places.watch([place.as_path(), Path::new("/proc/self/ns/net")].into_iter());
        assert!(!places.is_complete());
        places.watch([place.as_path(), &root.path().join("none/pod")].into_iter());
        assert!(!places.is_complete(), "its folder is not there");
        places.watch([place.as_path()].into_iter());
        assert!(places.is_complete());
        remove_dir(&place).unwrap();
        create_dir(&place).unwrap();
        timeout(Duration::from_secs(10), places.stirred()).await.unwrap();
    }
}

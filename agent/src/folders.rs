//! Folders, and the kernel's word that something has happened in one of them (inotify). What it was, whoever asks finds out
//! by a look.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use inotify::{Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;

/// Some watched folders.
#[derive(Debug)]
pub(crate) struct Folders {
    inotify: AsyncFd<Inotify>,
    /// What counts.
    events: WatchMask,
    watched: HashSet<WatchDescriptor>,
}

impl Folders {
    /// None yet. To be called where a runtime is.
    pub(crate) fn new(events: WatchMask) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        // SAFETY: an `Inotify` owns its descriptor and keeps it open, the same one, until it is dropped.
        let inotify = unsafe { AsyncFd::register(inotify) }?;
        Ok(Self { inotify, events, watched: HashSet::new() })
    }

    /// Watches what is at these paths now, and nothing else.
    ///
    /// # Errors
    /// That of a folder that cannot be watched; the others are.
    pub(crate) fn watch<'a>(&mut self, folders: impl IntoIterator<Item = &'a Path>) -> io::Result<()> {
        let mut watches = self.inotify.get_ref().watches();
        let before = std::mem::take(&mut self.watched);
        let mut result = Ok(());
        for folder in folders {
            match watches.add(folder, self.events) {
                Ok(watch) => drop(self.watched.insert(watch)),
                Err(error) => result = Err(error),
            }
        }
        for watch in before.difference(&self.watched) {
            // One whose folder has gone may have gone with it.
            let _ = watches.remove(watch.clone());
        }
        result
    }

    /// Returns when something has happened. Cancelling it loses nothing.
    pub(crate) async fn stirred(&mut self) {
        let mut buffer = [0; 1024];
        while let Ok(mut ready) = self.inotify.readable_mut().await {
            match ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer).map(drop)) {
                Ok(Ok(())) => return,
                Ok(Err(_)) => break,
                Err(_nothing_yet) => {}
            }
        }
        // The kernel tells of nothing any more.
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    /// Whether something has happened since it was asked last.
    async fn has_stirred(folders: &mut Folders) -> bool {
        // The driver of the runtime is to look once.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let mut has_stirred = false;
        while folders.stirred().now_or_never().is_some() {
            has_stirred = true;
        }
        has_stirred
    }

    #[tokio::test]
    async fn what_happens_in_a_watched_folder_is_told() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| root.path().join(name));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        let mut folders = Folders::new(WatchMask::CREATE | WatchMask::DELETE).unwrap();
        folders.watch([one.as_path(), one.as_path()]).unwrap();
        assert!(!has_stirred(&mut folders).await);
        File::create(one.join("file")).unwrap();
        assert!(has_stirred(&mut folders).await);
        assert!(!has_stirred(&mut folders).await, "once");
        File::create(other.join("file")).unwrap();
        assert!(!has_stirred(&mut folders).await, "nobody watches it");

        folders.watch([other.as_path()]).unwrap();
        has_stirred(&mut folders).await;
        fs::remove_file(one.join("file")).unwrap();
        assert!(!has_stirred(&mut folders).await, "nobody watches it any more");
        fs::remove_file(other.join("file")).unwrap();
        assert!(has_stirred(&mut folders).await);
    }

    #[tokio::test]
    async fn a_folder_that_was_made_anew_is_watched_when_it_is_named_again() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let mut folders = Folders::new(WatchMask::CREATE).unwrap();
        folders.watch([folder.as_path()]).unwrap();
        fs::remove_dir(&folder).unwrap();
        assert!(has_stirred(&mut folders).await, "it has gone");
        folders.watch([folder.as_path(), root.path()]).unwrap_err();
        fs::create_dir(&folder).unwrap();
        assert!(has_stirred(&mut folders).await, "the others are watched");
        folders.watch([folder.as_path()]).unwrap();
        has_stirred(&mut folders).await;
        File::create(folder.join("file")).unwrap();
        assert!(has_stirred(&mut folders).await);
    }
}

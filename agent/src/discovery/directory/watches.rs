//! What to be told of by the kernel (inotify), and what its events mean.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use inotify::{Event, EventMask, WatchDescriptor, WatchMask};

use super::tree::is_manifest;

/// What may have changed since it was last looked at.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Dirty {
    /// Manifests that were written, moved or removed.
    pub(super) files: BTreeSet<PathBuf>,
    /// Directories or links changed, or events were lost: everything is to be looked at.
    pub(super) everything: bool,
}

/// The watches on the tree.
#[derive(Debug)]
pub(super) struct Watches {
    watches: inotify::Watches,
    root: PathBuf,
    /// A directory that is reached by two links has one watch.
    targets: HashMap<WatchDescriptor, Vec<Target>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// Where the root is, which may be replaced.
    Parent,
    Directory(PathBuf),
    /// A link among the manifests, the watch being on what it points to.
    Link(PathBuf),
}

impl Dirty {
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.everything
    }
}

impl Watches {
    pub(super) fn new(watches: inotify::Watches, root: PathBuf) -> Self {
        Self { watches, root, targets: HashMap::new() }
    }

    /// Forgets all targets; those that are not added again have to be dropped with [`Self::drop_all_but`].
    pub(super) fn begin(&mut self) -> Vec<WatchDescriptor> {
        let before = std::mem::take(&mut self.targets).into_keys().collect();
        // `..` of the path as it is written: a link is replaced where it stands, not where it points.
        let parent = match self.root.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE;
        self.add(&parent, mask | WatchMask::ONLYDIR | WatchMask::MASK_ADD, Target::Parent);
        before
    }

    /// Watches a directory of the tree.
    pub(super) fn enter(&mut self, directory: &Path) {
        // Not MODIFY: a file counts once its writer has closed it.
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        self.add(
            directory,
            mask | WatchMask::ONLYDIR | WatchMask::MASK_ADD,
            Target::Directory(directory.to_owned()),
        );
    }

    /// Watches what a link among the manifests points to.
    pub(super) fn follow(&mut self, link: &Path) {
        let mask = WatchMask::CLOSE_WRITE | WatchMask::ATTRIB | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        self.add(link, mask | WatchMask::MASK_ADD, Target::Link(link.to_owned()));
    }

    /// Drops the watches of `before` that have no target any more.
    pub(super) fn drop_all_but_targets(&mut self, before: Vec<WatchDescriptor>) {
        for watch in before.into_iter().filter(|watch| !self.targets.contains_key(watch)) {
            // An error says that the kernel dropped it already, with what it watched.
            let _ = self.watches.remove(watch);
        }
    }

    /// Adds to `dirty` what the event is about.
    pub(super) fn interpret(&self, event: &Event<&std::ffi::OsStr>, dirty: &mut Dirty) {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            dirty.everything = true;
        }
        for target in self.targets.get(&event.wd).into_iter().flatten() {
            match (target, event.name) {
                (Target::Parent, Some(name)) => dirty.everything |= self.root.file_name() == Some(name),
                (Target::Parent, None) => {}
                (Target::Directory(_), None) => dirty.everything |= !event.mask.contains(EventMask::IGNORED),
                (Target::Directory(directory), Some(name)) => {
                    self.interpret_entry(&directory.join(name), event.mask, dirty);
                }
                // The link may point to another file of that name now, which needs a watch of its own.
                (Target::Link(_), _) => dirty.everything = true,
            }
        }
    }

    fn interpret_entry(&self, path: &Path, mask: EventMask, dirty: &mut Dirty) {
        // A mounted ConfigMap is replaced by moving the link `..data`.
        let is_config_map = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".."));
        let was_directory = || {
            let is_it = |target: &Target| matches!(target, Target::Directory(directory) if directory == path);
            self.targets.values().flatten().any(is_it)
        };
        let is_link = || fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
        if mask.contains(EventMask::ISDIR) || is_config_map {
            dirty.everything = true;
        } else if is_manifest(path) {
            let is_being_written = mask.contains(EventMask::CREATE)
                && fs::symlink_metadata(path).is_ok_and(|it| it.is_file() && it.nlink() == 1);
            if is_link() {
                dirty.everything = true;
            } else if !is_being_written {
                dirty.files.insert(path.to_owned());
            }
        } else if path.extension().is_none() && (was_directory() || is_link()) {
            dirty.everything = true;
        }
    }

    fn add(&mut self, path: &Path, mask: WatchMask, target: Target) {
        match self.watches.add(path, mask) {
            Ok(watch) => self.targets.entry(watch).or_default().push(target),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => tracing::warn!(
                path = %path.display(),
                "changes will not be noticed: too many files are watched, raise fs.inotify.max_user_watches"
            ),
            // That it cannot be read is reported by whoever reads it.
            Err(error) => tracing::debug!(path = %path.display(), %error, "cannot be watched"),
        }
    }
}

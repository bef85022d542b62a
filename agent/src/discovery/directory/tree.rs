//! The files of a directory tree: which are manifests, and which of them have changed.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What is there now.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The manifests, links followed.
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// The directories, the root first, links followed.
    pub(super) directories: Vec<PathBuf>,
    /// Manifests that are symbolic links: a change of what they point to shows in no directory of this tree.
    pub(super) links: Vec<PathBuf>,
    /// What could not be looked at.
    pub(super) unreadable: Vec<(PathBuf, io::Error)>,
}

/// Changes whenever a file's content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    /// Catches what keeps the others, such as `cp --preserve` over the file, and `chmod`.
    changed: (i64, i64),
}

impl Tree {
    /// Looks through the directory. `entered` is called with each directory before that is listed, so that a watch
    /// set there misses nothing.
    pub(super) fn scan(root: &Path, mut entered: impl FnMut(&Path)) -> Self {
        let mut tree = Self::default();
        let mut ancestors = Vec::new();
        tree.scan_directory(root, &mut ancestors, &mut entered);
        tree
    }

    fn scan_directory(
        &mut self,
        path: &Path,
        ancestors: &mut Vec<(u64, u64)>,
        entered: &mut dyn FnMut(&Path),
    ) {
        let result = fs::metadata(path).and_then(|metadata| {
            let inode = (metadata.dev(), metadata.ino());
            // A link back to where we come from.
            if ancestors.contains(&inode) {
                return Ok(());
            }
            entered(path);
            self.directories.push(path.to_owned());
            ancestors.push(inode);
            let listed = self.scan_entries(path, ancestors, entered);
            ancestors.pop();
            listed
        });
        if let Err(error) = result {
            self.unreadable.push((path.to_owned(), error));
        }
    }

    fn scan_entries(
        &mut self,
        directory: &Path,
        ancestors: &mut Vec<(u64, u64)>,
        entered: &mut dyn FnMut(&Path),
    ) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let path = entry.path();
            if is_hidden(&path) {
                continue;
            }
            // Gone again, or a link to nothing: not there.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                self.scan_directory(&path, ancestors, entered);
            } else if metadata.is_file() && is_manifest(&path) {
                if entry.file_type()?.is_symlink() {
                    self.links.push(path.clone());
                }
                self.files.insert(path, Stamp::of(&metadata));
            }
        }
        Ok(())
    }
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// `.yaml`, `.yml` or `.json`, and not hidden. What editors leave beside a file (`web.yaml~`, `.web.yaml.swp`, `4913`,
/// `#web.yaml#`) is none.
pub(super) fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    !is_hidden(path) && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Hidden directories are passed over too. A mounted ConfigMap keeps its files in one and links to them.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

//! Which file a path leads to. A cgroup or a network namespace may be replaced under its path.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A file, whatever path leads to it. The kernel gives a cgroup's number to no other one; a namespace's comes back
/// once nobody holds the namespace open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The open file.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::from(&metadata))
    }

    /// Whether the path leads to this very file now.
    pub fn is_at(self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|metadata| Self::from(&metadata) == self)
    }
}

impl From<&Metadata> for FileId {
    fn from(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_at_the_same_path_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod");
        // Held open, so that its number is not given away again.
        let first = File::create(&path).unwrap();
        let id = FileId::of(&first).unwrap();
        assert!(id.is_at(&path));
        fs::remove_file(&path).unwrap();
        assert!(!id.is_at(&path));
        let second = File::create(&path).unwrap();
        assert!(!id.is_at(&path) && FileId::of(&second).unwrap().is_at(&path));
    }
}

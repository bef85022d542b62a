//! Files that are replaced as a whole: others find the old one or the new one, also after a power cut. What is in them, their writers
//! know.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Replaces the file by one that `write` fills and that only its owner may read and write. The new one is made beside the old, with the
/// extension `new`: writers of one path must keep each other out, or its readers must be able to tell a mix of two.
///
/// # Errors
///
/// If it cannot be written. The old one is there as it was then.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let next = path.with_extension("new");
    let written = (|| {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        write(&file)?;
        file.sync_all()?;
        fs::rename(&next, path)?;
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    })();
    written.inspect_err(|_| _ = fs::remove_file(&next))
}

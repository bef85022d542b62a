//! Files that hold keys: only their owner may read them, and nobody ever sees half of one.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;
use zeroize::Zeroizing;

use crate::replace::replace;

/// No file of ours is larger; whoever put a larger one there is not us.
const MAX_BYTES: u64 = 1 << 20;

/// Why a file of the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The kernel says no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("{path} has mode {mode:04o} and must be for its owner alone: chmod {wanted:04o} {path}")]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// What they should be.
        wanted: u32,
    },
    /// It is not ours.
    #[error("{path} belongs to user {owner}, not to the user that runs undermesh")]
    OtherOwner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It is too large.
    #[error("{path} is too large")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

/// Changes whenever a file is replaced or written.
pub(in super::super) type Stamp = (u64, u64, u64, i64, i64, i64, i64);

/// The stamp of a file, links followed; `None` where there is none.
pub(in super::super) fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|m| stamp_of(&m))
}

fn stamp_of(m: &Metadata) -> Stamp {
    (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())
}

/// Makes the directory with mode 0700 unless it is there; refuses one that others may look into.
pub(super) fn private_directory(path: &Path) -> Result<(), FileError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error(path, error)),
        _ => check_directory(path),
    }
}

/// Refuses a directory that others may look into.
pub(super) fn check_directory(path: &Path) -> Result<(), FileError> {
    let metadata = fs::metadata(path).map_err(|error| io_error(path, error))?;
    check(path, &metadata, 0o700)
}

/// Reads a file that only its owner may read. Checks the very file that it opened.
pub(super) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(|error| io_error(path, error))?;
    let metadata = file.metadata().map_err(|error| io_error(path, error))?;
    check(path, &metadata, 0o600)?;
    if metadata.size() > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.into() });
    }
    // Room for all at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(metadata.size() as usize + 1));
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(|error| io_error(path, error))?;
    Ok(bytes)
}

/// Writes a file with mode 0600 so that others find the old one or the new one. The caller holds the directory's [`lock`].
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    replace(path, |mut file| file.write_all(bytes)).map_err(|error| io_error(path, error))
}

/// Keeps other commands out until the guard is dropped, or the process dies.
pub(super) fn lock(path: &Path) -> Result<Flock<File>, FileError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| io_error(path, error))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io_error(path, errno.into()))
}

/// Root may use what is another's: that is how a directory gets copied to many nodes.
fn check(path: &Path, metadata: &Metadata, wanted: u32) -> Result<(), FileError> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::TooOpen { path: path.into(), mode, wanted });
    }
    let user = Uid::effective();
    if !user.is_root() && metadata.uid() != user.as_raw() {
        return Err(FileError::OtherOwner { path: path.into(), owner: metadata.uid() });
    }
    Ok(())
}

fn io_error(path: &Path, source: io::Error) -> FileError {
    FileError::Io { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_the_owner_may_read_what_is_written_and_read() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("ca");
        private_directory(&directory).unwrap();
        private_directory(&directory).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
        let path = directory.join("key.pem");
        write(&path, b"old").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap().as_slice(), b"new");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing is left behind");

        for mode in [0o640, 0o604, 0o660, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("has mode {mode:04o} and must be for its owner")), "{error}");
        }
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o750)).unwrap();
        let error = private_directory(&directory).unwrap_err().to_string();
        assert!(error.ends_with(&format!("chmod 0700 {}", directory.display())), "{error}");
        assert!(matches!(read(&directory.join("none")), Err(FileError::Io { .. })));
    }
}

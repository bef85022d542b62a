//! A lab's folder in /run: the journal of what was made, the lock that tells a living owner from a killed one,
//! the manifests and the logs.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use super::signals;

/// The folder of one lab, locked for as long as this process lives.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    journal: Mutex<Option<File>>,
    _lock: Flock<File>,
}

impl State {
    /// Where the lab of this name keeps its folder.
    pub(crate) fn directory(name: &str) -> PathBuf {
        Path::new("/run").join(name)
    }

    /// Where what is too large for /run is kept, which may be memory.
    pub(crate) fn data_directory(name: &str) -> PathBuf {
        Path::new("/var/lib").join(name)
    }

    /// Creates and locks the folder; fails where another process that lives has it.
    pub(crate) fn open(name: &str) -> Result<Self> {
        check_name(name)?;
        let dir = Self::directory(name);
        let lock = lock(name, &dir)?;
        Ok(Self { name: name.to_owned(), dir, journal: Mutex::new(None), _lock: lock })
    }

    /// Starts an empty journal, once whatever the old one listed is gone.
    pub(crate) fn begin(&self) -> Result<()> {
        fs::create_dir_all(self.config_dir())?;
        fs::create_dir_all(self.log_dir())?;
        let file = OpenOptions::new().create(true).append(true).open(self.journal_file())?;
        *self.journal.lock().unwrap() = Some(file);
        Ok(())
    }

    /// Notes what is about to be made. Written before the deed: a thing listed but never made is swept for
    /// nothing, a thing made but not listed would stay.
    pub(crate) fn record(&self, kind: &str, what: impl AsRef<Path>) -> Result<()> {
        let _gate = signals::gate();
        let line = format!("{kind} {}\n", what.as_ref().display());
        let mut journal = self.journal.lock().unwrap();
        journal.as_mut().context("the lab's journal is not open")?.write_all(line.as_bytes())?;
        Ok(())
    }

    /// What an earlier run, or this one, has noted of the kind.
    pub(crate) fn recorded(&self, kind: &str) -> Vec<PathBuf> {
        let journal = fs::read_to_string(self.journal_file()).unwrap_or_default();
        let of_kind = journal.lines().filter_map(|line| line.strip_prefix(kind)?.strip_prefix(' '));
        of_kind.map(PathBuf::from).collect()
    }

    pub(crate) fn config_dir(&self) -> PathBuf {
        self.dir.join("config")
    }

    pub(crate) fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Puts a file into the configuration directory so that no reader ever sees half of it.
    pub(crate) fn apply(&self, file_name: &str, text: &str) -> Result<()> {
        let hidden = self.config_dir().join(format!(".{file_name}.new"));
        fs::write(&hidden, text).with_context(|| format!("{} cannot be written", hidden.display()))?;
        fs::rename(&hidden, self.config_dir().join(file_name))?;
        Ok(())
    }

    pub(crate) fn delete(&self, file_name: &str) -> Result<()> {
        let path = self.config_dir().join(file_name);
        fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))
    }

    /// Empties the folder, the lock's own file excepted.
    pub(crate) fn empty(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).into_iter().flatten() {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else if entry.file_name() != LOCK {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn journal_file(&self) -> PathBuf {
        self.dir.join("made")
    }
}

const LOCK: &str = "lock";

/// The name becomes a folder of /run and of the cgroup tree that a sweep removes: it must not be anyone else's.
fn check_name(name: &str) -> Result<()> {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !name.starts_with("um-") || !plain || name.len() > 32 {
        bail!("`{name}` is no name for a lab: it begins with `um-` and has at most 32 of a-z, 0-9 and -");
    }
    Ok(())
}

fn lock(name: &str, dir: &Path) -> Result<Flock<File>> {
    let path = dir.join(LOCK);
    loop {
        fs::create_dir_all(dir)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => bail!(
                "the lab {name} is in use by process {}: end that one first",
                fs::read_to_string(&path).unwrap_or_default().trim()
            ),
            Err((_, error)) => {
                return Err(error).with_context(|| format!("{} cannot be locked", path.display()));
            }
        };
        // The previous owner may have removed the folder between our open and our lock.
        let current = fs::metadata(&path).map(|m| m.ino());
        if current.is_ok_and(|ino| lock.metadata().is_ok_and(|own| own.ino() == ino)) {
            lock.set_len(0)?;
            writeln!(&*lock, "{}", std::process::id())?;
            return Ok(lock);
        }
    }
}

//! Documents from a directory of Kubernetes manifests, followed as it changes.
//!
//! What a file says badly never takes anything else down: the last good version of each object stays in force, and
//! what is wrong is published beside the snapshot. Nothing is polled while the directory is there.

#[cfg(fuzzing)]
pub mod fuzzing;
mod manifest;
mod store;
#[cfg(test)]
mod tests;
mod tree;
mod watches;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use inotify::Inotify;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout_at};

use self::store::Store;
use self::tree::{Stamp, Tree};
use self::watches::{Dirty, Watches};
use super::Publication;
use crate::config::{Compiler, Defaults, Rejection};
use crate::model::NodeInfo;

/// A change is taken in once nothing more has happened for this long: programs write files in several steps.
const SETTLE: Duration = Duration::from_millis(30);
/// And at the latest after this long.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// While the directory is missing, its own parents may be too, which no watch covers.
const RETRY_MISSING: Duration = Duration::from_secs(1);

/// A directory of manifests that has been read once.
#[derive(Debug)]
pub struct Directory {
    inotify: Inotify,
    state: State,
}

/// What [`check`] found.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Manifest files.
    pub files: usize,
    /// Objects in them, of the kinds that the mesh reads.
    pub objects: usize,
    /// What is wrong, sorted by place.
    pub rejections: Vec<Rejection>,
}

/// The directory cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is missing, not a directory or not readable.
    #[error("cannot read the directory of manifests {}: {source}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel cannot tell of changes.
    #[error("cannot watch files: {0}; raise fs.inotify.max_user_instances")]
    Watch(#[source] io::Error),
}

/// Reads the directory once, for whoever wants to know what is wrong with it.
pub fn check(root: &Path, node: NodeInfo) -> Result<Checked, OpenError> {
    let mut state = State::new(root, Compiler::new(node), None);
    state.refresh_first()?;
    Ok(Checked {
        files: state.stamps.len(),
        objects: state.store.objects(),
        rejections: state.publication.rejections.to_vec(),
    })
}

impl Directory {
    /// Reads the directory, blocking, and begins to watch it.
    pub fn open(root: &Path, node: NodeInfo, defaults: Defaults) -> Result<Self, OpenError> {
        let inotify = Inotify::init().map_err(OpenError::Watch)?;
        let watches = Watches::new(inotify.watches(), root.to_owned());
        let compiler = Compiler::new(node).with_defaults(defaults);
        let mut state = State::new(root, compiler, Some(watches));
        state.refresh_first()?;
        Ok(Self { inotify, state })
    }

    /// What the directory says, as far as it has been read.
    pub fn publication(&self) -> Publication {
        self.state.publication.clone()
    }

    /// Follows the directory for as long as the future is polled, and publishes what changes, once per settled change.
    /// Ends only if the kernel stops to tell of changes.
    pub async fn follow(self, mut publish: impl FnMut(Publication)) -> io::Result<Infallible> {
        let Self { inotify, mut state } = self;
        // SAFETY: an `Inotify` owns its descriptor and keeps it open, the same one, until it is dropped.
        let mut inotify = unsafe { AsyncFd::register(inotify) }?;
        loop {
            let dirty = settled(&mut inotify, &state).await?;
            // Reading files blocks, and after a long absence there may be many to read.
            let refresh = move || {
                let changed = state.refresh(dirty);
                (state, changed)
            };
            let changed;
            (state, changed) = tokio::task::spawn_blocking(refresh).await.map_err(io::Error::other)?;
            if changed {
                publish(state.publication.clone());
            }
        }
    }
}

/// Waits for a change and for its end.
async fn settled(inotify: &mut AsyncFd<Inotify>, state: &State) -> io::Result<Dirty> {
    let mut dirty = Dirty::default();
    if state.is_missing {
        let retry = Instant::now() + RETRY_MISSING;
        if timeout_at(retry, read_events(inotify, state, &mut dirty)).await.is_err() {
            dirty.everything = true;
            return Ok(dirty);
        }
    }
    while dirty.is_empty() {
        read_events(inotify, state, &mut dirty).await?;
    }
    let end = Instant::now() + SETTLE_AT_MOST;
    loop {
        let quiet = (Instant::now() + SETTLE).min(end);
        match timeout_at(quiet, read_events(inotify, state, &mut dirty)).await {
            Ok(result) => result?,
            Err(_) => return Ok(dirty),
        }
        if Instant::now() >= end {
            return Ok(dirty);
        }
        // Lets a burst of events come together instead of waking for each.
        sleep_until((Instant::now() + SETTLE / 10).min(end)).await;
    }
}

/// Waits for events and takes in those that are there.
async fn read_events(inotify: &mut AsyncFd<Inotify>, state: &State, dirty: &mut Dirty) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    let mut ready = inotify.readable_mut().await?;
    let Ok(result) = ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer)) else {
        return Ok(());
    };
    for event in result? {
        if let Some(watches) = &state.watches {
            watches.interpret(&event, dirty);
        }
    }
    Ok(())
}

/// What is known of the directory, and what was made of it.
#[derive(Debug)]
struct State {
    root: PathBuf,
    watches: Option<Watches>,
    stamps: BTreeMap<PathBuf, Stamp>,
    store: Store,
    compiler: Compiler,
    publication: Publication,
    /// The root cannot be read.
    is_missing: bool,
}

impl State {
    fn new(root: &Path, compiler: Compiler, watches: Option<Watches>) -> Self {
        Self {
            root: root.to_owned(),
            watches,
            stamps: BTreeMap::new(),
            store: Store::default(),
            compiler,
            publication: Publication { snapshot: Arc::default(), rejections: Arc::new([]) },
            is_missing: false,
        }
    }

    /// There is no last good state to fall back on.
    fn refresh_first(&mut self) -> Result<(), OpenError> {
        let error = |source| OpenError::Unreadable { path: self.root.clone(), source };
        fs::read_dir(&self.root).map_err(error)?;
        self.refresh(Dirty { everything: true, ..Dirty::default() });
        Ok(())
    }

    /// Looks again at what may have changed. True if that changes what is to be published.
    fn refresh(&mut self, dirty: Dirty) -> bool {
        let candidates = if dirty.everything { self.rescan() } else { self.stat(dirty) };
        let mut updates = Vec::new();
        for (path, stamp) in candidates {
            let Some(stamp) = stamp else {
                self.stamps.remove(&path);
                updates.push((path, None));
                continue;
            };
            let objects = fs::read(&path).map(|bytes| manifest::read(&path, &bytes));
            self.store.retain_unreadable(|unreadable| unreadable != path);
            match objects {
                Ok(Ok(objects)) => {
                    self.stamps.insert(path.clone(), stamp);
                    updates.push((path, Some(objects)));
                }
                Ok(Err(rejection)) => {
                    self.stamps.insert(path.clone(), stamp);
                    self.store.set_unreadable(*rejection);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.stamps.remove(&path);
                    updates.push((path, None));
                }
                Err(error) => self.store.set_unreadable(cannot_read(&path, &error)),
            }
        }
        let changes = self.store.update(updates);
        let has_new_world = self.compiler.apply(changes);
        let rejections = self.store.rejections(self.compiler.problems());
        let has_new_rejections = *self.publication.rejections != *rejections;
        if has_new_world {
            self.publication.snapshot = Arc::new(self.compiler.snapshot());
        }
        if has_new_rejections {
            self.publication.rejections = rejections.into();
        }
        has_new_world || has_new_rejections
    }

    /// Looks at the whole tree: the files that have changed, come (with their stamps) or gone (without).
    fn rescan(&mut self) -> Vec<(PathBuf, Option<Stamp>)> {
        let before = self.watches.as_mut().map(Watches::begin);
        let tree = Tree::scan(&self.root, |directory| {
            if let Some(watches) = &mut self.watches {
                watches.enter(directory);
            }
        });
        if let (Some(watches), Some(before)) = (&mut self.watches, before) {
            tree.links.iter().for_each(|link| watches.follow(link));
            watches.drop_all_but_targets(before);
        }
        self.is_missing = tree.unreadable.iter().any(|(path, _)| *path == self.root);
        let is_cut_off = |path: &Path| tree.unreadable.iter().any(|(cut, _)| path.starts_with(cut));

        let changed = tree.files.iter().filter(|(path, stamp)| self.stamps.get(*path) != Some(stamp));
        let mut candidates: Vec<_> = changed.map(|(path, stamp)| (path.clone(), Some(*stamp))).collect();
        let gone = self.stamps.keys().filter(|path| !tree.files.contains_key(*path) && !is_cut_off(path));
        candidates.extend(gone.map(|path| (path.clone(), None)));

        // A directory that can be listed again takes its note back; a bad file keeps it until it is read again.
        self.store.retain_unreadable(|path| tree.files.contains_key(path) || is_cut_off(path));
        for (path, error) in &tree.unreadable {
            self.store.set_unreadable(cannot_read(path, error));
        }
        candidates
    }

    /// Looks at single files.
    fn stat(&mut self, dirty: Dirty) -> Vec<(PathBuf, Option<Stamp>)> {
        let mut candidates = Vec::new();
        for path in dirty.files {
            let stamp = match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => Some(Stamp::of(&metadata)),
                _ => None,
            };
            if stamp.is_none() || self.stamps.get(&path) != stamp.as_ref() {
                candidates.push((path, stamp));
            }
        }
        candidates
    }
}

fn cannot_read(path: &Path, error: &io::Error) -> Rejection {
    Rejection::of_file(path, format!("cannot be read: {error}; what it said before stays in force"))
}

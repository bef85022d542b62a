//! Removes all that a lab's or a cluster's journal lists: first processes, then pins, namespaces, data, cgroups, and
//! the folder last.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use super::state::State;
use super::{cgroup, netns};

/// Removes what the journal lists and the folder itself.
pub(crate) fn everything(state: &State) -> Result<()> {
    clear(state)?;
    remove_tree(&state.dir)
}

/// Removes what a run that was killed left under this name.
pub(crate) fn what_is_left_of(name: &str) -> Result<()> {
    if !State::directory(name).exists() {
        return Ok(());
    }
    everything(&State::open(name)?)
}

/// Removes what the journal lists and empties the folder, but keeps it, and its lock. What cannot be removed
/// stays in the journal, so that a later run tries again.
pub(crate) fn clear(state: &State) -> Result<()> {
    let mut stuck = Vec::new();
    for path in state.recorded("cgroup") {
        attempt(&mut stuck, &path, cgroup::kill);
    }
    for path in state.recorded("pins") {
        attempt(&mut stuck, &path, remove_tree);
    }
    for path in state.recorded("netns") {
        attempt(&mut stuck, &path, netns::delete);
    }
    for path in state.recorded("tree") {
        attempt(&mut stuck, &path, remove_tree);
    }
    for path in state.recorded("cgroup") {
        attempt(&mut stuck, &path, cgroup::remove);
    }
    for path in state.recorded("controller") {
        attempt(&mut stuck, &path, cgroup::withhold_controller);
    }
    if !stuck.is_empty() {
        bail!("could not remove {}", stuck.join(", "));
    }
    state.empty()
}

/// What is left on the machine of the lab of this name; empty after a good sweep.
pub fn leftovers(name: &str) -> Result<Vec<String>> {
    let prefix = format!("{name}-");
    let mut left = Vec::new();
    for dir in ["/run/netns", "/sys/fs/bpf"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                left.push(entry.path().display().to_string());
            }
        }
    }
    for path in [State::directory(name), State::data_directory(name), cgroup::root()?.join(name)] {
        if path.exists() {
            left.push(path.display().to_string());
        }
    }
    Ok(left)
}

fn attempt(stuck: &mut Vec<String>, path: &Path, remove: impl Fn(&Path) -> Result<()>) {
    if let Err(error) = remove(path) {
        stuck.push(format!("{} ({error:#})", path.display()));
    }
}

/// Like `remove_dir_all`, but fine with a tree that was never made.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => Ok(other?),
    }
}

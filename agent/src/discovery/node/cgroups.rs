//! Pods as the kubelet's cgroup directories show them, for runtimes that do not tell us themselves.
//!
//! A pod's directory is there before its sandbox, and the sandbox's process before the first container: whoever follows the
//! directories sees a pod early, but nobody waits for him. What a directory is called is the kubelet's convention;
//! nothing but names is known here of drivers, classes of service and runtimes.

mod name;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::{Place, Sighting, addresses, namespaces};
use crate::model::{PodPaths, WorkloadUid};

/// A new directory gets its process within milliseconds, and with the process the pod is complete.
const SOON: Duration = Duration::from_millis(2);
/// For how long after something has happened it is looked so often.
const EAGER: Duration = Duration::from_millis(500);
/// How often it is looked at pods that take longer: an image is pulled, a network is slow.
const LATER: Duration = Duration::from_millis(200);
/// Everything is looked at anew after this long, for what no event told of.
const RESCAN: Duration = Duration::from_secs(10);

/// Processes of one pod that are looked at: one tells of the pod, unless it has a namespace of its own making.
const PROCESSES: usize = 32;

/// Follows the directories of one cgroup2 tree.
#[derive(Debug)]
pub struct Cgroups {
    root: PathBuf,
    inotify: AsyncFd<Inotify>,
    watches: Watches,
    /// Where each watch looks.
    watched: HashMap<WatchDescriptor, PathBuf>,
    pods: BTreeMap<WorkloadUid, Pod>,
}

#[derive(Debug)]
struct Pod {
    cgroup: PathBuf,
    place: Option<Place>,
    /// When something happened in its directory.
    stirred: Instant,
}

impl Cgroups {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the tree cannot be read, or the kernel does not tell of changes.
    pub fn open(root: &Path) -> io::Result<Self> {
        let mut cgroups = Self::new(root)?;
        if statfs(root)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::other(
                "it is no cgroup2 tree; on a node whose controllers are those of cgroup v1 the kubelet keeps pods \
                 where no program can be attached: boot it with systemd.unified_cgroup_hierarchy=1",
            ));
        }
        if let Err(error) = namespaces::can_look() {
            warn!(%error, "pods are found only as far as the container runtime tells of them: grant CAP_SYS_PTRACE and share the node's process ids");
        }
        cgroups.scan();
        Ok(cgroups)
    }

    fn new(root: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        // SAFETY: an `Inotify` owns its descriptor and keeps it open, the same one, until it is dropped.
        let inotify = unsafe { AsyncFd::register(inotify) }.map_err(io::Error::from)?;
        Ok(Self { root: root.to_owned(), inotify, watches, watched: HashMap::new(), pods: BTreeMap::new() })
    }

    /// Tells of pods that come and go, for as long as the future is polled.
    ///
    /// # Errors
    /// When the kernel stops to tell of changes.
    pub async fn follow(mut self, mut tell: impl FnMut(Sighting)) -> io::Result<Infallible> {
        let mut rescan = Instant::now() + RESCAN;
        loop {
            self.look(&mut tell);
            let pause = self.pause().min(rescan.saturating_duration_since(Instant::now()));
            tokio::select! {
                stirred = changed(&mut self.inotify) => {
                    let (watches, is_complete) = stirred?;
                    if !is_complete || watches.iter().any(|watch| !self.stir(watch)) {
                        self.scan();
                    }
                }
                () = sleep(pause) => {}
            }
            if Instant::now() >= rescan {
                rescan = Instant::now() + RESCAN;
                self.scan();
            }
        }
    }

    /// Something happened in a pod's directory. False if it is another one: then there may be new pods.
    fn stir(&mut self, watch: &WatchDescriptor) -> bool {
        let Some(path) = self.watched.get(watch) else { return true };
        let pod = self.pods.values_mut().find(|pod| path.starts_with(&pod.cgroup));
        pod.map(|pod| pod.stirred = Instant::now()).is_some()
    }

    /// Walks the directories that may lead to pods, and watches them.
    fn scan(&mut self) {
        let Walked { pods, on_the_way } = walk(&self.root);
        for path in on_the_way.into_iter().chain(pods.values().cloned()) {
            self.watch(path);
        }
        // The kernel keeps the watches of cgroups that have gone, and has room for so many.
        for (watch, _) in self.watched.extract_if(|_, path| !path.exists()) {
            // Of other kinds of directories it does not.
            let _ = self.watches.remove(watch);
        }
        for (uid, cgroup) in pods {
            let known = self.pods.get(&uid).is_some_and(|pod| pod.cgroup == cgroup);
            if !known {
                self.pods.insert(uid, Pod { cgroup, place: None, stirred: Instant::now() });
            }
        }
    }

    fn watch(&mut self, path: PathBuf) {
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::DELETE_SELF | WatchMask::ONLYDIR;
        match self.watches.add(&path, mask) {
            Ok(watch) => drop(self.watched.insert(watch, path)),
            // It has gone meanwhile; the next look finds that out.
            Err(error) => debug!(path = %path.display(), %error, "cannot watch a cgroup"),
        }
    }

    /// Looks at every pod that is not complete, or in which something happened.
    fn look(&mut self, tell: &mut impl FnMut(Sighting)) {
        let now = Instant::now();
        let gone: Vec<_> =
            self.pods.iter().filter(|(_, pod)| !pod.cgroup.exists()).map(|(uid, _)| uid.clone()).collect();
        for uid in gone {
            let told = self.pods.remove(&uid).is_some_and(|pod| pod.place.is_some());
            if told {
                tell(Sighting::Gone(uid));
            }
        }
        for (uid, pod) in &mut self.pods {
            if pod.place.is_some() && now.duration_since(pod.stirred) > EAGER {
                continue;
            }
            // A pod whose processes have all gone for a moment is where it was.
            let Some(place) = place(&pod.cgroup, pod.place.as_ref()) else { continue };
            if pod.place.as_ref() != Some(&place) {
                pod.place = Some(place.clone());
                tell(Sighting::Found(uid.clone(), place));
            }
        }
    }

    fn pause(&self) -> Duration {
        let now = Instant::now();
        let pauses = self.pods.values().filter_map(|pod| {
            let is_eager = now.duration_since(pod.stirred) <= EAGER;
            match (&pod.place, is_eager) {
                (None, true) => Some(SOON),
                (None, false) | (Some(_), true) => Some(LATER),
                (Some(_), false) => None,
            }
        });
        pauses.min().unwrap_or(RESCAN)
    }
}

/// The directory of one pod.
pub(super) fn find(root: &Path, uid: &str) -> Option<PathBuf> {
    walk(root).pods.remove(uid)
}

/// What there is in a tree.
struct Walked {
    pods: BTreeMap<WorkloadUid, PathBuf>,
    /// The directories in which there may be more.
    on_the_way: Vec<PathBuf>,
}

fn walk(root: &Path) -> Walked {
    let (mut pods, mut on_the_way) = (BTreeMap::new(), Vec::new());
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for path in children(&directory) {
            let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
            if let Some(uid) = name::pod(file) {
                pods.insert(uid, path);
            } else if name::leads_to_pods(file) {
                directories.push(path);
            }
        }
        on_the_way.push(directory);
    }
    Walked { pods, on_the_way }
}

/// Where the pod lives, once it has a process with a network.
fn place(cgroup: &Path, before: Option<&Place>) -> Option<Place> {
    let mut found: Vec<PathBuf> = Vec::new();
    for pid in processes(cgroup).into_iter().take(PROCESSES) {
        // One that is gone, or on the host's network, tells nothing.
        if let Ok(Some(path)) = namespaces::of_process(pid) {
            let is_pinned = !path.starts_with("/proc");
            found.push(path);
            if is_pinned {
                break;
            }
        }
    }
    let netns = match found.iter().find(|path| !path.starts_with("/proc")) {
        Some(pinned) => pinned.clone(),
        // The path through a process that is still there is as good as that through another.
        None => before
            .map(|before| before.paths.netns.clone())
            .filter(|netns| netns.exists())
            .or_else(|| found.first().cloned())?,
    };
    if let Some(before) = before.filter(|before| before.paths.netns == netns) {
        return Some(before.clone());
    }
    let addresses = addresses::of(&netns).ok().filter(|addresses| !addresses.is_empty())?;
    Some(Place { paths: PodPaths { netns, cgroup: cgroup.to_owned() }, addresses })
}

/// The processes of a cgroup and of those below it.
fn processes(cgroup: &Path) -> Vec<u32> {
    let mut pids = Vec::new();
    let mut directories = vec![cgroup.to_owned()];
    while let Some(directory) = directories.pop() {
        if pids.len() >= PROCESSES {
            break;
        }
        let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
        directories.extend(children(&directory));
    }
    pids.sort_unstable();
    pids
}

/// A directory that has gone has none.
fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Waits for events: which watches have them, and whether these are all.
async fn changed(inotify: &mut AsyncFd<Inotify>) -> io::Result<(Vec<WatchDescriptor>, bool)> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let mut ready = inotify.readable_mut().await?;
        let Ok(result) = ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer)) else {
            continue;
        };
        let (mut watches, mut is_complete) = (Vec::new(), true);
        for event in result? {
            is_complete &= !event.mask.contains(EventMask::Q_OVERFLOW);
            watches.push(event.wd);
        }
        return Ok((watches, is_complete));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[tokio::test]
    async fn nothing_is_left_to_watch_of_a_pod_that_has_gone() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/poda3c2e6f4-0e1c-4a57-9f0b-2d8f1c6b7a90");
        fs::create_dir_all(&pod).unwrap();
        let mut cgroups = Cgroups::new(root.path()).unwrap();
        let watched = |cgroups: &Cgroups| {
            let fdinfo = format!("/proc/self/fdinfo/{}", cgroups.inotify.get_ref().as_raw_fd());
            fs::read_to_string(fdinfo).unwrap().lines().filter(|line| line.starts_with("inotify ")).count()
        };
        cgroups.scan();
        assert_eq!((watched(&cgroups), cgroups.pods.len()), (3, 1));
        // While it is open the kernel keeps the watch, as it does of every cgroup.
        let open = File::open(&pod).unwrap();
        fs::remove_dir(&pod).unwrap();
        assert_eq!(watched(&cgroups), 3);
        cgroups.scan();
        assert_eq!(watched(&cgroups), 2);
        drop(open);
    }
}

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
    seat: Seat,
    /// When something happened in its directory.
    stirred: Instant,
    /// It is to be looked at once, for something may have happened that no event told of.
    is_due: bool,
}

/// What is known of where a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seat {
    /// Nothing yet.
    Unknown,
    /// It is on the host's network, and no pod of ours until something happens in its directory.
    Host,
    /// It has a network of its own.
    At(Place),
}

impl Pod {
    fn new(cgroup: PathBuf) -> Self {
        Self { cgroup, seat: Seat::Unknown, stirred: Instant::now(), is_due: false }
    }

    fn is_eager(&self, now: Instant) -> bool {
        now.duration_since(self.stirred) <= EAGER
    }
}

impl Seat {
    fn place(&self) -> Option<&Place> {
        match self {
            Self::At(place) => Some(place),
            Self::Unknown | Self::Host => None,
        }
    }

    /// With what a look has found. A pod whose processes have all gone for a moment is where it was, and the first process of a
    /// container is on the host's network until the runtime has moved it.
    fn after(&self, found: Self, is_eager: bool) -> Self {
        match (self, found) {
            (_, Self::At(place)) => Self::At(place),
            (Self::Unknown, Self::Host) if !is_eager => Self::Host,
            (before, _) => before.clone(),
        }
    }
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
                    self.take(&watches, is_complete);
                }
                () = sleep(pause) => {}
            }
            if Instant::now() >= rescan {
                rescan = Instant::now() + RESCAN;
                self.pods.values_mut().for_each(|pod| pod.is_due = true);
                self.scan();
            }
        }
    }

    /// Takes events in. Where the kernel has lost some, something may have happened in every directory.
    fn take(&mut self, watches: &[WatchDescriptor], is_complete: bool) {
        let mut are_of_pods = true;
        for watch in watches {
            are_of_pods &= self.stir(watch);
        }
        if !is_complete {
            self.pods.values_mut().for_each(|pod| pod.stirred = Instant::now());
        }
        if !(is_complete && are_of_pods) {
            self.scan();
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
                self.pods.insert(uid, Pod::new(cgroup));
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
            let told = self.pods.remove(&uid).is_some_and(|pod| pod.seat.place().is_some());
            if told {
                tell(Sighting::Gone(uid));
            }
        }
        for (uid, pod) in &mut self.pods {
            let is_eager = pod.is_eager(now);
            if !std::mem::take(&mut pod.is_due) && !is_eager && pod.seat != Seat::Unknown {
                continue;
            }
            let seat = pod.seat.after(seat(&pod.cgroup, pod.seat.place()), is_eager);
            if seat != pod.seat {
                if let Seat::At(place) = &seat {
                    tell(Sighting::Found(uid.clone(), place.clone()));
                }
                pod.seat = seat;
            }
        }
    }

    fn pause(&self) -> Duration {
        let now = Instant::now();
        let pauses = self.pods.values().filter_map(|pod| match (&pod.seat, pod.is_eager(now)) {
            (Seat::Unknown, true) => Some(SOON),
            (Seat::Unknown, false) | (_, true) => Some(LATER),
            (_, false) => None,
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

/// Where the pod is, once it has a process with a network.
fn seat(cgroup: &Path, before: Option<&Place>) -> Seat {
    let (mut found, mut is_on_host): (Vec<PathBuf>, _) = (Vec::new(), false);
    for pid in processes(cgroup).into_iter().take(PROCESSES) {
        match namespaces::of_process(pid) {
            Ok(Some(path)) => {
                let is_pinned = !path.starts_with("/proc");
                found.push(path);
                if is_pinned {
                    break;
                }
            }
            Ok(None) => is_on_host = true,
            // One that is gone tells nothing.
            Err(_) => {}
        }
    }
    match place(cgroup, &found, before) {
        Some(place) => Seat::At(place),
        None if is_on_host && found.is_empty() => Seat::Host,
        None => Seat::Unknown,
    }
}

/// Where the pod lives, if its processes are found in these namespaces.
fn place(cgroup: &Path, found: &[PathBuf], before: Option<&Place>) -> Option<Place> {
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

    const PODS: [&str; 2] = ["a3c2e6f4-0e1c-4a57-9f0b-2d8f1c6b7a90", "b3c2e6f4-0e1c-4a57-9f0b-2d8f1c6b7a90"];

    /// Two pods, in whose directories nothing has happened for long, and the directory of both.
    fn two_pods() -> (tempfile::TempDir, PathBuf, Cgroups) {
        let root = tempfile::tempdir().unwrap();
        let kubepods = root.path().join("kubepods");
        for uid in PODS {
            fs::create_dir_all(kubepods.join(format!("pod{uid}"))).unwrap();
        }
        let mut cgroups = Cgroups::new(root.path()).unwrap();
        cgroups.scan();
        let long_ago = Instant::now() - 10 * EAGER;
        cgroups.pods.values_mut().for_each(|pod| pod.stirred = long_ago);
        (root, kubepods, cgroups)
    }

    fn stirred(cgroups: &Cgroups) -> [bool; 2] {
        PODS.map(|uid| cgroups.pods[&WorkloadUid::from(uid)].is_eager(Instant::now()))
    }

    #[tokio::test]
    async fn each_pod_of_which_events_tell_is_looked_at() {
        let (_root, kubepods, mut cgroups) = two_pods();
        // The first event is none of a pod's directory, and those of both pods come with it.
        fs::create_dir(kubepods.join("podc3c2e6f4-0e1c-4a57-9f0b-2d8f1c6b7a90")).unwrap();
        for uid in PODS {
            fs::create_dir(kubepods.join(format!("pod{uid}/container"))).unwrap();
        }
        let (watches, is_complete) = changed(&mut cgroups.inotify).await.unwrap();
        assert_eq!((watches.len(), is_complete), (3, true));
        cgroups.take(&watches, is_complete);
        assert_eq!((stirred(&cgroups), cgroups.pods.len()), ([true, true], 3));
    }

    #[tokio::test]
    async fn every_pod_is_looked_at_where_events_are_lost() {
        let (_root, _, mut cgroups) = two_pods();
        cgroups.take(&[], true);
        assert_eq!(stirred(&cgroups), [false, false]);
        cgroups.take(&[], false);
        assert_eq!(stirred(&cgroups), [true, true]);
    }

    #[tokio::test]
    async fn a_pod_on_the_hosts_network_is_not_looked_at_for_ever() {
        let (_root, _, mut cgroups) = two_pods();
        assert_eq!(cgroups.pause(), LATER, "nothing is known of them yet");
        assert_eq!(Seat::Unknown.after(Seat::Host, true), Seat::Unknown, "it may be moved yet");
        assert_eq!(Seat::Unknown.after(Seat::Host, false), Seat::Host);
        cgroups.pods.values_mut().for_each(|pod| pod.seat = pod.seat.after(Seat::Host, false));
        assert_eq!(cgroups.pause(), RESCAN);
        let paths = PodPaths { netns: "/run/netns/a".into(), cgroup: "/cgroup".into() };
        let at = Seat::At(Place { paths, addresses: vec![[10, 0, 0, 1].into()] });
        assert_eq!(Seat::Host.after(at.clone(), false), at);
        for found in [Seat::Host, Seat::Unknown] {
            assert_eq!(at.after(found, false), at, "it is where it was");
        }
    }

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

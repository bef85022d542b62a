//! The loaded programs and the pinned maps.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, PerCpuValues};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, SkLookup, SockOps};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};
use undermesh_common::maps::{Agent, Counters, DEPARTED, LAYOUT, Voucher};
use undermesh_common::{Endpoint, Tuple};

use super::charge::{Charge, Succession};
use super::loader::{Loader, explain};
use super::{CaptureError, CaptureSettings, Heartbeat, OnAgentDown, Part, cgroup, link, map_error};
use crate::sentence::in_one_sentence;

/// The programs of a pod's cgroup, in the order of their attachment: names before connects, so that no captured
/// socket ever shows a code. They are detached in the opposite order.
pub(super) const COOKIE_FREE: [&str; 7] =
    ["watch_tcp", "getpeername4", "getpeername6", "getsockname4", "getsockname6", "connect4", "connect6"];

/// The two of them that capture.
const CONNECTS: [&str; 2] = ["connect4", "connect6"];

/// The program of a pod's network namespace, attached before all others.
pub(super) const STEER: &str = "steer";

const VOUCH_DIAL: &str = "vouch_dial";

/// The program of the kubelet's cgroup.
pub(super) const VOUCH_PROBE: &str = "vouch_probe";

/// The loaded object and where it is pinned: `<root>/maps/<map>` and `<root>/pods/<pod>/<program>`.
#[derive(Debug)]
pub(super) struct Programs {
    loader: Loader,
    ebpf: Ebpf,
    root: PathBuf,
    charge: Charge,
}

impl Programs {
    /// Loads the programs with the pinned maps, made now or found.
    pub(super) fn load(settings: &CaptureSettings) -> Result<Self, CaptureError> {
        let root = settings.bpffs.clone();
        let maps = root.join("maps");
        // Before anything is touched: a build may have no programs.
        let mut loader = Loader::new(&maps)?;
        for dir in [&maps, &root.join("pods")] {
            fs::create_dir_all(dir).map_err(Part::Links.step(format!("making {}", dir.display())))?;
        }
        // Two agents with one folder of pins would take each other's pods.
        let charge = Charge::take(&root, settings.take_over)?;
        drop_foreign_layout(&maps)?;

        let mut ebpf = loader.load(0)?;
        for name in COOKIE_FREE.into_iter().chain([VOUCH_DIAL]) {
            load_program(&mut ebpf, name)?;
        }
        forward_log(&mut ebpf);
        let mut programs = Self { loader, ebpf, root, charge };
        programs.clear_leftovers()?;
        programs.heartbeat(settings.on_agent_down)?.beat(super::monotonic_ns())?;
        programs.vouch_for_own_dials()?;
        Ok(programs)
    }

    /// Who is in charge of the pins.
    pub(super) fn charge(&mut self) -> &mut Charge {
        &mut self.charge
    }

    /// As [`Charge::take_back`].
    pub(super) fn take_back(&mut self) -> Result<bool, CaptureError> {
        self.charge.take_back(&self.root)
    }

    /// Watches for an agent that wants to be.
    pub(super) fn succession(&self) -> Result<Succession, CaptureError> {
        Succession::watch(&self.root)
    }

    /// Opens a pinned map once more, for a reader or writer of its own.
    pub(super) fn open_map(&self, name: &'static str) -> Result<Map, CaptureError> {
        MapData::from_pin(self.root.join("maps").join(name))
            .and_then(Map::from_map_data)
            .map_err(map_error(name))
    }

    /// As [`Self::open_map`], for a hash map.
    pub(super) fn hash_map<K: aya::Pod, V: aya::Pod>(
        &self,
        name: &'static str,
    ) -> Result<BpfHashMap<MapData, K, V>, CaptureError> {
        BpfHashMap::try_from(self.open_map(name)?).map_err(map_error(name))
    }

    /// The writer of the agent's sign of life.
    pub(super) fn heartbeat(&self, on_agent_down: OnAgentDown) -> Result<Heartbeat, CaptureError> {
        let map = Array::try_from(self.open_map("agents")?).map_err(map_error("agents"))?;
        let agent = Agent {
            layout: LAYOUT,
            closed_when_down: u32::from(on_agent_down == OnAgentDown::Closed),
            ..Agent::default()
        };
        Ok(Heartbeat { map, agent })
    }

    /// Where the folders of all pods' pins are.
    pub(super) fn pods_folder(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// Where the links of one pod are pinned.
    pub(super) fn pod_pins(&self, label: &str) -> PathBuf {
        self.pods_folder().join(label)
    }

    /// Attaches one of [`COOKIE_FREE`] to a pod's cgroup and pins the link. A link that is pinned there already is
    /// replaced only once the new one is in force.
    pub(super) fn attach_to_cgroup(
        &mut self,
        name: &'static str,
        cgroup: &File,
        pins: &Path,
    ) -> Result<(), CaptureError> {
        let link = attach_to_cgroup(&mut self.ebpf, name, cgroup)
            .map_err(Part::Links.step(format!("attaching {name} to the cgroup")))?;
        pin_over(link, &pins.join(name))
    }

    /// Loads an instance of [`VOUCH_PROBE`] for one network namespace, or for none (0), attaches it to the cgroup and pins the link, in
    /// place of the one before.
    pub(super) fn attach_to_kubelet(&mut self, cgroup: &File, netns_cookie: u64) -> Result<(), CaptureError> {
        let pins = self.kubelet_pins();
        fs::create_dir_all(&pins).map_err(Part::Links.step(format!("making {}", pins.display())))?;
        let mut ebpf = self.loader.load(netns_cookie)?;
        load_program(&mut ebpf, VOUCH_PROBE)?;
        let link = attach_to_cgroup(&mut ebpf, VOUCH_PROBE, cgroup)
            .map_err(Part::Links.step(format!("attaching {VOUCH_PROBE} to the cgroup")))?;
        pin_over(link, &pins.join(VOUCH_PROBE))
    }

    /// Takes [`VOUCH_PROBE`] off whatever it is on, at once.
    pub(super) fn detach_from_kubelet(&self) -> Result<(), CaptureError> {
        let pins = self.kubelet_pins();
        let pin = pins.join(VOUCH_PROBE);
        if pin.exists() {
            link::detach(&pin).map_err(Part::Links.step(format!("detaching {}", pin.display())))?;
        }
        unless_gone(fs::remove_dir_all(&pins))
            .map_err(Part::Links.step(format!("removing {}", pins.display())))
    }

    fn kubelet_pins(&self) -> PathBuf {
        self.root.join("kubelet")
    }

    /// Loads an instance of [`STEER`] for one namespace, attaches it there and pins the link.
    pub(super) fn attach_to_netns(
        &mut self,
        netns: impl AsFd,
        netns_cookie: u64,
        pins: &Path,
    ) -> Result<(), CaptureError> {
        let mut ebpf = self.loader.load(netns_cookie)?;
        load_program(&mut ebpf, STEER)?;
        let attach = |ebpf: &mut Ebpf| -> Result<FdLink, ProgramError> {
            let program: &mut SkLookup = program(ebpf, STEER)?;
            let id = program.attach(netns)?;
            Ok(program.take_link(id)?.into())
        };
        let link = attach(&mut ebpf)
            .map_err(|error| io::Error::other(in_one_sentence(&error)))
            .map_err(Part::Links.step(format!("attaching {STEER} to the pod's network namespace")))?;
        pin_over(link, &pins.join(STEER))
    }

    /// Removes the pins of pods that are not to be kept, by the name of their folder; says how many.
    pub(super) fn forget_pods_except(&self, keep: impl Fn(&str) -> bool) -> io::Result<usize> {
        let mut forgotten = 0;
        for entry in fs::read_dir(self.pods_folder())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if keep(&name) {
                continue;
            }
            unpin_pod(&entry.path())?;
            if let Some(cookie) = cookie_of(&name)
                && !self.is_pinned(cookie)?
            {
                self.remove_entries(cookie);
            }
            forgotten += 1;
        }
        Ok(forgotten)
    }

    /// Whether a pod is pinned with this network namespace. An agent of another version may have called it otherwise:
    /// the entries are then those of its present enrolment.
    fn is_pinned(&self, netns_cookie: u64) -> io::Result<bool> {
        for entry in fs::read_dir(self.pods_folder())? {
            if cookie_of(&entry?.file_name().to_string_lossy()) == Some(netns_cookie) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes what an earlier pod of the same name, in another network namespace, has left.
    pub(super) fn forget_other_lives(&self, label: &str) {
        let Some((name, _)) = label.rsplit_once('_') else { return };
        let is_other =
            |pin: &str| pin != label && pin.rsplit_once('_').is_some_and(|(other, _)| other == name);
        if let Err(error) = self.forget_pods_except(|pin| !is_other(pin)) {
            warn!(%error, pod = name, "cannot remove what an earlier pod of the name left");
        }
    }

    /// Removes vouchers that nobody else would.
    pub(super) fn forget_vouched(
        &self,
        is_stale: impl Fn(&Tuple, &Voucher) -> bool,
    ) -> Result<(), CaptureError> {
        let mut vouched = self.hash_map::<Tuple, Voucher>("vouched")?;
        let stale = vouched.iter().filter_map(Result::ok).filter(|(tuple, it)| is_stale(tuple, it));
        for (tuple, _) in stale.collect::<Vec<_>>() {
            // Gone in the meantime is as good.
            let _ = vouched.remove(&tuple);
        }
        Ok(())
    }

    /// Removes what the maps hold of a pod; its counts go to those that have left. An entry that is not there is as good
    /// as removed.
    pub(super) fn remove_entries(&self, netns_cookie: u64) {
        if let Ok(mut pods) = self.hash_map::<u64, undermesh_common::maps::Pod>("pods") {
            let _ = pods.remove(&netns_cookie);
        }
        if let Err(error) = self.retire_counters(netns_cookie) {
            warn!(%error, "the counts of a pod that has left are lost");
        }
    }

    fn retire_counters(&self, netns_cookie: u64) -> Result<(), CaptureError> {
        let mut counters = self.counters()?;
        let Ok(counted) = counters.get(&netns_cookie, 0) else { return Ok(()) };
        let departed = counters.get(&DEPARTED, 0).or_else(|_| zeros()).map_err(map_error("counters"))?;
        let sums = departed
            .iter()
            .zip(counted.iter())
            .map(|(sum, more)| [*sum, *more].iter().sum())
            .collect::<Vec<_>>();
        let departed = PerCpuValues::<Counters>::try_from(sums)
            .map_err(Part::Links.step("adding up the counts of pods that have left"))?;
        let _ = counters.remove(&netns_cookie);
        counters.insert(DEPARTED, departed, 0).map_err(map_error("counters"))
    }

    /// The per-CPU counters.
    pub(super) fn counters(&self) -> Result<PerCpuHashMap<MapData, u64, Counters>, CaptureError> {
        PerCpuHashMap::try_from(self.open_map("counters")?).map_err(map_error("counters"))
    }

    /// Connections that an earlier agent vouched for died with it. Those of one that lives on go with their servers' sockets; what it is
    /// about to make counts as anybody's.
    fn clear_leftovers(&mut self) -> Result<(), CaptureError> {
        let succeeds = self.charge.succeeds();
        self.forget_vouched(|_, voucher| !succeeds || voucher.accepted == 0)?;
        let mut dials = self.hash_map::<u64, Endpoint>("dials")?;
        for cookie in dials.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _ = dials.remove(&cookie);
        }
        Ok(())
    }

    /// The agent's sockets belong to its own cgroup; the link lives as long as this process.
    fn vouch_for_own_dials(&mut self) -> Result<(), CaptureError> {
        let path = cgroup::own().map_err(Part::Cgroup.step("finding the agent's own cgroup"))?;
        let own = cgroup::open(&path)
            .map_err(Part::Cgroup.step(format!("opening the agent's own cgroup {}", path.display())))?;
        if cgroup::is_root(&path) {
            warn!(
                "the agent is in the root cgroup, so its program sees every socket of this machine; give it one of its own"
            );
        }
        let attach = |ebpf: &mut Ebpf| -> Result<(), ProgramError> {
            let program: &mut SockOps = program(ebpf, VOUCH_DIAL)?;
            program.attach(&own, CgroupAttachMode::Single).map(drop)
        };
        attach(&mut self.ebpf).map_err(|error| {
            CaptureError::Load(format!(
                "attaching {VOUCH_DIAL} to {}: {}",
                path.display(),
                in_one_sentence(&error)
            ))
        })
    }
}

/// The network namespace of the pod whose pins have this label.
fn cookie_of(label: &str) -> Option<u64> {
    label.rsplit('_').next()?.parse().ok()
}

/// Removes every pin below the folder, and the folder; says how many pods were enrolled.
pub(super) fn detach_all(root: &Path) -> io::Result<usize> {
    let mut pods = 0;
    let pods_dir = root.join("pods");
    if pods_dir.exists() {
        for entry in fs::read_dir(&pods_dir)? {
            unpin_pod(&entry?.path())?;
            pods += 1;
        }
    }
    fs::remove_dir_all(root)?;
    Ok(pods)
}

/// Detaches `connect4` and `connect6`, at once: a link whose pin is removed lives on for an uncertain moment.
pub(super) fn detach_connects(pins: &Path) -> io::Result<()> {
    for name in CONNECTS {
        let pin = pins.join(name);
        if pin.exists() {
            link::detach(&pin)?;
        }
    }
    Ok(())
}

/// Connects first: from then on nothing new is captured, while what is captured keeps its names and its way.
pub(super) fn unpin_pod(pins: &Path) -> io::Result<()> {
    if let Err(error) = detach_connects(pins) {
        // It goes with its pin, if not at once.
        warn!(%error, pins = %pins.display(), "cannot detach the pod's connect programs");
    }
    for name in COOKIE_FREE.into_iter().rev().chain([STEER]) {
        unless_gone(fs::remove_file(pins.join(name)))?;
    }
    // Whatever else an agent of another version pinned goes with the folder; the pod's next life may have removed it.
    unless_gone(fs::remove_dir_all(pins))
}

fn unless_gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Counters at nought, one per CPU.
pub(super) fn zeros() -> Result<PerCpuValues<Counters>, MapError> {
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    Ok(PerCpuValues::try_from(vec![Counters::default(); cpus])?)
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), CaptureError> {
    let mut load = || -> Result<(), ProgramError> {
        match name {
            STEER => program::<SkLookup>(ebpf, name)?.load(),
            VOUCH_DIAL | VOUCH_PROBE | "watch_tcp" => program::<SockOps>(ebpf, name)?.load(),
            _ => program::<CgroupSockAddr>(ebpf, name)?.load(),
        }
    };
    load().map_err(|error| CaptureError::Load(format!("{name}: {}", explain(&in_one_sentence(&error)))))
}

fn attach_to_cgroup(ebpf: &mut Ebpf, name: &'static str, cgroup: &File) -> io::Result<FdLink> {
    let attach = |ebpf: &mut Ebpf| -> Result<FdLink, ProgramError> {
        let mode = CgroupAttachMode::Single;
        if matches!(name, VOUCH_PROBE | "watch_tcp") {
            let program: &mut SockOps = program(ebpf, name)?;
            let id = program.attach(cgroup, mode)?;
            Ok(program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)?)
        } else {
            let program: &mut CgroupSockAddr = program(ebpf, name)?;
            let id = program.attach(cgroup, mode)?;
            Ok(program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)?)
        }
    };
    attach(ebpf).map_err(|error| io::Error::other(in_one_sentence(&error)))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

/// Pins the link at the path; one that is there goes away only when the new one has taken its place.
fn pin_over(link: FdLink, path: &Path) -> Result<(), CaptureError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push("_new");
    let fresh = PathBuf::from(fresh);
    let _ = fs::remove_file(&fresh);
    link.pin(&fresh)
        .map_err(|error| io::Error::other(in_one_sentence(&error)))
        .map_err(Part::Links.step(format!("pinning {}", path.display())))?;
    fs::rename(&fresh, path).map_err(Part::Links.step(format!("pinning {}", path.display())))
}

/// Maps of another layout cannot be taken over. Pods keep the programs and maps that they have until they are
/// enrolled anew.
fn drop_foreign_layout(maps: &Path) -> Result<(), CaptureError> {
    let path = maps.join("agents");
    if !path.exists() {
        return Ok(());
    }
    let layout = || -> Option<u32> {
        let info = MapInfo::from_pin(&path).ok()?;
        if info.value_size() as usize != size_of::<Agent>() {
            return None;
        }
        let map = Map::from_map_data(MapData::from_pin(&path).ok()?).ok()?;
        Array::<_, Agent>::try_from(map).ok()?.get(&0, 0).ok().map(|agent| agent.layout)
    };
    // 0: made but not yet written when an earlier agent died.
    if matches!(layout(), Some(LAYOUT | 0)) {
        return Ok(());
    }
    info!("the pinned maps are of another version of the agent; making new ones");
    for entry in fs::read_dir(maps).map_err(Part::Links.step(format!("reading {}", maps.display())))? {
        let entry = entry.map_err(Part::Links.step(format!("reading {}", maps.display())))?;
        fs::remove_file(entry.path())
            .map_err(Part::Links.step(format!("removing {}", entry.path().display())))?;
    }
    Ok(())
}

/// aya-log's records go where all others go.
fn forward_log(ebpf: &mut Ebpf) {
    let logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "the kernel programs' log cannot be read");
            return;
        }
    };
    // SAFETY: the logger owns its ring buffer's descriptor and never replaces it.
    let watched = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let Ok(mut logger) = watched else {
        warn!("the kernel programs' log cannot be watched");
        return;
    };
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
}

//! Capture: the kernel side of the agent.
//!
//! Loads and pins the programs, enrols pods, tells the kernel which addresses the mesh knows and says what a captured
//! connection's original destination was. The only module that knows aya, network namespaces and cgroups. It does not
//! know why a pod is enrolled, nor what becomes of a connection.

mod cgroup;
mod charge;
mod codes;
mod counters;
mod dial;
mod direct;
mod earlier;
mod error;
mod inherited;
mod kubelet;
mod link;
mod listener;
mod loader;
mod netns;
mod pinned;
mod place;
mod places;
mod pod;
mod preflight;
mod programs;
mod sock_diag;
mod sockopt;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use imbl::OrdSet;
use imbl::ordset::DiffItem;
use tracing::{debug, info, warn};
use undermesh_common::Tuple;
use undermesh_common::maps::Voucher;

use crate::model::{Opened, Probers, SameNode, Workload, WorkloadUid};
use crate::snapshot::Snapshot;

pub use charge::Succession;
pub use codes::{Code, CodeTable, bound_source};
pub use counters::PodCounters;
pub use dial::{Dial, Dialer};
pub use earlier::{EarlierConnection, EarlierConnections};
pub use error::{CaptureError, Part};
pub use kubelet::{KubeletSettings, OnKubeletUnknown};
pub use listener::PodListeners;
pub use netns::{Netns, leave_unless as leave_netns_unless};
pub use pinned::PinnedPods;
pub use pod::PodNet;
pub use preflight::Preflight;
pub use sockopt::set_local;
pub use undermesh_common::maps::Counters;

use codes::Codes;
use error::map_error;
use inherited::Inherited;
use kubelet::Kubelet;
use places::Places;
use pod::Enrolled;
use programs::Programs;

/// What new connections of enrolled pods find while the agent is gone or hung (`--on-agent-down`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnAgentDown {
    /// They go straight to their destination.
    #[default]
    Open,
    /// They are refused.
    Closed,
}

/// What the user may set.
#[derive(Clone, Debug)]
pub struct CaptureSettings {
    /// Folder of the pins, on a bpffs.
    pub bpffs: PathBuf,
    /// What happens without an agent.
    pub on_agent_down: OnAgentDown,
    /// How many listeners share each pod's connections: one per worker.
    pub workers: usize,
    /// Take over from an agent that runs, instead of refusing to start beside it.
    pub take_over: bool,
    /// Whose connections are probes; none where there is no kubelet.
    pub kubelet: Option<KubeletSettings>,
    /// How pods of this node reach each other.
    pub same_node: SameNode,
}

/// How long a pod that is captured no more is still steered: a SYN that was lost on its way to the agent comes again
/// after a second (RFC 6298), and would reach a listener of the application's own otherwise, or nobody.
const UNENROL_GRACE: Duration = Duration::from_millis(1500);

/// The enrolled pods by address: a fact, where a label is only a wish.
pub type EnrolledPods = Arc<ArcSwap<imbl::HashMap<IpAddr, Arc<PodNet>>>>;

/// The loaded kernel side and the pods enrolled in it.
#[derive(Debug)]
pub struct Capture {
    programs: Programs,
    settings: CaptureSettings,
    codes: Codes,
    captured: OrdSet<IpAddr>,
    pods: HashMap<WorkloadUid, Enrolled>,
    by_address: EnrolledPods,
    /// Pods that are captured no more, since when, and still steered.
    leaving: Vec<(Instant, Enrolled)>,
    /// Pods that are to be enrolled and have lost their place, see [`Self::strand`].
    stranded: HashMap<WorkloadUid, Enrolled>,
    /// Un-enrolled pods that still have connections.
    retiring: Vec<Arc<PodNet>>,
    /// A pod has left whose vouched connections nobody removes any more.
    vouched_stale: bool,
    /// Pods that are reached through tunnels alone, and were not before.
    shut: Vec<WorkloadUid>,
    kubelet: Option<Kubelet>,
    places: Places,
    earlier: EarlierConnections,
    inherited: Inherited,
    /// Enrolled pods that nobody has looked at yet for what they had before.
    new: Vec<WorkloadUid>,
}

/// A pod that was just enrolled: its listeners wait to be served, one set per worker.
#[derive(Debug)]
pub struct NewPod {
    /// The pod.
    pub net: Arc<PodNet>,
    /// One entry per worker.
    pub listeners: Vec<PodListeners>,
    /// What takes plaintext that refused it when the agent before this one was last there.
    pub opened: Option<Opened>,
}

impl Capture {
    /// Loads the programs, or takes over the pinned maps of an agent that was here before. Pods that it had enrolled
    /// stay as they are, captured or in their down mode, until they are enrolled again or [`Self::forget_strangers`].
    pub fn start(settings: CaptureSettings) -> Result<Self, CaptureError> {
        Preflight::check(&settings.bpffs)?;
        let mut programs = Programs::load(&settings)?;
        let mut kubelet = settings.kubelet.clone().map(Kubelet::new);
        if let Some(kubelet) = &mut kubelet {
            kubelet.attend(&mut programs, Instant::now());
        }
        let codes = Codes::adopt(&programs)?;
        let captured = codes.addresses();
        if !captured.is_empty() {
            info!(addresses = captured.len(), "took over the pinned maps of an earlier agent");
        }
        Ok(Self {
            inherited: Inherited::of(&programs),
            programs,
            settings,
            codes,
            captured,
            pods: HashMap::new(),
            by_address: EnrolledPods::default(),
            leaving: Vec::new(),
            stranded: HashMap::new(),
            retiring: Vec::new(),
            vouched_stale: false,
            shut: Vec::new(),
            kubelet,
            places: Places::new(),
            earlier: EarlierConnections::default(),
            new: Vec::new(),
        })
    }

    /// What stands behind each code, for the proxy.
    pub fn code_table(&self) -> CodeTable {
        self.codes.table()
    }

    /// The enrolled pods by address, for the proxy.
    pub fn enrolled(&self) -> EnrolledPods {
        self.by_address.clone()
    }

    /// The pods that are captured, as whoever is not in charge sees them.
    pub fn pinned(&self) -> PinnedPods {
        PinnedPods::new(self.programs.pods_folder())
    }

    /// A dialler for one worker.
    pub fn dialer(&self) -> Result<Dialer, CaptureError> {
        Dialer::new(&self.programs)
    }

    /// Has the kernel forget the addresses that are not the mesh's any more. Touches only what changed.
    pub fn forget_destinations(&mut self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        let before = self.captured.clone();
        let gone = before.diff(&snapshot.captured).filter_map(|item| match item {
            DiffItem::Remove(address) => Some(*address),
            DiffItem::Add(_) => None,
        });
        let now = Instant::now();
        let mut result = Ok(());
        for address in gone {
            self.captured.remove(&address);
            result = self.codes.remove(address, now).and(result);
        }
        result
    }

    /// Makes the snapshot's addresses known to the kernel. Touches only what changed.
    pub fn learn_destinations(&mut self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        let before = self.captured.clone();
        let new = before.diff(&snapshot.captured).filter_map(|item| match item {
            DiffItem::Add(address) => Some(*address),
            DiffItem::Remove(_) => None,
        });
        let mut result = Ok(());
        for address in new {
            result = match self.codes.add(address) {
                Ok(()) => {
                    self.captured.insert(address);
                    result
                }
                // It stays unknown, hence uncaptured, and is tried again with the next snapshot.
                Err(error) => Err(error),
            };
        }
        result
    }

    /// Whether this very pod (not a predecessor of its name) is enrolled.
    pub fn is_enrolled(&self, uid: &WorkloadUid) -> bool {
        self.pods.contains_key(uid)
    }

    /// Whether the pod is enrolled, in its place or not, and processes of it are left.
    pub fn runs(&self, uid: &WorkloadUid) -> bool {
        let enrolled = self.pods.get(uid).or_else(|| self.stranded.get(uid));
        enrolled.is_some_and(|enrolled| !enrolled.net.is_deserted())
    }

    /// Whether the pod is enrolled with other addresses, at another place or as somebody else than it is now.
    pub fn has_moved(&self, workload: &Workload) -> bool {
        self.pods.get(&workload.uid).is_some_and(|enrolled| {
            let then = &enrolled.net.workload;
            then.addresses != workload.addresses
                || then.paths != workload.paths
                || then.identity != workload.identity
        })
    }

    /// Pods whose cgroup or network namespace is not, or not any more, what their paths lead to. The kernel takes the
    /// programs of a cgroup away with it, and a new namespace has none.
    pub fn displaced(&mut self) -> Vec<WorkloadUid> {
        // Before the look: what is replaced from here on is told of.
        self.places.watch(
            self.pods
                .values()
                .flat_map(Enrolled::paths)
                .chain(self.kubelet.iter().filter_map(Kubelet::place)),
        );
        let displaced = self.pods.iter().filter(|(_, enrolled)| !enrolled.is_in_place());
        displaced.map(|(uid, _)| uid.clone()).collect()
    }

    /// Returns when a look at what is [`Self::displaced`] may be due. Cancelling it loses nothing.
    pub async fn stirred(&mut self) {
        self.places.stirred().await;
    }

    /// Takes a displaced pod that is still wanted out of the mesh. What is left of it is steered as before, so that one
    /// that takes no plaintext never does: until it is enrolled again, is wanted no more or nobody can use its namespace.
    pub fn strand(&mut self, uid: &WorkloadUid) -> Option<Arc<PodNet>> {
        let enrolled = self.take_out(uid)?;
        let net = enrolled.net.clone();
        self.stranded.insert(uid.clone(), enrolled);
        // The program that would remove them went with the cgroup.
        self.forget_vouched();
        Some(net)
    }

    /// Enrols a running pod. Its existing connections are left alone. On an error nothing new is left of it: a pod that
    /// an earlier agent had enrolled stays in its down mode.
    pub fn enrol(&mut self, workload: &Arc<Workload>) -> Result<NewPod, CaptureError> {
        let net = PodNet::open(workload, self.settings.same_node)?;
        if let Some(other) = self.occupant(&net) {
            let error = io::Error::other(format!("it is that of {}, which is enrolled", other.pod));
            return Err(Part::Netns.step("taking the pod's network namespace")(error));
        }
        // Under another name it has other pins.
        self.complete(|_, leaving| leaving.net.cookie == net.cookie && leaving.net.pod != net.pod);
        let enrolled = Enrolled::enrol(&mut self.programs, &net, self.settings.workers);
        let (enrolled, listeners) = enrolled.inspect_err(|_| self.drop_route(&net))?;
        let opened = self.inherited.opened(net.cookie, enrolled.entry());
        self.supersede(&net);
        self.by_address.rcu(|pods| {
            let mut pods = imbl::HashMap::clone(pods);
            for address in &net.addresses {
                pods.insert(*address, net.clone());
            }
            pods
        });
        if enrolled.is_tunnelled() {
            self.shut.push(workload.uid.clone());
        }
        self.pods.insert(workload.uid.clone(), enrolled);
        self.new.push(workload.uid.clone());
        Ok(NewPod { net, listeners, opened })
    }

    /// The other pod that has the network namespace.
    fn occupant(&self, net: &PodNet) -> Option<&PodNet> {
        let stranded = self.stranded.iter().filter(|(uid, _)| **uid != net.workload.uid);
        let mut others = self.pods.iter().chain(stranded).map(|(_, enrolled)| &*enrolled.net);
        others.find(|other| other.cookie == net.cookie)
    }

    /// A new enrolment has taken the place of earlier ones of the pod in the same namespace: there was no moment between
    /// them. Their listeners close when the workers get the new ones.
    fn supersede(&mut self, net: &PodNet) {
        let stranded = self.stranded.remove(&net.workload.uid);
        self.leaving.extend(stranded.map(|enrolled| (Instant::now(), enrolled)));
        let replaced = self.leaving.extract_if(.., |(_, enrolled)| enrolled.net.cookie == net.cookie);
        self.retiring.extend(replaced.map(|(_, enrolled)| enrolled.net));
    }

    /// Takes what may change while a pod runs (its mTLS mode) over into the kernel.
    pub fn update(&mut self, workload: &Workload) -> Result<(), CaptureError> {
        let Some(enrolled) = self.pods.get_mut(&workload.uid) else { return Ok(()) };
        let was_tunnelled = enrolled.is_tunnelled();
        enrolled.update(&mut self.programs, workload)?;
        if enrolled.is_tunnelled() && !was_tunnelled {
            self.shut.push(workload.uid.clone());
        }
        Ok(())
    }

    /// Ends what other pods have open directly to pods that are reached through tunnels alone since the last call. The kernel lets in
    /// nothing of the kind any more, so none is left.
    pub fn end_direct(&mut self) {
        for uid in std::mem::take(&mut self.shut) {
            if let Some(enrolled) = self.pods.get(&uid) {
                direct::end(&self.programs, &enrolled.net);
            }
        }
    }

    /// Takes a pod out of the mesh: from now on nothing that it dials is captured. What is on its way to the agent still
    /// gets there: the rest goes with [`Self::left`], some moments later.
    pub fn unenrol(&mut self, uid: &WorkloadUid, now: Instant) -> Option<Arc<PodNet>> {
        let enrolled = self.take_out(uid).or_else(|| self.stranded.remove(uid))?;
        let net = enrolled.net.clone();
        self.leaving.push((now, enrolled));
        Some(net)
    }

    fn take_out(&mut self, uid: &WorkloadUid) -> Option<Enrolled> {
        let enrolled = self.pods.remove(uid)?;
        self.earlier.forget(uid);
        let net = &enrolled.net;
        self.by_address.rcu(|pods| {
            let mut pods = imbl::HashMap::clone(pods);
            for address in &net.addresses {
                // A successor may have the address by now.
                if pods.get(address).is_some_and(|other| Arc::ptr_eq(other, net)) {
                    pods.remove(address);
                }
            }
            pods
        });
        enrolled.stop_capturing();
        Some(enrolled)
    }

    /// Pods whose un-enrolment is complete as of now: nothing of ours is on them. Connections that the agent relays go
    /// on; the caller closes the listeners.
    pub fn left(&mut self, now: Instant) -> Vec<Arc<PodNet>> {
        let abandoned = self.stranded.extract_if(|_, enrolled| enrolled.net.is_abandoned());
        self.leaving.extend(abandoned.map(|(_, enrolled)| (now, enrolled)));
        self.complete(|since, enrolled| {
            now.saturating_duration_since(since) >= UNENROL_GRACE || enrolled.net.is_deserted()
        })
    }

    fn complete(&mut self, is_due: impl Fn(Instant, &Enrolled) -> bool) -> Vec<Arc<PodNet>> {
        let (due, leaving) =
            std::mem::take(&mut self.leaving).into_iter().partition(|(since, pod)| is_due(*since, pod));
        self.leaving = leaving;
        let due: Vec<(Instant, Enrolled)> = due;
        for (_, enrolled) in &due {
            enrolled.unenrol(&mut self.programs);
            self.vouched_stale = true;
            self.retiring.push(enrolled.net.clone());
        }
        due.into_iter().map(|(_, enrolled)| enrolled.net).collect()
    }

    /// Removes what an earlier agent left of pods that are not to be enrolled now. One that is wanted and could not be
    /// enrolled yet keeps its programs: it is in its down mode meanwhile.
    pub fn forget_strangers<'a>(&self, wanted: impl Iterator<Item = &'a Workload>) {
        let wanted: Vec<String> = wanted.map(|workload| pod::pin_prefix(&workload.pod)).collect();
        match self.programs.forget_pods_except(|pin| wanted.iter().any(|prefix| pin.starts_with(prefix))) {
            Ok(0) => {}
            Ok(count) => info!(count, "removed what an earlier agent had left of pods no longer enrolled"),
            Err(error) => warn!(%error, "cannot remove what an earlier agent left"),
        }
    }

    /// Housekeeping: codes that no connection shows any more, namespaces of pods that have gone.
    pub fn tidy(&mut self, now: Instant) {
        self.codes.tidy(now);
        if let Some(kubelet) = &mut self.kubelet {
            kubelet.attend(&mut self.programs, now);
        }
        if std::mem::take(&mut self.vouched_stale) {
            self.forget_vouched();
        }
        // One reference here; the others are connections.
        let (in_use, idle) =
            std::mem::take(&mut self.retiring).into_iter().partition(|net| Arc::strong_count(net) > 1);
        self.retiring = in_use;
        let idle: Vec<Arc<PodNet>> = idle;
        for net in idle.into_iter().filter(|net| !self.needs_routes(net.cookie)) {
            debug!(pod = %net.pod, "the last connection of an un-enrolled pod has ended");
            net.leave();
        }
    }

    /// Whether nothing is under way that nobody tells of, so that housekeeping may wait until something happens.
    pub fn is_settled(&self) -> bool {
        let is_under_way =
            self.leaving.len() + self.stranded.len() + self.retiring.len() + self.new.len() > 0;
        !is_under_way
            && !self.vouched_stale
            && self.kubelet.iter().all(Kubelet::is_attended)
            && self.places.is_complete()
    }

    /// Looks what the pods that were enrolled since the last call had open before.
    pub fn look_for_earlier(&mut self) {
        for uid in std::mem::take(&mut self.new) {
            let Some(enrolled) = self.pods.get(&uid) else { continue };
            let is_of_mesh = |address| self.captured.contains(&address);
            if let Err(error) = self.earlier.look(&enrolled.net, &self.by_address, is_of_mesh) {
                let pod = &enrolled.net.pod;
                warn!(%pod, %error, "cannot see which connections the pod had before it was enrolled");
            }
        }
    }

    /// What pods had open before they were enrolled, and still have.
    pub fn earlier(&self) -> EarlierConnections {
        self.earlier.clone()
    }

    /// Whose connections pass for the kubelet's; none where there is no kubelet.
    pub fn probers(&self) -> Option<&Probers> {
        self.kubelet.as_ref()?.probers()
    }

    /// Of connections to addresses that are none of an enrolled pod: the program that would have removed the vouchers went with the pod.
    fn forget_vouched(&self) {
        let enrolled = self.by_address.load();
        let is_stale = |tuple: &Tuple, _: &Voucher| !enrolled.contains_key(&IpAddr::from(tuple.destination));
        if let Err(error) = self.programs.forget_vouched(is_stale) {
            warn!(%error, "cannot remove vouchers for pods that have left");
        }
    }

    /// After an enrolment that failed. Programs of an earlier agent refuse by way of the route.
    fn drop_route(&self, net: &PodNet) {
        let pins = self.programs.pod_pins(&pod::pin_label(&net.pod, net.cookie));
        if !self.needs_routes(net.cookie) && !pins.exists() {
            net.leave();
        }
    }

    /// A pod may have been enrolled several times, and connections of each time may live on: they share its routes.
    fn needs_routes(&self, cookie: u64) -> bool {
        let leaving = self.leaving.iter().map(|(_, pod)| pod);
        let enrolled = self.pods.values().chain(self.stranded.values()).chain(leaving);
        let mut nets = enrolled.map(|pod| &pod.net).chain(&self.retiring);
        nets.any(|net| net.cookie == cookie)
    }

    /// Un-enrolled pods whose last process has exited: what is left of their connections serves nobody any more.
    pub fn deserted(&self) -> Vec<Arc<PodNet>> {
        let is_back = |net: &PodNet| {
            self.pods.values().chain(self.stranded.values()).any(|pod| pod.net.cookie == net.cookie)
        };
        self.retiring.iter().filter(|net| net.is_deserted() && !is_back(net)).cloned().collect()
    }

    /// The writer of the agent's sign of life.
    pub fn heartbeat(&self) -> Result<Heartbeat, CaptureError> {
        self.programs.heartbeat(self.settings.on_agent_down)
    }

    /// A reader of what the kernel programs counted.
    pub fn counters(&self) -> Result<PodCounters, CaptureError> {
        PodCounters::open(&self.programs)
    }

    /// Every pod that is to be is enrolled: an agent whose place this one takes may close its listeners.
    pub fn settled(&mut self) {
        self.programs.charge().complete();
    }

    /// Watches for an agent that wants to take this one's place.
    pub fn succession(&self) -> Result<Succession, CaptureError> {
        self.programs.succession()
    }

    /// Lets another agent have the kernel side. Pods are enrolled by that one from here on, and accepted for as long as
    /// their listeners are in the maps; nothing may be asked of `self` but [`Self::served`].
    pub fn let_go(&mut self) {
        self.programs.charge().let_go();
    }

    /// Has the kernel side again, if the agent that it was left to has died. False if it has not.
    pub fn take_back(&mut self) -> Result<bool, CaptureError> {
        self.programs.take_back()
    }

    /// Every enrolled pod.
    pub fn enrolled_uids(&self) -> Vec<WorkloadUid> {
        self.pods.keys().cloned().collect()
    }

    /// The pods that are enrolled, as they were when they were.
    pub fn enrolled_workloads(&self) -> impl Iterator<Item = &Workload> {
        self.pods.values().map(|pod| &*pod.net.workload)
    }

    /// The pods that have listeners of this agent.
    pub fn served(&self) -> impl Iterator<Item = &Arc<PodNet>> {
        let enrolled = self.pods.values().chain(self.stranded.values());
        enrolled.map(|pod| &pod.net).chain(self.leaving.iter().map(|(_, pod)| &pod.net))
    }

    /// How many workers the pods' connections are spread over.
    pub fn workers(&self) -> usize {
        self.settings.workers
    }
}

/// Removes every link, program and map that agents pinned under `bpffs`, so that no pod is enrolled any more.
pub fn detach_all(bpffs: &std::path::Path) -> io::Result<usize> {
    programs::detach_all(bpffs)
}

/// The agent's sign of life, owned by the thread that watches the workers.
pub struct Heartbeat {
    map: aya::maps::Array<aya::maps::MapData, undermesh_common::maps::Agent>,
    agent: undermesh_common::maps::Agent,
}

impl Heartbeat {
    /// Writes the time (`CLOCK_MONOTONIC`, ns) at which every worker was last seen working.
    pub fn beat(&mut self, at_ns: u64) -> Result<(), CaptureError> {
        self.agent.heartbeat_ns = at_ns;
        self.map
            .set(0, self.agent, 0)
            .map_err(|error| CaptureError::Map { map: "agents", reason: error.to_string() })
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds, the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // The clock exists on every Linux; were it missing, the agent would count as hung, which fails as configured.
    now.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

//! One enrolled pod: its place in the maps, its listeners and its programs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{HashMap as BpfHashMap, MapData, SockHash};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::route::{RouteProtocol, RouteScope, RouteType};
use rtnetlink::{RouteMessageBuilder, new_connection};
use tracing::debug;
use undermesh_common::maps::{
    INBOUND, Listener, MODE_EXCEPTIONS, OUTBOUND, POD_ADDRESSES, PROBED_PORTS, Pod,
};
use undermesh_common::{Address, code, source};

use super::listener::{self, PodListeners};
use super::place::FileId;
use super::programs::{COOKIE_FREE, Programs, detach_connects, unpin_pod, zeros};
use super::{CaptureError, Netns, Part, cgroup, map_error};
use crate::model::{MtlsMode, ObjectRef, PodPaths, SameNode, Workload};

/// An enrolled pod's network, for whoever dials from it. Connections keep it alive.
#[derive(Debug)]
pub struct PodNet {
    /// Namespace and name.
    pub pod: ObjectRef,
    /// The pod when it was enrolled.
    pub workload: Arc<Workload>,
    /// What the kernel programs know its network namespace by.
    pub cookie: u64,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    pub(super) netns: Netns,
    same_node: SameNode,
    /// Of an agent in charge, never false while the kernel refuses what does not come through a tunnel.
    tunnelled: AtomicBool,
}

impl PodNet {
    /// Opens the pod's network namespace.
    pub(super) fn open(workload: &Arc<Workload>, same_node: SameNode) -> Result<Arc<Self>, CaptureError> {
        let path = &paths(workload)?.netns;
        let netns = Netns::open(path).map_err(Part::Netns.step(format!("opening {}", path.display())))?;
        Ok(Arc::new(Self {
            pod: workload.pod.clone(),
            workload: workload.clone(),
            cookie: netns.cookie(),
            addresses: workload.addresses.clone(),
            netns,
            same_node,
            tunnelled: AtomicBool::new(same_node.tunnels_to(workload)),
        }))
    }

    /// Whether a pod of this node with this address reaches it through a tunnel alone. What it says to itself never leaves its
    /// loopback.
    pub fn wants_tunnel_from(&self, source: IpAddr) -> bool {
        self.is_tunnelled() && !self.addresses.contains(&source)
    }

    /// Whether other pods of this node reach it through a tunnel alone.
    pub fn is_tunnelled(&self) -> bool {
        self.tunnelled.load(Ordering::Relaxed)
    }

    /// Has this agent's new connections be made as the pod is to be reached now. An agent in charge has the kernel agree with it.
    pub fn follow(&self, workload: &Workload) {
        self.tunnelled.store(self.same_node.tunnels_to(workload), Ordering::Relaxed);
    }

    /// The pod's address of the family of `like`.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }

    /// Whether the last process of the pod has exited.
    pub(super) fn is_deserted(&self) -> bool {
        self.workload.paths.as_ref().is_none_or(|paths| !cgroup::is_populated(&paths.cgroup))
    }

    /// Whether the pod's path still leads to this namespace.
    fn is_in_place(&self) -> bool {
        self.workload.paths.as_ref().is_some_and(|paths| self.netns.is_at(&paths.netns))
    }

    /// Whether nobody can use this namespace any more: no path leads to it and no process of the pod is left.
    pub(super) fn is_abandoned(&self) -> bool {
        !self.is_in_place() && self.is_deserted()
    }

    /// Makes reachable what the agent needs in the pod, in the families that the pod has.
    fn add_routes(&self) -> Result<(), CaptureError> {
        self.netns
            .run(|| self.change_routes(RouteChange::Add))
            .and_then(|result| result)
            .map_err(Part::Netns.step("adding the local routes to the agent's sources and the IPv6 codes"))
    }

    /// Takes the routes away, when no connection needs them any more.
    pub(super) fn leave(&self) {
        let removed = self.netns.run(|| self.change_routes(RouteChange::Remove));
        if let Err(error) = removed.and_then(|result| result) {
            // The namespace is going away.
            debug!(pod = %self.pod, %error, "the agent's routes are not there to be removed");
        }
    }

    fn change_routes(&self, change: RouteChange) -> io::Result<()> {
        let has = |ipv4| self.addresses.iter().any(|address| address.to_canonical().is_ipv4() == ipv4);
        let routes = [has(true).then(route_to_sources), has(false).then(route_to_codes)];
        change_routes(change, routes.into_iter().flatten())
    }
}

/// A pod while it is enrolled.
#[derive(Debug)]
pub(super) struct Enrolled {
    pub(super) net: Arc<PodNet>,
    /// The one that the programs are on. The kernel takes them away with it.
    cgroup: FileId,
    pins: PathBuf,
    entry: Pod,
}

impl Enrolled {
    /// Every step that captures comes after all that a captured connection needs. On an error the route to the IPv6
    /// codes may be left: only the caller knows who else needs it.
    pub(super) fn enrol(
        programs: &mut Programs,
        net: &Arc<PodNet>,
        workers: usize,
    ) -> Result<(Self, Vec<PodListeners>), CaptureError> {
        let paths = paths(&net.workload)?;
        let cgroup = cgroup::open(&paths.cgroup)
            .map_err(Part::Cgroup.step(format!("opening {}", paths.cgroup.display())))?;
        let id = FileId::of(&cgroup).map_err(Part::Cgroup.step("asking which cgroup it is"))?;
        let entry = map_entry(net)?;
        net.add_routes()?;
        let listeners =
            listener::open(&net.netns, workers).map_err(Part::Listeners.step("listening inside the pod"))?;

        let label = pin_label(&net.pod, net.cookie);
        let enrolled = Self { net: net.clone(), cgroup: id, pins: programs.pod_pins(&label), entry };
        // An earlier agent's programs protect the pod until ours do, or for as long as ours cannot.
        let protected = enrolled.pins.exists();
        match enrolled.capture(programs, &cgroup, &listeners) {
            Ok(()) => {
                programs.forget_other_lives(&label);
                Ok((enrolled, listeners))
            }
            Err(error) => {
                if !protected {
                    enrolled.unenrol(programs);
                }
                Err(error)
            }
        }
    }

    fn capture(
        &self,
        programs: &mut Programs,
        cgroup: &std::fs::File,
        listeners: &[PodListeners],
    ) -> Result<(), CaptureError> {
        std::fs::create_dir_all(&self.pins)
            .map_err(Part::Links.step(format!("making {}", self.pins.display())))?;
        self.write_entries(programs, listeners)?;
        programs.attach_to_netns(self.net.netns.as_fd(), self.net.cookie, &self.pins)?;
        for name in COOKIE_FREE {
            programs.attach_to_cgroup(name, cgroup, &self.pins)?;
        }
        Ok(())
    }

    fn write_entries(&self, programs: &Programs, listeners: &[PodListeners]) -> Result<(), CaptureError> {
        let cookie = self.net.cookie;
        let mut counters = programs.counters()?;
        // An earlier agent's counts go on: they tell what happened while nobody watched.
        for cookie in [0, cookie] {
            if counters.get(&cookie, 0).is_err() {
                zeros().and_then(|zeros| counters.insert(cookie, zeros, 0)).map_err(map_error("counters"))?;
            }
        }
        let mut sockets: SockHash<MapData, Listener> =
            SockHash::try_from(programs.open_map("listeners")?).map_err(map_error("listeners"))?;
        // One of each group is enough: the kernel spreads connections over the rest (SO_REUSEPORT).
        if let Some(set) = listeners.first() {
            sockets
                .insert(Listener::new(cookie, INBOUND), set.inbound.as_raw_fd(), 0)
                .map_err(map_error("listeners"))?;
            sockets
                .insert(Listener::new(cookie, OUTBOUND), set.outbound.as_raw_fd(), 0)
                .map_err(map_error("listeners"))?;
        }
        self.write_pod(programs)
    }

    fn write_pod(&self, programs: &Programs) -> Result<(), CaptureError> {
        let mut pods: BpfHashMap<MapData, u64, Pod> = programs.hash_map("pods")?;
        pods.insert(self.net.cookie, self.entry, 0).map_err(map_error("pods"))
    }

    /// The pod's paths.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        let paths = self.net.workload.paths.iter();
        paths.flat_map(|paths| [paths.netns.as_path(), paths.cgroup.as_path()])
    }

    /// Whether the pod's paths still lead to what it was enrolled in.
    pub(super) fn is_in_place(&self) -> bool {
        let paths = self.net.workload.paths.as_ref();
        self.net.is_in_place() && paths.is_some_and(|paths| self.cgroup.is_at(&paths.cgroup))
    }

    /// Takes over what may change while the pod runs.
    pub(super) fn update(
        &mut self,
        programs: &mut Programs,
        workload: &Workload,
    ) -> Result<(), CaptureError> {
        let entry = with_settings(self.entry, workload, self.net.same_node);
        if self.entry == entry {
            return Ok(());
        }
        if entry.tunnelled != 0 {
            // Before the kernel refuses what does not come through a tunnel; not after it takes it again.
            self.net.follow(workload);
        }
        let before = std::mem::replace(&mut self.entry, entry);
        let written = self.write_pod(programs);
        if written.is_err() {
            // So that the next try does not take it for done.
            self.entry = before;
        } else {
            self.net.follow(workload);
        }
        written
    }

    /// What the kernel knows of it.
    pub(super) fn entry(&self) -> &Pod {
        &self.entry
    }

    /// Whether the kernel refuses what does not come through a tunnel.
    pub(super) fn is_tunnelled(&self) -> bool {
        self.entry.tunnelled != 0
    }

    /// Before anything else of the pod is taken away, and done when this returns.
    pub(super) fn stop_capturing(&self) {
        if let Err(error) = detach_connects(&self.pins) {
            tracing::warn!(pod = %self.net.pod, %error, pins = %self.pins.display(), "cannot detach the pod's connect programs");
        }
    }

    /// Nothing of ours stays but what connections still need.
    pub(super) fn unenrol(&self, programs: &mut Programs) {
        if let Err(error) = unpin_pod(&self.pins) {
            tracing::warn!(pod = %self.net.pod, %error, pins = %self.pins.display(), "cannot remove the pod's pins");
        }
        programs.remove_entries(self.net.cookie);
    }
}

fn paths(workload: &Workload) -> Result<&PodPaths, CaptureError> {
    workload.paths.as_ref().ok_or_else(|| {
        let lack = "the pod has no annotations undermesh.io/netns and undermesh.io/cgroup";
        let error = io::Error::new(io::ErrorKind::NotFound, lack);
        Part::Netns.step("finding the pod's network namespace and cgroup")(error)
    })
}

/// The folder of a pod's pins, in the network namespace with this cookie.
pub(super) fn pin_label(pod: &ObjectRef, cookie: u64) -> String {
    format!("{}{cookie}", pin_prefix(pod))
}

/// What the labels of a pod's pins begin with, whatever its network namespace. A bpffs takes no dots in names, and no
/// name of Kubernetes has a plus or an underscore: no two pods share a label.
pub(super) fn pin_prefix(pod: &ObjectRef) -> String {
    format!("{}_{}_", pod.namespace, pod.name).replace('.', "+")
}

fn map_entry(net: &PodNet) -> Result<Pod, CaptureError> {
    let mut addresses = [Address::default(); POD_ADDRESSES];
    for (slot, address) in addresses.iter_mut().zip(&net.addresses) {
        *slot = Address::from(*address);
    }
    let interface = net
        .netns
        .run(|| interface_of(&net.addresses))
        .and_then(|result| result)
        .map_err(Part::Netns.step("finding the pod's interface"))?;
    Ok(with_settings(Pod { addresses, interface, ..Pod::default() }, &net.workload, net.same_node))
}

/// The entry, with what may change while the pod runs. Where more ports are exceptions than there is room for, all are strict. More
/// probed ports than there is room for were told of when the pod was read.
fn with_settings(entry: Pod, workload: &Workload, same_node: SameNode) -> Pod {
    let exceptions = workload.mtls_ports.iter().filter(|(_, mode)| *mode != workload.mtls);
    let exceptions: Vec<u16> = exceptions.map(|(port, _)| *port).collect();
    let mut mode_exceptions = [0; MODE_EXCEPTIONS];
    let has_room = exceptions.len() <= MODE_EXCEPTIONS;
    if has_room {
        mode_exceptions[..exceptions.len()].copy_from_slice(&exceptions);
    }
    let strict = u32::from(!has_room || workload.mtls == MtlsMode::Strict);
    let guarded = u32::from(workload.guarded);
    let tunnelled = u32::from(same_node.tunnels_to(workload));
    let mut probed_ports = [0; PROBED_PORTS];
    probed_ports.iter_mut().zip(&workload.probed_ports).for_each(|(slot, port)| *slot = *port);
    Pod { strict, guarded, tunnelled, mode_exceptions, probed_ports, ..entry }
}

/// The index of the interface that has one of the addresses.
fn interface_of(addresses: &[IpAddr]) -> io::Result<u32> {
    let ours = |address: &nix::ifaddrs::InterfaceAddress| {
        let ip = address.address.and_then(|storage| {
            let v4 = storage.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
        });
        ip.is_some_and(|ip| addresses.contains(&ip))
    };
    let interface = nix::ifaddrs::getifaddrs()?.find(ours).ok_or_else(|| {
        let list = addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("no interface of the pod has its status.podIPs ({list})"),
        )
    })?;
    Ok(nix::net::if_::if_nametoindex(interface.interface_name.as_str())?)
}

#[derive(Clone, Copy)]
enum RouteChange {
    Add,
    Remove,
}

/// `local <sources> dev lo`: what the agent dials the application from.
fn route_to_sources() -> RouteMessage {
    let network = Ipv4Addr::from(source::NETWORK4);
    let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, source::LENGTH4);
    to_itself(route).scope(RouteScope::Host).build()
}

/// `local <code prefix>/64 dev lo`: the IPv6 codes, bound sockets included, and the IPv6 sources.
fn route_to_codes() -> RouteMessage {
    let mut octets = [0; 16];
    octets[..8].copy_from_slice(&code::PREFIX6);
    let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::from(octets), 64);
    to_itself(route).scope(RouteScope::Universe).build()
}

fn to_itself<T>(route: RouteMessageBuilder<T>) -> RouteMessageBuilder<T> {
    const LO: u32 = 1;
    const LOCAL_TABLE: u32 = 255;
    route.output_interface(LO).table_id(LOCAL_TABLE).kind(RouteType::Local).protocol(RouteProtocol::Static)
}

/// In the calling thread's namespace. All are tried.
fn change_routes(change: RouteChange, routes: impl Iterator<Item = RouteMessage>) -> io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
        let (connection, handle, _) = new_connection()?;
        let connection = tokio::spawn(connection);
        let mut outcome = Ok(());
        for route in routes {
            let changed = match change {
                RouteChange::Add => handle.route().add(route).replace().execute().await,
                RouteChange::Remove => handle.route().del(route).execute().await,
            };
            outcome = outcome.and(changed);
        }
        connection.abort();
        outcome.map_err(io::Error::other)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_similar_names_have_labels_of_their_own() {
        let prefix = |name: &str| pin_prefix(&ObjectRef::new("shop", name));
        assert_eq!([prefix("web-a"), prefix("web.a")], ["shop_web-a_", "shop_web+a_"]);
        assert!(!prefix("web-a").starts_with(&prefix("web")));
    }
}

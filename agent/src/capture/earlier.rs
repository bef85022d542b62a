//! Connections that pods had before they were enrolled: nobody carries them, and nothing of the mesh holds for them.
//!
//! They are looked for once, right after the enrolment, and then known until they end: what a pod connects afterwards is carried, or
//! goes where the mesh is not. Whether anything is to become of them is for others to say.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use undermesh_common::{Address, code, source};

use super::pod::PodNet;
use super::sock_diag::{self, TcpSocket, TcpSocketId};
use super::{EnrolledPods, cgroup};
use crate::model::WorkloadUid;

/// Those of all enrolled pods.
#[derive(Clone, Debug, Default)]
pub struct EarlierConnections(Arc<Mutex<HashMap<WorkloadUid, OfPod>>>);

#[derive(Debug)]
struct OfPod {
    /// Whoever holds a pod's namespace is taken for one of its connections.
    net: Weak<PodNet>,
    connections: Vec<(EarlierConnection, TcpSocketId)>,
}

/// A connection that its pod had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlierConnection {
    /// Whether the pod was called.
    pub is_inbound: bool,
    /// The pod's own end.
    pub local: SocketAddr,
    /// The other end, as the pod knows it.
    pub peer: SocketAddr,
}

impl EarlierConnections {
    /// Looks for those of a pod that was just enrolled. `is_of_mesh` tells which destinations would be carried now.
    pub(super) fn look(
        &self,
        net: &Arc<PodNet>,
        enrolled: &EnrolledPods,
        is_of_mesh: impl Fn(IpAddr) -> bool,
    ) -> io::Result<()> {
        let (established, listening) =
            net.inside(|| Ok((sock_diag::established()?, sock_diag::listening()?)))?;
        let ports: HashSet<u16> = listening.iter().map(|socket| socket.local.port()).collect();
        let own = net.cgroup_ids();
        let mut found = Vec::new();
        for socket in established.iter().filter(|socket| is_one_of(socket, &own)) {
            let is_inbound = ports.contains(&socket.local.port());
            let peer = socket.peer.ip();
            if !is_its_own(net, peer) && (is_inbound || is_of_mesh(peer)) {
                let TcpSocket { local, peer, .. } = *socket;
                found.push((EarlierConnection { is_inbound, local, peer }, socket.id.clone()));
            }
        }
        // An agent stands for a client of this node in the client's own namespace.
        let mut carried: HashMap<IpAddr, HashSet<(SocketAddr, SocketAddr)>> = HashMap::new();
        let pods = enrolled.load();
        for (connection, _) in &found {
            let peer = connection.peer.ip();
            if let Some(net) = pods.get(&peer)
                && !carried.contains_key(&peer)
            {
                carried.insert(peer, of_agents(net)?);
            }
        }
        found.retain(|(connection, _)| {
            let of_peer = carried.get(&connection.peer.ip());
            of_peer.is_none_or(|agents| !agents.contains(&(connection.peer, connection.local)))
        });
        let mut all = self.lock();
        match found.is_empty() {
            true => drop(all.remove(&net.workload.uid)),
            false => {
                let of_pod = OfPod { net: Arc::downgrade(net), connections: found };
                all.insert(net.workload.uid.clone(), of_pod);
            }
        }
        Ok(())
    }

    /// Those of a pod are nobody's business any more.
    pub(super) fn forget(&self, uid: &WorkloadUid) {
        self.lock().remove(uid);
    }

    /// The pods that may have any.
    pub fn pods(&self) -> Vec<Arc<PodNet>> {
        self.lock().values().filter_map(|of_pod| of_pod.net.upgrade()).collect()
    }

    /// Those that are still open, by their pods. It asks the kernel, so it may block for a moment.
    pub fn open(&self) -> Vec<(Arc<PodNet>, Vec<EarlierConnection>)> {
        let of = |net: Arc<PodNet>| {
            let open = self.open_of(&net).unwrap_or_default();
            (!open.is_empty()).then_some((net, open))
        };
        self.pods().into_iter().filter_map(of).collect()
    }

    /// Those of one pod.
    pub fn open_of(&self, net: &PodNet) -> io::Result<Vec<EarlierConnection>> {
        let is_known = self.lock().contains_key(&net.workload.uid);
        if !is_known {
            return Ok(Vec::new());
        }
        let established = net.inside(sock_diag::established)?;
        let mut all = self.lock();
        let Some(of_pod) = all.get_mut(&net.workload.uid) else { return Ok(Vec::new()) };
        let ids: Vec<_> = established.iter().map(|socket| (socket.local, &socket.id)).collect();
        of_pod.connections.retain(|(connection, id)| ids.contains(&(connection.local, id)));
        let open: Vec<_> = of_pod.connections.iter().map(|(connection, _)| *connection).collect();
        if open.is_empty() {
            all.remove(&net.workload.uid);
        }
        Ok(open)
    }

    /// Ends those of a pod that are meant; how many there were. Where the kernel cannot do that, none.
    ///
    /// # Errors
    /// What the kernel says; `Unsupported` without `CONFIG_INET_DIAG_DESTROY`.
    pub fn close(&self, net: &PodNet, is_meant: impl Fn(&EarlierConnection) -> bool) -> io::Result<usize> {
        let meant: Vec<_> = match self.lock().get(&net.workload.uid) {
            Some(of_pod) => {
                let meant = of_pod.connections.iter().filter(|(connection, _)| is_meant(connection));
                meant.map(|(_, id)| id.clone()).collect()
            }
            None => Vec::new(),
        };
        net.inside(|| sock_diag::destroy_all(&meant))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkloadUid, OfPod>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PodNet {
    pub(super) fn inside<T: Send>(&self, ask: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        self.netns.run(ask).and_then(|answer| answer)
    }

    /// The pod's cgroups, by what sockets know them by.
    fn cgroup_ids(&self) -> HashSet<u64> {
        self.workload.paths.as_ref().map(|paths| cgroup::ids_below(&paths.cgroup)).unwrap_or_default()
    }
}

fn is_one_of(socket: &TcpSocket, cgroups: &HashSet<u64>) -> bool {
    socket.cgroup.is_some_and(|cgroup| cgroups.contains(&cgroup))
}

/// Loopback, the pod's own addresses, the codes that stand for what the agent carries, and the sources that it dials from.
fn is_its_own(net: &PodNet, peer: IpAddr) -> bool {
    let address = Address::from(peer);
    peer.is_loopback()
        || net.addresses.contains(&peer)
        || code::of(&address).is_some()
        || source::is(&address)
}

/// What is in a pod's namespace and not the pod's own, by both ends: an agent's, this one or one that it takes over from.
fn of_agents(net: &PodNet) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
    let own = net.cgroup_ids();
    let all = net.inside(sock_diag::established)?;
    let agents = all.iter().filter(|socket| !is_one_of(socket, &own));
    Ok(agents.map(|socket| (socket.local, socket.peer)).collect())
}

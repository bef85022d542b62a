//! Connections that stand at this node's pods, so that one ends when policies do not let it in any more.
//!
//! Policies that have changed are asked again for each of them: how long it has been open makes no difference.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{AbortHandle, AbortRegistration, Abortable, FutureExt as _};
use tracing::info;

use super::Proxy;
use super::admission::{Caller, Door, Entry};
use crate::balance::Carries;
use crate::capture::PodNet;
use crate::model::{MtlsMode, Workload, WorkloadUid};
use crate::policy::authorization::Set;
use crate::policy::jwt::Rules;
use crate::snapshot::Snapshot;
use crate::telemetry::Security;

/// The pods of this node that are in the mesh.
type Pods = imbl::HashMap<IpAddr, Arc<PodNet>>;

/// Those of one worker thread.
#[derive(Debug, Default)]
pub(super) struct LetIn(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// By pod, for snapshots change often, and what they say of a pod seldom.
    pods: HashMap<WorkloadUid, AtPod>,
}

/// Those at one pod.
#[derive(Debug)]
struct AtPod {
    connections: HashMap<u64, Carried>,
    held_to: HeldTo,
}

/// What a snapshot says of who is let in at a pod.
#[derive(Debug)]
struct HeldTo {
    access: Option<Arc<Set>>,
    tokens: Option<Arc<Rules>>,
    workload: Option<Arc<Workload>>,
    is_tunnelled: bool,
}

#[derive(Debug)]
struct Carried {
    connection: Standing,
    end: AbortHandle,
}

/// A connection, and what it was let in as.
#[derive(Debug)]
pub(super) struct Standing {
    pub(super) door: Door,
    pub(super) visitor: Caller,
    pub(super) security: Security,
    pub(super) entry: Entry,
    pub(super) carries: Carries,
    /// Set once it was looked at, and has turned out to carry something else than requests.
    pub(super) carries_bytes: Arc<AtomicBool>,
}

impl LetIn {
    /// Takes in a connection, which stands for as long as policies let it, those of now to begin with.
    pub(super) fn enter(self: &Arc<Self>, proxy: &Proxy, connection: Standing) -> Entered {
        let (snapshot, enrolled) = (&proxy.snapshot.load(), &proxy.enrolled.load());
        let (end, ended) = AbortHandle::new_pair();
        let pod = connection.door.pod.clone();
        let mut new = Carried { connection, end };
        new.review(snapshot, enrolled);
        let mut open = self.lock();
        open.next += 1;
        let id = open.next;
        let at_pod = open.pods.entry(pod.clone());
        let nobody = || AtPod { connections: HashMap::new(), held_to: HeldTo::of(snapshot, enrolled, &pod) };
        at_pod.or_insert_with(nobody).connections.insert(id, new);
        drop(open);
        Entered { place: Place { all: self.clone(), pod, id }, ended }
    }

    /// Holds them to the policies that there are now, where these are others than before.
    pub(super) fn review(&self, proxy: &Proxy) {
        let (snapshot, enrolled) = (&proxy.snapshot.load(), &proxy.enrolled.load());
        for (pod, at_pod) in &mut self.lock().pods {
            let now = HeldTo::of(snapshot, enrolled, pod);
            if !now.is(&at_pod.held_to) {
                at_pod.held_to = now;
                at_pod.connections.values_mut().for_each(|carried| carried.review(snapshot, enrolled));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeldTo {
    fn of(snapshot: &Snapshot, enrolled: &Pods, pod: &WorkloadUid) -> Self {
        let Snapshot { access, tokens, workloads, .. } = snapshot;
        let is_tunnelled = |pod| {
            let near = enrolled.get(workloads.get(pod)?.addresses.first()?)?;
            Some(near.workload.uid == *pod && near.is_tunnelled())
        };
        Self {
            access: access.get(pod).cloned(),
            tokens: tokens.get(pod).cloned(),
            workload: workloads.get(pod).cloned(),
            is_tunnelled: is_tunnelled(pod).unwrap_or_default(),
        }
    }

    /// Whether the snapshots have the same.
    fn is(&self, other: &Self) -> bool {
        fn is_same<T>(one: &Option<Arc<T>>, other: &Option<Arc<T>>) -> bool {
            one.as_ref().map(Arc::as_ptr) == other.as_ref().map(Arc::as_ptr)
        }
        is_same(&self.access, &other.access)
            && is_same(&self.tokens, &other.tokens)
            && is_same(&self.workload, &other.workload)
            && self.is_tunnelled == other.is_tunnelled
    }
}

impl Carried {
    fn review(&mut self, snapshot: &Snapshot, enrolled: &Pods) {
        let Standing { door, visitor, entry, carries, carries_bytes, .. } = &mut self.connection;
        let policies = door.policies(snapshot).cloned();
        let is_same = policies.as_ref().map(Arc::as_ptr) == entry.policies.as_ref().map(Arc::as_ptr);
        entry.policies = policies;
        let caller = visitor.at(door.address.port());
        if (is_same || entry.lets_stand(&caller, *carries, carries_bytes.load(Ordering::Relaxed)))
            && self.connection.is_protected(snapshot)
            && self.connection.is_seen(snapshot)
            && !self.connection.wants_tunnel(enrolled)
        {
            return;
        }
        let Standing { door, visitor, .. } = &self.connection;
        info!(
            pod = %door.pod, address = %door.address, client = %visitor.address,
            "a connection ends that policies do not let in any more"
        );
        self.end.abort();
    }
}

impl Standing {
    /// One that is nothing special, as far as is known.
    pub(super) fn new(door: Door, visitor: Caller, security: Security, entry: Entry) -> Self {
        let carries = Carries::Connection;
        Self { door, visitor, security, entry, carries, carries_bytes: Arc::default() }
    }

    /// Whether its requests are looked at, if it has any, where the pod wants tokens to be checked: what was never looked at may be
    /// requests, and say what only tokens may.
    fn is_seen(&self, snapshot: &Snapshot) -> bool {
        let is_bytes = || self.carries_bytes.load(Ordering::Relaxed);
        match self.door.tokens(snapshot) {
            None => true,
            Some(rules) => self.entry.by_request && !(is_bytes() && rules.make_headers()),
        }
    }

    /// Whether it goes directly to a pod of its node that is reached through tunnels alone.
    fn wants_tunnel(&self, enrolled: &Pods) -> bool {
        let Self { door, visitor, security, .. } = self;
        let is_it = |near: &&Arc<PodNet>| near.workload.uid == door.pod;
        let pod = || enrolled.get(&door.address.ip()).filter(is_it);
        *security == Security::SameNode && pod().is_some_and(|near| near.wants_tunnel_from(visitor.address))
    }

    /// Whether it is as well protected as the pod asks for.
    fn is_protected(&self, snapshot: &Snapshot) -> bool {
        let takes_plaintext = || {
            let pod = snapshot.workloads.get(&self.door.pod);
            pod.is_none_or(|pod| pod.mtls_at(self.door.address.port()) == MtlsMode::Permissive)
        };
        self.security != Security::Plaintext || takes_plaintext()
    }
}

/// A connection that was taken in.
#[derive(Debug)]
pub(super) struct Entered {
    place: Place,
    ended: AbortRegistration,
}

impl Entered {
    /// Carries it for as long as it may stand; None if that ended first.
    pub(super) fn carry<T, F: Future<Output = T>>(
        self,
        carried: F,
    ) -> impl Future<Output = Option<T>> + use<T, F> {
        let Self { place, ended } = self;
        // Not an async block, which would have room for what it carries twice.
        Abortable::new(carried, ended).map(move |result| {
            drop(place);
            result.ok()
        })
    }
}

/// Takes the connection out again, however it ends.
#[derive(Debug)]
struct Place {
    all: Arc<LetIn>,
    pod: WorkloadUid,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.all.lock();
        let Some(at_pod) = open.pods.get_mut(&self.pod) else { return };
        at_pod.connections.remove(&self.id);
        if at_pod.connections.is_empty() {
            open.pods.remove(&self.pod);
        }
    }
}

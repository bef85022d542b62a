//! Connections and requests that are under way at this node's pods, so that one ends when policies do not let it in any more.
//!
//! Policies that have changed are asked again for each of them: how long it has been open makes no difference.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};

use futures_util::future::{AbortHandle, AbortRegistration, Abortable, FutureExt as _};
use futures_util::task::AtomicWaker;
use tracing::info;

use super::Proxy;
use super::admission::{self, Caller, Door, Entry};
use super::http::Kept;
use crate::balance::Carries;
use crate::capture::PodNet;
use crate::model::{MtlsMode, Workload, WorkloadUid};
use crate::policy::authorization::{OnConnection, Set};
use crate::policy::jwt::Rules;
use crate::snapshot::Snapshot;
use crate::telemetry::{RulingOf, Security};

/// The pods of this node that are in the mesh.
type Pods = imbl::HashMap<IpAddr, Arc<PodNet>>;

/// Those of one worker thread.
#[derive(Clone, Debug, Default)]
pub(super) struct LetIn(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// By pod, for snapshots change often, and what they say of a pod seldom.
    pods: HashMap<WorkloadUid, AtPod>,
}

/// Those at one pod.
#[derive(Debug)]
struct AtPod {
    carried: HashMap<u64, Carried>,
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
    standing: Standing,
    end: End,
}

/// What ends it.
#[derive(Debug)]
enum End {
    Connection(AbortHandle),
    Request(Arc<Verdict>),
}

/// A connection or a request, and what it was let in as.
#[derive(Debug)]
pub(super) struct Standing {
    pub(super) door: Door,
    pub(super) visitor: Caller,
    pub(super) security: Security,
    pub(super) entry: Entry,
    pub(super) carries: Carries,
    /// Set once it was looked at, and has turned out to carry something else than requests.
    pub(super) carries_bytes: Arc<AtomicBool>,
    /// Of a connection whose requests are looked at: each of them is asked about again. Otherwise those alone that began while policies
    /// wanted to see requests.
    pub(super) keeps_all: bool,
    /// The request that it is, as policies were asked about it.
    pub(super) request: Option<Kept>,
}

/// A request under way. It is asked about again for as long as anybody has this.
#[derive(Debug)]
pub(super) struct Held {
    verdict: Arc<Verdict>,
    _place: Place,
}

/// What has become of a request that is under way.
#[derive(Debug, Default)]
struct Verdict {
    /// Once it is not let in any more: what policies say, if it was they.
    denied: OnceLock<RulingOf>,
    /// Who passes on what its client says.
    body: AtomicWaker,
    /// Who waits for the answer, or passes it on.
    answer: AtomicWaker,
}

impl LetIn {
    /// Takes in a connection, which stands for as long as policies let it, those of now to begin with.
    pub(super) fn enter(&self, proxy: &Proxy, connection: Standing) -> Entered {
        let (end, ended) = AbortHandle::new_pair();
        Entered { place: self.take_in(proxy, connection, End::Connection(end)), ended }
    }

    /// Holds the request to policies for as long as it takes, to those of now to begin with.
    pub(super) fn hold(&self, proxy: &Proxy, request: Standing) -> Arc<Held> {
        let verdict = Arc::<Verdict>::default();
        let place = self.take_in(proxy, request, End::Request(verdict.clone()));
        Arc::new(Held { verdict, _place: place })
    }

    fn take_in(&self, proxy: &Proxy, standing: Standing, end: End) -> Place {
        let (snapshot, enrolled) = (&proxy.snapshot.load(), &proxy.enrolled.load());
        let pod = standing.door.pod.clone();
        let mut new = Carried { standing, end };
        new.review(snapshot, enrolled);
        let mut open = self.lock();
        open.next += 1;
        let id = open.next;
        let at_pod = open.pods.entry(pod.clone());
        let nobody = || AtPod { carried: HashMap::new(), held_to: HeldTo::of(snapshot, enrolled, &pod) };
        at_pod.or_insert_with(nobody).carried.insert(id, new);
        drop(open);
        Place { all: self.clone(), pod, id }
    }

    /// Holds them to the policies that there are now, where these are others than before.
    pub(super) fn review(&self, proxy: &Proxy) {
        let (snapshot, enrolled) = (&proxy.snapshot.load(), &proxy.enrolled.load());
        for (pod, at_pod) in &mut self.lock().pods {
            let now = HeldTo::of(snapshot, enrolled, pod);
            if !now.is(&at_pod.held_to) {
                at_pod.held_to = now;
                at_pod.carried.values_mut().for_each(|carried| carried.review(snapshot, enrolled));
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
        let Self { standing, end } = self;
        // What stands is held to what was known last.
        if !standing.door.is_known(snapshot) {
            return;
        }
        let now = standing.door.policies(snapshot).cloned();
        let is_same = now.as_ref().map(Arc::as_ptr) == standing.entry.policies.as_ref().map(Arc::as_ptr);
        let before = std::mem::replace(&mut standing.entry.policies, now);
        let denied = if is_same { None } else { standing.denied(before.as_deref()) };
        let is_well = || {
            standing.is_protected(snapshot) && standing.is_seen(snapshot) && !standing.wants_tunnel(enrolled)
        };
        let Some(ruling) = denied.or_else(|| if is_well() { None } else { Some(None) }) else { return };
        match end {
            End::Request(verdict) => verdict.deny(ruling),
            End::Connection(end) => {
                let Standing { door, visitor, .. } = standing;
                info!(
                    pod = %door.pod, address = %door.address, client = %visitor.address,
                    "a connection ends that policies do not let in any more"
                );
                end.abort();
            }
        }
    }
}

impl Standing {
    /// One that is nothing special, as far as is known.
    pub(super) fn new(door: Door, visitor: Caller, security: Security, entry: Entry) -> Self {
        Self {
            door,
            visitor,
            security,
            entry,
            carries: Carries::Connection,
            carries_bytes: Arc::default(),
            keeps_all: true,
            request: None,
        }
    }

    /// Nothing if it may stand, now that policies are others than `before`; otherwise what they say of it, if they do.
    fn denied(&self, before: Option<&Set>) -> Option<RulingOf> {
        let policies = self.entry.policies.as_ref()?;
        let port = self.door.address.port();
        let connection = self.visitor.at(port);
        if let Some(request) = &self.request {
            return request.denied(policies, &connection);
        }
        let are_seen = self.entry.by_request && !self.carries_bytes.load(Ordering::Relaxed);
        let were_kept = || self.keeps_all || before.is_some_and(|before| before.needs_requests(port));
        let decision = match policies.connection(&connection) {
            OnConnection::Decided(decision) => decision,
            OnConnection::ByRequest if are_seen && were_kept() => return None,
            // Its requests are to be looked at from now on: they come again on another one, which another agent makes for them, or this one.
            OnConnection::ByRequest if self.carries == Carries::Request => return Some(None),
            // What was never looked at counts as something else, too.
            OnConnection::ByRequest => policies.bytes(&connection),
        };
        (!decision.is_allowed()).then(|| admission::of(&decision))
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

impl Held {
    /// Once policies do not let the request in any more: what they say. Whoever passes on what its client says is woken then.
    pub(super) fn poll_body(&self, cx: &Context<'_>) -> Poll<RulingOf> {
        self.verdict.poll(&self.verdict.body, cx)
    }

    /// The same for whoever waits for the answer, or passes it on.
    pub(super) fn poll_answer(&self, cx: &Context<'_>) -> Poll<RulingOf> {
        self.verdict.poll(&self.verdict.answer, cx)
    }

    /// What policies have said, if they do not let it in any more.
    pub(super) fn denied(&self) -> Option<RulingOf> {
        self.verdict.denied.get().cloned()
    }
}

impl Verdict {
    fn deny(&self, ruling: RulingOf) {
        _ = self.denied.set(ruling);
        self.body.wake();
        self.answer.wake();
    }

    fn poll(&self, waker: &AtomicWaker, cx: &Context<'_>) -> Poll<RulingOf> {
        waker.register(cx.waker());
        self.denied.get().map_or(Poll::Pending, |ruling| Poll::Ready(ruling.clone()))
    }
}

/// Takes it out again, however it ends.
#[derive(Debug)]
struct Place {
    all: LetIn,
    pod: WorkloadUid,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.all.lock();
        let Some(at_pod) = open.pods.get_mut(&self.pod) else { return };
        at_pod.carried.remove(&self.id);
        if at_pod.carried.is_empty() {
            open.pods.remove(&self.pod);
        }
    }
}

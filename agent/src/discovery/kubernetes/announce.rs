//! Tells the API server, and so the other agents and the user, what has become of this node's pods.
//!
//! A pod's annotation `undermesh.io/enrolled` is the fact that clients go by, its condition of the same name is for people, and
//! an event says when that changes. What is to be said is kept here until the API server has it; who decides it is not
//! known here.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::{Timestamp, Unit};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use super::Told;
use crate::config::document::ENROLLED;
use crate::kubernetes::{self, AskError, Failures};
use crate::model::{Name, ObjectRef, WorkloadUid};

/// What Istio's agents go by: to them, too, the pod takes tunnels.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// Pods of which it is told at one time.
const AT_ONCE: usize = 8;

/// What is to be told of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Announcement {
    pod: ObjectRef,
    /// The annotation; none while the pod takes no tunnels.
    enrolled: Option<Name>,
    /// Nothing is said of a pod that never asked for anything.
    condition: Option<Condition>,
}

/// What the API server has of a pod, as far as we know.
#[derive(Clone, Debug, Default)]
struct Known {
    enrolled: Option<Name>,
    condition: Option<Condition>,
    /// Since when the condition has its status.
    since: Option<Timestamp>,
    generation: Option<i64>,
}

/// The condition `undermesh.io/enrolled` of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// The pod is in the mesh.
    pub is_enrolled: bool,
    /// A word for programs, in CamelCase.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// Keeps what is to be told, and tells it.
#[derive(Clone)]
pub struct Announcer {
    client: Client,
    node: Name,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    pods: Mutex<Pods>,
    /// There is something to tell.
    due: Notify,
    /// Something has been told.
    told: Notify,
}

#[derive(Debug, Default)]
struct Pods {
    wanted: HashMap<WorkloadUid, Announcement>,
    /// Those that it has told us of or that we have told it of.
    has: HashMap<WorkloadUid, (ObjectRef, Known)>,
    /// What it would not take. Of a pod of which something else is to be told by now, that is tried at once.
    failures: Failures<(WorkloadUid, Announcement)>,
}

impl Announcer {
    pub(crate) fn new(client: Client, node: Name) -> Self {
        Self { client, node, shared: Arc::default() }
    }

    /// Takes in what the API server has. What somebody else has changed of annotations is told again; of pods that are gone nothing
    /// is told any more.
    pub fn observe(&self, told: &imbl::HashMap<WorkloadUid, Told>) {
        self.update(|pods| {
            pods.wanted.retain(|uid, _| told.contains_key(uid));
            pods.has.retain(|uid, _| told.contains_key(uid));
            for (uid, told) in told {
                // The condition as an agent before this one has left it; later it is ours, and what comes may be older than that.
                let (_, has) =
                    pods.has.entry(uid.clone()).or_insert_with(|| (told.pod.clone(), Known::read(told)));
                has.enrolled.clone_from(&told.enrolled);
                has.generation = told.generation;
            }
        });
    }

    /// The pod takes tunnels; the value says what its connections find while this agent is down.
    pub fn enrolled(&self, uid: &WorkloadUid, pod: &ObjectRef, value: &str) {
        self.update(|pods| pods.want(uid, pod).enrolled = Some(value.into()));
    }

    /// Whether it is told, or to be told, that the pod takes tunnels.
    pub fn has(&self, uid: &WorkloadUid) -> bool {
        self.lock().wanted.get(uid).is_some_and(|wanted| wanted.enrolled.is_some())
    }

    /// These take no tunnels any more. True if that is news.
    pub fn withdraw<'a>(&self, uids: impl IntoIterator<Item = &'a WorkloadUid>) -> bool {
        let mut is_news = false;
        self.update(|pods| {
            for uid in uids {
                is_news |= pods.withdraw(uid);
            }
        });
        is_news
    }

    /// What an earlier agent has told of pods that are not to be enrolled now is taken back.
    pub fn withdraw_all_but(&self, is_wanted: impl Fn(&WorkloadUid) -> bool) {
        self.update(|pods| {
            let stale: Vec<_> = pods.has.keys().filter(|uid| !is_wanted(uid)).cloned().collect();
            for uid in stale {
                pods.withdraw(&uid);
            }
        });
    }

    /// How the pod stands.
    pub fn condition(&self, uid: &WorkloadUid, pod: &ObjectRef, condition: Condition) {
        self.update(|pods| pods.want(uid, pod).condition = Some(condition));
    }

    /// How these pods stand.
    pub fn conditions<'a>(
        &self,
        conditions: impl Iterator<Item = (&'a WorkloadUid, &'a ObjectRef, Condition)>,
    ) {
        self.update(|pods| {
            for (uid, pod, condition) in conditions {
                pods.want(uid, pod).condition = Some(condition);
            }
        });
    }

    /// Returns when the API server has been told all that is due of these now, or after the time limit.
    pub async fn settled(&self, uids: &[WorkloadUid], limit: Duration) {
        let told = async {
            loop {
                let told = self.shared.told.notified();
                if !self.lock().due().any(|(uid, _)| uids.contains(uid)) {
                    return;
                }
                told.await;
            }
        };
        let _ = timeout(limit, told).await;
    }

    /// Tells what is due, for ever.
    pub async fn run(self) -> ! {
        let reporter =
            Reporter { controller: "undermesh.io/agent".into(), instance: Some(self.node.to_string()) };
        let recorder = Recorder::new(self.client.clone(), reporter);
        loop {
            let more = self.shared.due.notified();
            let (due, again) = self.lock().next(Instant::now());
            if due.is_empty() {
                match again {
                    Some(moment) => _ = timeout_at(moment, more).await,
                    None => more.await,
                }
                continue;
            }
            let tell = |(uid, announcement)| self.tell(&recorder, uid, announcement);
            stream::iter(due).for_each_concurrent(AT_ONCE, tell).await;
        }
    }

    /// Tells of one pod.
    async fn tell(&self, recorder: &Recorder, uid: WorkloadUid, announcement: Announcement) {
        let ObjectRef { namespace, name } = &announcement.pod;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let before = self.lock().has.get(&uid).map(|(_, has)| has.clone()).unwrap_or_default();
        let (patch, known) = announcement.patch(&uid, &before, Timestamp::now());
        match kubernetes::ask(api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch))).await
        {
            Ok(_) => {}
            // The pod has gone, or is another one of its name.
            Err(AskError::Gone(_) | AskError::Overtaken) => {
                debug!(pod = %announcement.pod, "the pod has gone; nothing is told of it");
                let mut pods = self.lock();
                pods.wanted.remove(&uid);
                pods.has.remove(&uid);
                drop(pods);
                return self.shared.told.notify_waiters();
            }
            Err(error) => {
                let again_in = self.failed(&uid, &announcement, &error);
                return warn!(pod = %announcement.pod, %error, ?again_in, "the API server cannot be told of the pod; trying again");
            }
        }
        if let Some(event) = announcement.news_since(&before) {
            // People are told; nothing hangs on it.
            if let Err(error) =
                kubernetes::ask(recorder.publish(&event.event(), &announcement.reference(&uid))).await
            {
                debug!(pod = %announcement.pod, %error, "no event about the pod");
            }
        }
        self.lock().has.insert(uid, (announcement.pod, known));
        self.shared.told.notify_waiters();
    }

    /// Who refuses this pod may go on to; who cannot be asked is soon asked again. A little later for each agent, for they all lose
    /// the API server at one time.
    fn failed(&self, uid: &WorkloadUid, announcement: &Announcement, error: &AskError) -> Duration {
        let (what, at) = (
            (uid.clone(), announcement.clone()),
            Instant::now() + Duration::from_millis(fastrand::u64(..1000)),
        );
        let failures = &mut self.lock().failures;
        match error {
            AskError::Away(_) => failures.put_off(&what, at),
            _ => failures.add(&what, at),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Pods)) {
        let mut pods = self.lock();
        change(&mut pods);
        if pods.due().next().is_some() {
            self.shared.due.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        self.shared.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pods {
    fn want(&mut self, uid: &WorkloadUid, pod: &ObjectRef) -> &mut Announcement {
        self.wanted.entry(uid.clone()).or_insert_with(|| Announcement::nothing(pod))
    }

    fn withdraw(&mut self, uid: &WorkloadUid) -> bool {
        let has = self.has.get(uid);
        let Some(pod) = has.map(|(pod, _)| pod).or(self.wanted.get(uid).map(|it| &it.pod)).cloned() else {
            return false;
        };
        let told = has.is_some_and(|(_, has)| has.enrolled.is_some());
        self.want(uid, &pod).enrolled.take().is_some() || told
    }

    /// What the API server does not have.
    fn due(&self) -> impl Iterator<Item = (&WorkloadUid, &Announcement)> {
        let is_due = |uid: &WorkloadUid, wanted: &Announcement| {
            self.has.get(uid).is_none_or(|(_, has)| !has.says_all_of(wanted))
        };
        self.wanted.iter().filter(move |(uid, wanted)| is_due(uid, wanted))
    }

    /// What is to be told now; and when something is to be tried again.
    fn next(&mut self, now: Instant) -> (Vec<(WorkloadUid, Announcement)>, Option<Instant>) {
        let mut due: HashSet<_> = self.due().map(|(uid, wanted)| (uid.clone(), wanted.clone())).collect();
        self.failures.keep(|what| due.contains(what), now);
        due.retain(|what| !self.failures.is_left_alone(what, now));
        (due.into_iter().collect(), self.failures.next())
    }
}

impl Known {
    fn read(told: &Told) -> Self {
        let condition = told.condition.as_ref().map(|condition| Condition {
            is_enrolled: condition.is_true,
            reason: condition.reason.clone(),
            message: condition.message.clone(),
        });
        let since = told.condition.as_ref().and_then(|condition| condition.since);
        Self { enrolled: told.enrolled.clone(), condition, since, generation: told.generation }
    }

    fn says_all_of(&self, wanted: &Announcement) -> bool {
        self.enrolled == wanted.enrolled
            && wanted.condition.as_ref().is_none_or(|condition| self.condition.as_ref() == Some(condition))
    }
}

impl Announcement {
    fn nothing(pod: &ObjectRef) -> Self {
        Self { pod: pod.clone(), enrolled: None, condition: None }
    }

    /// With the uid, so that it is refused for another pod of the same name; and what the API server has after it.
    fn patch(&self, uid: &WorkloadUid, before: &Known, now: Timestamp) -> (Value, Known) {
        let redirection = self.enrolled.as_ref().map(|_| "enabled");
        let annotations = json!({ ENROLLED: self.enrolled.as_deref(), REDIRECTION: redirection });
        let mut patch = json!({ "metadata": { "uid": uid, "annotations": annotations } });
        let mut after = Known { enrolled: self.enrolled.clone(), ..before.clone() };
        if let Some(condition) = &self.condition {
            let status = |condition: &Condition| if condition.is_enrolled { "True" } else { "False" };
            let is_same = before.condition.as_ref().is_some_and(|it| it.is_enrolled == condition.is_enrolled);
            let since = before.since.filter(|_| is_same);
            let since = since.unwrap_or_else(|| now.round(Unit::Second).unwrap_or_default());
            let mut said = json!({
                "type": ENROLLED, "status": status(condition), "reason": condition.reason, "message": condition.message,
                "lastTransitionTime": since.to_string(), "lastProbeTime": null,
            });
            // Pods have a generation where their conditions have this field. It is no reason to tell anything again.
            if let Some(generation) = before.generation {
                said["observedGeneration"] = generation.into();
            }
            patch["status"] = json!({ "conditions": [said] });
            after = Known { condition: Some(condition.clone()), since: Some(since), ..after };
        }
        (patch, after)
    }

    /// The condition, if it has another reason than before.
    fn news_since(&self, before: &Known) -> Option<&Condition> {
        let reason = before.condition.as_ref().map(|before| &before.reason);
        self.condition.as_ref().filter(|condition| reason != Some(&condition.reason))
    }

    fn reference(&self, uid: &WorkloadUid) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(self.pod.namespace.to_string()),
            name: Some(self.pod.name.to_string()),
            uid: Some(uid.to_string()),
            ..ObjectReference::default()
        }
    }
}

impl Condition {
    fn event(&self) -> Event {
        Event {
            type_: match &*self.reason {
                "Enrolled" | "Left" => EventType::Normal,
                _ => EventType::Warning,
            },
            reason: self.reason.clone(),
            note: Some(self.message.clone()),
            action: "Enrol".into(),
            secondary: None,
        }
    }
}

impl std::fmt::Debug for Announcer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announcer").field("node", &self.node).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

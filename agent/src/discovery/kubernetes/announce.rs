//! Tells the API server, and so the other agents and the user, what has become of this node's pods.
//!
//! A pod's annotation `undermesh.io/enrolled` is the fact that clients go by, its condition of the same name is for people, and
//! an event says when that changes. What is to be said is kept here until the API server has it; who decides it is not
//! known here.

use std::collections::HashMap;
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
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Told;
use crate::config::document::ENROLLED;
use crate::kubernetes::{self, AskError};
use crate::model::{Name, ObjectRef, WorkloadUid};

/// What Istio's agents go by: to them, too, the pod takes tunnels.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// How long after a failure it is tried again, and a little longer for each agent.
const RETRY: Duration = Duration::from_secs(2);

/// Pods of which it is told at one time.
const AT_ONCE: usize = 8;

/// What is to be told of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Announcement {
    pod: ObjectRef,
    /// The annotation; none while the pod takes no tunnels.
    enrolled: Option<Name>,
    /// Nothing is said of a pod that never asked for anything.
    condition: Option<Condition>,
}

/// The condition `undermesh.io/enrolled` of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// What the API server has, as far as we know.
    has: HashMap<WorkloadUid, Announcement>,
}

impl Announcer {
    pub(crate) fn new(client: Client, node: Name) -> Self {
        Self { client, node, shared: Arc::default() }
    }

    /// Takes in what the API server has. What somebody else has changed of it is told again; of pods that are gone nothing
    /// is told any more.
    pub fn observe(&self, told: &imbl::HashMap<WorkloadUid, Told>) {
        self.update(|pods| {
            pods.wanted.retain(|uid, _| told.contains_key(uid));
            pods.has.retain(|uid, _| told.contains_key(uid));
            for (uid, Told { pod, enrolled }) in told {
                let has = pods.has.entry(uid.clone()).or_insert_with(|| Announcement::nothing(pod));
                has.enrolled.clone_from(enrolled);
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

    /// Returns when the API server has been told all that is due now, or after the time limit.
    pub async fn settled(&self, limit: Duration) {
        let told = async {
            loop {
                let told = self.shared.told.notified();
                if self.lock().due().is_empty() {
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
            let due = self.lock().due();
            let tell = |(uid, announcement)| self.tell(&recorder, uid, announcement);
            let all_told = stream::iter(due).map(tell).buffer_unordered(AT_ONCE).all(async |told| told).await;
            self.shared.told.notify_waiters();
            if all_told {
                more.await;
            } else {
                sleep(RETRY + Duration::from_millis(fastrand::u64(..1000))).await;
            }
        }
    }

    /// Tells of one pod. False if it is to be tried again.
    async fn tell(&self, recorder: &Recorder, uid: WorkloadUid, announcement: Announcement) -> bool {
        let ObjectRef { namespace, name } = &announcement.pod;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let before = self.lock().has.get(&uid).cloned();
        let patch = announcement.patch(&uid);
        match kubernetes::ask(api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch))).await
        {
            Ok(_) => {}
            // The pod has gone, or is another one of its name.
            Err(AskError::Gone(_) | AskError::Overtaken) => {
                debug!(pod = %announcement.pod, "the pod has gone; nothing is told of it");
                let mut pods = self.lock();
                pods.wanted.remove(&uid);
                pods.has.remove(&uid);
                return true;
            }
            Err(error) => {
                warn!(pod = %announcement.pod, %error, "the API server cannot be told of the pod; trying again");
                return false;
            }
        }
        let is_news = |condition: &Condition| {
            before.and_then(|before| before.condition).is_none_or(|before| before.reason != condition.reason)
        };
        if let Some(event) = announcement.condition.as_ref().filter(|condition| is_news(condition)) {
            // People are told; nothing hangs on it.
            if let Err(error) =
                kubernetes::ask(recorder.publish(&event.event(), &announcement.reference(&uid))).await
            {
                debug!(pod = %announcement.pod, %error, "no event about the pod");
            }
        }
        self.lock().has.insert(uid, announcement);
        true
    }

    fn update(&self, change: impl FnOnce(&mut Pods)) {
        let mut pods = self.lock();
        change(&mut pods);
        if !pods.due().is_empty() {
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
        let Some(pod) = self.has.get(uid).or(self.wanted.get(uid)).map(|it| it.pod.clone()) else {
            return false;
        };
        let told = self.has.get(uid).is_some_and(|has| has.enrolled.is_some());
        self.want(uid, &pod).enrolled.take().is_some() || told
    }

    fn due(&self) -> Vec<(WorkloadUid, Announcement)> {
        let is_due =
            |uid: &WorkloadUid, wanted: &Announcement| self.has.get(uid).is_none_or(|has| has != wanted);
        let due = self.wanted.iter().filter(|(uid, wanted)| is_due(uid, wanted));
        due.map(|(uid, wanted)| (uid.clone(), wanted.clone())).collect()
    }
}

impl Announcement {
    fn nothing(pod: &ObjectRef) -> Self {
        Self { pod: pod.clone(), enrolled: None, condition: None }
    }

    /// With the uid, so that it is refused for another pod of the same name.
    fn patch(&self, uid: &WorkloadUid) -> Value {
        let redirection = self.enrolled.as_ref().map(|_| "enabled");
        let annotations = json!({ ENROLLED: self.enrolled.as_deref(), REDIRECTION: redirection });
        let mut patch = json!({ "metadata": { "uid": uid, "annotations": annotations } });
        if let Some(Condition { is_enrolled, reason, message }) = &self.condition {
            let status = if *is_enrolled { "True" } else { "False" };
            let now = Timestamp::now().round(Unit::Second).unwrap_or_default().to_string();
            patch["status"] = json!({ "conditions": [{
                "type": ENROLLED, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": now, "lastProbeTime": null,
            }]});
        }
        patch
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
mod tests {
    use super::*;

    fn pods() -> (Pods, ObjectRef, WorkloadUid) {
        (Pods::default(), ObjectRef::new("shop", "web"), "uid".into())
    }

    /// As if the API server had been told.
    fn told(pods: &mut Pods) -> Vec<Announcement> {
        let due = pods.due();
        pods.has.extend(due.iter().cloned());
        due.into_iter().map(|(_, announcement)| announcement).collect()
    }

    #[test]
    fn what_the_api_server_has_is_not_told_again() {
        let (mut pods, web, uid) = pods();
        assert!(pods.due().is_empty());
        pods.want(&uid, &web).enrolled = Some("open".into());
        assert_eq!(told(&mut pods).len(), 1);
        assert!(pods.due().is_empty());
        // Somebody has taken it away.
        pods.has.get_mut(&uid).unwrap().enrolled = None;
        assert_eq!(told(&mut pods)[0].enrolled.as_deref(), Some("open"));
        assert!(pods.due().is_empty());
    }

    #[test]
    fn what_is_withdrawn_is_told_once_also_of_what_another_agent_has_told() {
        let (mut pods, web, uid) = pods();
        assert!(!pods.withdraw(&uid), "nothing is known of it");
        // By an agent before this one.
        pods.has.insert(
            uid.clone(),
            Announcement { enrolled: Some("closed".into()), ..Announcement::nothing(&web) },
        );
        assert!(pods.withdraw(&uid));
        assert_eq!(told(&mut pods)[0].enrolled, None);
        assert!(!pods.withdraw(&uid));
        assert!(pods.due().is_empty());
    }

    #[test]
    fn a_patch_is_for_one_pod_and_says_all_or_takes_all_back() {
        let (_, web, uid) = pods();
        let condition =
            Condition { is_enrolled: true, reason: "Enrolled".into(), message: "it is in".into() };
        let enrolled = Announcement {
            enrolled: Some("open".into()),
            condition: Some(condition),
            ..Announcement::nothing(&web)
        };
        let mut patch = enrolled.patch(&uid);
        let time = patch["status"]["conditions"][0]["lastTransitionTime"].take();
        assert!(time.as_str().is_some_and(|time| time.ends_with('Z') && !time.contains('.')), "{time}");
        let expected = json!({
            "metadata": { "uid": "uid", "annotations": {
                "undermesh.io/enrolled": "open", "ambient.istio.io/redirection": "enabled",
            } },
            "status": { "conditions": [{
                "type": "undermesh.io/enrolled", "status": "True", "reason": "Enrolled", "message": "it is in",
                "lastTransitionTime": null, "lastProbeTime": null,
            }] },
        });
        assert_eq!(patch, expected);
        let left = Announcement::nothing(&web).patch(&uid);
        let expected = json!({ "metadata": { "uid": "uid", "annotations": {
            "undermesh.io/enrolled": null, "ambient.istio.io/redirection": null,
        } } });
        assert_eq!(left, expected);
    }
}

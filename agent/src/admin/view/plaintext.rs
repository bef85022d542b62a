//! `/debug/plaintext`: who has called the pods of this node in plaintext.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::{time, to_json};
use crate::model::{MtlsMode, ObjectRef, Workload};
use crate::telemetry::{Calls, PlaintextCaller, PlaintextSource, PodState, Status, Telemetry, Watched};

/// The page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlaintextView {
    /// The node's name.
    pub node: String,
    /// Since when the agent watches (RFC 3339): since it runs.
    pub watching_since: Option<String>,
    /// Seconds since.
    pub watching_seconds: u64,
    /// How long a caller is remembered after its last connection.
    pub memory_seconds: u64,
    /// Every workload of which there is an enrolled pod on this node, or was within that time.
    pub workloads: Vec<WatchedView>,
    /// Everybody who called one of them in plaintext, or has such a connection open.
    pub callers: Vec<CallerView>,
    /// What there was no place for: the list of callers is not complete.
    pub missed: Option<CallsView>,
}

/// A workload that is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchedView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub workload: String,
    /// How many of its pods are enrolled on this node now.
    pub pods: usize,
    /// `permissive`, `strict`, or `mixed` where its pods here, or their ports, differ; none without pods.
    pub mtls: Option<String>,
    /// Since when there are enrolled pods of it here (RFC 3339).
    pub watched_since: Option<String>,
    /// Seconds since.
    pub watched_seconds: u64,
    /// Seconds since there was one; 0 while there is.
    pub unwatched_seconds: u64,
}

/// Who called whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerView {
    /// The namespace of the workload that was called.
    pub namespace: String,
    /// Its name.
    pub workload: String,
    /// Its port.
    pub port: u16,
    /// `permissive`, `strict` or `mixed`: what its pods here say of the port; none without pods.
    pub mtls: Option<String>,
    /// The namespace of the workload that called, if the address is that of a known pod.
    pub source_namespace: Option<String>,
    /// Its name.
    pub source_workload: Option<String>,
    /// The address that called, if it is that of no known pod.
    pub source_address: Option<String>,
    /// How often, and when.
    #[serde(flatten)]
    pub calls: CallsView,
}

/// How often something happened, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallsView {
    /// How many connections were opened.
    pub connections: u64,
    /// When the first was (RFC 3339).
    pub first: Option<String>,
    /// Seconds since.
    pub first_seconds: u64,
    /// When one was open last (RFC 3339).
    pub last: Option<String>,
    /// Seconds since.
    pub last_seconds: u64,
}

/// The watch's beat is some five seconds, so that it is now what was ten seconds ago.
const NOW: Duration = Duration::from_secs(10);

/// One moment on both clocks.
#[derive(Clone, Copy)]
struct Moment(Instant, SystemTime);

pub(in super::super) fn plaintext(telemetry: &Telemetry) -> Vec<u8> {
    let now = Moment(Instant::now(), SystemTime::now());
    let report = telemetry.plaintext_report(now.0);
    let pods = enrolled(telemetry.status());
    to_json(&PlaintextView {
        node: telemetry.status().node.to_string(),
        watching_since: now.told(report.began),
        watching_seconds: now.since(report.began).as_secs(),
        memory_seconds: report.keeps.as_secs(),
        workloads: report
            .watched
            .iter()
            .map(|(id, watched)| WatchedView::of(id, watched, &pods, now))
            .collect(),
        callers: report
            .callers
            .iter()
            .map(|(caller, calls)| CallerView::of(caller, calls, &pods, now))
            .collect(),
        missed: report.missed.as_ref().map(|missed| CallsView::of(missed, now)),
    })
}

/// The enrolled pods of this node, by what they are replicas of.
type Enrolled = BTreeMap<ObjectRef, Vec<std::sync::Arc<Workload>>>;

fn enrolled(status: &Status) -> Enrolled {
    let mut enrolled = Enrolled::new();
    for standing in status.pods() {
        if let (Some(workload), Some(PodState::Enrolled { .. })) = (standing.workload, standing.state) {
            enrolled.entry(workload.replica_of()).or_default().push(workload);
        }
    }
    enrolled
}

/// Of all ports, and of those that have one of their own.
fn modes(pod: &Workload) -> impl Iterator<Item = MtlsMode> {
    std::iter::once(pod.mtls).chain(pod.mtls_ports.iter().map(|(_, mode)| *mode))
}

/// What the pods say together.
fn mode(modes: impl Iterator<Item = MtlsMode>) -> Option<String> {
    let modes: BTreeSet<&str> = modes.map(|mode| mode.as_str()).collect();
    match modes.len() {
        0 | 1 => modes.first().map(ToString::to_string),
        _ => Some("mixed".into()),
    }
}

impl WatchedView {
    fn of(id: &ObjectRef, watched: &Watched, pods: &Enrolled, now: Moment) -> Self {
        let pods = pods.get(id).map_or(&[][..], Vec::as_slice);
        let unwatched = now.since(watched.until);
        Self {
            namespace: id.namespace.to_string(),
            workload: id.name.to_string(),
            pods: pods.len(),
            mtls: mode(pods.iter().flat_map(|pod| modes(pod))),
            watched_since: now.told(watched.since),
            watched_seconds: now.since(watched.since).as_secs(),
            unwatched_seconds: if unwatched > NOW { unwatched.as_secs() } else { 0 },
        }
    }
}

impl CallerView {
    fn of(caller: &PlaintextCaller, calls: &Calls, pods: &Enrolled, now: Moment) -> Self {
        let PlaintextCaller { destination, port, source } = caller;
        let (workload, address) = match source {
            PlaintextSource::Workload(id) => (Some(id), None),
            PlaintextSource::Address(address) => (None, Some(address)),
        };
        Self {
            namespace: destination.namespace.to_string(),
            workload: destination.name.to_string(),
            port: *port,
            mtls: mode(pods.get(destination).into_iter().flatten().map(|pod| pod.mtls_at(*port))),
            source_namespace: workload.map(|id| id.namespace.to_string()),
            source_workload: workload.map(|id| id.name.to_string()),
            source_address: address.map(ToString::to_string),
            calls: CallsView::of(calls, now),
        }
    }
}

impl CallsView {
    fn of(calls: &Calls, now: Moment) -> Self {
        Self {
            connections: calls.connections,
            first: now.told(calls.first),
            first_seconds: now.since(calls.first).as_secs(),
            last: now.told(calls.last),
            last_seconds: now.since(calls.last).as_secs(),
        }
    }
}

impl Moment {
    fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_duration_since(earlier)
    }

    fn told(self, earlier: Instant) -> Option<String> {
        time(self.1.checked_sub(self.since(earlier))?)
    }
}

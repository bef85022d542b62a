//! Whether the agent of a node holds: it is ready, has been for a while, and does not crash over and over.
//!
//! What counts is what was seen here, by one clock: the times in a pod's status are those of its node, whose clock may
//! be minutes off.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// A container that has restarted within this time may do it again.
const CALM: Duration = Duration::from_secs(30);

/// One that ran for so long before it ended did not end for what it does at its start; so does the kubelet's own back-off go by it.
const LONG: Duration = Duration::from_secs(600);

/// What a pod of an agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AgentPod {
    pub(super) node: String,
    pub(super) ready: bool,
    /// It is about to go.
    pub(super) terminating: bool,
    /// A container waits to be started once more.
    pub(super) crash_looping: bool,
    /// Of all containers.
    pub(super) restarts: i32,
    /// When the youngest container that has restarted was started, by the node's clock.
    pub(super) restarted: Option<SystemTime>,
    /// How long the one ran that ended last, where that was not [`LONG`].
    pub(super) short_life: Duration,
}

/// What was seen of every agent.
#[derive(Debug)]
pub(super) struct Agents {
    settle: Duration,
    by_uid: HashMap<String, Watched>,
}

#[derive(Debug)]
struct Watched {
    pod: AgentPod,
    /// Since when it has been ready.
    ready_since: Option<Instant>,
    /// Until when a restart counts against it.
    restless_until: Option<Instant>,
}

/// What becomes of a node's taint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may go.
    Lift,
    /// It may go after this, if nothing happens.
    Wait(Duration),
    /// It stays until the agent is another.
    Keep,
}

impl AgentPod {
    /// The pod's UID and what matters of it; none before it has a node.
    pub(super) fn read(pod: &Pod) -> Option<(String, Self)> {
        let uid = pod.metadata.uid.clone()?;
        let node = pod.spec.as_ref()?.node_name.clone()?;
        let status = pod.status.clone().unwrap_or_default();
        let ready = status.conditions.unwrap_or_default();
        let ready = ready.iter().any(|it| it.type_ == "Ready" && it.status == "True");
        let containers = status.container_statuses.unwrap_or_default();
        let agent = Self {
            node,
            ready,
            terminating: pod.metadata.deletion_timestamp.is_some(),
            crash_looping: containers.iter().any(is_crash_looping),
            restarts: containers.iter().map(|container| container.restart_count).sum(),
            restarted: containers.iter().filter_map(restarted).max(),
            short_life: containers.iter().filter_map(short_life).max().unwrap_or_default(),
        };
        Some((uid, agent))
    }

    /// How long it has to run after a restart: one that crashes over and over has to outlive its last life.
    fn calm(&self) -> Duration {
        CALM + self.short_life
    }
}

fn is_crash_looping(container: &ContainerStatus) -> bool {
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    waiting.is_some_and(|waiting| waiting.reason.as_deref() == Some("CrashLoopBackOff"))
}

fn restarted(container: &ContainerStatus) -> Option<SystemTime> {
    let running = container.state.as_ref()?.running.as_ref()?;
    let started = running.started_at.as_ref()?;
    (container.restart_count > 0).then(|| started.0.into())
}

fn short_life(container: &ContainerStatus) -> Option<Duration> {
    let ended = container.last_state.as_ref()?.terminated.as_ref()?;
    let (started, finished) = (ended.started_at.as_ref()?, ended.finished_at.as_ref()?);
    let life = SystemTime::from(finished.0).duration_since(started.0.into()).ok()?;
    (life < LONG).then_some(life)
}

impl Agents {
    pub(super) fn new(settle: Duration) -> Self {
        Self { settle, by_uid: HashMap::new() }
    }

    /// Takes note of an agent as it is now.
    pub(super) fn apply(&mut self, uid: &str, pod: AgentPod, now: Instant, wall: SystemTime) {
        let before = self.by_uid.remove(uid);
        let ready_since = match (&before, pod.ready) {
            (_, false) => None,
            // A restart in between was too quick to be seen as not ready.
            (Some(before), true) if before.pod.restarts == pod.restarts => before.ready_since.or(Some(now)),
            (_, true) => Some(now),
        };
        let restless_until = match &before {
            Some(before) if before.pod.restarts == pod.restarts => before.restless_until,
            Some(_) => Some(now + pod.calm()),
            // Met for the first time, as by a new leader: the node's own clock is better than nothing.
            None => pod
                .restarted
                .and_then(|restarted| wall.duration_since(restarted).ok())
                .and_then(|ago| pod.calm().checked_sub(ago))
                .map(|left| now + left),
        };
        self.by_uid.insert(uid.to_owned(), Watched { pod, ready_since, restless_until });
    }

    /// An agent is gone.
    pub(super) fn remove(&mut self, uid: &str) {
        self.by_uid.remove(uid);
    }

    /// Forgets all but these.
    pub(super) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.by_uid.retain(|uid, _| keep(uid));
    }

    /// What becomes of the taint of a node: one agent that holds is enough, for during an update there are two.
    pub(super) fn verdict(&self, node: &str, now: Instant) -> Verdict {
        let agents = self.by_uid.values().filter(|agent| agent.pod.node == node);
        agents.map(|agent| agent.verdict(self.settle, now)).min().unwrap_or(Verdict::Keep)
    }
}

impl Watched {
    fn verdict(&self, settle: Duration, now: Instant) -> Verdict {
        let Some(ready_since) = self.ready_since else { return Verdict::Keep };
        if self.pod.terminating || self.pod.crash_looping {
            return Verdict::Keep;
        }
        let settled = ready_since + settle;
        let due = self.restless_until.map_or(settled, |calm| calm.max(settled));
        match due.checked_duration_since(now) {
            Some(wait) if !wait.is_zero() => Verdict::Wait(wait),
            _ => Verdict::Lift,
        }
    }
}

impl Ord for Verdict {
    /// The sooner, the less.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |verdict: &Self| match verdict {
            Self::Lift => Duration::ZERO,
            Self::Wait(wait) => *wait,
            Self::Keep => Duration::MAX,
        };
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Verdict {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SETTLE: Duration = Duration::from_secs(3);

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn agent(ready: bool, restarts: i32) -> AgentPod {
        AgentPod { node: "n1".into(), ready, restarts, ..AgentPod::default() }
    }

    struct Node {
        agents: Agents,
        start: Instant,
        wall: SystemTime,
    }

    impl Node {
        fn new() -> Self {
            Self { agents: Agents::new(SETTLE), start: Instant::now(), wall: SystemTime::now() }
        }

        fn apply(&mut self, uid: &str, pod: AgentPod, second: u64) {
            self.agents.apply(uid, pod, self.start + secs(second), self.wall + secs(second));
        }

        fn check(&self, second: u64, expected: Verdict) {
            assert_eq!(self.agents.verdict("n1", self.start + secs(second)), expected, "after {second} s");
        }
    }

    #[test]
    fn an_agent_that_has_been_ready_for_a_while_holds() {
        let mut node = Node::new();
        node.check(0, Verdict::Keep);
        node.apply("a", agent(false, 0), 0);
        node.check(100, Verdict::Keep);
        node.apply("a", agent(true, 0), 100);
        node.check(100, Verdict::Wait(secs(3)));
        node.apply("a", agent(true, 0), 102);
        node.check(102, Verdict::Wait(secs(1)));
        node.check(103, Verdict::Lift);
        node.apply("a", agent(false, 0), 104);
        node.check(104, Verdict::Keep);
        node.apply("a", agent(true, 0), 105);
        node.check(107, Verdict::Wait(secs(1)));
        node.agents.retain(|uid| uid == "b");
        node.check(200, Verdict::Keep);
    }

    #[test]
    fn one_that_crashes_over_and_over_does_not_hold() {
        let mut node = Node::new();
        for crash in 0..5 {
            let (ready, down) = (crash * 20 + 10, crash * 20 + 15);
            node.apply("a", agent(true, crash as i32), ready);
            // Before the first crash nobody can know.
            if crash > 0 {
                node.check(down, Verdict::Wait(secs(25)));
            }
            node.apply("a", AgentPod { crash_looping: true, ..agent(false, crash as i32) }, down);
            node.check(down + 4, Verdict::Keep);
        }
        // A container beside the one that is ready.
        node.apply("a", AgentPod { crash_looping: true, ..agent(true, 4) }, 100);
        node.check(200, Verdict::Keep);
        // Each time it lives for longer than a restart counts, and then ends.
        for life in [40, 60] {
            let restarts = 5 + life as i32;
            node.apply("a", AgentPod { short_life: secs(life), ..agent(true, restarts) }, 100 + life);
            node.check(100 + life + 40, Verdict::Wait(secs(life - 10)));
        }
        // At last it stays up.
        node.apply("a", agent(true, 5), 200);
        node.check(229, Verdict::Wait(secs(1)));
        node.check(230, Verdict::Lift);
    }

    #[test]
    fn a_new_leader_goes_by_the_nodes_clock_and_is_not_misled_by_it() {
        let mut node = Node::new();
        let restarted = |at: SystemTime| AgentPod { restarted: Some(at), ..agent(true, 1) };
        node.apply("a", restarted(node.wall - secs(10)), 0);
        node.check(0, Verdict::Wait(secs(20)));
        node.apply("b", AgentPod { short_life: secs(60), ..restarted(node.wall - secs(10)) }, 0);
        node.agents.remove("a");
        node.check(0, Verdict::Wait(secs(80)));
        node.agents.remove("b");
        node.apply("b", restarted(node.wall - secs(300)), 0);
        node.check(0, Verdict::Wait(secs(3)));
        node.agents.remove("b");
        // A clock that is minutes ahead.
        node.apply("c", restarted(node.wall + secs(300)), 0);
        node.check(3, Verdict::Lift);
    }

    #[test]
    fn of_two_agents_the_one_that_stays_counts() {
        let mut node = Node::new();
        node.apply("old", AgentPod { terminating: true, ..agent(true, 0) }, 0);
        node.check(9, Verdict::Keep);
        node.apply("new", agent(true, 0), 9);
        node.check(9, Verdict::Wait(secs(3)));
        node.check(12, Verdict::Lift);
        node.apply("elsewhere", AgentPod { node: "n2".into(), ..agent(true, 0) }, 0);
        node.agents.remove("new");
        node.check(20, Verdict::Keep);
    }

    #[test]
    fn a_pod_is_read() {
        let pod = json!({
            "metadata": {"uid": "u1", "deletionTimestamp": "2027-01-15T08:00:00Z"},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {
                "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}],
                "containerStatuses": [
                    {"name": "a", "image": "", "imageID": "", "ready": true, "restartCount": 2,
                     "state": {"running": {"startedAt": "2027-01-15T08:00:00Z"}},
                     "lastState": {"terminated": {"exitCode": 1,
                                                  "startedAt": "2027-01-15T07:50:00Z", "finishedAt": "2027-01-15T07:50:40Z"}}},
                    {"name": "b", "image": "", "imageID": "", "ready": false, "restartCount": 1,
                     "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
                    {"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                     "lastState": {"terminated": {"exitCode": 1,
                                                  "startedAt": "2027-01-15T07:00:00Z", "finishedAt": "2027-01-15T07:10:00Z"}},
                     "state": {"running": {"startedAt": "2027-01-15T09:00:00Z"}}},
                ],
            },
        });
        let (uid, agent) = AgentPod::read(&serde_json::from_value(pod).unwrap()).unwrap();
        let restarted = Some(SystemTime::UNIX_EPOCH + secs(1_800_000_000));
        let expected = AgentPod {
            node: "n1".into(),
            ready: true,
            terminating: true,
            crash_looping: true,
            restarts: 3,
            restarted,
            short_life: secs(40),
        };
        assert_eq!((uid.as_str(), agent), ("u1", expected));
        let bare = json!({"metadata": {"uid": "u1"}, "spec": {"nodeName": "n1", "containers": []}});
        let (_, agent) = AgentPod::read(&serde_json::from_value(bare).unwrap()).unwrap();
        assert_eq!(agent, AgentPod { node: "n1".into(), ..AgentPod::default() });
        let unscheduled = json!({"metadata": {"uid": "u1"}, "spec": {"containers": []}});
        assert!(AgentPod::read(&serde_json::from_value(unscheduled).unwrap()).is_none());
    }
}

//! Holds a pod that has just come until it is in the mesh, or is known not to be meant.
//!
//! In the mesh it is once its very network namespace is: whoever enrolled it, so that an agent whose place another one takes decides
//! as well as that one, and whatever is said of an earlier sandbox of the pod.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::capture::OnAgentDown;
use crate::discovery::node::Arrival;
use crate::model::{ObjectRef, WorkloadUid};
use crate::snapshot::Snapshot;
use crate::telemetry::{PodState, Status};

/// Whether the pod is captured, in one network namespace.
pub(super) type IsCaptured = Box<dyn Fn(&ObjectRef) -> bool + Send + Sync>;

/// Decides what becomes of arrivals.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) status: Arc<Status>,
    /// Changes whenever this agent may have enrolled a pod.
    pub(super) applied: watch::Receiver<()>,
    /// Who is captured in the network namespace at a path.
    pub(super) captured_in: Arc<dyn Fn(&Path) -> IsCaptured + Send + Sync>,
    pub(super) on_agent_down: OnAgentDown,
}

/// How often it is looked at a pod that another agent may have enrolled, for nobody tells of that.
const LOOK: Duration = Duration::from_millis(50);

/// Time that is left for the answer.
const SPARE: Duration = Duration::from_millis(50);

/// What is known of a pod.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    /// It may start.
    Settled,
    /// It is to be in the mesh and is not yet, for this reason.
    Wanted(String),
    /// The API server has not told of it yet.
    Nothing,
}

impl Gate {
    /// Decides for ever.
    pub(super) async fn keep(self, mut arrivals: mpsc::UnboundedReceiver<Arrival>) {
        let mut waiting = JoinSet::new();
        loop {
            tokio::select! {
                arrival = arrivals.recv() => match arrival {
                    Some(arrival) => drop(waiting.spawn(self.clone().decide(arrival))),
                    None => std::future::pending().await,
                },
                Some(_) = waiting.join_next() => {}
            }
        }
    }

    async fn decide(mut self, arrival: Arrival) {
        let Arrival { uid, netns, patience, decide } = arrival;
        let is_captured = (self.captured_in)(&netns);
        let settled = async {
            while self.known(&uid, &is_captured) != Known::Settled {
                if let Ok(Err(_ended)) = timeout(LOOK, self.applied.changed()).await {
                    std::future::pending().await
                }
            }
        };
        let in_time = timeout(patience.saturating_sub(SPARE), settled).await.is_ok();
        let decision = match self.known(&uid, &is_captured) {
            // With `open`, whatever fails must not keep applications from running.
            Known::Wanted(why) if !in_time && self.on_agent_down == OnAgentDown::Closed => Err(why),
            _ => Ok(()),
        };
        // The runtime has given up waiting.
        let _ = decide.send(decision);
    }

    fn known(&self, uid: &WorkloadUid, is_captured: &IsCaptured) -> Known {
        let snapshot = self.snapshot.load();
        let Some(workload) = snapshot.workloads.get(uid) else { return Known::Nothing };
        if !workload.enrolment.is_wanted() || is_captured(&workload.pod) {
            return Known::Settled;
        }
        Known::Wanted(match self.status.pod(uid) {
            Some(PodState::NotEnrolled { detail, .. }) => detail,
            _ => "the pod is being enrolled, and that takes too long".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::SystemTime;

    use tokio::sync::oneshot;

    use super::*;
    use crate::model::{Enrolment, Workload};
    use crate::telemetry::{NotEnrolledReason, PodReport};

    fn pod(enrolment: Enrolment) -> Arc<Workload> {
        Arc::new(Workload { enrolment, ..Workload::example() })
    }

    /// What becomes of the pod after a second.
    enum Then {
        /// Nothing.
        Nothing,
        /// It is captured in this network namespace, by the agent itself or by another one.
        Captured(&'static str),
        /// It cannot be.
        Fails,
    }

    /// What is decided of the pod when it is known from the beginning, and when. It arrives in the namespace `new`, and had another
    /// sandbox before: that was enrolled.
    async fn decided(
        workload: Option<Arc<Workload>>,
        on_agent_down: OnAgentDown,
        then: Then,
    ) -> (String, f64) {
        let mut snapshot = Snapshot::default();
        if let Some(workload) = workload {
            snapshot.workloads.insert("uid".into(), workload);
        }
        let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
        let status = Status::new("node-1", snapshot.clone());
        let report = |state| PodReport { pod: ObjectRef::new("shop", "web"), state };
        status.set_pod("uid".into(), report(PodState::Enrolled { since: SystemTime::UNIX_EPOCH }));
        let (_tell, applied) = watch::channel(());
        let captured = Arc::new(Mutex::new("before"));
        let captured_in = {
            let captured = captured.clone();
            move |netns: &Path| -> IsCaptured {
                let (captured, netns) = (captured.clone(), netns.to_owned());
                Box::new(move |_| netns == Path::new(*captured.lock().unwrap()))
            }
        };
        let captured_in = Arc::new(captured_in);
        let gate = Gate { snapshot, status: status.clone(), applied, captured_in, on_agent_down };
        let (arrive, arrivals) = mpsc::unbounded_channel();
        tokio::spawn(gate.keep(arrivals));
        let (decide, decision) = oneshot::channel();
        let began = tokio::time::Instant::now();
        let patience = Duration::from_secs(2);
        arrive.send(Arrival { uid: "uid".into(), netns: "new".into(), patience, decide }).unwrap();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match then {
                Then::Nothing => {}
                Then::Captured(netns) => *captured.lock().unwrap() = netns,
                Then::Fails => {
                    let (reason, detail) = (NotEnrolledReason::AttachFailed, "no program".into());
                    status.set_pod("uid".into(), report(PodState::NotEnrolled { reason, detail }));
                }
            }
        });
        let decision = decision.await.unwrap();
        let seconds = (began.elapsed().as_secs_f64() * 10.0).round() / 10.0;
        (decision.map_or_else(|why| format!("not: {why}"), |()| "starts".into()), seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_starts_when_it_is_in_the_mesh_or_is_not_meant() {
        let starts = |seconds| ("starts".to_owned(), seconds);
        let wanted = || Some(pod(Enrolment::Wanted));
        use OnAgentDown::{Closed, Open};
        use Then::{Captured, Fails, Nothing};
        assert_eq!(decided(wanted(), Closed, Captured("new")).await, starts(1.0));
        assert_eq!(decided(Some(pod(Enrolment::NotWanted)), Closed, Nothing).await, starts(0.0));
        assert_eq!(decided(Some(pod(Enrolment::Impossible("x".into()))), Closed, Nothing).await, starts(0.0));
        assert_eq!(decided(wanted(), Open, Fails).await, starts(2.0));
        assert_eq!(decided(wanted(), Closed, Fails).await, ("not: no program".to_owned(), 2.0));
        // A pod that nobody has heard of: the API server is away.
        assert_eq!(decided(None, Closed, Nothing).await, starts(2.0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_whose_sandbox_is_made_anew_is_not_in_the_mesh_for_having_been() {
        let wanted = || Some(pod(Enrolment::Wanted));
        let late = "not: the pod is being enrolled, and that takes too long".to_owned();
        assert_eq!(decided(wanted(), OnAgentDown::Closed, Then::Captured("before")).await, (late, 2.0));
        let captured = decided(wanted(), OnAgentDown::Closed, Then::Captured("new")).await;
        assert_eq!(captured, ("starts".to_owned(), 1.0));
    }
}

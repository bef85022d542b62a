//! Holds a pod that has just come until it is in the mesh, or is known not to be meant.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::capture::OnAgentDown;
use crate::discovery::node::Arrival;
use crate::model::{Enrolment, WorkloadUid};
use crate::snapshot::Snapshot;
use crate::telemetry::{PodState, Status};

/// Decides what becomes of arrivals.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) status: Arc<Status>,
    /// Changes whenever a pod may have been enrolled.
    pub(super) applied: watch::Receiver<()>,
    pub(super) on_agent_down: OnAgentDown,
}

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
        let Arrival { uid, patience, decide } = arrival;
        let settled = async {
            while self.known(&uid) != Known::Settled {
                if self.applied.changed().await.is_err() {
                    std::future::pending().await
                }
            }
        };
        let in_time = timeout(patience.saturating_sub(Duration::from_millis(50)), settled).await.is_ok();
        let decision = match self.known(&uid) {
            // With `open`, whatever fails must not keep applications from running.
            Known::Wanted(why) if !in_time && self.on_agent_down == OnAgentDown::Closed => Err(why),
            _ => Ok(()),
        };
        // The runtime has given up waiting.
        let _ = decide.send(decision);
    }

    fn known(&self, uid: &WorkloadUid) -> Known {
        let snapshot = self.snapshot.load();
        let Some(workload) = snapshot.workloads.get(uid) else { return Known::Nothing };
        match (&workload.enrolment, self.status.pod(uid)) {
            (Enrolment::NotWanted | Enrolment::Impossible(_), _) | (_, Some(PodState::Enrolled { .. })) => {
                Known::Settled
            }
            (Enrolment::Wanted, Some(PodState::NotEnrolled { detail, .. })) => Known::Wanted(detail),
            (Enrolment::Wanted, _) => {
                Known::Wanted("the pod is being enrolled, and that takes too long".into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tokio::sync::oneshot;

    use super::*;
    use crate::model::{DialledPods, MtlsMode, ObjectRef, Workload};
    use crate::telemetry::{NotEnrolledReason, PodReport};

    fn pod(enrolment: Enrolment) -> Arc<Workload> {
        Arc::new(Workload {
            uid: "uid".into(),
            pod: ObjectRef::new("shop", "web"),
            workload: "web".into(),
            service_account: "web".into(),
            identity: None,
            addresses: vec![[10, 0, 0, 1].into()],
            node: Some("node-1".into()),
            enrolment,
            mtls: MtlsMode::Permissive,
            mtls_ports: Vec::new(),
            guarded: false,
            probed_ports: Vec::new(),
            by_request: false,
            mtls_by: Vec::new(),
            mtls_opened: None,
            dialled_pods: DialledPods::Pod,
            paths: None,
        })
    }

    /// What is decided of the pod when it is known from the beginning, and how it stands after a second.
    async fn decided(
        workload: Option<Arc<Workload>>,
        on_agent_down: OnAgentDown,
        then: Option<PodState>,
    ) -> (String, f64) {
        let mut snapshot = Snapshot::default();
        if let Some(workload) = workload {
            snapshot.workloads.insert("uid".into(), workload);
        }
        let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
        let status = Status::new("node-1", snapshot.clone());
        let (tell, applied) = watch::channel(());
        let gate = Gate { snapshot, status: status.clone(), applied, on_agent_down };
        let (arrive, arrivals) = mpsc::unbounded_channel();
        tokio::spawn(gate.keep(arrivals));
        let (decide, decision) = oneshot::channel();
        let began = tokio::time::Instant::now();
        arrive.send(Arrival { uid: "uid".into(), patience: Duration::from_secs(2), decide }).unwrap();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if let Some(state) = then {
                status.set_pod("uid".into(), PodReport { pod: ObjectRef::new("shop", "web"), state });
                tell.send_replace(());
            }
            std::future::pending::<()>().await;
        });
        let decision = decision.await.unwrap();
        let seconds = (began.elapsed().as_secs_f64() * 10.0).round() / 10.0;
        (decision.map_or_else(|why| format!("not: {why}"), |()| "starts".into()), seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_starts_when_it_is_in_the_mesh_or_is_not_meant() {
        let starts = |seconds| ("starts".to_owned(), seconds);
        let enrolled = || Some(PodState::Enrolled { since: SystemTime::UNIX_EPOCH });
        let failed = || {
            Some(PodState::NotEnrolled {
                reason: NotEnrolledReason::AttachFailed,
                detail: "no program".into(),
            })
        };
        use OnAgentDown::{Closed, Open};
        assert_eq!(decided(Some(pod(Enrolment::Wanted)), Closed, enrolled()).await, starts(1.0));
        assert_eq!(decided(Some(pod(Enrolment::NotWanted)), Closed, None).await, starts(0.0));
        assert_eq!(decided(Some(pod(Enrolment::Impossible("x".into()))), Closed, None).await, starts(0.0));
        assert_eq!(decided(Some(pod(Enrolment::Wanted)), Open, failed()).await, starts(2.0));
        let refused = ("not: no program".to_owned(), 2.0);
        assert_eq!(decided(Some(pod(Enrolment::Wanted)), Closed, failed()).await, refused);
        // A pod that nobody has heard of: the API server is away.
        assert_eq!(decided(None, Closed, None).await, starts(2.0));
    }
}

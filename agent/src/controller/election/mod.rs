//! The election of a leader by a Lease: one of the replicas at most does what only one may do.
//!
//! Written here since it is small: what there is for it follows other versions of the API client, and has no injected
//! time to test it by.

mod step;

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{info, warn};

use super::api::FIELD_MANAGER;
use super::root::labels;
use super::settings::ControllerSettings;
use crate::kubernetes::{self, AskError, PATIENCE};
use crate::telemetry::ControllerTelemetry;
use step::{Candidate, LEASE, RETRY, Record, Step};

/// The lease's name.
const NAME: &str = "undermesh-controller";

/// Stands for election until `shutdown` is done, and tells over `leads` whether it leads; then gives the lease back.
pub(super) async fn run(
    client: &Client,
    settings: &ControllerSettings,
    telemetry: &ControllerTelemetry,
    leads: watch::Sender<bool>,
    shutdown: impl Future<Output = ()>,
) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), &settings.namespace);
    let mut candidate = Candidate::new(&settings.pod_name);
    let tell = |now_leads: bool| {
        telemetry.set_leader(now_leads);
        let changed = leads.send_if_modified(|before| std::mem::replace(before, now_leads) != now_leads);
        match (changed, now_leads) {
            (true, true) => info!("this replica leads"),
            (true, false) => warn!("this replica does not lead any more"),
            (false, _) => {}
        }
    };
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            () = round(&leases, &mut candidate) => {}
        }
        tell(candidate.leads(Instant::now()));
        // Give or take a tenth, so that replicas do not ask in step.
        let retry = RETRY.mul_f64(0.9 + 0.2 * fastrand::f64());
        let next = Instant::now() + retry;
        let wake = candidate.stops_at().map_or(next, |stop| stop.min(next));
        tokio::select! {
            () = &mut shutdown => break,
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        if !candidate.leads(Instant::now()) {
            candidate.stop();
            tell(false);
        }
    }
    if candidate.leads(Instant::now()) {
        // First the work, then the lease.
        tell(false);
        if let Err(error) = give_back(&leases, candidate.name()).await {
            warn!(%error, "the lease cannot be given back; another replica takes it when it has run out");
        }
    }
}

/// One look at the lease and what follows from it, never longer than a leader may lead without a renewal.
async fn round(leases: &Api<Lease>, candidate: &mut Candidate) {
    let now = Instant::now();
    let deadline = candidate.stops_at().map_or(now + PATIENCE, |stop| stop.min(now + PATIENCE));
    let outcome = tokio::time::timeout_at(deadline.into(), attempt(leases, candidate)).await;
    match outcome {
        Ok(Ok(()) | Err(AskError::Overtaken)) => {}
        Ok(Err(error)) => warn!(lease = NAME, %error, "the lease cannot be read or written"),
        Err(_) => warn!(lease = NAME, "the API server does not answer in time about the lease"),
    }
}

async fn attempt(leases: &Api<Lease>, candidate: &mut Candidate) -> Result<(), AskError> {
    let lease = kubernetes::ask(leases.get_opt(NAME)).await?;
    let began = Instant::now();
    let options = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
    match (candidate.step(lease.as_ref().map(read), began), lease) {
        (Step::Wait, _) => return Ok(()),
        (step @ (Step::Take | Step::Renew), Some(lease)) => {
            let held = hold(lease, candidate.name(), step == Step::Take, Timestamp::now());
            // With the resource version that was read: of two who take it one is told so.
            kubernetes::ask(leases.replace(NAME, &options, &held)).await?;
        }
        (Step::Create | Step::Take | Step::Renew, _) => {
            let metadata =
                ObjectMeta { name: Some(NAME.into()), labels: Some(labels()), ..ObjectMeta::default() };
            let lease = Lease { metadata, ..Lease::default() };
            let held = hold(lease, candidate.name(), true, Timestamp::now());
            kubernetes::ask(leases.create(&options, &held)).await?;
        }
    }
    candidate.wrote(began);
    Ok(())
}

async fn give_back(leases: &Api<Lease>, name: &str) -> Result<(), AskError> {
    let Some(mut lease) = kubernetes::ask(leases.get_opt(NAME)).await? else { return Ok(()) };
    let spec = lease.spec.get_or_insert_default();
    if spec.holder_identity.as_deref() != Some(name) {
        return Ok(());
    }
    spec.holder_identity = Some(String::new());
    spec.lease_duration_seconds = Some(1);
    spec.renew_time = Some(MicroTime(Timestamp::now()));
    kubernetes::ask(leases.replace(NAME, &PostParams::default(), &lease)).await?;
    Ok(())
}

fn read(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
        length: seconds.map_or(LEASE, Duration::from_secs),
    }
}

fn hold(mut lease: Lease, name: &str, anew: bool, now: Timestamp) -> Lease {
    let before = lease.spec.take().unwrap_or_default();
    let (acquired, transitions) = match anew {
        true => (Some(MicroTime(now)), before.lease_transitions.map_or(0, |count| count.saturating_add(1))),
        false => (before.acquire_time, before.lease_transitions.unwrap_or(0)),
    };
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(name.to_owned()),
        lease_duration_seconds: Some(LEASE.as_secs() as i32),
        renew_time: Some(MicroTime(now)),
        acquire_time: acquired,
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    });
    lease
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_read_as_such() {
        let now: Timestamp = "2027-01-15T08:00:00Z".parse().unwrap();
        let later: Timestamp = "2027-01-15T08:00:02Z".parse().unwrap();
        let first = hold(Lease::default(), "a", true, now);
        let record = Record { holder: "a".into(), renewed: now.to_string(), length: LEASE };
        assert_eq!(read(&first), record);
        let renewed = hold(first.clone(), "a", false, later);
        assert_ne!(read(&renewed), record);
        let spec = |lease: &Lease| lease.spec.clone().unwrap();
        assert_eq!(spec(&renewed).acquire_time, spec(&first).acquire_time);
        let taken = hold(renewed, "b", true, later);
        assert_eq!(
            (spec(&taken).lease_transitions, spec(&taken).acquire_time),
            (Some(1), Some(MicroTime(later)))
        );
        assert_eq!(read(&Lease::default()).holder, "");
    }
}

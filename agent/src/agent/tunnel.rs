//! Mutual TLS between the nodes, put together: the authority, the certificates, and who is told of what.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::task::JoinSet;
use tracing::{error, warn};

use super::enrolled::{Follower, Publisher};
use crate::identity::ca::directory::DirectoryCa;
use crate::identity::{
    CertificateStore, Clock, CrlMode, MeshTls, Radar, SpiffeId, StoreSettings, Trust, TrustDomain,
};
use crate::model::{Name, Workload, WorkloadUid};
use crate::proxy::tunnel::{Strangers, Tunnel};

/// How often it is looked for certificates that are about to expire.
const RADAR: Duration = Duration::from_secs(60);

/// How long other agents may take to notice that a pod takes no tunnels any more.
const NOTICE: Duration = Duration::from_millis(250);

/// Validated settings of the tunnel.
#[derive(Clone, Debug)]
pub struct TunnelSettings {
    /// The embedded certificate authority, which the agents of this machine share.
    pub ca_dir: PathBuf,
    /// Where they tell each other which pods are enrolled.
    pub state_dir: PathBuf,
    /// The trust domain that the authority must speak for.
    pub trust_domain: TrustDomain,
}

/// What the agent keeps running for the tunnel.
pub(super) struct Background {
    certificates: Arc<CertificateStore>,
    radar: Arc<Radar>,
    follower: Follower,
}

/// The pods of this node, as far as the tunnel is concerned.
pub(super) struct Members {
    tunnel: Arc<Tunnel>,
    publisher: Publisher,
    /// Whose certificate each pod needs.
    identities: HashMap<WorkloadUid, SpiffeId>,
    /// Those whose certificate is awaited.
    awaited: JoinSet<Arc<Workload>>,
}

/// Whatever may fail, before the kernel is touched.
pub(super) fn open(
    settings: &TunnelSettings,
    node: &Name,
) -> anyhow::Result<(Arc<Tunnel>, Members, Background)> {
    let clock = Clock::system();
    let ca =
        DirectoryCa::open(&settings.ca_dir, clock.clone()).context("opening the certificate authority")?;
    let trust_domain = ca.trust_domain();
    ensure!(
        trust_domain == settings.trust_domain,
        "the certificate authority in {} is of the trust domain {trust_domain}, not {}",
        settings.ca_dir.display(),
        settings.trust_domain
    );
    let trust = Trust::new(trust_domain.clone(), CrlMode::default());
    let store = CertificateStore::new(Arc::new(ca), trust.clone(), clock.clone(), StoreSettings::default());
    let publisher = Publisher::open(&settings.state_dir, node)?;
    let follower = Follower::open(&settings.state_dir, node);
    let tunnel = Arc::new(Tunnel {
        tls: MeshTls::new(store.clone(), trust.clone(), clock),
        certificates: store.clone(),
        trust_domain,
        published: follower.published(),
        strangers: Strangers::default(),
    });
    let radar = Radar::new(store.clone(), trust);
    let members =
        Members { tunnel: tunnel.clone(), publisher, identities: HashMap::new(), awaited: JoinSet::new() };
    Ok((tunnel, members, Background { certificates: store, radar, follower }))
}

impl Background {
    /// For ever.
    pub(super) async fn run(self) {
        tokio::join!(self.certificates.run(), self.radar.watch(RADAR), self.follower.follow());
    }
}

impl Members {
    /// The pod is enrolled: it gets a certificate, and others learn of it when that is there.
    pub(super) fn enrolled(&mut self, workload: &Arc<Workload>) {
        let id = match self.tunnel.identity(workload) {
            Ok(id) => id,
            Err(error) => {
                return warn!(pod = %workload.pod, %error, "the pod's service account makes no identity");
            }
        };
        if self.identities.contains_key(&workload.uid) {
            return;
        }
        let certificates = self.tunnel.certificates.clone();
        certificates.ensure(&id);
        self.identities.insert(workload.uid.clone(), id.clone());
        let workload = workload.clone();
        self.awaited.spawn(async move {
            // It is not held any more: the pod has left, and whoever asks finds that out.
            let _ = certificates.get(&id).await;
            workload
        });
    }

    /// Publishes one pod as soon as its certificate is there. Cancelling it loses nothing.
    pub(super) async fn publish_next(&mut self) {
        match self.awaited.join_next().await {
            Some(Ok(workload)) => {
                let id = self.identities.get(&workload.uid);
                if id.is_some_and(|id| self.tunnel.certificates.current(id).is_some()) {
                    self.publisher.publish(&workload);
                }
            }
            Some(Err(error)) => error!(%error, "waiting for a certificate failed inside the agent"),
            None => std::future::pending().await,
        }
    }

    /// These are about to be un-enrolled: nobody is to open a tunnel to them any more. Returns when others know.
    pub(super) async fn leaving(&mut self, uids: &[WorkloadUid]) {
        if self.publisher.withdraw(uids) {
            tokio::time::sleep(NOTICE).await;
        }
    }

    /// The pod is not enrolled any more.
    pub(super) fn left(&mut self, uid: &WorkloadUid) {
        if let Some(id) = self.identities.remove(uid) {
            self.tunnel.certificates.release(&id);
        }
    }

    /// What an earlier agent has told of pods that are not to be enrolled now is taken back.
    pub(super) fn settle(&mut self, is_wanted: impl Fn(&WorkloadUid) -> bool) {
        self.publisher.withdraw_all_but(is_wanted);
    }
}

//! Mutual TLS between the nodes, put together: the authority, the certificates, and who is told of what.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::task::{self, JoinSet};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::enrolled::{Follower, Publisher};
use super::telling::Telling;
use crate::capture::OnAgentDown;
use crate::discovery::kubernetes::Announcer;
use crate::identity::ca::CertificateAuthority;
use crate::identity::ca::directory::{self, DirectoryCa, InitOptions};
use crate::identity::ca::grpc::{GrpcCa, GrpcSettings};
use crate::identity::{
    CertificateStore, Clock, CrlMode, Danger, MeshTls, Radar, SpiffeId, StoreSettings, Trust, TrustDomain,
    TrustFileError, TrustFiles, TrustFilesSettings,
};
use crate::model::{Name, Workload, WorkloadUid};
use crate::proxy::tunnel::{Handshakes, Strangers, Tunnel};
use crate::telemetry::Telemetry;

/// How often it is looked for certificates that are about to expire.
const RADAR: Duration = Duration::from_secs(60);

/// How often it is looked whether trust bundles and revocation lists have changed.
const TRUST_FILES: Duration = Duration::from_secs(2);

/// How long the other certificates are waited for once there is one.
const LATE: Duration = Duration::from_secs(2);

/// Validated settings of the tunnel.
#[derive(Clone, Debug)]
pub struct TunnelSettings {
    /// Who signs the certificates.
    pub authority: AuthoritySettings,
    /// Where the agents tell each other which pods are enrolled, where no API server is there for that.
    pub state_dir: Option<PathBuf>,
    /// The trust domain that the authority must speak for.
    pub trust_domain: TrustDomain,
    /// How long certificates are to live; the authority may give less.
    pub certificate_lifetime: Duration,
    /// Bundles of other trust domains, and revocation lists.
    pub trust_files: TrustFilesSettings,
    /// What revocation lists count for.
    pub crl_mode: CrlMode,
}

/// Who signs the certificates of this node's pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthoritySettings {
    /// The embedded authority, in a directory that the agents of this machine share.
    Directory(PathBuf),
    /// One that serves Istio's protocol.
    Grpc(GrpcSettings),
}

/// The tunnel, and what the agent has to do for it.
pub(super) struct Opened {
    pub(super) tunnel: Arc<Tunnel>,
    pub(super) members: Members,
    pub(super) radar: Arc<Radar>,
    pub(super) background: Background,
}

/// What the agent keeps running for the tunnel.
pub(super) struct Background {
    certificates: Arc<CertificateStore>,
    radar: Arc<Radar>,
    trust_files: TrustFiles,
    follower: Option<Follower>,
}

/// The pods of this node, as far as the tunnel is concerned.
pub(super) struct Members {
    tunnel: Arc<Tunnel>,
    radar: Arc<Radar>,
    telling: Telling,
    known: HashMap<WorkloadUid, Known>,
    awaited: JoinSet<Awaited>,
}

/// Whatever may fail, before the kernel is touched.
pub(super) fn open(
    settings: &TunnelSettings,
    node: &Name,
    on_agent_down: OnAgentDown,
    telemetry: &Arc<Telemetry>,
    announcer: Option<Announcer>,
) -> anyhow::Result<Opened> {
    let clock = Clock::system();
    let ca = authority(settings, &clock)?;
    let trust = Trust::new(settings.trust_domain.clone(), settings.crl_mode);
    let trust_files = TrustFiles::open(settings.trust_files.clone(), trust.clone()).map_err(with_flag)?;
    let store_settings = StoreSettings { leaf_life: settings.certificate_lifetime, ..Default::default() };
    let store = CertificateStore::new(ca, trust.clone(), clock.clone(), store_settings);
    let (telling, follower) = match announcer {
        Some(announcer) => (Telling::Api(announcer, on_agent_down), None),
        None => {
            let folder =
                settings.state_dir.as_deref().context("there is no folder to tell other agents by")?;
            let publisher = Publisher::open(folder, node, on_agent_down)?;
            (Telling::Folder(publisher), Some(Follower::open(folder, node)))
        }
    };
    let tunnel = Arc::new(Tunnel {
        tls: MeshTls::new(store.clone(), trust.clone(), clock),
        certificates: store.clone(),
        published: follower.as_ref().map(Follower::published).unwrap_or_default(),
        strangers: Strangers::default(),
        handshakes: Handshakes::new(telemetry.clone()),
    });
    let radar = Radar::new(store.clone(), trust);
    let (known, awaited) = (HashMap::new(), JoinSet::new());
    let members = Members { tunnel: tunnel.clone(), radar: radar.clone(), telling, known, awaited };
    let background = Background { certificates: store, radar: radar.clone(), trust_files, follower };
    Ok(Opened { tunnel, members, radar, background })
}

fn authority(settings: &TunnelSettings, clock: &Clock) -> anyhow::Result<Arc<dyn CertificateAuthority>> {
    let directory = match &settings.authority {
        AuthoritySettings::Directory(directory) => directory,
        AuthoritySettings::Grpc(settings) => return Ok(Arc::new(GrpcCa::new(settings.clone())?)),
    };
    let defaults = InitOptions::default();
    let options = InitOptions {
        trust_domain: settings.trust_domain.clone(),
        leaf_life: defaults.leaf_life.max(settings.certificate_lifetime),
        ..defaults
    };
    if directory::ensure(directory, &options, clock.now()).context("making the certificate authority")? {
        info!(directory = %directory.display(), trust_domain = %options.trust_domain, "made a certificate authority");
    }
    let ca = DirectoryCa::open(directory, clock.clone()).context("opening the certificate authority")?;
    let trust_domain = ca.trust_domain();
    ensure!(
        trust_domain == settings.trust_domain,
        "the certificate authority in {} is of the trust domain {trust_domain}, not {} (--trust-domain)",
        directory.display(),
        settings.trust_domain
    );
    Ok(Arc::new(ca))
}

fn with_flag(error: TrustFileError) -> anyhow::Error {
    let flag = match error {
        TrustFileError::Bundle { .. } => "--trust-bundle",
        TrustFileError::Crl { .. } => "--crl",
    };
    anyhow::Error::new(error).context(flag)
}

/// Certificates that are held before the pods are that need them; given back with this.
pub(super) struct Certified {
    certificates: Arc<CertificateStore>,
    ids: BTreeSet<SpiffeId>,
}

impl Certified {
    /// Returns when there are certificates for these identities, but for those that come late: where the authority knows one, it
    /// may know of another that its pod has gone.
    pub(super) async fn get(certificates: Arc<CertificateStore>, ids: BTreeSet<SpiffeId>) -> Self {
        let held = Self { certificates, ids };
        let mut awaited = JoinSet::new();
        for id in &held.ids {
            held.certificates.ensure(id);
            let (certificates, id) = (held.certificates.clone(), id.clone());
            awaited.spawn(async move { certificates.get(&id).await.map(drop) });
        }
        if awaited.join_next().await.is_some() {
            let _late = timeout(LATE, awaited.join_all()).await;
        }
        held
    }
}

impl Drop for Certified {
    fn drop(&mut self) {
        self.ids.iter().for_each(|id| self.certificates.release(id));
    }
}

/// What a member waits for.
enum Awaited {
    /// That of this pod.
    Certificate(WorkloadUid),
    /// That others know what they were told.
    Notice,
}

/// What others are being told of pods that take no tunnels any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Notice(task::Id);

/// A pod of this node.
struct Known {
    /// Whose certificate it needs.
    id: SpiffeId,
    /// The pod as it is now.
    workload: Arc<Workload>,
    /// It is not to be told of any more.
    is_withdrawn: bool,
}

impl Background {
    /// For ever.
    pub(super) async fn run(self) {
        tokio::join!(
            self.certificates.run(),
            self.radar.watch(RADAR),
            self.trust_files.follow(TRUST_FILES),
            async {
                if let Some(follower) = self.follower {
                    follower.follow().await;
                }
            }
        );
    }
}

impl Members {
    /// The pod is enrolled: it gets a certificate, and others learn of it when that is there.
    pub(super) fn enrolled(&mut self, workload: &Arc<Workload>) {
        let Some(id) = workload.identity.clone() else {
            return warn!(pod = %workload.pod, account = %workload.service_account, "the pod's service account makes no identity");
        };
        let uid = workload.uid.clone();
        let certificates = self.tunnel.certificates.clone();
        let is_held = self.known.get(&uid).is_some_and(|known| known.id == id);
        if !is_held {
            certificates.ensure(&id);
            if let Some(before) = self.known.remove(&uid) {
                certificates.release(&before.id);
                self.withdraw(std::slice::from_ref(&uid));
            }
        }
        let known = Known { id: id.clone(), workload: workload.clone(), is_withdrawn: false };
        self.known.insert(uid.clone(), known);
        // An earlier agent may have published it, as it was then.
        self.updated(workload);
        if is_held && self.telling.has(&uid) {
            return;
        }
        self.awaited.spawn(async move {
            // It is not held any more: the pod has left, and whoever asks finds that out.
            let _ = certificates.get(&id).await;
            Awaited::Certificate(uid)
        });
    }

    /// Waits for what is next: publishes a pod whose certificate is there, or says that others know what [`Self::withdraw`] was
    /// asked to tell them. Cancelling it loses nothing.
    pub(super) async fn next(&mut self) -> Option<Notice> {
        match self.awaited.join_next_with_id().await {
            Some(Ok((_, Awaited::Certificate(uid)))) => {
                let known = self.known.get(&uid);
                if let Some(Known { id, workload, is_withdrawn: false }) = known
                    && self.tunnel.certificates.current(id).is_some()
                {
                    self.telling.publish(workload);
                }
            }
            Some(Ok((id, Awaited::Notice))) => return Some(Notice(id)),
            Some(Err(error)) => error!(%error, "waiting for a certificate failed inside the agent"),
            None => std::future::pending().await,
        }
        None
    }

    /// What is told of the pod may have changed.
    pub(super) fn updated(&mut self, workload: &Arc<Workload>) {
        if let Some(known) = self.known.get_mut(&workload.uid) {
            known.workload = workload.clone();
        }
        if self.telling.has(&workload.uid) {
            self.telling.publish(workload);
        }
    }

    /// Nobody is to open a tunnel to these any more. If that is news to others, [`Self::next`] says when they know.
    pub(super) fn withdraw(&mut self, uids: &[WorkloadUid]) -> Option<Notice> {
        for uid in uids {
            if let Some(known) = self.known.get_mut(uid) {
                known.is_withdrawn = true;
            }
        }
        let known = self.telling.withdraw(uids)?;
        let told = self.awaited.spawn(async {
            known.await;
            Awaited::Notice
        });
        Some(Notice(told.id()))
    }

    /// The pod is not enrolled any more.
    pub(super) fn left(&mut self, uid: &WorkloadUid) {
        if let Some(known) = self.known.remove(uid) {
            self.tunnel.certificates.release(&known.id);
        }
    }

    /// Housekeeping.
    pub(super) fn tidy(&mut self) {
        self.telling.try_again();
    }

    /// What endangers certificates that are in use.
    pub(super) fn dangers(&self) -> HashMap<SpiffeId, Danger> {
        self.radar.dangers()
    }

    /// Whether there is nothing for [`Self::tidy`] to do.
    pub(super) fn is_settled(&self) -> bool {
        self.telling.is_settled()
    }

    /// What an earlier agent has told of pods that are not to be enrolled now is taken back.
    pub(super) fn settle(&mut self, is_wanted: impl Fn(&WorkloadUid) -> bool) {
        self.telling.withdraw_all_but(is_wanted);
    }
}

//! Documents from the Kubernetes API, followed by watches, and what this node's agent tells it in return.
//!
//! A watch that breaks is taken up where it was; while the API server is away, what was last known holds. Where the pods
//! of this node live is not for the API server to say: an annotation that names a network namespace would let whoever may
//! write a pod capture another. It comes from [`super::node`].

mod announce;
mod last_known;
mod optional;
mod policies;
mod published;
mod version;
mod watch;
mod world;

#[cfg(fuzzing)]
pub use self::last_known::fuzz;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::Fuse;
use kube::Client;
use kube::api::Api;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::Publication;
use super::node::Sighting;
use crate::config::Defaults;
use crate::config::document::EnrolledCondition;
use crate::kubernetes::{self, NoClient};
use crate::model::{Name, NodeInfo, ObjectRef, PublishedPod, SpiffeId, WorkloadUid};

pub use announce::{Announcer, Condition};
use last_known::{Keeper, Remembered};
pub use version::{Unsupported, Version};
use watch::News;
use world::World;

/// News that come together are taken in together: a Service with its endpoints, the pods of a Deployment.
const SETTLE: Duration = Duration::from_millis(5);

/// News that may wait to be taken in. A watch that is faster waits for us.
const QUEUE: usize = 1024;

/// How long an agent waits for the API server before it begins with what was known last.
const SILENCE: Duration = Duration::from_secs(5);

/// What the API server says at one moment.
#[derive(Clone, Debug)]
pub struct ClusterNews {
    /// The world.
    pub publication: Publication,
    /// The pods of other nodes that take tunnels, by address, as their nodes' agents say.
    pub published: imbl::HashMap<IpAddr, PublishedPod>,
    /// What the API server has of what this node's agent has said of its pods.
    pub told: imbl::HashMap<WorkloadUid, Told>,
    /// Of when it is, if that is not what the API server says now but what it said last to an agent before this one.
    pub as_of: Option<SystemTime>,
}

/// What an agent of this node has told the API server of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The pod.
    pub pod: ObjectRef,
    /// Its annotation `undermesh.io/enrolled`, if it has one.
    pub enrolled: Option<Name>,
    /// Its condition of the same name.
    pub condition: Option<EnrolledCondition>,
    /// Which version of its specification that is.
    pub generation: Option<i64>,
}

/// The API server, which has answered once, or whose last word there is.
pub struct Cluster {
    client: Client,
    node: NodeInfo,
    defaults: Defaults,
    sightings: mpsc::UnboundedReceiver<Sighting>,
    /// The file of what it said last.
    last_known: Option<PathBuf>,
    /// When it was first asked.
    since: Instant,
    has_answered: bool,
}

/// The API server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no way to one.
    #[error(transparent)]
    NoClient(#[from] NoClient),
    /// It is of a version that cannot be served.
    #[error(transparent)]
    Version(#[from] Unsupported),
}

impl Cluster {
    /// Connects as the pod's service account, or as KUBECONFIG says. Waits for an API server that does not answer, unless there is a
    /// file of what it said last.
    ///
    /// # Errors
    /// When there is no configuration, or the version is not one that can be served.
    pub async fn connect(
        mut node: NodeInfo,
        defaults: Defaults,
        sightings: mpsc::UnboundedReceiver<Sighting>,
        last_known: Option<PathBuf>,
    ) -> Result<Self, ConnectError> {
        let (client, since) = (kubernetes::client().await?, Instant::now());
        let has_answered = {
            let mut answer = pin!(answer(&client));
            match timeout(SILENCE, &mut answer).await {
                Ok(answer) => answer.map(|()| true)?,
                Err(_silence) => match last_known.as_deref().and_then(|path| load(path, &node.name)) {
                    Some(remembered) => {
                        node.zone = node.zone.or(remembered.zone);
                        false
                    }
                    None => answer.await.map(|()| true)?,
                },
            }
        };
        if has_answered && node.zone.is_none() {
            node.zone = zone(&client, &node.name).await;
        }
        Ok(Self { client, node, defaults, sightings, last_known, since, has_answered })
    }

    /// For whoever tells the API server what has become of this node's pods.
    pub fn announcer(&self) -> Announcer {
        Announcer::new(self.client.clone(), self.node.name.clone())
    }

    /// Follows the API server for as long as the future is polled, and publishes what changes; for the first time when all
    /// is known. Each attempt to watch that fails is told of.
    ///
    /// What was known last is published in its place while it says nothing, but not before there are certificates for this node's pods:
    /// `certify` gets them, and keeps them until its answer is dropped. Without them an agent would refuse what goes on past it.
    pub async fn follow<C>(
        self,
        mut publish: impl FnMut(ClusterNews),
        watch_failed: WatchFailed,
        certify: impl AsyncFnOnce(BTreeSet<SpiffeId>) -> C,
    ) -> anyhow::Result<Infallible> {
        let Self { client, node, defaults, mut sightings, last_known, since, has_answered } = self;
        let recalled = recall(last_known.clone(), &node, &defaults, certify).fuse();
        let (mut recalled, mut certificates) = (pin!(recalled), None);
        let mut keeper = last_known.map(Keeper::new);
        let answered = async {
            match has_answered {
                true => std::future::pending().await,
                false => answer(&client).await,
            }
        };
        let mut answered = pin!(answered.fuse());
        let (tell, mut news) = mpsc::channel(QUEUE);
        let (want, wanted) = tokio::sync::watch::channel(BTreeSet::new());
        let mut watches = watch::all(&client, wanted, &tell, &watch_failed);
        let mut world = World::new(node.clone(), defaults.clone());
        // The last that the API server has said of an object, and that this was too long ago.
        let (mut heard, mut is_silent) = (since, false);
        loop {
            tokio::select! {
                Some(first) = news.recv() => {
                    // That it is asked for a list is none.
                    if !matches!(first, News::Begins(_)) {
                        (heard, is_silent) = (Instant::now(), false);
                    }
                    world.take(first);
                }
                () = sleep_until(heard + SILENCE), if !is_silent && !world.is_published() => {
                    is_silent = true;
                    continue;
                }
                Some(sighting) = sightings.recv() => world.sight(sighting),
                (remembered, certified) = &mut recalled, if is_silent && !world.is_published() => {
                    warn!("the API server does not answer: beginning with what was known last");
                    world.recall(remembered);
                    certificates = Some(certified);
                }
                result = &mut answered => result?,
                () = due(&mut keeper) => {
                    if let (Some(keeper), Some(records)) = (&mut keeper, world.remember()) {
                        keeper.write(node.clone(), records);
                    }
                    continue;
                }
                Some(ended) = watches.join_next() => {
                    ended?;
                    anyhow::bail!("a watch of the API server has ended");
                }
            }
            sleep(SETTLE).await;
            while let Ok(more) = news.try_recv() {
                world.take(more);
            }
            while let Ok(more) = sightings.try_recv() {
                world.sight(more);
            }
            if let Some(news) = world.apply() {
                if news.as_of.is_none() {
                    // With what it holds, if it is still being made ready.
                    recalled.set(Fuse::terminated());
                    if certificates.take().is_some() {
                        info!("the API server has told of everything: what was known last is out of use");
                    }
                    keeper.iter_mut().for_each(Keeper::changed);
                }
                publish(news);
            }
            kubernetes::want(&want, world.config_maps());
        }
    }
}

/// Returns when the API server has answered, and is of a version that can be served.
async fn answer(client: &Client) -> Result<(), Unsupported> {
    loop {
        match kubernetes::ask(client.apiserver_version()).await {
            Ok(info) => {
                let version = Version::of(&info)?;
                info!(%version, "connected to the API server");
                return Ok(());
            }
            Err(error) => warn!(%error, "the API server does not answer; trying again"),
        }
        sleep(Duration::from_secs(1) + Duration::from_millis(fastrand::u64(..1000))).await;
    }
}

/// What was known last, once there are certificates for those of its pods that are this node's; never if there is nothing.
async fn recall<C>(
    path: Option<PathBuf>,
    node: &NodeInfo,
    defaults: &Defaults,
    certify: impl AsyncFnOnce(BTreeSet<SpiffeId>) -> C,
) -> (Remembered, C) {
    let Some(remembered) = path.and_then(|path| load(&path, &node.name)) else {
        return std::future::pending().await;
    };
    let identities = World::identities(node.clone(), defaults.clone(), remembered.clone());
    let certificates = certify(identities).await;
    (remembered, certificates)
}

fn load(path: &Path, node: &Name) -> Option<Remembered> {
    match last_known::load(path, node) {
        Ok(remembered) => {
            let age = remembered.as_of.elapsed().unwrap_or_default();
            info!(path = %path.display(), ?age, objects = remembered.records.len(), "there is a file of what the API server said last");
            Some(remembered)
        }
        Err(error) => {
            warn!(path = %path.display(), %error, "the file of what the API server said last is of no use");
            None
        }
    }
}

async fn due(keeper: &mut Option<Keeper>) {
    match keeper {
        Some(keeper) => keeper.due().await,
        None => std::future::pending().await,
    }
}

/// The zone of a node is a label that seldom changes and that nothing breaks without.
async fn zone(client: &Client, node: &Name) -> Option<Name> {
    const ZONE: &str = "topology.kubernetes.io/zone";
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    match kubernetes::ask(nodes.get_metadata(node)).await {
        Ok(node) => node.metadata.labels?.get(ZONE).map(|zone| zone.as_str().into()),
        Err(error) => {
            warn!(%node, %error, "the node's zone is not known; Services with a traffic distribution do without");
            None
        }
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The queue by which the machine's news of its pods come.
pub fn sightings() -> (mpsc::UnboundedSender<Sighting>, mpsc::UnboundedReceiver<Sighting>) {
    mpsc::unbounded_channel()
}

type Tell = mpsc::Sender<News>;

/// Hears by the plural name of its kind, `pods`, that objects could not be watched.
pub type WatchFailed = Arc<dyn Fn(&'static str) + Send + Sync>;

#[cfg(test)]
mod tests;

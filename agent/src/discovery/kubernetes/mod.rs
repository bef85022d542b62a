//! Documents from the Kubernetes API, followed by watches, and what this node's agent tells it in return.
//!
//! A watch that breaks is taken up where it was; while the API server is away, what was last known holds. Where the pods
//! of this node live is not for the API server to say: an annotation that names a network namespace would let whoever may
//! write a pod capture another. It comes from [`super::node`].

mod announce;
mod optional;
mod policies;
mod version;
mod watch;
mod world;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::Api;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{info, warn};

use super::Publication;
use super::node::Sighting;
use crate::config::Defaults;
use crate::kubernetes::{self, NoClient};
use crate::model::{Name, NodeInfo, ObjectRef, PublishedPod, WorkloadUid};

pub use announce::{Announcer, Condition};
pub use version::{Unsupported, Version};
use watch::News;
use world::World;

/// News that come together are taken in together: a Service with its endpoints, the pods of a Deployment.
const SETTLE: Duration = Duration::from_millis(5);

/// News that may wait to be taken in. A watch that is faster waits for us.
const QUEUE: usize = 1024;

/// What the API server says at one moment.
#[derive(Clone, Debug)]
pub struct ClusterNews {
    /// The world.
    pub publication: Publication,
    /// The pods of other nodes that take tunnels, by address, as their nodes' agents say.
    pub published: imbl::HashMap<IpAddr, PublishedPod>,
    /// What the API server has of what this node's agent has said of its pods.
    pub told: imbl::HashMap<WorkloadUid, Told>,
}

/// What an agent of this node has told the API server of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The pod.
    pub pod: ObjectRef,
    /// Its annotation `undermesh.io/enrolled`, if it has one.
    pub enrolled: Option<Name>,
}

/// The API server, which has answered once.
pub struct Cluster {
    client: Client,
    node: NodeInfo,
    defaults: Defaults,
    sightings: mpsc::UnboundedReceiver<Sighting>,
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
    /// Connects as the pod's service account, or as KUBECONFIG says. Waits for an API server that does not answer.
    ///
    /// # Errors
    /// When there is no configuration, or the version is not one that can be served.
    pub async fn connect(
        mut node: NodeInfo,
        defaults: Defaults,
        sightings: mpsc::UnboundedReceiver<Sighting>,
    ) -> Result<Self, ConnectError> {
        let client = kubernetes::client().await?;
        let version = loop {
            match client.apiserver_version().await {
                Ok(info) => break Version::of(&info)?,
                Err(error) => {
                    warn!(error = kubernetes::told(&error), "the API server does not answer; trying again")
                }
            }
            sleep(Duration::from_secs(1) + Duration::from_millis(fastrand::u64(..1000))).await;
        };
        info!(%version, "connected to the API server");
        if node.zone.is_none() {
            node.zone = zone(&client, &node.name).await;
        }
        Ok(Self { client, node, defaults, sightings })
    }

    /// For whoever tells the API server what has become of this node's pods.
    pub fn announcer(&self) -> Announcer {
        Announcer::new(self.client.clone(), self.node.name.clone())
    }

    /// Follows the API server for as long as the future is polled, and publishes what changes; for the first time when all
    /// is known. Each attempt to watch that fails is told of.
    pub async fn follow(
        self,
        mut publish: impl FnMut(ClusterNews),
        watch_failed: WatchFailed,
    ) -> anyhow::Result<Infallible> {
        let Self { client, node, defaults, mut sightings } = self;
        let (tell, mut news) = mpsc::channel(QUEUE);
        let (want, wanted) = tokio::sync::watch::channel(BTreeSet::new());
        let mut watches = watch::all(&client, wanted, &tell, &watch_failed);
        let mut world = World::new(node, defaults);
        loop {
            tokio::select! {
                Some(first) = news.recv() => world.take(first),
                Some(sighting) = sightings.recv() => world.sight(sighting),
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
                publish(news);
            }
            kubernetes::want(&want, world.config_maps());
        }
    }
}

/// The zone of a node is a label that seldom changes and that nothing breaks without.
async fn zone(client: &Client, node: &Name) -> Option<Name> {
    const ZONE: &str = "topology.kubernetes.io/zone";
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    match nodes.get_metadata(node).await {
        Ok(node) => node.metadata.labels?.get(ZONE).map(|zone| zone.as_str().into()),
        Err(error) => {
            warn!(%node, error = kubernetes::told(&error), "the node's zone is not known; Services with a traffic distribution do without");
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

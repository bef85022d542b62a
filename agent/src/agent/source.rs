//! Where the agent's documents come from, chosen once: a directory of manifests, or the Kubernetes API together with what
//! the machine says of its pods.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, UnboundedSender};
use tracing::error;

use super::gate::Gate;
use super::tunnel::Certified;

use crate::config::Defaults;
use crate::discovery::Publication;
use crate::discovery::directory::Directory;
use crate::discovery::kubernetes::{self, Announcer, Cluster};
use crate::discovery::node::Sighting;
use crate::discovery::node::cgroups::Cgroups;
use crate::discovery::node::nri::Nri;
use crate::model::NodeInfo;
use crate::proxy::tunnel::Tunnel;
use crate::telemetry::Telemetry;

/// Where documents come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSettings {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The Kubernetes API.
    Kubernetes {
        /// The cgroup2 tree in which the kubelet keeps its pods.
        cgroup_root: PathBuf,
        /// Where the container runtime offers NRI.
        nri_socket: PathBuf,
        /// The file of what the API server said last, if it is to be kept.
        last_known: Option<PathBuf>,
    },
}

/// What an agent does for its node beside following the source, until it steps down.
pub(super) struct Role {
    /// Tells the source what has become of the pods.
    pub(super) announcer: Option<Announcer>,
    /// Holds pods that come.
    pub(super) gate: Gate,
    /// Told when all that is another agent's.
    pub(super) stepped_down: Arc<Notify>,
}

/// A source that has been reached.
pub(super) enum Source {
    /// A directory, read once.
    Directory(Box<Directory>),
    /// The API server, and what the machine knows of its pods.
    Cluster(Box<ClusterSource>),
}

/// The API server, and the two ways to the pods of the machine.
pub(super) struct ClusterSource {
    cluster: Cluster,
    cgroups: Cgroups,
    nri: Nri,
    tell: UnboundedSender<Sighting>,
}

impl Source {
    /// Reaches the source; waits for an API server that does not answer.
    pub(super) async fn open(
        settings: &SourceSettings,
        node: NodeInfo,
        defaults: Defaults,
    ) -> anyhow::Result<Self> {
        match settings {
            SourceSettings::Directory(path) => {
                Ok(Self::Directory(Box::new(Directory::open(path, node, defaults)?)))
            }
            SourceSettings::Kubernetes { cgroup_root, nri_socket, last_known } => {
                let cgroups = Cgroups::open(cgroup_root).with_context(|| {
                    format!("looking for pods in {} (--cgroup-root)", cgroup_root.display())
                })?;
                let (tell, sightings) = kubernetes::sightings();
                let cluster = Cluster::connect(node, defaults, sightings, last_known.clone()).await?;
                let nri = Nri { socket: nri_socket.clone(), cgroup_root: cgroup_root.clone() };
                Ok(Self::Cluster(Box::new(ClusterSource { cluster, cgroups, nri, tell })))
            }
        }
    }

    /// For whoever tells the source what has become of the pods; a directory is not told.
    pub(super) fn announcer(&self) -> Option<Announcer> {
        match self {
            Self::Directory(_) => None,
            Self::Cluster(source) => Some(source.cluster.announcer()),
        }
    }

    /// Publishes what the source says, for as long as it can be followed, also after the agent has stepped down: what it still has
    /// open is held to it. Who takes tunnels on other nodes goes where the tunnels look for it.
    pub(super) async fn follow(
        self,
        mut publish: impl FnMut(Publication),
        tunnel: Option<Arc<Tunnel>>,
        Role { announcer, gate, stepped_down }: Role,
        telemetry: Arc<Telemetry>,
    ) -> anyhow::Error {
        match self {
            Self::Directory(directory) => {
                publish(directory.publication());
                let Err(error) = directory.follow(publish).await;
                anyhow::Error::new(error).context("following the directory of manifests")
            }
            Self::Cluster(source) => {
                let ClusterSource { cluster, cgroups, nri, tell } = *source;
                let (arrive, arrivals) = mpsc::unbounded_channel();
                let runtime = async { tokio::join!(nri.serve(tell.clone(), arrive), gate.keep(arrivals)) };
                let told = async {
                    match announcer.clone() {
                        Some(announcer) => announcer.run().await,
                        None => std::future::pending().await,
                    }
                };
                let in_role = async {
                    tokio::select! {
                        never = told => never,
                        _ = runtime => unreachable!("both go on for ever"),
                        () = stepped_down.notified() => {}
                    }
                    std::future::pending::<Infallible>().await
                };
                let tell = tell.clone();
                let sightings = cgroups.follow(move |sighting| {
                    if tell.send(sighting).is_err() {
                        error!("nobody listens to what the machine says of its pods");
                    }
                });
                let published = tunnel.as_ref().map(|tunnel| tunnel.published.clone());
                let status = telemetry.status().clone();
                let followed = cluster.follow(
                    |news| {
                        status.set_as_of(news.as_of);
                        // First who takes tunnels: a pod that is known and not published would be sent plaintext.
                        if let Some(published) = &published {
                            published.store(Arc::new(news.published));
                        }
                        if let Some(announcer) = &announcer {
                            announcer.observe(&news.told);
                        }
                        publish(news.publication);
                    },
                    Arc::new(move |resource| telemetry.watch_failed(resource)),
                    async |identities| match tunnel {
                        Some(tunnel) => Some(Certified::get(tunnel.certificates.clone(), identities).await),
                        None => None,
                    },
                );
                tokio::select! {
                    Err(error) = sightings => anyhow::Error::new(error).context("following the cgroups of pods"),
                    Err(error) = followed => error.context("following the Kubernetes API"),
                    never = in_role => match never {},
                }
            }
        }
    }
}

//! NRI, by which a container runtime tells its plugins of each pod: after its network is there, and before its first container
//! is. It waits for the answer, so nothing of a pod runs before it is in the mesh.
//!
//! The plugin asks for no change of anything. A runtime that does not answer is tried again for ever: pods are found by
//! their cgroups meanwhile.

mod message;
mod wire;

#[cfg(fuzzing)]
pub use self::wire::fuzz;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use self::message::{
    Configure, Configured, PodSandbox, RegisterPlugin, Request, Response, RunPodSandbox, StateChange, Status,
    Synchronize, Synchronized,
};
use self::wire::{Decoder, Kind, Message, PLUGIN, RUNTIME};
use super::{Arrival, Place, Sighting, addresses, cgroups, namespaces};
use crate::model::PodPaths;

const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";

/// Our name among plugins, and our turn: the network is done before us, and whoever adjusts containers does not matter.
const NAME: &str = "undermesh";
const INDEX: &str = "90";

/// The kubelet's note of where it has a pod from.
const SOURCE: &str = "kubernetes.io/config.source";

/// `RUN_POD_SANDBOX`: the one event that is asked for.
const RUN_POD_SANDBOX: i32 = 1;

/// What an answer may take where the runtime does not say.
const USUAL_TIMEOUT: Duration = Duration::from_secs(2);

/// How often it is looked for a runtime.
const RETRY: Duration = Duration::from_secs(2);

/// gRPC's `UNIMPLEMENTED` and `FAILED_PRECONDITION`.
const UNIMPLEMENTED: i32 = 12;
const FAILED_PRECONDITION: i32 = 9;

/// A plugin of the node's runtime.
#[derive(Clone, Debug)]
pub struct Nri {
    /// The runtime's socket.
    pub socket: PathBuf,
    /// The cgroup2 tree in which the kubelet keeps its pods.
    pub cgroup_root: PathBuf,
}

impl Nri {
    /// Serves the runtime for as long as the future is polled: tells of each pod, and has the runtime wait for what becomes of
    /// one that has just come.
    pub async fn serve(
        self,
        sightings: mpsc::UnboundedSender<Sighting>,
        arrivals: mpsc::UnboundedSender<Arrival>,
    ) {
        let mut was_there = true;
        loop {
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => {
                    was_there = true;
                    let session = Session {
                        nri: &self,
                        sightings: &sightings,
                        arrivals: &arrivals,
                        patience: USUAL_TIMEOUT,
                    };
                    match session.run(stream).await {
                        Ok(()) => info!("the container runtime has closed NRI"),
                        Err(error) => warn!(%error, "NRI broke off; trying again"),
                    }
                }
                Err(error) => {
                    if std::mem::take(&mut was_there) {
                        warn!(
                            socket = %self.socket.display(),
                            %error,
                            "the container runtime offers no NRI: a container may make its first connections before its pod \
                             is in the mesh; enable NRI (containerd 2 and CRI-O have it on)"
                        );
                    }
                }
            }
            sleep(RETRY).await;
        }
    }
}

/// One connection to the runtime.
struct Session<'a> {
    nri: &'a Nri,
    sightings: &'a mpsc::UnboundedSender<Sighting>,
    arrivals: &'a mpsc::UnboundedSender<Arrival>,
    /// How long the runtime waits for an answer.
    patience: Duration,
}

impl Session<'_> {
    async fn run(mut self, stream: UnixStream) -> io::Result<()> {
        let (mut read, mut write) = stream.into_split();
        // Answers come when pods are enrolled, in whichever order.
        let (answer, mut answers) = mpsc::unbounded_channel::<Message>();
        let register = RegisterPlugin { plugin_name: NAME.into(), plugin_idx: INDEX.into() };
        let register = Request {
            service: RUNTIME_SERVICE.into(),
            method: "RegisterPlugin".into(),
            payload: register.encode_to_vec(),
            timeout_nano: 0,
        };
        // Streams of a client are odd.
        let register = Message {
            connection: RUNTIME,
            stream: 1,
            kind: Kind::Request,
            payload: register.encode_to_vec(),
        };
        write.write_all(&register.encode()).await?;

        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            tokio::select! {
                count = read.read(&mut buffer) => {
                    let count = count?;
                    if count == 0 {
                        return Ok(());
                    }
                    let messages = decoder.take(&buffer[..count]).map_err(io::Error::other)?;
                    for message in messages {
                        self.take(message, &answer)?;
                    }
                }
                Some(message) = answers.recv() => write.write_all(&message.encode()).await?,
            }
        }
    }

    fn take(&mut self, message: Message, answer: &mpsc::UnboundedSender<Message>) -> io::Result<()> {
        match message.kind {
            Kind::Response => {
                let response = Response::decode(&*message.payload).map_err(io::Error::other)?;
                match response.status.filter(|status| status.code != 0) {
                    Some(status) => {
                        Err(io::Error::other(format!("the runtime refuses us: {}", status.message)))
                    }
                    None => Ok(()),
                }
            }
            Kind::Request => {
                let request = Request::decode(&*message.payload).map_err(io::Error::other)?;
                let reply = Reply { stream: message.stream, answer: answer.clone() };
                self.serve(request, reply).map_err(io::Error::other)
            }
        }
    }

    fn serve(&mut self, request: Request, reply: Reply) -> Result<(), prost::DecodeError> {
        let payload = &*request.payload;
        match (request.service.as_str(), request.method.as_str()) {
            (PLUGIN_SERVICE, "Configure") => {
                let Configure { runtime_name, runtime_version, request_timeout } =
                    Configure::decode(payload)?;
                if let Some(millis) = u64::try_from(request_timeout).ok().filter(|millis| *millis > 0) {
                    self.patience = Duration::from_millis(millis);
                }
                info!(
                    runtime = runtime_name,
                    version = runtime_version,
                    "the container runtime tells of its pods"
                );
                reply.with(&Configured { events: 1 << (RUN_POD_SANDBOX - 1) });
            }
            (PLUGIN_SERVICE, "Synchronize") => {
                let Synchronize { pods, more } = Synchronize::decode(payload)?;
                for pod in pods {
                    self.sight(&pod);
                }
                reply.with(&Synchronized { more });
            }
            (PLUGIN_SERVICE, "RunPodSandbox") => match RunPodSandbox::decode(payload)?.pod {
                Some(pod) => self.arrive(&pod, reply),
                None => reply.done(),
            },
            (PLUGIN_SERVICE, "StateChange") => match StateChange::decode(payload)? {
                StateChange { event: RUN_POD_SANDBOX, pod: Some(pod) } => self.arrive(&pod, reply),
                _ => reply.done(),
            },
            (PLUGIN_SERVICE, "Shutdown") => reply.done(),
            (service, method) => reply.refuse(UNIMPLEMENTED, format!("{service}/{method} is not served")),
        }
        Ok(())
    }

    /// Tells of a pod, and says in which network namespace it is. One on the host's network is no pod of ours.
    fn sight(&self, pod: &PodSandbox) -> Option<PathBuf> {
        // The runtime's name for a static pod is not that of the API server, which has no say in it.
        if pod.annotations.get(SOURCE).is_some_and(|source| source != "api") {
            return None;
        }
        let place = self.place(pod)?;
        let netns = place.paths.netns.clone();
        self.sightings.send(Sighting::Found(pod.uid.as_str().into(), place)).ok().map(|()| netns)
    }

    /// A pod that has just come: the runtime waits until it is in the mesh, or is known not to be meant.
    fn arrive(&self, pod: &PodSandbox, reply: Reply) {
        let Some(netns) = self.sight(pod) else { return reply.done() };
        let (decide, decided) = oneshot::channel();
        // Time is left for the answer itself: a plugin that is late is not asked any more.
        let patience = self.patience.mul_f64(0.75);
        let arrival = Arrival { uid: pod.uid.as_str().into(), netns, patience, decide };
        if self.arrivals.send(arrival).is_err() {
            return reply.done();
        }
        let name = format!("{}/{}", pod.namespace, pod.name);
        tokio::spawn(async move {
            match timeout(patience, decided).await {
                Ok(Ok(Err(why))) => {
                    warn!(pod = name, why, "the pod is not started, for it cannot be put into the mesh");
                    reply.refuse(FAILED_PRECONDITION, format!("undermesh: {why}"));
                }
                Ok(_) => reply.done(),
                Err(_elapsed) => {
                    warn!(pod = name, "the pod starts before it is known whether it is in the mesh");
                    reply.done();
                }
            }
        });
    }

    fn place(&self, pod: &PodSandbox) -> Option<Place> {
        let namespaces = &pod.linux.as_ref()?.namespaces;
        let network = namespaces.iter().find(|namespace| namespace.kind == "network")?;
        if network.path.is_empty() {
            return None;
        }
        let netns = namespaces::spelt_as_here(Path::new(&network.path));
        let cgroup = cgroups::find(&self.nri.cgroup_root, &pod.uid)?;
        let addresses = match addresses::of(&netns) {
            Ok(addresses) => addresses,
            Err(error) => {
                debug!(pod = pod.name, netns = %netns.display(), %error, "the pod's network cannot be looked at");
                return None;
            }
        };
        Some(Place { paths: PodPaths { netns, cgroup }, addresses })
    }
}

/// What the runtime waits for.
struct Reply {
    stream: u32,
    answer: mpsc::UnboundedSender<Message>,
}

impl Reply {
    fn done(self) {
        self.send(Response::default());
    }

    fn with(self, payload: &impl prost::Message) {
        self.send(Response { status: None, payload: payload.encode_to_vec() });
    }

    fn refuse(self, code: i32, message: String) {
        self.send(Response { status: Some(Status { code, message }), payload: Vec::new() });
    }

    fn send(self, response: Response) {
        let payload = response.encode_to_vec();
        // Without a connection there is nobody to answer.
        let _ = self.answer.send(Message {
            connection: PLUGIN,
            stream: self.stream,
            kind: Kind::Response,
            payload,
        });
    }
}

#[cfg(test)]
mod tests;

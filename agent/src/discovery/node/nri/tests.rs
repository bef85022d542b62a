//! A runtime that speaks NRI, and what the plugin does.

use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::message::{LinuxNamespace, LinuxPodSandbox};
use super::*;

/// The runtime's end.
struct Runtime {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    decoder: Decoder,
    pending: Vec<Message>,
}

impl Runtime {
    async fn accept(listener: &UnixListener) -> Self {
        let (read, write) = listener.accept().await.unwrap().0.into_split();
        Self { read, write, decoder: Decoder::default(), pending: Vec::new() }
    }

    async fn next(&mut self) -> Message {
        let mut buffer = [0; 4096];
        while self.pending.is_empty() {
            let count = timeout(Duration::from_secs(5), self.read.read(&mut buffer)).await.unwrap().unwrap();
            assert_ne!(count, 0, "the plugin has closed");
            self.pending = self.decoder.take(&buffer[..count]).unwrap();
        }
        self.pending.remove(0)
    }

    async fn call(&mut self, stream: u32, method: &str, payload: &impl prost::Message) {
        let request = Request {
            service: PLUGIN_SERVICE.into(),
            method: method.into(),
            payload: payload.encode_to_vec(),
            timeout_nano: 0,
        };
        let message =
            Message { connection: PLUGIN, stream, kind: Kind::Request, payload: request.encode_to_vec() };
        self.write.write_all(&message.encode()).await.unwrap();
    }

    /// The answer to a call: its payload, or its code and why.
    async fn answer(&mut self, stream: u32) -> Result<Vec<u8>, (i32, String)> {
        let message = self.next().await;
        assert_eq!((message.connection, message.stream, message.kind), (PLUGIN, stream, Kind::Response));
        let response = Response::decode(&*message.payload).unwrap();
        match response.status {
            Some(status) => Err((status.code, status.message)),
            None => Ok(response.payload),
        }
    }
}

/// A plugin that has registered, with a tree in which the kubelet has one pod.
async fn registered()
-> (Runtime, mpsc::UnboundedReceiver<Sighting>, mpsc::UnboundedReceiver<Arrival>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nri.sock");
    let cgroup_root = folder.path().join("cgroup");
    std::fs::create_dir_all(cgroup_root.join(format!("kubepods/besteffort/pod{UID}"))).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let (tell, sightings) = mpsc::unbounded_channel();
    let (arrive, arrivals) = mpsc::unbounded_channel();
    tokio::spawn(Nri { socket, cgroup_root }.serve(tell, arrive));
    let mut runtime = Runtime::accept(&listener).await;
    let message = runtime.next().await;
    assert_eq!((message.connection, message.kind), (RUNTIME, Kind::Request));
    let request = Request::decode(&*message.payload).unwrap();
    assert_eq!((request.service.as_str(), request.method.as_str()), (RUNTIME_SERVICE, "RegisterPlugin"));
    let plugin = RegisterPlugin::decode(&*request.payload).unwrap();
    assert_eq!((plugin.plugin_name.as_str(), plugin.plugin_idx.as_str()), ("undermesh", "90"));
    (runtime, sightings, arrivals, folder)
}

const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

/// Its network is the one that the test is in: any will do.
fn pod(netns: &str) -> PodSandbox {
    let network = LinuxNamespace { kind: "network".into(), path: netns.into() };
    PodSandbox {
        name: "web".into(),
        uid: UID.into(),
        namespace: "shop".into(),
        linux: Some(LinuxPodSandbox { namespaces: vec![network] }),
        ..PodSandbox::default()
    }
}

async fn configure(runtime: &mut Runtime, request_timeout: i64) {
    let configure = Configure { runtime_name: "containerd".into(), request_timeout, ..Configure::default() };
    runtime.call(1, "Configure", &configure).await;
    let configured = Configured::decode(&*runtime.answer(1).await.unwrap()).unwrap();
    assert_eq!(configured.events, 1, "only new pods are of interest");
}

#[tokio::test]
async fn the_runtime_waits_for_what_becomes_of_a_pod() {
    let (mut runtime, mut sightings, mut arrivals, _folder) = registered().await;
    configure(&mut runtime, 60_000).await;
    let expected = |sighting: Sighting| match sighting {
        Sighting::Found(uid, place) => {
            assert!(&*uid == UID && place.paths.cgroup.ends_with(format!("pod{UID}")), "{uid} {place:?}");
        }
        Sighting::Gone(uid) => panic!("{uid} has gone"),
    };

    // What runs already is told of at once; on the host's network, it is no pod of ours.
    let pods = vec![pod("/proc/self/ns/net"), pod("")];
    runtime.call(3, "Synchronize", &Synchronize { pods, more: true }).await;
    let synchronized = Synchronized::decode(&*runtime.answer(3).await.unwrap()).unwrap();
    assert!(synchronized.more, "the runtime is told to go on");
    expected(sightings.recv().await.unwrap());

    // Both ways of telling, of older runtimes and of newer ones, and both decisions.
    let run = RunPodSandbox { pod: Some(pod("/proc/self/ns/net")) };
    runtime.call(5, "RunPodSandbox", &run).await;
    expected(sightings.recv().await.unwrap());
    let first = arrivals.recv().await.unwrap();
    let change = StateChange { event: RUN_POD_SANDBOX, pod: Some(pod("/proc/self/ns/net")) };
    runtime.call(7, "StateChange", &change).await;
    let second = arrivals.recv().await.unwrap();
    assert_eq!((&*first.uid, first.patience), (UID, Duration::from_secs(45)));
    assert_eq!(first.netns, Path::new("/proc/self/ns/net"));
    // Not in the order in which they came.
    second.decide.send(Err("there is no way".into())).unwrap();
    let (code, why) = runtime.answer(7).await.unwrap_err();
    assert_eq!((code, why.as_str()), (FAILED_PRECONDITION, "undermesh: there is no way"));
    first.decide.send(Ok(())).unwrap();
    assert_eq!(runtime.answer(5).await, Ok(Vec::new()));

    // What was not asked for is refused, and does no harm.
    runtime.call(9, "Unheard", &RunPodSandbox::default()).await;
    assert_eq!(runtime.answer(9).await.unwrap_err().0, UNIMPLEMENTED);
    runtime.call(11, "RunPodSandbox", &RunPodSandbox::default()).await;
    assert_eq!(runtime.answer(11).await, Ok(Vec::new()));
}

#[tokio::test]
async fn a_decision_that_does_not_come_holds_nobody_for_ever() {
    let (mut runtime, _sightings, mut arrivals, _folder) = registered().await;
    configure(&mut runtime, 400).await;
    runtime.call(3, "RunPodSandbox", &RunPodSandbox { pod: Some(pod("/proc/self/ns/net")) }).await;
    let _undecided = arrivals.recv().await.unwrap();
    assert_eq!(runtime.answer(3).await, Ok(Vec::new()));
}

#[tokio::test]
async fn static_pods_are_no_business_of_ours() {
    let (mut runtime, _sightings, mut arrivals, _folder) = registered().await;
    configure(&mut runtime, 0).await;
    let mut pod = pod("/proc/self/ns/net");
    pod.annotations.insert(SOURCE.into(), "file".into());
    runtime.call(3, "RunPodSandbox", &RunPodSandbox { pod: Some(pod) }).await;
    assert_eq!(runtime.answer(3).await, Ok(Vec::new()));
    assert!(arrivals.try_recv().is_err());
}

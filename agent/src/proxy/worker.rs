//! Worker threads: each accepts on its own listeners in every enrolled pod and relays what it accepted.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tracing::{debug, error, warn};

use super::detect::ServersFirst;
use super::let_in::LetIn;
use super::relay::begin_and_carry;
use super::tunnel::{self, TUNNEL_PORT, Tunnel};
use super::{Proxy, http, inbound, outbound};
use crate::capture::{
    Capture, CaptureError, Dialer, NewPod, Part, PodListeners, PodNet, leave_netns_unless, monotonic_ns,
};

/// Pause after an accept failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The worker threads. Dropping this ends them and every connection they relay.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
}

/// A worker thread has ended, which only a bug can make it do.
#[derive(Debug, thiserror::Error)]
#[error("a worker thread has ended")]
pub struct WorkersGone;

#[derive(Debug)]
struct Worker {
    commands: mpsc::Sender<Command>,
    pulse: Arc<Pulse>,
    thread: Option<JoinHandle<()>>,
}

/// How a worker shows that it works. It is asked from outside: timers of its own would wake it twice for each.
#[derive(Debug)]
struct Pulse {
    asked: Notify,
    /// When it answered last, `CLOCK_MONOTONIC` in nanoseconds.
    answered: AtomicU64,
}

/// What one worker has for itself.
#[derive(Debug)]
pub(super) struct Here {
    pub(super) dialer: Dialer,
    pub(super) tunnels: Arc<tunnel::Pool>,
    /// Connections that requests are sent on.
    pub(super) upstreams: Arc<http::Pool>,
    /// Those of all workers.
    pub(super) all_upstreams: Arc<[Arc<http::Pool>]>,
    /// Tells those of all workers that a connection has left its place, where there is a cap on places.
    pub(super) place_left: Arc<Notify>,
    pub(super) servers_first: ServersFirst,
    pub(super) shares: Shares,
    /// Connections that stand at this node's pods.
    pub(super) let_in: LetIn,
}

/// Numbers by which requests are shared out by weight. They are spread more evenly than random ones would be: 50 % of 10,000
/// requests are 5,000 and not 5,087.
#[derive(Debug)]
pub(super) struct Shares(AtomicU64);

impl Shares {
    /// The next one, of 64 bits.
    pub(super) fn next(&self) -> u64 {
        /// 2^64 over the golden ratio: multiples of it fill the circle evenly, and so do every second, every third... of them
        /// (Weyl's equidistribution), so that rules which take turns get theirs as well.
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        self.0.fetch_add(STEP, Ordering::Relaxed)
    }
}

impl Default for Shares {
    fn default() -> Self {
        Self(AtomicU64::new(fastrand::u64(..)))
    }
}

enum Command {
    Serve {
        net: Arc<PodNet>,
        listeners: PodListeners,
    },
    Release {
        cookie: u64,
        fate: Fate,
        done: oneshot::Sender<()>,
    },
    /// Policies or mTLS modes may be others now.
    Review {
        done: oneshot::Sender<()>,
    },
}

/// What becomes of a pod's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// New ones are accepted.
    Serve,
    /// The pod is not served any more; those that are open go on until they end.
    GoOn,
    /// They are broken off: nobody is left at the pod's end.
    BreakOff,
}

impl Workers {
    /// Starts `count` workers.
    pub fn start(count: usize, proxy: &Arc<Proxy>, capture: &Capture) -> Result<Self, CaptureError> {
        keep_freed_memory();
        let mut workers = Vec::with_capacity(count);
        let all_upstreams: Arc<[Arc<http::Pool>]> = (0..count).map(|_| Arc::default()).collect();
        let place_left = Arc::<Notify>::default();
        for index in 0..count {
            let here = Here {
                dialer: capture.dialer()?,
                tunnels: Arc::default(),
                upstreams: all_upstreams[index].clone(),
                all_upstreams: all_upstreams.clone(),
                place_left: place_left.clone(),
                servers_first: ServersFirst::default(),
                shares: Shares::default(),
                let_in: LetIn::default(),
            };
            let worker = Worker::start(index, proxy.clone(), Arc::new(here));
            workers.push(worker.map_err(Part::Workers.step("starting a worker thread"))?);
        }
        Ok(Self { workers })
    }

    /// Serves a pod that was just enrolled.
    pub async fn serve(&self, pod: NewPod) -> Result<(), WorkersGone> {
        for (worker, listeners) in self.workers.iter().zip(pod.listeners) {
            worker.send(Command::Serve { net: pod.net.clone(), listeners }).await?;
        }
        Ok(())
    }

    /// Stops serving a pod: takes what waits in the listeners' backlog, then closes them. May be called again to break
    /// off what has gone on.
    pub async fn release(&self, net: &PodNet, fate: Fate) -> Result<(), WorkersGone> {
        for worker in &self.workers {
            let (done, released) = oneshot::channel();
            worker.send(Command::Release { cookie: net.cookie, fate, done }).await?;
            released.await.map_err(|_| WorkersGone)?;
        }
        Ok(())
    }

    /// Has connections end that the newest snapshot does not let in any more. They have been told to when it returns.
    pub async fn review(&self) -> Result<(), WorkersGone> {
        let mut reviews = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            let (done, reviewed) = oneshot::channel();
            worker.send(Command::Review { done }).await?;
            reviews.push(reviewed);
        }
        for reviewed in reviews {
            reviewed.await.map_err(|_| WorkersGone)?;
        }
        Ok(())
    }

    /// Asks every worker for a sign of life whenever it is called, and says when all had given one after they were asked
    /// before, `CLOCK_MONOTONIC` in nanoseconds. To be called several times a second: workers tidy up on that occasion.
    pub fn pulse(&self) -> impl Fn() -> u64 + Send + 'static {
        let pulses: Vec<_> = self.workers.iter().map(|worker| worker.pulse.clone()).collect();
        move || {
            pulses.iter().for_each(|pulse| pulse.asked.notify_one());
            let answers = pulses.iter().map(|pulse| pulse.answered.load(Ordering::Relaxed));
            answers.min().unwrap_or_default()
        }
    }
}

impl Worker {
    fn start(index: usize, proxy: Arc<Proxy>, here: Arc<Here>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel(64);
        let pulse = Arc::new(Pulse { asked: Notify::new(), answered: AtomicU64::new(monotonic_ns()) });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shown = pulse.clone();
        let thread = std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || runtime.block_on(run(proxy, here, inbox, &shown)))?;
        Ok(Self { commands, pulse, thread: Some(thread) })
    }

    async fn send(&self, command: Command) -> Result<(), WorkersGone> {
        self.commands.send(command).await.map_err(|_| WorkersGone)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let threads: Vec<_> = self.workers.drain(..).filter_map(|mut worker| worker.thread.take()).collect();
        // The inboxes are closed now, which ends the threads.
        for thread in threads {
            if thread.join().is_err() {
                error!("a worker thread panicked");
            }
        }
    }
}

async fn run(proxy: Arc<Proxy>, here: Arc<Here>, mut inbox: mpsc::Receiver<Command>, pulse: &Pulse) {
    let mut pods: HashMap<u64, watch::Sender<Fate>> = HashMap::new();
    let mut accepting: JoinSet<()> = JoinSet::new();
    loop {
        tokio::select! {
            command = inbox.recv() => match command {
                Some(Command::Serve { net, listeners }) => {
                    let (decide, fate) = watch::channel(Fate::Serve);
                    let cookie = net.cookie;
                    match PodTask::new(proxy.clone(), here.clone(), net, listeners) {
                        Ok(pod) => {
                            pods.insert(cookie, decide);
                            accepting.spawn(pod.run(fate));
                        }
                        Err(error) => error!(%error, "cannot serve the listeners of a pod"),
                    }
                }
                Some(Command::Release { cookie, fate, done }) => {
                    here.tunnels.forget(cookie);
                    here.upstreams.forget(cookie);
                    if let Some(decide) = pods.get(&cookie) {
                        decide.send_replace(fate);
                    }
                    leave_unserved(&pods);
                    let _ = done.send(());
                }
                Some(Command::Review { done }) => {
                    here.let_in.review(&proxy);
                    let _ = done.send(());
                }
                None => break,
            },
            () = pulse.asked.notified() => {
                pulse.answered.store(monotonic_ns(), Ordering::Relaxed);
                // What waited in the backlog of a pod that is released may have led back into its namespace.
                leave_unserved(&pods);
                here.tunnels.look();
                here.upstreams.sweep(Instant::now(), &proxy.snapshot.load());
            }
            Some(ended) = accepting.join_next() => {
                pods.retain(|_, decide| !decide.is_closed());
                if let Err(error) = ended {
                    error!(%error, "serving a pod broke off");
                }
            }
        }
    }
}

/// What bulk traffic frees it needs again at once; the allocator would give it back to the kernel and have its pages
/// cleared anew each time.
fn keep_freed_memory() {
    const KEPT: libc::c_int = 1024 * 1024;
    // SAFETY: the call takes no pointers; it sets a parameter of the allocator, which may refuse it.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT) };
}

/// Dialling leaves the thread in the pod's namespace, which would outlive the pod.
fn leave_unserved(pods: &HashMap<u64, watch::Sender<Fate>>) {
    let is_served = |cookie| pods.get(&cookie).is_some_and(|fate| *fate.borrow() == Fate::Serve);
    if let Err(error) = leave_netns_unless(is_served) {
        error!(%error, "cannot leave the network namespace of a pod");
    }
}

/// Owns the listeners and connections of one pod on one worker.
struct PodTask {
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    outbound: TcpListener,
    inbound: TcpListener,
    connections: JoinSet<()>,
}

impl PodTask {
    fn new(
        proxy: Arc<Proxy>,
        here: Arc<Here>,
        net: Arc<PodNet>,
        listeners: PodListeners,
    ) -> io::Result<Self> {
        let outbound = TcpListener::from_std(listeners.outbound)?;
        let inbound = TcpListener::from_std(listeners.inbound)?;
        // Accepted sockets inherit it: a caller may vanish as well as a server may.
        SockRef::from(&inbound).set_tcp_keepalive(&proxy.settings.keepalive)?;
        Ok(Self { proxy, here, net, outbound, inbound, connections: JoinSet::new() })
    }

    async fn run(mut self, mut fate: watch::Receiver<Fate>) {
        while *fate.borrow_and_update() == Fate::Serve {
            tokio::select! {
                changed = fate.changed() => if changed.is_err() { break },
                accepted = self.outbound.accept() => self.take_outbound(accepted, &fate).await,
                accepted = self.inbound.accept() => self.take_inbound(accepted, &fate).await,
                Some(ended) = self.connections.join_next() => report_panic(ended),
            }
        }
        self.take_backlog(&fate).await;
        let Self { net, outbound, inbound, connections, .. } = self;
        drop((outbound, inbound));
        debug!(pod = %net.pod, open = connections.len(), "not serving the pod any more");
        drop(net);
        see_out(connections, fate).await;
    }

    async fn take_outbound(
        &mut self,
        accepted: io::Result<(TcpStream, SocketAddr)>,
        fate: &watch::Receiver<Fate>,
    ) {
        if let Some(accepted) = self.accepted(accepted).await {
            let (proxy, here, net) = (self.proxy.clone(), self.here.clone(), self.net.clone());
            self.connections.spawn(begin_and_carry(outbound::begin(
                proxy,
                here,
                net,
                accepted,
                fate.clone(),
            )));
        }
    }

    async fn take_inbound(
        &mut self,
        accepted: io::Result<(TcpStream, SocketAddr)>,
        fate: &watch::Receiver<Fate>,
    ) {
        let Some((stream, peer)) = self.accepted(accepted).await else { return };
        let (proxy, here, net) = (self.proxy.clone(), self.here.clone(), self.net.clone());
        let fate = fate.clone();
        match self.tunnel_of(&stream) {
            Some(tunnel) => {
                self.connections.spawn(tunnel::server::serve(proxy, tunnel, here, net, (stream, peer), fate))
            }
            None => self.connections.spawn(begin_and_carry(inbound::begin(
                proxy,
                here,
                net,
                (stream, peer),
                fate,
            ))),
        };
    }

    /// The tunnel's port is the agent's own, where there are tunnels.
    fn tunnel_of(&self, stream: &TcpStream) -> Option<Arc<Tunnel>> {
        let tunnel = self.proxy.tunnel.as_ref()?;
        let is_tunnel = stream.local_addr().is_ok_and(|local| local.port() == TUNNEL_PORT);
        is_tunnel.then(|| tunnel.clone())
    }

    async fn accepted(
        &self,
        accepted: io::Result<(TcpStream, SocketAddr)>,
    ) -> Option<(TcpStream, SocketAddr)> {
        match accepted {
            Ok(accepted) => Some(accepted),
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => None,
            Err(error) => {
                warn!(pod = %self.net.pod, %error, "cannot accept connections; raise the limit of open files if it is reached");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                None
            }
        }
    }

    /// What was captured before the programs went would be reset with the listeners otherwise.
    async fn take_backlog(&mut self, fate: &watch::Receiver<Fate>) {
        loop {
            // Cancelling an accept loses nothing; a short wait finds what is there.
            let next = async {
                tokio::select! {
                    biased;
                    accepted = self.outbound.accept() => (true, accepted),
                    accepted = self.inbound.accept() => (false, accepted),
                }
            };
            match tokio::time::timeout(Duration::from_millis(10), next).await {
                Ok((true, accepted)) => self.take_outbound(accepted, fate).await,
                Ok((false, accepted)) => self.take_inbound(accepted, fate).await,
                Err(_nothing_waits) => return,
            }
        }
    }
}

/// Waits for the connections to end, or breaks them off when that is decided.
async fn see_out(mut connections: JoinSet<()>, mut fate: watch::Receiver<Fate>) {
    while !connections.is_empty() {
        if *fate.borrow_and_update() == Fate::BreakOff {
            connections.abort_all();
        }
        tokio::select! {
            Some(ended) = connections.join_next() => report_panic(ended),
            // Err: the pod is served anew, by another task, and nobody decides about these any more.
            Ok(()) = fate.changed() => {}
        }
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked; this is a bug");
    }
}

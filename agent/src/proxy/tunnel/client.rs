//! The client's end: a stream to a pod of another node, over a tunnel that stands or a new one.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong};
use http::header::{FORWARDED, HeaderName, HeaderValue};
use http::{Method, Request, StatusCode, Uri, Version};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::handshake::{self, Failure, Watched};
use super::health::{Health, Verdict};
use super::pool::{Claimed, Dial, Established, Key, Pool};
use super::refusal;
use super::stream::Ends;
use super::transport::{Flusher, Transport};
use super::window::{CONNECTION_WINDOW, STREAM_WINDOW, StreamWindow};
use super::{HANDSHAKE_TIMEOUT, MAX_FRAME, SEND_BUFFER, TUNNEL_PORT, Tunnel};
use crate::balance::Carries;
use crate::capture::PodNet;
use crate::identity::{HandshakeError, HandshakeReason, Standing};
use crate::model::Workload;
use crate::proxy::Proxy;
use crate::proxy::upstream::{self, Target};
use crate::proxy::worker::Here;
use crate::telemetry::{RefuseReason, Reporter};

/// Unused tunnels go after this long.
const IDLE_LIMIT: Duration = Duration::from_secs(300);

const MAX_HEADER_LIST: u32 = 16 * 1024;

// Made once: as texts they would be checked and copied for each request.
pub(super) static BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// Says of a stream that its client is another agent, which sends requests on it. Nothing is let in by it.
pub(super) static CARRIES: HeaderName = HeaderName::from_static("undermesh-carries");
pub(super) const REQUESTS: HeaderValue = HeaderValue::from_static("requests");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What is wanted: a connection from a pod of this node to another pod.
#[derive(Clone, Copy, Debug)]
pub(in crate::proxy) struct Wanted<'a> {
    pub(in crate::proxy) from: &'a Arc<PodNet>,
    /// The application's end, which the server's application is to see.
    pub(in crate::proxy) client: SocketAddr,
    pub(in crate::proxy) to: SocketAddr,
    /// The pod that has the address.
    pub(in crate::proxy) destination: &'a Workload,
    /// How long the other side may take to connect.
    pub(in crate::proxy) within: Duration,
    pub(in crate::proxy) carries: Carries,
}

/// Why a CONNECT came to nothing.
#[derive(Debug)]
enum Failed {
    /// The other side said so.
    Refused(RefuseReason),
    /// It said nothing: the tunnel broke, or had broken long ago.
    Broken,
}

/// Connects. The caller gives up when the client does.
pub(in crate::proxy) async fn connect(
    proxy: &Arc<Proxy>,
    tunnel: &Arc<Tunnel>,
    here: &Arc<Here>,
    wanted: Wanted<'_>,
) -> Result<Ends, RefuseReason> {
    let key = key(wanted)?;
    let make = |dial: Dial| {
        let (proxy, tunnel, here, net) = (proxy.clone(), tunnel.clone(), here.clone(), wanted.from.clone());
        async move {
            match establish(&proxy, &tunnel, &here, &net, &dial.key).await {
                Ok(connection) => run(&proxy, &tunnel, &net, dial, connection).await,
                Err(reason) => dial.failed(reason),
            }
        }
    };
    let mut not_before = None;
    loop {
        let began = Instant::now();
        let claimed = here.tunnels.claim(&key, not_before, make).await?;
        let (is_reused, health) = (claimed.is_reused, claimed.place.shared());
        match ask(claimed, wanted).await {
            Ok(tunnelled) => return Ok(tunnelled),
            Err(Failed::Refused(reason)) => return Err(reason),
            Err(Failed::Broken) => here.tunnels.discard(&key, &health),
        }
        if !is_reused || not_before.is_some() {
            return Err(RefuseReason::ConnectReset);
        }
        debug!(to = %wanted.to, "a tunnel had died; trying a new one");
        not_before = Some(began);
    }
}

fn key(wanted: Wanted<'_>) -> Result<Key, RefuseReason> {
    let identity = |workload: &Workload| {
        workload.identity.clone().ok_or_else(|| {
            warn!(pod = %workload.pod, "the pod's service account makes no identity");
            RefuseReason::Internal
        })
    };
    Ok(Key {
        source: wanted.from.cookie,
        source_id: identity(&wanted.from.workload)?,
        destination: SocketAddr::new(wanted.to.ip(), TUNNEL_PORT),
        destination_id: identity(wanted.destination)?,
    })
}

/// A new connection, its handshakes done.
struct NewConnection {
    requests: SendRequest<Bytes>,
    pings: PingPong,
    connection: Driven,
    failure: Failure,
    standing: Standing,
}

/// What moves a connection's frames.
struct Driven {
    connection: Connection<Watched<Transport>, Bytes>,
    flusher: Flusher,
    window: StreamWindow,
    /// Once it carries streams.
    health: Option<Arc<Health>>,
}

impl Driven {
    fn new(connection: Connection<Watched<Transport>, Bytes>, flusher: Flusher) -> Self {
        Self { connection, flusher, window: StreamWindow::new(), health: None }
    }
}

impl Future for Driven {
    type Output = Result<(), h2::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { connection, flusher, window, health } = self.get_mut();
        let ended = Pin::new(&mut *connection).poll(cx);
        if let Some(health) = health {
            window.follow(cx, health, |size| connection.set_initial_window_size(size));
        }
        flusher.poll(cx);
        ended
    }
}

async fn establish(
    proxy: &Proxy,
    tunnel: &Tunnel,
    here: &Here,
    net: &PodNet,
    key: &Key,
) -> Result<NewConnection, RefuseReason> {
    let failed = |why| tunnel.handshakes.failed(Reporter::Source, &net.pod, key.destination, &why);
    let tls = handshake::client_end(tunnel, &key.source_id, &key.destination_id).await.map_err(|why| {
        failed(why);
        RefuseReason::NoCertificate
    })?;
    let target = Target { from: net, to: key.destination, source: None, on_behalf_of: None };
    let tcp = upstream::connect(proxy, &here.dialer, std::future::pending(), target).await;
    let tcp = tcp.map_err(|reason| match reason {
        RefuseReason::ConnectRefused => RefuseReason::AgentDown,
        other => other,
    })?;
    let observer = tunnel.tls.observer();
    let handshakes = async {
        let (stream, _peer) = tls.connect(tcp).await?;
        let standing = observer.of_server(stream.get_ref().1);
        let (socket, tls) = stream.into_inner();
        let (transport, flusher) = Transport::new(socket, tls);
        let (transport, failure) = Watched::new(transport);
        let (requests, mut connection) =
            settings().handshake(transport).await.map_err(|error| failure.of(Some(error)))?;
        let no_pings = || HandshakeError::new(HandshakeReason::Internal, "the connection has no pings");
        let pings = connection.ping_pong().ok_or_else(no_pings)?;
        Ok(NewConnection { requests, pings, connection: Driven::new(connection, flusher), failure, standing })
    };
    let shaken = timeout(HANDSHAKE_TIMEOUT, handshakes).await;
    shaken.unwrap_or_else(|_elapsed| Err(handshake::too_slow())).map_err(|why| {
        failed(why);
        RefuseReason::HandshakeFailed
    })
}

pub(super) fn settings() -> h2::client::Builder {
    let mut settings = h2::client::Builder::new();
    settings
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false);
    settings
}

/// Carries the tunnel's frames until it is over. Without tunnels in the pool that lead to it, the connection ends
/// itself after its last stream.
async fn run(proxy: &Proxy, tunnel: &Tunnel, net: &PodNet, dial: Dial, new: NewConnection) {
    let NewConnection { requests, mut pings, mut connection, failure, standing } = new;
    // The other side tells that it refuses our certificate only now; nobody should have to find that out by losing a
    // stream.
    let answered = tokio::select! {
        biased;
        ended = &mut connection => Err(failure.of(ended.err())),
        pong = timeout(HANDSHAKE_TIMEOUT, pings.ping(Ping::opaque())) => match pong {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(failure.of(Some(error))),
            Err(_elapsed) => Err(handshake::too_slow()),
        },
    };
    if let Err(why) = answered {
        tunnel.handshakes.failed(Reporter::Source, &net.pod, dial.key.destination, &why);
        return dial.failed(RefuseReason::HandshakeFailed);
    }
    tunnel.handshakes.succeeded(Reporter::Source);
    let health = Health::of(proxy.telemetry.tunnels().opened(Reporter::Source));
    connection.health = Some(health.clone());
    let (key, pool) = (dial.key.clone(), dial.pool().clone());
    dial.succeeded(Established::new(requests, health.clone(), baggage(&net.workload)));
    drive(&pool, &key, &health, pings, standing, connection).await;
}

async fn drive(
    pool: &Pool,
    key: &Key,
    health: &Health,
    mut pings: PingPong,
    standing: Standing,
    mut connection: Driven,
) {
    let keep_alive = async {
        let mut idle_limit = IDLE_LIMIT;
        while health.watch(&mut pings, idle_limit).await == Verdict::Idle {
            pool.discard(key, health);
            // What has begun in this very moment is carried to its end.
            idle_limit = Duration::MAX;
        }
    };
    let withdrawn = standing.withdrawn(|why| {
        info!(to = %key.destination, reason = why.reason.as_str(), "a tunnel takes no more streams: {}", why.detail);
        health.lapses();
        pool.discard(key, health);
    });
    let is_silent = tokio::select! {
        biased;
        ended = &mut connection => {
            health.ended(ended.as_ref().err());
            if let Err(error) = ended {
                debug!(to = %key.destination, %error, "a tunnel broke");
            }
            false
        }
        () = keep_alive => {
            info!(to = %key.destination, "a tunnel fell silent");
            true
        }
        why = withdrawn => {
            warn!(to = %key.destination, reason = why.reason.as_str(), "a tunnel is broken off: {}", why.detail);
            health.withdrawn();
            false
        }
    };
    // New streams do not wait for the end of this one.
    pool.discard(key, health);
    let Driven { connection, flusher, .. } = connection;
    drop(connection);
    if !is_silent {
        flusher.farewell().await;
    }
}

/// Asks for the stream, and waits for the application behind it as long as for any other.
async fn ask(claimed: Claimed, wanted: Wanted<'_>) -> Result<Ends, Failed> {
    let Claimed { requests, place, baggage, is_reused, .. } = claimed;
    let request = request(wanted, baggage).ok_or(Failed::Refused(RefuseReason::Internal))?;
    let answer = async {
        let mut requests = requests.ready().await.map_err(broken)?;
        let (response, send) = requests.send_request(request, false).map_err(broken)?;
        Ok((response.await.map_err(broken)?, send))
    };
    let unanswered = place.health().asks();
    let (response, send) = tokio::select! {
        answer = timeout(wanted.within, answer) => match answer {
            Ok(answer) => answer?,
            Err(_elapsed) => return Err(Failed::Refused(RefuseReason::ConnectTimeout)),
        },
        () = place.health().found_dead(), if is_reused => return Err(Failed::Broken),
    };
    unanswered.answered();
    match response.status() {
        StatusCode::OK => Ok(Ends::new(send, response.into_body(), place)),
        StatusCode::UNAUTHORIZED => Err(Failed::Refused(RefuseReason::Denied)),
        StatusCode::SERVICE_UNAVAILABLE => {
            // Who says nothing more, as ztunnel, has found nobody listening more often than not.
            let told = refusal::told(response.headers());
            Err(Failed::Refused(told.unwrap_or(RefuseReason::ConnectRefused)))
        }
        status => {
            info!(to = %wanted.to, %status, "the tunnel's other side does not connect");
            Err(Failed::Refused(RefuseReason::ConnectFailed))
        }
    }
}

fn broken(error: h2::Error) -> Failed {
    debug!(%error, "a tunnel does not take a stream");
    Failed::Broken
}

fn request(wanted: Wanted<'_>, baggage: Option<HeaderValue>) -> Option<Request<()>> {
    let uri = Uri::builder().authority(wanted.to.to_string()).build().ok()?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(uri)
        .header(FORWARDED, format!("for=\"{}\"", wanted.client))
        .header(&TRACEPARENT, traceparent());
    if let Some(baggage) = baggage {
        request = request.header(&BAGGAGE, baggage);
    }
    if wanted.carries == Carries::Request {
        request = request.header(&CARRIES, REQUESTS);
    }
    request.body(()).ok()
}

/// What is known of a pod, for the other side's telemetry.
pub(super) fn baggage(workload: &Workload) -> Option<HeaderValue> {
    let known = [
        ("k8s.namespace.name", &*workload.pod.namespace),
        ("k8s.pod.name", &*workload.pod.name),
        ("service.name", &*workload.workload),
    ];
    let pairs: Vec<_> = known.iter().map(|(key, value)| format!("{key}={value}")).collect();
    HeaderValue::try_from(pairs.join(",")).ok()
}

/// A trace of its own: what the application says of traces is inside, where nobody looks.
fn traceparent() -> String {
    // All zeros would be invalid (W3C Trace Context, 3.2.2.3).
    format!("00-{:032x}-{:016x}-00", fastrand::u128(1..), fastrand::u64(1..))
}

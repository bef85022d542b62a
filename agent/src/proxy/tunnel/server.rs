//! The server's end: a tunnel that another node's agent opens to a pod of this one, and the streams in it.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::header::{FORWARDED, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::handshake;
use super::health::{Health, Verdict};
use super::refusal;
use super::stream::Ends;
use super::transport::{Flusher, Transport};
use super::window::{CONNECTION_WINDOW, STREAM_WINDOW, StreamWindow};
use super::{HANDSHAKE_TIMEOUT, MAX_FRAME, SEND_BUFFER, TUNNEL_PORT, Tunnel, client};
use crate::balance::Carries;
use crate::capture::{PodNet, set_local};
use crate::identity::{HandshakeError, HandshakeReason, PeerIdentity, Standing};
use crate::model::Workload;
use crate::proxy::Proxy;
use crate::proxy::admission::{Caller, Door, Refused};
use crate::proxy::inbound::Visit;
use crate::proxy::reach::Upstream;
use crate::proxy::relay::{Carried, begin_and_carry};
use crate::proxy::upstream::{self, Target};
use crate::proxy::worker::{Fate, Here};
use crate::telemetry::{ConnectionFacts, RefuseReason, Reporter, Security};

/// The client closes first, so that no CONNECT meets a tunnel that goes.
const IDLE_LIMIT: Duration = Duration::from_secs(600);

pub(super) const MAX_STREAMS: u32 = 200;
const MAX_HEADER_LIST: u32 = 64 * 1024;

/// Streams that the peer has reset and we still know: rapid resets beyond these end the connection (CVE-2023-44487).
const MAX_RESET_STREAMS: usize = 50;

/// Streams that *we* had to reset for the peer's mistakes (CVE-2025-8671).
const MAX_OWN_RESETS: usize = 100;

/// A tunnel to one pod, whose peer is proven.
struct Server {
    proxy: Arc<Proxy>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    peer: PeerIdentity,
    /// The other end of the TCP connection.
    peer_socket: SocketAddr,
    health: Arc<Health>,
    fate: watch::Receiver<Fate>,
    /// What every answer says of the pod.
    baggage: Option<HeaderValue>,
}

/// Serves one connection to the pod's tunnel port for as long as it lives. A pod that leaves the mesh takes no new
/// streams.
pub(in crate::proxy) async fn serve(
    proxy: Arc<Proxy>,
    tunnel: Arc<Tunnel>,
    here: Arc<Here>,
    net: Arc<PodNet>,
    (socket, peer_socket): (TcpStream, SocketAddr),
    fate: watch::Receiver<Fate>,
) {
    let peer_socket = SocketAddr::new(peer_socket.ip().to_canonical(), peer_socket.port());
    let Ok(local) = socket.local_addr() else { return };
    let dialled = SocketAddr::new(local.ip().to_canonical(), local.port());
    if proxy.enrolled.load().contains_key(&peer_socket.ip()) {
        // Without it, it is as fast as between nodes.
        let _ = set_local(&SockRef::from(&socket));
    }
    let refuse = |reason| {
        let facts = facts(&proxy, &net, peer_socket, dialled, None);
        proxy.telemetry.connection_refused(facts, reason);
    };
    let (connection, peer, standing) = match meet(&tunnel, &net, socket, peer_socket).await {
        Ok(known) => known,
        Err(reason) => return refuse(reason),
    };
    tunnel.handshakes.succeeded(Reporter::Destination);
    let Some(place) = proxy.enter() else { return refuse(RefuseReason::Limit) };
    let health = Health::of(proxy.telemetry.tunnels().opened(Reporter::Destination));
    let baggage = client::baggage(&net.workload);
    let server = Arc::new(Server {
        proxy: proxy.clone(),
        here,
        net: net.clone(),
        peer,
        peer_socket,
        health,
        fate: fate.clone(),
        baggage,
    });
    server.run(connection, standing, fate).await;
    drop(place);
}

/// Finds out who the caller is, if it can be found out in time and without harm to others.
async fn meet(
    tunnel: &Tunnel,
    net: &PodNet,
    socket: TcpStream,
    peer_socket: SocketAddr,
) -> Result<(Connection, PeerIdentity, Standing), RefuseReason> {
    let Some(stranger) = tunnel.strangers.enter(peer_socket.ip(), Instant::now()) else {
        debug!(pod = %net.pod, peer = %peer_socket, "a tunnel is refused: the address begins too many handshakes");
        return Err(RefuseReason::Limit);
    };
    let in_turn = async {
        stranger.turn().await;
        let shaken = timeout(HANDSHAKE_TIMEOUT, shake_hands(tunnel, net, socket)).await;
        shaken.unwrap_or_else(|_elapsed| Err(handshake::too_slow()))
    };
    tokio::select! {
        shaken = in_turn => shaken.map_err(|why| {
            tunnel.handshakes.failed(Reporter::Destination, &net.pod, peer_socket, &why);
            RefuseReason::HandshakeFailed
        }),
        () = stranger.displaced() => {
            debug!(pod = %net.pod, peer = %peer_socket, "a tunnel is refused: too many handshakes are not finished");
            Err(RefuseReason::Limit)
        }
    }
}

/// A connection, and what writes its frames.
struct Connection {
    frames: h2::server::Connection<Transport, Bytes>,
    flusher: Flusher,
    window: StreamWindow,
}

impl Connection {
    /// The next stream; carries the frames of the others meanwhile.
    async fn accept(
        &mut self,
        health: &Health,
    ) -> Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>> {
        poll_fn(|cx| {
            let accepted = self.frames.poll_accept(cx);
            self.window.follow(cx, health, |size| self.frames.set_initial_window_size(size));
            self.flusher.poll(cx);
            accepted
        })
        .await
    }
}

async fn shake_hands(
    tunnel: &Tunnel,
    net: &PodNet,
    socket: TcpStream,
) -> Result<(Connection, PeerIdentity, Standing), HandshakeError> {
    let nobody =
        || HandshakeError::new(HandshakeReason::Internal, "the pod's service account makes no identity");
    let local = net.workload.identity.as_ref().ok_or_else(nobody)?;
    let tls = handshake::server_end(tunnel, local).await?;
    let observer = tunnel.tls.observer();
    let (stream, peer) = tls.accept(socket).await?;
    let standing = observer.of_client(stream.get_ref().1);
    let (socket, tls) = stream.into_inner();
    let (transport, flusher) = Transport::new(socket, tls);
    let frames = settings().handshake(transport).await.map_err(|error| {
        HandshakeError::new(HandshakeReason::Protocol, format_args!("HTTP/2 with {peer}: {error}"))
    })?;
    Ok((Connection { frames, flusher, window: StreamWindow::new() }, peer, standing))
}

pub(super) fn settings() -> h2::server::Builder {
    let mut settings = h2::server::Builder::new();
    settings
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .max_pending_accept_reset_streams(MAX_RESET_STREAMS)
        .max_local_error_reset_streams(Some(MAX_OWN_RESETS));
    settings
}

impl Server {
    /// Takes streams and carries their frames until the connection is over. Dropped with streams in it, it resets them.
    async fn run(
        self: Arc<Self>,
        mut connection: Connection,
        standing: Standing,
        mut fate: watch::Receiver<Fate>,
    ) {
        let mut streams = JoinSet::new();
        let Some(mut pings) = connection.frames.ping_pong() else { return };
        let health = self.health.clone();
        let enough = Notify::new();
        let mut enough_is_said = std::pin::pin!(enough.notified());
        let mut silence = std::pin::pin!(async {
            if health.watch(&mut pings, IDLE_LIMIT).await == Verdict::Idle {
                enough.notify_one();
                // What has begun in this very moment is carried to its end.
                while health.watch(&mut pings, Duration::MAX).await == Verdict::Idle {}
            }
        });
        let mut withdrawn = std::pin::pin!(standing.withdrawn(|why| {
            let reason = why.reason.as_str();
            info!(pod = %self.net.pod, peer = %self.peer, reason, "a tunnel takes no more streams: {}", why.detail);
            self.health.lapses();
            enough.notify_one();
        }));
        let mut takes_streams = true;
        loop {
            if takes_streams && *fate.borrow_and_update() != Fate::Serve {
                takes_streams = false;
                connection.frames.graceful_shutdown();
            }
            tokio::select! {
                accepted = connection.accept(&self.health) => match accepted {
                    Some(Ok((request, respond))) => {
                        streams.spawn(self.clone().stream(request, respond));
                    }
                    Some(Err(error)) => {
                        self.health.ended(Some(&error));
                        debug!(pod = %self.net.pod, peer = %self.peer, %error, "a tunnel broke");
                        break;
                    }
                    None => break,
                },
                Some(ended) = streams.join_next() => report_panic(ended),
                changed = fate.changed(), if takes_streams => if changed.is_err() {
                    takes_streams = false;
                    connection.frames.graceful_shutdown();
                },
                () = &mut silence => {
                    info!(pod = %self.net.pod, peer = %self.peer, "a tunnel fell silent");
                    break;
                }
                why = &mut withdrawn => {
                    let reason = why.reason.as_str();
                    warn!(pod = %self.net.pod, peer = %self.peer, reason, "a tunnel is broken off: {}", why.detail);
                    self.health.withdrawn();
                    break;
                }
                () = &mut enough_is_said, if takes_streams => {
                    takes_streams = false;
                    connection.frames.graceful_shutdown();
                }
            }
        }
        self.health.ended(None);
        // Its streams find it closed, and break off what they relay.
        let Connection { frames, flusher, .. } = connection;
        drop(frames);
        // Nobody is there to take leave of.
        if self.health.is_silent() {
            drop(flusher);
        } else {
            flusher.farewell().await;
        }
        while let Some(ended) = streams.join_next().await {
            report_panic(ended);
        }
    }

    fn stream(
        self: Arc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
    ) -> impl Future<Output = ()> + Send {
        begin_and_carry(self.begin(request, respond))
    }

    async fn begin(
        self: Arc<Self>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) -> Option<Carried> {
        let caller = self.caller(request.headers());
        let to = match self.destination(&request) {
            Ok(to) => to,
            Err(why) => {
                info!(pod = %self.net.pod, peer = %self.peer, "a stream is refused: {why}");
                self.answer(&mut respond, StatusCode::BAD_REQUEST, None);
                return None;
            }
        };
        let is_credible =
            |caller: &SocketAddr| caller.is_ipv4() == to.is_ipv4() && self.speaks_for(caller.ip());
        let caller = caller.filter(is_credible).unwrap_or(self.peer_socket);
        let mut facts = facts(&self.proxy, &self.net, caller, to, Some(&self.peer));
        let refused = |facts, reason| {
            self.proxy.telemetry.connection_refused(facts, reason);
            None
        };
        let Some(place) = self.proxy.enter() else {
            self.answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE, Some(RefuseReason::Limit));
            return refused(facts, RefuseReason::Limit);
        };
        let door = Door { pod: self.net.workload.uid.clone(), address: to };
        let visitor = Caller { identity: Some(self.peer.id().clone()), address: caller.ip() };
        let entry = match door.enter(&self.proxy.snapshot.load(), &visitor) {
            Ok(entry) => entry,
            Err(Refused { reason, ruling }) => {
                let status = match reason {
                    RefuseReason::Denied => StatusCode::UNAUTHORIZED,
                    _ => StatusCode::SERVICE_UNAVAILABLE,
                };
                self.answer(&mut respond, status, Some(reason));
                return refused(ConnectionFacts { ruling, ..facts }, reason);
            }
        };
        let counted = self.health.enter();
        let target = Target { from: &self.net, to, source: None, on_behalf_of: Some(caller) };
        let gone = async {
            let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
        };
        let application = match upstream::connect(&self.proxy, &self.here.dialer, gone, target).await {
            Ok(application) => application,
            Err(reason) => {
                self.answer(&mut respond, StatusCode::SERVICE_UNAVAILABLE, Some(reason));
                return refused(facts, reason);
            }
        };
        let Some(send) = accept(&mut respond, self.baggage.clone()) else {
            return refused(facts, RefuseReason::ClientGone);
        };
        (facts.upstream, facts.ruling) = (Some(to), entry.ruling.clone());
        let carries = match request.headers().get(&client::CARRIES) {
            Some(what) if *what == client::REQUESTS => Carries::Request,
            _ => Carries::Connection,
        };
        let tunnel = Ends::new(send, request.into_body(), counted);
        let visit = Visit {
            proxy: self.proxy.clone(),
            here: self.here.clone(),
            door,
            visitor,
            facts: vec![facts],
            fate: self.fate.clone(),
            idle: None,
            carries,
        };
        Some(visit.carry(entry, Upstream::Tunnel(tunnel), application, (place, self.net.clone())))
    }

    /// Ends a stream that leads nowhere; without a reason the request made no sense.
    fn answer(&self, respond: &mut SendResponse<Bytes>, status: StatusCode, reason: Option<RefuseReason>) {
        let counted = reason.map_or("bad_request", RefuseReason::as_str);
        self.proxy.telemetry.tunnels().request_refused(status.as_u16(), counted);
        let mut response = Response::new(());
        *response.status_mut() = status;
        if let Some(reason) = reason {
            refusal::tell(response.headers_mut(), reason);
        }
        // An error says that the client has gone.
        let _ = respond.send_response(response, true);
    }

    /// The application that the stream is for.
    fn destination(&self, request: &Request<RecvStream>) -> Result<SocketAddr, String> {
        if request.method() != Method::CONNECT {
            return Err(format!("the method is {}", request.method()));
        }
        let authority = request.uri().authority().ok_or("it names no destination")?;
        let to: SocketAddr =
            authority.as_str().parse().map_err(|_| format!("{authority:?} is no address and port"))?;
        // A zone, which names no other pod, would make it another one to whoever looks it up.
        let to = SocketAddr::new(to.ip(), to.port());
        if !self.net.addresses.contains(&to.ip()) {
            return Err(format!("{to} is not an address of this pod"));
        }
        match to.port() {
            0 | TUNNEL_PORT => Err(format!("{to} is no application's port")),
            _ => Ok(to),
        }
    }

    /// Whether the peer may speak in the name of this address: its own, or that of a pod whose identity it has. Whoever is
    /// let in could else be anybody to the application, the pod's own loopback included.
    fn speaks_for(&self, address: IpAddr) -> bool {
        let is_peers = |workload: &Workload| workload.identity.as_ref() == Some(self.peer.id());
        address == self.peer_socket.ip()
            || self.proxy.snapshot.load().workload(address).is_some_and(|workload| is_peers(workload))
    }

    /// The client as the peer tells it.
    fn caller(&self, headers: &HeaderMap) -> Option<SocketAddr> {
        let forwarded = headers.get(FORWARDED)?.to_str().ok();
        let caller = forwarded.and_then(forwarded_for);
        if caller.is_none() {
            debug!(pod = %self.net.pod, peer = %self.peer, ?forwarded, "the client's address cannot be read");
        }
        caller
    }
}

/// The `for` of a `Forwarded` header (RFC 7239) with one element: an address and a port.
pub(super) fn forwarded_for(header: &str) -> Option<SocketAddr> {
    let mut pairs = header.split(';').filter_map(|pair| pair.trim().split_once('='));
    let (_, value) = pairs.find(|(name, _)| name.eq_ignore_ascii_case("for"))?;
    let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
    let address: SocketAddr = value.parse().ok()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn accept(respond: &mut SendResponse<Bytes>, baggage: Option<HeaderValue>) -> Option<SendStream<Bytes>> {
    let mut response = Response::new(());
    if let Some(baggage) = baggage {
        response.headers_mut().insert(&client::BAGGAGE, baggage);
    }
    respond.send_response(response, false).ok()
}

/// The client's pod counts as known only if it is who the certificate says.
fn facts(
    proxy: &Proxy,
    net: &PodNet,
    caller: SocketAddr,
    dialled: SocketAddr,
    proven: Option<&PeerIdentity>,
) -> ConnectionFacts {
    let mut source = proxy.peer(&proxy.snapshot.load(), caller);
    if let Some(peer) = proven {
        source.identity = Some(peer.to_name());
        source.workload = source.workload.filter(|workload| workload.identity.as_ref() == Some(peer.id()));
    }
    ConnectionFacts {
        reporter: Reporter::Destination,
        source,
        destination: proxy.own_peer(net, dialled),
        service: None,
        security: Security::MutualTls,
        dialled,
        client: caller,
        upstream: None,
        ruling: None,
    }
}

fn report_panic(ended: Result<(), JoinError>) {
    match ended {
        Err(error) if error.is_panic() => error!(%error, "a stream's task panicked; this is a bug"),
        Err(error) => warn!(%error, "a stream's task broke off"),
        Ok(()) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_read_from_the_header() {
        let check = |header: &str, expected: Option<&str>| {
            let expected = expected.map(|text| text.parse().unwrap());
            assert_eq!(forwarded_for(header), expected, "{header}");
        };
        check("for=\"10.77.1.2:40000\"", Some("10.77.1.2:40000"));
        check("for=\"[fd77:1::2]:40000\";host=db.shop", Some("[fd77:1::2]:40000"));
        check("host=x; For=10.77.1.2:40000", Some("10.77.1.2:40000"));
        check("for=\"[::ffff:10.77.1.2]:40000\"", Some("10.77.1.2:40000"));
        check("for=10.77.1.2", None);
        check("for=unknown", None);
        check("for=\"10.77.1.2:40000", None);
        check("", None);
    }
}

//! Two relays with a tunnel between them, and an application at either end.

use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::window::STREAM_WINDOW;
use super::super::{client, server};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// One relayed connection.
struct Connection {
    /// The client application's end.
    client: TcpStream,
    /// The server application's.
    server: TcpStream,
    /// What the relays make of it.
    ended: [JoinHandle<CloseReason>; 2],
}

/// A tunnel in memory.
struct Tunnel {
    requests: h2::client::SendRequest<Bytes>,
    accepted: mpsc::Receiver<(http::Request<RecvStream>, h2::server::SendResponse<Bytes>)>,
}

impl Tunnel {
    async fn new() -> Self {
        Self::to(server::settings()).await
    }

    /// To a server with these settings.
    async fn to(server: h2::server::Builder) -> Self {
        let (near, far) = tokio::io::duplex(256 * 1024);
        let (client, server) =
            tokio::join!(client::settings().handshake(near), server.handshake::<_, Bytes>(far));
        let ((requests, driver), mut server) = (client.unwrap(), server.unwrap());
        tokio::spawn(driver);
        let (sender, accepted) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(Ok(stream)) = server.accept().await {
                // Nobody wants more of them; those that there are need the connection.
                _ = sender.send(stream).await;
            }
        });
        Self { requests, accepted }
    }

    /// Both ends of a new stream, the client's first.
    async fn stream(&mut self) -> [(SendStream<Bytes>, RecvStream); 2] {
        let request = http::Request::connect("10.77.2.2:7000").body(()).unwrap();
        let mut requests = self.requests.clone().ready().await.unwrap();
        let (response, send) = requests.send_request(request, false).unwrap();
        let (request, mut respond) = self.accepted.recv().await.unwrap();
        let send_back = respond.send_response(http::Response::new(()), false).unwrap();
        let recv_back = response.await.unwrap().into_body();
        [(send, recv_back), (send_back, request.into_body())]
    }
}

/// So many connections in one tunnel.
async fn connections(count: usize) -> Vec<Connection> {
    let mut tunnel = Tunnel::new().await;
    let mut connections = Vec::new();
    for _ in 0..count {
        let [near, far] = tunnel.stream().await;
        let (client, client_relayed) = sockets().await;
        let (server, server_relayed) = sockets().await;
        let ended = [spawn(client_relayed, Side::Client, near), spawn(server_relayed, Side::Server, far)];
        connections.push(Connection { client, server, ended });
    }
    connections
}

async fn connection() -> Connection {
    connections(1).await.remove(0)
}

/// The application's end and the relay's.
async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (application, accepted) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let relayed = accepted.unwrap().0;
    reset_on_close(&relayed);
    (application.unwrap(), relayed)
}

fn reset_on_close(socket: &TcpStream) {
    SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
}

fn spawn(
    mut socket: TcpStream,
    side: Side,
    (send, recv): (SendStream<Bytes>, RecvStream),
) -> JoinHandle<CloseReason> {
    tokio::spawn(async move {
        let mut ends = Ends::new(send, recv, Health::new().enter());
        relay(&mut socket, side, &mut ends, &Meter::new([])).await
    })
}

impl Connection {
    async fn reasons(self) -> [CloseReason; 2] {
        let [client, server] = self.ended;
        let both = async { [client.await.unwrap(), server.await.unwrap()] };
        timeout(PATIENCE, both).await.expect("the relays end")
    }
}

async fn hear(socket: &mut TcpStream) -> io::Result<String> {
    let mut heard = String::new();
    timeout(PATIENCE, socket.read_to_string(&mut heard)).await.expect("the stream ends or breaks")?;
    Ok(heard)
}

#[tokio::test]
async fn half_closes_are_passed_on_both_ways() {
    for client_first in [true, false] {
        let mut it = connection().await;
        let Connection { client, server, .. } = &mut it;
        let (first, second) = if client_first { (client, server) } else { (server, client) };
        first.write_all(b"ask").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(hear(second).await.unwrap(), "ask");
        second.write_all(b"answer").await.unwrap();
        second.shutdown().await.unwrap();
        assert_eq!(hear(first).await.unwrap(), "answer");
        assert_eq!(it.reasons().await, [CloseReason::Done; 2]);
    }
}

#[tokio::test]
async fn resets_are_passed_on_both_ways() {
    for (client_resets, half_closed) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut it = connection().await;
        let Connection { client, server, ended } = &mut it;
        let (breaks, other) = if client_resets { (client, server) } else { (server, client) };
        if half_closed {
            other.shutdown().await.unwrap();
            assert_eq!(hear(breaks).await.unwrap(), "");
        }
        // What was said before the reset is heard before it.
        breaks.write_all(b"last words").await.unwrap();
        let (replacement, _) = sockets().await;
        reset_on_close(breaks);
        drop(std::mem::replace(breaks, replacement));
        let mut words = [0; 10];
        timeout(PATIENCE, other.read_exact(&mut words)).await.expect("words").unwrap();
        assert_eq!(&words, b"last words");
        let error = hear(other).await.expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let reason = if client_resets { CloseReason::ClientReset } else { CloseReason::UpstreamReset };
        for ended in ended {
            assert_eq!(timeout(PATIENCE, ended).await.expect("it ends").unwrap(), reason);
        }
    }
}

#[tokio::test]
async fn a_reset_has_the_reason_that_others_understand() {
    let [near, (_send, mut recv)] = Tunnel::new().await.stream().await;
    let (client, relayed) = sockets().await;
    let ended = spawn(relayed, Side::Client, near);
    reset_on_close(&client);
    drop(client);
    let heard = timeout(PATIENCE, recv.data()).await.expect("the reset comes");
    assert_eq!(heard.unwrap().unwrap_err().reason(), Some(Reason::CONNECT_ERROR));
    assert_eq!(ended.await.unwrap(), CloseReason::ClientReset);
}

#[tokio::test]
async fn a_slow_reader_holds_its_sender_and_nobody_else() {
    let mut all = connections(2).await;
    let mut neighbour = all.pop().unwrap();
    let mut slow = all.pop().unwrap();
    let block = vec![7; CHUNK];
    let mut written = 0;
    // Sockets' buffers and the stream's window fill up, and no more is taken.
    while let Ok(n) = timeout(Duration::from_millis(500), slow.client.write(&block)).await {
        written += n.unwrap();
        assert!(written < 64 * 1024 * 1024, "{written} bytes are somewhere");
    }
    assert!(written > STREAM_WINDOW as usize, "{written} bytes do not fill the window");

    neighbour.client.write_all(b"ping").await.unwrap();
    timeout(PATIENCE, neighbour.server.read_exact(&mut [0; 4])).await.expect("it is not held up").unwrap();

    slow.client.shutdown().await.ok();
    let mut read = Vec::new();
    timeout(PATIENCE, slow.server.read_to_end(&mut read)).await.expect("the rest comes").unwrap();
    assert_eq!(read.len(), written);
    slow.server.shutdown().await.unwrap();
    assert_eq!(slow.reasons().await, [CloseReason::Done; 2]);
}

/// A stream in a tunnel without room, and the other end of it.
struct Crowded {
    client: TcpStream,
    far: RecvStream,
    /// Has got what fills the connection's window, and gives nothing back.
    neighbour: RecvStream,
    _alive: (Tunnel, [SendStream<Bytes>; 2]),
}

impl Crowded {
    /// These last words fill what room there was.
    async fn after(words: &'static str) -> Self {
        let mut server = server::settings();
        server.initial_connection_window_size(SMALL_WINDOW as u32);
        let mut tunnel = Tunnel::to(server).await;
        let [near, (far_send, mut far)] = tunnel.stream().await;
        let [(mut send, _), (_, mut neighbour)] = tunnel.stream().await;
        let (mut client, relayed) = sockets().await;
        spawn(relayed, Side::Client, near);

        send.reserve_capacity(SMALL_WINDOW);
        while send.capacity() < SMALL_WINDOW {
            timeout(PATIENCE, poll_fn(|cx| send.poll_capacity(cx))).await.expect("room").unwrap().unwrap();
        }
        let filling = SMALL_WINDOW - words.len();
        send.send_data(vec![7; filling].into(), false).unwrap();
        send.reserve_capacity(0);
        let mut held = 0;
        while held < filling {
            held += timeout(PATIENCE, neighbour.data()).await.expect("data").unwrap().unwrap().len();
        }
        client.write_all(words.as_bytes()).await.unwrap();
        if !words.is_empty() {
            let heard = timeout(PATIENCE, far.data()).await.expect("there is room for that");
            assert_eq!(heard.unwrap().unwrap(), words);
        }
        Self { client, far, neighbour, _alive: (tunnel, [far_send, send]) }
    }
}

/// The least window that HTTP/2 has for a connection, in bytes.
const SMALL_WINDOW: usize = 65_535;

#[tokio::test]
async fn the_end_of_a_stream_waits_for_no_room() {
    for words in ["", "last words"] {
        let Crowded { mut client, mut far, neighbour: _neighbour, _alive } = Crowded::after(words).await;
        client.shutdown().await.unwrap();
        let mut next = async || timeout(PATIENCE, far.data()).await.expect("the end comes");
        // It is a frame of its own, without bytes.
        while let Some(heard) = next().await {
            assert_eq!(heard.unwrap(), "", "after {words:?}");
        }
    }
}

#[tokio::test]
async fn bytes_wait_for_room_and_get_it() {
    for words in ["", "words"] {
        let Crowded { mut client, mut far, mut neighbour, _alive } = Crowded::after(words).await;
        client.write_all(b"more").await.unwrap();
        let early = timeout(Duration::from_millis(200), far.data()).await;
        assert!(early.is_err(), "{early:?} came without room for it, after {words:?}");
        neighbour.flow_control().release_capacity(SMALL_WINDOW - words.len()).unwrap();
        let heard = timeout(PATIENCE, far.data()).await.expect("it comes once there is room");
        assert_eq!(heard.unwrap().unwrap(), "more", "after {words:?}");
    }
}

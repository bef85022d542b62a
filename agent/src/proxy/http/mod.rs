//! HTTP on a captured connection: each request is routed, sent to an endpoint and measured on its own.
//!
//! Requests and answers pass as they come, frame by frame; neither is ever held as a whole. HTTP/1 stays HTTP/1 and HTTP/2
//! stays HTTP/2 on the way to the upstream. What a route says is for `route` to know, which endpoint is for `balance`, how
//! one is reached for `reach`.

mod answer;
mod body;
mod exchange;
mod forward;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod hashed;
mod head;
mod io;
mod mirror;
mod pool;
mod quiet;
mod retry;
mod send;
mod session;
mod slow;
mod talk;
mod upgrade;

use std::convert::Infallible;
use std::sync::Arc;

use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::io::InspectReader;
use tracing::debug;

use super::Proxy;
use super::captured::Captured;
use super::relay::close_in_order;
use super::tasks::Tasks;
use super::worker::{Fate, Here};
pub(super) use pool::Pool;
use slow::Heads;
use talk::{Dialect, Talk};

/// A client's connection on which HTTP is spoken.
#[derive(Debug)]
pub(super) struct Client {
    talk: Arc<Talk>,
    socket: TcpStream,
    fate: watch::Receiver<Fate>,
}

impl Client {
    /// The connection is `captured` on `socket`; `fate` is that of its pod.
    pub(super) fn new(
        (proxy, here): (Arc<Proxy>, Arc<Here>),
        captured: Captured,
        socket: TcpStream,
        fate: watch::Receiver<Fate>,
    ) -> Self {
        // HTTP says for itself when a message is cut off, so that no reset has to.
        close_in_order(&socket);
        Self { talk: Arc::new(Talk::new(proxy, here, captured, fate.clone())), socket, fate }
    }
}

/// Headers in one head.
const MOST_HEADERS: usize = 128;

/// Bytes of a head, in HTTP/2 (RFC 9113, section 6.5.2).
const HEADER_LIST: u32 = 64 * 1024;

/// Bytes of a connection that are held at a time, a head as a whole among them.
const MOST_BUFFERED: usize = 128 * 1024;

/// Requests at a time on one HTTP/2 connection of a client.
const HTTP2_STREAMS: u32 = 256;

/// Bytes of one message that may be under way without having been passed on.
const HTTP2_STREAM_WINDOW: u32 = 256 * 1024;

/// And of all messages of a connection.
const HTTP2_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Carries the requests of a client that speaks HTTP/1, until it ends the connection or has been told to.
pub(super) async fn serve_http1(client: Client) {
    let Client { talk, socket, .. } = client;
    let heads = Arc::new(Heads::default());
    let answer = service_fn(|request| {
        let (talk, busy) = (talk.clone(), heads.complete());
        async move {
            let response = forward::answer(talk, request, Dialect::Http1).await;
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        // Who ends its side while it waits has gone, as servers and proxies take it: nobody is to work for it any more.
        .half_close(false)
        .preserve_header_case(true)
        // The upstream's date is the answer's.
        .auto_date_header(false)
        .max_headers(MOST_HEADERS)
        .max_buf_size(MOST_BUFFERED)
        // It would close connections that are idle, which is for the application to decide.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(heads.watch(watched(&talk, socket))), answer)
        .with_upgrades();
    tokio::select! {
        biased;
        result = connection => ended(result),
        () = heads.overdue() => debug!(pod = %talk.captured.net.pod, "a client does not get on with its request"),
        () = talk.idle_for_too_long() => {}
    }
}

/// Carries the requests of a client that speaks HTTP/2, until it ends the connection or its pod leaves.
pub(super) async fn serve_http2(client: Client) {
    let Client { talk, socket, mut fate } = client;
    let answer = service_fn(|request| {
        let talk = talk.clone();
        async move { Ok::<_, Infallible>(forward::answer(talk, request, Dialect::Http2).await) }
    });
    // The requests end with their connection.
    let streams = Arc::new(Tasks::default());
    let connection = http2::Builder::new(Streams(streams.clone()))
        .max_concurrent_streams(HTTP2_STREAMS)
        .max_header_list_size(HEADER_LIST)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .auto_date_header(false)
        .enable_connect_protocol()
        .serve_connection(TokioIo::new(watched(&talk, socket)), answer);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        result = &mut connection => return ended(result),
        _ = fate.wait_for(|fate| *fate != Fate::Serve) => {}
        () = talk.idle_for_too_long() => {}
    }
    // What is under way is answered, and the client sends no more (GOAWAY).
    connection.as_mut().graceful_shutdown();
    ended(connection.await);
}

/// The client's connection, of which it is noted whether it says anything, if anybody wants to know.
fn watched(talk: &Arc<Talk>, socket: TcpStream) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    let talk = talk.clone();
    InspectReader::new(socket, move |bytes: &[u8]| {
        if let Some(quiet) = &talk.quiet
            && !bytes.is_empty()
        {
            quiet.said();
        }
    })
}

/// Any client can provoke it, so it is not for the log of a node. What was asked has been answered or told of.
fn ended(result: hyper::Result<()>) {
    if let Err(error) = result {
        debug!(%error, "a client's connection broke");
    }
}

/// Runs the requests of one HTTP/2 connection.
#[derive(Clone, Debug)]
struct Streams(Arc<Tasks>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

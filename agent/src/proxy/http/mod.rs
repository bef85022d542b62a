//! HTTP on a captured connection: each request is routed, sent to an endpoint and measured on its own.
//!
//! Requests and answers pass as they come, frame by frame; neither is ever held as a whole. HTTP/1 stays HTTP/1 and HTTP/2
//! stays HTTP/2 on the way to the upstream. What a route says is for `route` to know, which endpoint is for `balance`, how
//! one is reached for `reach`.

mod answer;
mod authorize;
mod blame;
mod body;
mod connect;
mod deadline;
mod endpoints;
mod exchange;
mod explained;
mod fault;
mod forward;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod hashed;
mod head;
mod inbound;
mod interim;
mod io;
mod limit;
mod limits;
mod mirror;
mod pool;
mod quiet;
mod repeat;
mod retry;
mod send;
mod serve;
mod session;
mod slow;
mod talk;
mod tls;
mod tokens;
mod upgrade;

use std::convert::Infallible;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::io::InspectReader;

use super::Proxy;
use super::captured::Captured;
use super::relay::close_in_order;
use super::worker::{Fate, Here};
pub(super) use authorize::Kept;
pub(super) use explained::{Routed, as_policies_see_it, routed};
pub(super) use inbound::Inbound;
pub use limits::HttpLimits;
pub(super) use pool::Pool;
use talk::{Dialect, Talk};
pub use tls::BackendTlsClients;

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

/// Bytes of one message that may be under way without having been passed on.
const HTTP2_STREAM_WINDOW: u32 = 256 * 1024;

/// And of all messages of a connection.
const HTTP2_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Carries the requests of a client that speaks HTTP/1, until it ends the connection or has been told to.
pub(super) async fn serve_http1(client: Client) {
    let Client { talk, socket, .. } = client;
    let (pod, limits) = (talk.captured.net.pod.clone(), &talk.proxy.settings.http_limits);
    // A pod that leaves is told of with an answer: closed between two, the connection could take a request with it.
    let leave = talk.idle_for_too_long();
    let answer = |request| {
        let talk = talk.clone();
        async move { Ok::<_, Infallible>(forward::answer(talk, request, Dialect::Http1).await) }
    };
    serve::http1(pod, limits, watched(&talk, socket), answer, leave).await;
}

/// Carries the requests of a client that speaks HTTP/2, until it ends the connection or its pod leaves.
pub(super) async fn serve_http2(client: Client) {
    let Client { talk, socket, mut fate } = client;
    let leave = async {
        tokio::select! {
            _ = fate.wait_for(|fate| *fate != Fate::Serve) => {}
            () = talk.idle_for_too_long() => {}
        }
    };
    let answer = |request| {
        let talk = talk.clone();
        async move { Ok::<_, Infallible>(forward::answer(talk, request, Dialect::Http2).await) }
    };
    serve::http2(&talk.proxy.settings.http_limits, watched(&talk, socket), answer, leave).await;
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

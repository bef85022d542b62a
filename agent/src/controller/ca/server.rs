//! The authority's port: TLS 1.3 and HTTP/2, within bounds that a crowd of callers does not move.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::Ca;
use super::own::OwnCertificate;

/// Connections at one time: agents keep theirs. More wait in the kernel's queue.
const CONNECTIONS: usize = 8192;
/// Handshakes at one time.
const HANDSHAKES: usize = 256;
/// How long one may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Requests of one connection at one time: an agent asks for one certificate after the other, or for a few at once.
const STREAMS: u32 = 64;
/// A connection lives this long, give or take what tonic scatters: then its caller meets the other replica, perhaps, and
/// after a restart of one the load comes back to it.
const CONNECTION_AGE: Duration = Duration::from_secs(30 * 60);
/// What an aged connection's requests are given.
const AGE_GRACE: Duration = Duration::from_secs(30);

/// Serves until `shutdown` is done, and then what is under way.
pub(in super::super) async fn serve(
    listener: TcpListener,
    ca: Ca,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(tls(ca.0.own.clone())?));
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .max_connection_age(CONNECTION_AGE)
        .max_connection_age_grace(AGE_GRACE)
        .http2_keepalive_interval(Some(Duration::from_secs(60)))
        .http2_max_header_list_size(16 * 1024)
        .serve_with_incoming_shutdown(ca, incoming(listener, acceptor), shutdown)
        .await?;
    Ok(())
}

fn tls(own: Arc<OwnCertificate>) -> Result<rustls::ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(own);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Connections whose handshake is done. Slow ones hold up nobody.
fn incoming(
    listener: TcpListener,
    acceptor: TlsAcceptor,
) -> impl Stream<Item = Result<Connection, io::Error>> {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let accepted = stream::unfold((listener, places), async |(listener, places)| {
        let place = places.clone().acquire_owned().await.ok()?;
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(error) => {
                    // Out of descriptors, mostly: the next attempt fails as well unless somebody closes one.
                    warn!(%error, "cannot take a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        Some(((stream, place), (listener, places)))
    });
    let handshakes = accepted.map(move |(stream, place)| {
        let acceptor = acceptor.clone();
        async move {
            _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => Some(Ok(Connection { stream, _place: place })),
                Ok(Err(error)) => {
                    // Anybody may knock: no warning.
                    debug!(%error, "a handshake with the authority failed");
                    None
                }
                Err(_) => None,
            }
        }
    });
    handshakes.buffer_unordered(HANDSHAKES).filter_map(std::future::ready)
}

/// A connection and its place among those that there may be.
struct Connection {
    stream: TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

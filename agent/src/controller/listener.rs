//! Connections over TLS, within bounds that a crowd of callers does not move.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// Handshakes at one time.
const HANDSHAKES: usize = 256;
/// How long one may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How many connections there may be at one time, and how long a caller may take to say what it wants. Nobody has shown who it is yet:
/// what one caller holds must not be what others need.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) connections: usize,
    pub(super) of_one_address: usize,
    /// From the end of the handshake until a request is there as a whole ([`Seat`]).
    pub(super) request: Duration,
}

/// Connections whose handshake is done, so many at one time; more wait in the kernel's queue, and more of one address are closed. Slow
/// ones hold up nobody.
pub(super) fn incoming(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    bounds: Bounds,
) -> impl Stream<Item = Result<Connection, io::Error>> {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let places = Arc::new(Semaphore::new(bounds.connections));
    let callers = Arc::new(Callers { most: bounds.of_one_address, open: Mutex::default() });
    let accepted = stream::unfold((listener, places, callers), async |(listener, places, callers)| {
        let place = places.clone().acquire_owned().await.ok()?;
        let (stream, caller) = loop {
            match listener.accept().await {
                Ok((stream, peer)) => match callers.admit(peer.ip().to_canonical()) {
                    Some(caller) => break (stream, caller),
                    // Anybody may knock: no warning.
                    None => debug!(%peer, "a connection is closed: its address has too many"),
                },
                Err(error) => {
                    // Out of descriptors, mostly: the next attempt fails as well unless somebody closes one.
                    warn!(%error, "cannot take a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        Some(((stream, place, caller), (listener, places, callers)))
    });
    let handshakes = accepted.map(move |(stream, place, caller)| {
        let acceptor = acceptor.clone();
        async move {
            _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let seat = Seat::default();
                    seat.limit(bounds.request);
                    let timer = Box::pin(sleep_until(Instant::now()));
                    Some(Ok(Connection { stream, seat, timer, _place: place, _caller: caller }))
                }
                Ok(Err(error)) => {
                    debug!(%error, "a handshake failed");
                    None
                }
                Err(_) => None,
            }
        }
    });
    handshakes.buffer_unordered(HANDSHAKES).filter_map(std::future::ready)
}

/// How many connections each address has.
struct Callers {
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// One of them.
struct Caller(Arc<Callers>, IpAddr);

impl Callers {
    fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Caller> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(address).or_default();
        // Of whom there is none yet there is one from now on, so no entry is left behind.
        (*count < self.most).then(|| {
            *count += 1;
            Caller(self.clone(), address)
        })
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.1);
            }
        }
    }
}

/// Until when a connection may stay unless something comes of it; whoever serves it knows what.
#[derive(Clone, Debug, Default)]
pub(super) struct Seat(Arc<Mutex<Stay>>);

#[derive(Debug, Default)]
struct Stay {
    until: Option<Instant>,
    is_earned: bool,
}

impl Seat {
    /// For so long from now on, unless it has been earned.
    pub(super) fn limit(&self, time: Duration) {
        let mut stay = self.stay();
        stay.until = (!stay.is_earned).then(|| Instant::now() + time);
    }

    /// For as long as it likes.
    pub(super) fn keep(&self) {
        self.stay().until = None;
    }

    /// For as long as it likes, whatever else it asks for.
    pub(super) fn earn(&self) {
        *self.stay() = Stay { until: None, is_earned: true };
    }

    fn deadline(&self) -> Option<Instant> {
        self.stay().until
    }

    fn stay(&self) -> MutexGuard<'_, Stay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection and its place among those that there may be.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    pub(super) seat: Seat,
    timer: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
    _caller: Caller,
}

impl Connection {
    fn is_overdue(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(deadline) = self.seat.deadline() else { return false };
        if self.timer.deadline() != deadline {
            self.timer.as_mut().reset(deadline);
        }
        self.timer.as_mut().poll(cx).is_ready()
    }
}

impl Connected for Connection {
    type ConnectInfo = Seat;

    fn connect_info(&self) -> Seat {
        self.seat.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            // All that has come is taken in before.
            Poll::Pending if self.is_overdue(cx) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            read => read,
        }
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

#[cfg(test)]
mod tests;

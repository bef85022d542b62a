//! Handshakes of tunnels: what they need to begin, what is told of those that fail.
//!
//! A failure is one line in the log, with the peer, the pod and the reason, and never more lines than a log can bear:
//! whoever can reach a pod can make handshakes fail.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tracing::{info, warn};

use super::Tunnel;
use crate::identity::{ClientTls, Expected, HandshakeError, HandshakeReason, ServerTls, SpiffeId};
use crate::model::ObjectRef;
use crate::telemetry::{Reporter, Telemetry};

/// How long a pod that was enrolled a moment ago may wait for its certificate.
const CERTIFICATE_WAIT: Duration = Duration::from_secs(2);

/// Failures that are logged at once; later ones are as they come in, one each second.
const BURST: u32 = 20;

/// Counts handshakes and logs those that fail.
#[derive(Debug)]
pub struct Handshakes {
    telemetry: Arc<Telemetry>,
    /// One for each side: strangers who knock at our pods keep no failure of our own clients out of the log.
    lines: [Mutex<Lines>; Reporter::ALL.len()],
}

impl Handshakes {
    /// Counts into this telemetry.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        let now = Instant::now();
        Self { telemetry, lines: Reporter::ALL.map(|_| Mutex::new(Lines::new(now))) }
    }

    pub(super) fn succeeded(&self, reporter: Reporter) {
        self.telemetry.tunnels().handshake_succeeded(reporter);
    }

    pub(super) fn failed(&self, reporter: Reporter, pod: &ObjectRef, peer: SocketAddr, why: &HandshakeError) {
        let reason = why.reason.as_str();
        self.telemetry.tunnels().handshake_failed(reporter, reason);
        let lines = &self.lines[reporter as usize];
        let Some(withheld) = lines.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now()) else {
            return;
        };
        let HandshakeError { by_peer, detail, .. } = why;
        match reporter {
            Reporter::Source => {
                warn!(%pod, %peer, reason, by_peer, withheld, "the handshake of a tunnel failed: {detail}");
            }
            Reporter::Destination => {
                info!(%pod, %peer, reason, by_peer, withheld, "the handshake of a tunnel failed: {detail}");
            }
        }
    }
}

/// The server's end of a handshake, once the pod has its certificate.
pub(super) async fn server_end(tunnel: &Tunnel, local: &SpiffeId) -> Result<ServerTls, HandshakeError> {
    certificate(tunnel, local).await?;
    tunnel.tls.server(local).map_err(|error| HandshakeError::new(HandshakeReason::NoCertificate, error))
}

/// The client's end of a handshake with this server, once the pod has its certificate.
pub(super) async fn client_end(
    tunnel: &Tunnel,
    local: &SpiffeId,
    server: &SpiffeId,
) -> Result<ClientTls, HandshakeError> {
    certificate(tunnel, local).await?;
    let tls = tunnel.tls.client(local, &Expected::from(server.clone()));
    tls.map_err(|error| HandshakeError::new(HandshakeReason::NoCertificate, error))
}

/// Waits for the pod's certificate, but not for long: somebody waits for the connection.
async fn certificate(tunnel: &Tunnel, local: &SpiffeId) -> Result<(), HandshakeError> {
    let none = |why: String| HandshakeError::new(HandshakeReason::NoCertificate, why);
    match timeout(CERTIFICATE_WAIT, tunnel.certificates.get(local)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(none(error.to_string())),
        Err(_elapsed) => Err(none(format!("there is no certificate for {local} yet"))),
    }
}

/// A handshake that did not end in time.
pub(super) fn too_slow() -> HandshakeError {
    HandshakeError::new(HandshakeReason::Timeout, "it takes too long")
}

/// A connection whose first error of reading is kept as it was: HTTP/2 makes a text of it, and a TLS 1.3 client learns
/// only by reading that the server has refused it.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    failure: Failure,
}

/// What went wrong on a [`Watched`] connection, if anything did.
#[derive(Clone, Debug, Default)]
pub(super) struct Failure(Arc<OnceLock<HandshakeError>>);

impl<S> Watched<S> {
    pub(super) fn new(stream: S) -> (Self, Failure) {
        let failure = Failure::default();
        (Self { stream, failure: failure.clone() }, failure)
    }
}

impl Failure {
    /// Why the connection broke before the handshake was known to be good.
    pub(super) fn of(&self, error: Option<h2::Error>) -> HandshakeError {
        let closed = || match error {
            Some(error) => HandshakeError::new(HandshakeReason::Closed, error),
            None => HandshakeError::new(HandshakeReason::Closed, "the peer closed the connection"),
        };
        self.0.get().cloned().unwrap_or_else(closed)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Poll::Ready(Err(error)) = &read {
            self.failure.0.get_or_init(|| HandshakeError::of_io(error));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Lines that may be logged: a burst, and then one each second.
#[derive(Debug)]
struct Lines {
    left: u32,
    refilled: Instant,
    withheld: u64,
}

impl Lines {
    fn new(now: Instant) -> Self {
        Self { left: BURST, refilled: now, withheld: 0 }
    }

    /// One line, and how many were withheld since the last; `None` if this one is to be withheld too.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let seconds = now.saturating_duration_since(self.refilled).as_secs();
        self.refilled += Duration::from_secs(seconds);
        self.left = BURST.min(self.left.saturating_add(u32::try_from(seconds).unwrap_or(u32::MAX)));
        if self.left == 0 {
            self.withheld += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_failures_costs_a_line_a_second() {
        let start = Instant::now();
        let mut lines = Lines::new(start);
        let mut take = |count: usize, millis: u64| -> Vec<u64> {
            (0..count).filter_map(|_| lines.take(start + Duration::from_millis(millis))).collect()
        };
        assert_eq!(take(20, 0), [0; 20]);
        assert_eq!(take(500, 900), [0; 0]);
        assert_eq!(take(10, 1000), [500]);
        assert_eq!(take(2, 1900), [0; 0]);
        assert_eq!(take(3, 3000), [11, 0]);
        assert_eq!(take(30, 3_600_000), [[1].as_slice(), &[0; 19]].concat());
    }

    /// Telemetry takes any name; that these are all explained is for whoever hands them over to see.
    #[test]
    fn every_reason_is_documented() {
        for page in
            [include_str!("../../../../docs/metrics.md"), include_str!("../../../../docs/identity.md")]
        {
            for reason in HandshakeReason::ALL {
                assert!(page.contains(&format!("`{}`", reason.as_str())), "{} is missing", reason.as_str());
            }
        }
    }

    #[tokio::test]
    async fn the_first_error_of_reading_is_kept() {
        struct Refuses(Vec<io::Error>);
        impl AsyncRead for Refuses {
            fn poll_read(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
                _: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Poll::Ready(self.0.pop().map_or(Ok(()), Err))
            }
        }
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
        let alert = io::Error::new(io::ErrorKind::InvalidData, alert);
        let (mut watched, failure) =
            Watched::new(Refuses(vec![io::ErrorKind::ConnectionReset.into(), alert]));
        assert_eq!(failure.of(None).reason, HandshakeReason::Closed);
        for _ in 0..2 {
            tokio::io::AsyncReadExt::read_u8(&mut watched).await.unwrap_err();
        }
        let kept = failure.of(None);
        assert!(kept.reason == HandshakeReason::Expired && kept.by_peer, "{kept}");
    }
}

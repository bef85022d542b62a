//! The agent's own connections: to an endpoint, or to the application behind an inbound connection.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Proxy;
use crate::capture::{Dial, Dialer, PodNet};
use crate::telemetry::RefuseReason;

/// How long a connection to another pod is handed to ever new clients. The network between them (a NetworkPolicy, a firewall) is asked
/// when a connection is made, and as a rule lets pass what stands: what it has come to refuse must not live on in what is kept warm.
pub(super) const SHARED_FOR: Duration = Duration::from_secs(60);

/// A connection to be made on behalf of a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    /// The pod to dial from.
    pub(super) from: &'a PodNet,
    /// Where to.
    pub(super) to: SocketAddr,
    /// The source address that the application had bound, if it had.
    pub(super) source: Option<IpAddr>,
    /// The client to vouch for, where the destination is a pod of this node.
    pub(super) on_behalf_of: Option<SocketAddr>,
}

/// Connects within the agent's time limit, and no longer than the client is there.
pub(super) async fn connect(
    proxy: &Proxy,
    dialer: &Dialer,
    gone: impl Future<Output = ()>,
    target: Target<'_>,
) -> Result<TcpStream, RefuseReason> {
    connect_within(proxy.settings.connect_timeout, proxy, dialer, gone, target).await
}

/// Connects within this time, and no longer than the client is there.
pub(super) async fn connect_within(
    limit: Duration,
    proxy: &Proxy,
    dialer: &Dialer,
    gone: impl Future<Output = ()>,
    target: Target<'_>,
) -> Result<TcpStream, RefuseReason> {
    let Target { from, to, source, on_behalf_of } = target;
    // Both ends of a connection within one pod go together: none vanishes without the other's knowledge.
    let keepalive = (!from.addresses.contains(&to.ip())).then_some(&proxy.settings.keepalive);
    let is_local = proxy.enrolled.load().contains_key(&to.ip());
    let dial = dialer.dial(Dial { from, to, source, on_behalf_of, is_local, keepalive });
    tokio::select! {
        biased;
        connected = tokio::time::timeout(limit, dial) => match connected {
            Ok(Ok(upstream)) => Ok(upstream),
            Ok(Err(error)) => Err(reason(&error, target)),
            Err(_elapsed) => Err(RefuseReason::ConnectTimeout),
        },
        () = gone => Err(RefuseReason::ClientGone),
    }
}

/// Returns when the client has gone away.
pub(super) async fn gone(client: &TcpStream) {
    let _ = client.ready(Interest::ERROR).await;
}

/// Whether another endpoint may do better. No byte has been sent, so trying again is safe for any protocol.
pub(super) fn is_worth_another(reason: RefuseReason) -> bool {
    is_the_endpoints(reason)
        || matches!(
            reason,
            RefuseReason::ConnectFailed | RefuseReason::HandshakeFailed | RefuseReason::RateLimited
        )
}

/// Whether it is the endpoint that was in the way, as opposed to this node, the client, or what the two may do with each other.
pub(super) fn is_the_endpoints(reason: RefuseReason) -> bool {
    matches!(
        reason,
        RefuseReason::ConnectRefused
            | RefuseReason::ConnectReset
            | RefuseReason::ConnectTimeout
            | RefuseReason::ConnectUnreachable
            | RefuseReason::TlsFailed
            | RefuseReason::CertificateRefused
            | RefuseReason::AgentDown
    )
}

fn reason(error: &io::Error, target: Target<'_>) -> RefuseReason {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => RefuseReason::ConnectRefused,
        io::ErrorKind::ConnectionReset => RefuseReason::ConnectReset,
        io::ErrorKind::TimedOut => RefuseReason::ConnectTimeout,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => {
            RefuseReason::ConnectUnreachable
        }
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => RefuseReason::Limit,
        _ => {
            // Any pod can provoke it, so it is not for the log of a node.
            tracing::debug!(pod = %target.from.pod, to = %target.to, %error, "cannot connect");
            RefuseReason::ConnectFailed
        }
    }
}

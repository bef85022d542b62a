//! The authority's port: TLS 1.3 and HTTP/2.

use std::time::Duration;

use tokio::net::TcpListener;
use tonic::transport::Server;

use super::super::listener::{Bounds, incoming};
use super::Ca;

/// Agents keep their connection, one of each node, two in an update. A caller that was not given anything yet has ten seconds for each
/// attempt; what it asks for may take longer.
pub(in super::super) const BOUNDS: Bounds =
    Bounds { connections: 8192, of_one_address: 32, request: Duration::from_secs(10) };
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
    bounds: Bounds,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let tls = ca.tls(b"h2")?;
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .max_connection_age(CONNECTION_AGE)
        .max_connection_age_grace(AGE_GRACE)
        .http2_keepalive_interval(Some(Duration::from_secs(60)))
        .http2_max_header_list_size(16 * 1024)
        .serve_with_incoming_shutdown(ca, incoming(listener, tls, bounds), shutdown)
        .await?;
    Ok(())
}

//! The beginning of HTTP on a connection to an upstream, and what keeps it going.

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tracing::debug;

use super::body::RequestBody;
use super::io::Io;
use super::{HEADER_LIST, HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW, MOST_BUFFERED, MOST_HEADERS};
use crate::proxy::tasks::Tasks;

/// What requests are handed to, and what has to run for them to get anywhere; that ends with the connection.
pub(super) async fn http1(
    io: Io,
) -> hyper::Result<(http1::SendRequest<RequestBody>, impl Future<Output = ()> + Send + 'static)> {
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_headers(MOST_HEADERS)
        .max_buf_size(MOST_BUFFERED)
        .handshake(TokioIo::new(io))
        .await?;
    Ok((sender, async move { ended(connection.with_upgrades().await) }))
}

/// The same of HTTP/2, whose streams end with what has to run.
pub(super) async fn http2(
    io: Io,
) -> hyper::Result<(http2::SendRequest<RequestBody>, impl Future<Output = ()> + Send + 'static)> {
    let streams = Streams::default();
    let (sender, connection) = http2::Builder::new(streams.0.clone())
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_header_list_size(HEADER_LIST)
        .handshake(TokioIo::new(io))
        .await?;
    let carried = async move {
        ended(connection.await);
        // Nobody has more to send, and what was sent is still to be answered.
        streams.0.ended().await;
    };
    Ok((sender, carried))
}

/// What hyper runs for the streams of a connection, and would run on when that is dropped: it holds on to itself.
#[derive(Default)]
struct Streams(Tasks);

impl Drop for Streams {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The requests on it have been told.
fn ended(result: hyper::Result<()>) {
    if let Err(error) = result {
        debug!(%error, "an upstream connection broke");
    }
}

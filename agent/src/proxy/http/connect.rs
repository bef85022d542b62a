//! The beginning of HTTP on a connection to an upstream, and what keeps it going.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tokio::sync::watch;
use tokio::time::interval;
use tracing::debug;

use super::body::RequestBody;
use super::io::Io;
use super::pool::USUAL_STREAMS;
use super::{HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW, HttpLimits};
use crate::proxy::tasks::Tasks;

/// What requests are handed to, and what has to run for them to get anywhere; that ends with the connection.
pub(super) async fn http1(
    limits: &HttpLimits,
    io: Io,
) -> hyper::Result<(http1::SendRequest<RequestBody>, impl Future<Output = ()> + Send + 'static)> {
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_headers(limits.http1_headers)
        .max_header_size(limits.http1_head)
        .max_buf_size(limits.http1_buffered())
        .handshake(TokioIo::new(io))
        .await?;
    Ok((sender, async move { ended(connection.with_upgrades().await) }))
}

/// What hyper says of a server that has not said yet how many streams it takes: a number that none says.
const UNTOLD_STREAMS: usize = USUAL_STREAMS - 1;

/// How long a server is given to say so, which it does first of all on a connection.
const TOLD_WITHIN: Duration = Duration::from_millis(50);

/// The same of HTTP/2, whose streams end with what has to run.
pub(super) async fn http2(
    limits: &HttpLimits,
    io: Io,
) -> hyper::Result<(http2::SendRequest<RequestBody>, impl Future<Output = ()> + Send + 'static)> {
    let (sender, _most_streams, carried) = http2_shared(limits, io).await?;
    Ok((sender, carried))
}

/// The same, with how many requests the server takes at a time, once it has said so or was given enough time to.
pub(super) async fn http2_shared(
    limits: &HttpLimits,
    io: Io,
) -> hyper::Result<(
    http2::SendRequest<RequestBody>,
    watch::Receiver<Option<usize>>,
    impl Future<Output = ()> + Send + 'static,
)> {
    let streams = Streams::default();
    let (sender, connection) = http2::Builder::new(streams.0.clone())
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_header_list_size(limits.http2_head)
        .initial_max_send_streams(UNTOLD_STREAMS)
        .handshake(TokioIo::new(io))
        .await?;
    let (most_streams, told) = watch::channel(None);
    let carried = async move {
        let mut connection = pin!(connection);
        // hyper runs this for requests alone, and what the server says is another task's to read: looked for until it is there.
        let mut looks = TOLD_WITHIN.as_millis();
        let mut look = interval(Duration::from_millis(1));
        let result = poll_fn(|cx| {
            let polled = connection.as_mut().poll(cx);
            let is_told = || connection.current_max_send_streams() != UNTOLD_STREAMS;
            while looks > 0 && !is_told() && look.poll_tick(cx).is_ready() {
                looks -= 1;
            }
            let now = match connection.current_max_send_streams() {
                UNTOLD_STREAMS if looks > 0 => None,
                UNTOLD_STREAMS => Some(USUAL_STREAMS),
                said => Some(said),
            };
            most_streams.send_if_modified(|most| std::mem::replace(most, now) != now);
            polled
        });
        ended(result.await);
        // Nobody has more to send, and what was sent is still to be answered.
        streams.0.ended().await;
    };
    Ok((sender, told, carried))
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

#[cfg(test)]
mod tests {
    use http::{Request, StatusCode};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::super::blame;
    use super::super::io::{Counted, Stream};
    use super::*;
    use crate::proxy::relay::Meter;
    use crate::telemetry::RequestEnd;

    /// What comes of a request to which a server answers this.
    async fn answered(answer: &str) -> Result<StatusCode, RequestEnd> {
        let limits = HttpLimits { http1_head: 9_000, http1_headers: 200, ..HttpLimits::DEFAULT };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let io = Io::Left(Counted::new(Stream::socket(client), Meter::new([]), None));
        let (mut sender, carried) = http1(&limits, io).await.unwrap();
        tokio::spawn(carried);
        let asked = sender.send_request(Request::get("/").body(RequestBody::empty()).unwrap());
        let answering = async {
            server.read_u8().await.unwrap();
            server.write_all(answer.as_bytes()).await.unwrap();
        };
        let (response, ()) = tokio::join!(asked, answering);
        response.map(|response| response.status()).map_err(|error| blame::blamed(&error))
    }

    #[tokio::test]
    async fn a_head_of_an_answer_in_http1_has_no_more_bytes_and_headers_than_it_may() {
        const BEGIN: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n";
        let large = |bytes: usize| format!("{BEGIN}x: {}\r\n\r\n", "y".repeat(bytes - BEGIN.len() - 7));
        let many = |headers: usize| format!("{BEGIN}{}\r\n", "x: y\r\n".repeat(headers - 1));
        assert_eq!(large(9_000).len(), 9_000);
        assert_eq!(answered(&large(9_000)).await, Ok(StatusCode::OK));
        assert_eq!(answered(&large(9_001)).await, Err(RequestEnd::UpstreamReset));
        assert_eq!(answered(&many(200)).await, Ok(StatusCode::OK));
        assert_eq!(answered(&many(201)).await, Err(RequestEnd::UpstreamReset));
    }
}

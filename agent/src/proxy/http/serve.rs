//! A connection on which a client speaks HTTP, carried until one of the two has had enough. Who answers its requests is told.

use std::error::Error;
use std::fmt::Display;
use std::sync::Arc;

use futures_util::TryFutureExt as _;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use super::body::ResponseBody;
use super::interim::Interim;
use super::slow::Heads;
use super::{HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW, HttpLimits};
use crate::proxy::tasks::Tasks;

/// HTTP/1 with a client of a pod, or with one that calls an endpoint: `whom` the log names. Told to `leave`, it ends after the answer that is under way.
pub(super) async fn http1<S, F, E>(
    whom: impl Display,
    limits: &HttpLimits,
    client: S,
    answer: impl Fn(Request<Incoming>) -> F,
    leave: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Result<Response<ResponseBody>, E>>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let (heads, interim) = (Arc::new(Heads::new(limits.http1_head_time)), Arc::new(Interim::default()));
    let answer = service_fn(|mut request| {
        let (busy, open) = (heads.complete(), interim.begin(&mut request));
        let answered = answer(request);
        async move {
            let response = answered.await;
            if let Some(open) = open {
                open.told().await;
            }
            drop(busy);
            response
        }
    });
    let connection = http1::Builder::new()
        // Who ends its side while it waits has gone, as servers and proxies take it: nobody is to work for it any more.
        .half_close(false)
        .preserve_header_case(true)
        // The upstream's date is the answer's.
        .auto_date_header(false)
        .max_headers(limits.http1_headers)
        .max_header_size(limits.http1_head)
        .max_buf_size(limits.http1_buffered())
        // It would close connections that are idle, which is for the application to decide.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(interim.written_to(heads.watch(client))), answer)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased;
        result = &mut connection => return ended(result),
        () = heads.overdue() => return debug!(%whom, "a client does not get on with its request"),
        () = leave => {}
    }
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        biased;
        result = connection => ended(result),
        () = heads.overdue() => debug!(%whom, "a client does not get on with its request"),
    }
}

/// HTTP/2. Told to `leave`, it answers what is under way, and the client sends no more (GOAWAY).
pub(super) async fn http2<S, F, E>(
    limits: &HttpLimits,
    client: S,
    answer: impl Fn(Request<Incoming>) -> F,
    leave: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Result<Response<ResponseBody>, E>> + Send + 'static,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let answer = service_fn(|request: Request<Incoming>| {
        let is_head = request.method() == Method::HEAD;
        answer(request).map_ok(move |response| if is_head { without_body(response) } else { response })
    });
    // The requests end with their connection.
    let connection = http2::Builder::new(Tasks::default())
        .max_concurrent_streams(limits.http2_streams)
        .max_header_list_size(limits.http2_head)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .auto_date_header(false)
        .enable_connect_protocol()
        .serve_connection(TokioIo::new(client), answer);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        result = &mut connection => return ended(result),
        () = leave => {}
    }
    connection.as_mut().graceful_shutdown();
    ended(connection.await);
}

/// An answer to HEAD has no body (RFC 9110, section 9.3.2), and still says how long it would be. In HTTP/1 hyper leaves it out itself.
fn without_body(response: Response<ResponseBody>) -> Response<ResponseBody> {
    response.map(|body| match body {
        ResponseBody::Own(_) => ResponseBody::Own(None),
        upstream @ ResponseBody::Upstream { .. } => upstream,
    })
}

/// Any client can provoke it, so it is not for the log of a node. What was asked has been answered or told of.
fn ended(result: hyper::Result<()>) {
    if let Err(error) = result {
        debug!(%error, "a client's connection broke");
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::pending;
    use std::pin::pin;
    use std::time::Duration;

    use bytes::Bytes;
    use http::StatusCode;
    use http_body_util::Empty;
    use hyper::client::conn::http2::handshake;
    use hyper_util::rt::TokioExecutor;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::Instant;

    use super::*;

    /// Nothing is as it is by default.
    const LIMITS: HttpLimits = HttpLimits {
        http1_head: 9_000,
        http1_headers: 200,
        http2_head: 10_000,
        http2_streams: 3,
        ..HttpLimits::DEFAULT
    };

    async fn answer(_: Request<Incoming>) -> Result<Response<ResponseBody>, Infallible> {
        Ok(Response::new(ResponseBody::Own(None)))
    }

    /// The first line of what an HTTP/1 client hears.
    async fn heard(said: &str) -> String {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        client.write_all(said.as_bytes()).await.unwrap();
        let mut heard = String::new();
        let served = http1("a test", &LIMITS, server, answer, pending());
        let (read, ()) = tokio::join!(client.read_to_string(&mut heard), served);
        read.unwrap();
        heard.lines().next().unwrap_or_default().to_owned()
    }

    #[tokio::test]
    async fn a_head_of_http1_has_no_more_bytes_and_headers_than_it_may() {
        const BEGIN: &str = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n";
        let large = |bytes: usize| format!("{BEGIN}x: {}\r\n\r\n", "y".repeat(bytes - BEGIN.len() - 7));
        let many = |headers: usize| format!("{BEGIN}{}\r\n", "x: y\r\n".repeat(headers - 2));
        assert_eq!(large(9_000).len(), 9_000);
        assert_eq!(heard(&large(9_000)).await, "HTTP/1.1 200 OK");
        assert_eq!(heard(&large(9_001)).await, "HTTP/1.1 431 Request Header Fields Too Large");
        assert_eq!(heard(&many(200)).await, "HTTP/1.1 200 OK");
        assert_eq!(heard(&many(201)).await, "HTTP/1.1 431 Request Header Fields Too Large");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_of_http1_that_does_not_get_on_has_its_time_alone() {
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let limits = HttpLimits { http1_head_time: Duration::from_secs(2), ..LIMITS };
        let begun = Instant::now();
        http1("a test", &limits, server, answer, pending()).await;
        assert_eq!(begun.elapsed().as_secs(), 2);
    }

    #[tokio::test]
    async fn a_connection_of_http2_has_no_more_requests_and_bytes_of_heads_than_it_may() {
        let (client, server) = tokio::io::duplex(1 << 20);
        tokio::spawn(async { http2(&LIMITS, server, answer, pending()).await });
        let (mut requests, connection) = handshake(TokioExecutor::new(), TokioIo::new(client)).await.unwrap();
        let mut connection = pin!(connection);
        let mut status = async |bytes: usize| {
            let request = Request::get("http://a/").header("x", "y".repeat(bytes));
            let request = request.body(Empty::<Bytes>::new()).unwrap();
            tokio::select! {
                ended = &mut connection => panic!("{ended:?}"),
                answered = requests.send_request(request) => answered.unwrap().status(),
            }
        };
        assert_eq!(status(9_000).await, StatusCode::OK);
        assert_eq!(status(10_000).await, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert_eq!(connection.current_max_send_streams(), 3);
    }
}

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
use super::{
    HEADER_LIST, HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW, HTTP2_STREAMS, MOST_BUFFERED, MOST_HEADERS,
};
use crate::proxy::tasks::Tasks;

/// HTTP/1 with a client of a pod, or with one that calls an endpoint: `whom` the log names. Told to `leave`, it ends after the answer that is under way.
pub(super) async fn http1<S, F, E>(
    whom: impl Display,
    client: S,
    answer: impl Fn(Request<Incoming>) -> F,
    leave: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Result<Response<ResponseBody>, E>>,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let (heads, interim) = (Arc::new(Heads::default()), Arc::new(Interim::default()));
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
        .max_headers(MOST_HEADERS)
        .max_buf_size(MOST_BUFFERED)
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
        .max_concurrent_streams(HTTP2_STREAMS)
        .max_header_list_size(HEADER_LIST)
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

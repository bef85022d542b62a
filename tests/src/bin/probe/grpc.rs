//! A server of unary gRPC calls, whichever their methods: each gets back the message that it brought.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Request, Response};

use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpListener;

/// The arguments of `probe grpc`.
#[derive(Args)]
pub struct Grpc {
    /// Where it listens, IPv4 and IPv6.
    #[arg(long)]
    port: u16,
}

impl Grpc {
    /// Serves for ever, on one thread.
    pub fn run(&self) -> Result<Value> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(self.serve())
    }

    async fn serve(&self) -> Result<Value> {
        let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port))).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(async move {
                let connection = http2::Builder::new(TokioExecutor::new());
                // How a client ends its connection is for the client to tell.
                let _ = connection.serve_connection(TokioIo::new(stream), service_fn(echo)).await;
            });
        }
    }
}

/// The message back, and what ends a call that went well (gRPC over HTTP/2, "Responses").
async fn echo(
    request: Request<Incoming>,
) -> Result<Response<impl Body<Data = Bytes, Error = Infallible>>, hyper::Error> {
    let message = request.into_body().collect().await?.to_bytes();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok::<_, Infallible>(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(futures_util::stream::iter(frames)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

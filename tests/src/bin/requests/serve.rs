//! The server. What a request's query may ask for: `status=503`, `delay_ms=100` before the answer, `bytes=1000` of body,
//! `drip_ms=100` (of body a byte at a time, with as long between them, and no end), `break=1` (the connection ends without an answer), `trailer=value`, `cookie=name` (its value is said back),
//! `header=name:value` on the answer, `first=3` (the rest is for the first three requests alone), `by=name` (for that server alone).

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Args;
use http::{HeaderMap, Request, Response, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::client::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;

#[derive(Args)]
pub struct Serve {
    /// What it calls itself.
    #[arg(long)]
    name: String,
    /// The port to listen on, IPv4 and IPv6.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// `http://ADDRESS:PORT`: asks there what it is asked, and answers with the status that it got.
    #[arg(long)]
    forward: Option<Uri>,
    /// A file with a certificate and its key, in PEM: takes TLS alone.
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Requests that it takes at a time on one connection of HTTP/2.
    #[arg(long)]
    streams: Option<u32>,
    /// At SIGTERM it takes no new connection, answers what it has been asked, and ends.
    #[arg(long)]
    graceful: bool,
}

/// How long answers may take that are under way at SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

impl Serve {
    pub async fn run(self) -> Result<()> {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, self.port)).await?;
        let acceptor = self.tls.as_deref().map(acceptor).transpose()?;
        let server = Arc::new(Server {
            name: self.name,
            next: self.forward.map(Next::new),
            streams: self.streams,
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        });
        let mut stop = self.graceful.then(|| signal(SignalKind::terminate())).transpose()?;
        let stopped = async {
            match &mut stop {
                Some(stop) => stop.recv().await,
                None => std::future::pending().await,
            }
        };
        let mut stopped = std::pin::pin!(stopped);
        let under_way = GracefulShutdown::new();
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => accepted?,
                _ = &mut stopped => break,
            };
            stream.set_nodelay(true)?;
            let (server, watcher) = (server.clone(), under_way.watcher());
            let connection = server.connections.fetch_add(1, Ordering::Relaxed);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Some(acceptor) = acceptor else {
                    return server.serve(stream, Caller { peer, connection, asked_for: None }, watcher).await;
                };
                // How a client begins and ends its connection is for the client to tell.
                if let Ok(stream) = acceptor.accept(stream).await {
                    let asked_for = stream.get_ref().1.server_name().map(str::to_owned);
                    server.serve(stream, Caller { peer, connection, asked_for }, watcher).await;
                }
            });
        }
        drop(listener);
        let _ = tokio::time::timeout(GRACE, under_way.shutdown()).await;
        Ok(())
    }
}

/// Of TLS with whatever HTTP the client wants.
fn acceptor(file: &Path) -> Result<TlsAcceptor> {
    let pem = fs::read_to_string(file)?;
    let acceptor = undermesh_tests::issuer::acceptor(&pem, &pem)?;
    let mut config = rustls::ServerConfig::clone(acceptor.config());
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Who is on a connection.
#[derive(Clone)]
struct Caller {
    peer: SocketAddr,
    connection: u64,
    /// The server that was asked for in TLS.
    asked_for: Option<String>,
}

struct Server {
    name: String,
    next: Option<Next>,
    streams: Option<u32>,
    connections: AtomicU64,
    requests: AtomicU64,
}

/// The connection ends without an answer.
#[derive(Debug, thiserror::Error)]
#[error("as was asked for")]
struct Broken;

/// An answer that goes on. When its client has had enough, that is said.
struct Drip {
    target: String,
    every: Duration,
}

impl Drip {
    fn body(self) -> Body {
        let bytes = futures_util::stream::unfold(self, |drip| async {
            tokio::time::sleep(drip.every).await;
            Some((Ok(Frame::data(Bytes::from_static(b"."))), drip))
        });
        StreamBody::new(bytes).boxed_unsync()
    }
}

impl Drop for Drip {
    fn drop(&mut self) {
        println!("broken off: {}", self.target);
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl Server {
    async fn serve(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        caller: Caller,
        watcher: Watcher,
    ) {
        let mut builder = Builder::new(TokioExecutor::new());
        if let Some(streams) = self.streams {
            builder.http2().max_concurrent_streams(streams);
        }
        let answer = service_fn(move |request| {
            let (server, caller) = (self.clone(), caller.clone());
            async move { server.answer(request, caller).await }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), answer);
        let _ = watcher.watch(connection).await;
    }

    async fn answer(&self, request: Request<Incoming>, caller: Caller) -> Result<Response<Body>, Broken> {
        let Caller { peer, connection, asked_for } = caller;
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(next) = &self.next {
            let response =
                Response::builder().status(next.ask(&request).await).header("x-server", &self.name);
            return response.body(Full::default().boxed_unsync()).map_err(|_| Broken);
        }
        let asked = request.uri().query().unwrap_or_default().to_owned();
        let mut query = query(&asked);
        let is_later =
            query.get("first").and_then(|text| text.parse().ok()).is_some_and(|first: u64| number > first);
        if is_later || query.get("by").is_some_and(|name| *name != self.name) {
            query.clear();
        }
        if let Some(delay) = query.get("delay_ms").and_then(|text| text.parse().ok()) {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if query.contains_key("break") {
            return Err(Broken);
        }
        if request.headers().contains_key("upgrade") {
            return Ok(upgraded(request));
        }
        let (head, body) = request.into_parts();
        // Of what may take long.
        if !body.is_end_stream() || query.contains_key("drip_ms") {
            println!("begun: {}", head.uri);
        }
        if let Some(every) = query.get("drip_ms").and_then(|text| text.parse().ok()) {
            let drip = Drip { target: head.uri.to_string(), every: Duration::from_millis(every) };
            return Ok(Response::new(drip.body()));
        }
        let received = body.collect().await.map_err(|_| {
            println!("broken off: {}", head.uri);
            Broken
        })?;
        let trailers = received.trailers().cloned().unwrap_or_default();
        let said = json!({
            "server": self.name,
            "connection": connection,
            "requests": number,
            "peer": peer.ip().to_canonical(),
            "asked_for": asked_for,
            "method": head.method.as_str(),
            "target": head.uri.to_string(),
            "version": format!("{:?}", head.version),
            "headers": fields(&head.headers),
            "trailers": fields(&trailers),
            "bytes": received.to_bytes().len(),
        });
        let body = match query.get("bytes").and_then(|text| text.parse().ok()) {
            Some(bytes) => Bytes::from(vec![b'x'; bytes]),
            None => Bytes::from(format!("{said}\n")),
        };
        let status = query.get("status").and_then(|text| text.parse().ok()).unwrap_or(200u16);
        let mut response = Response::builder().status(status).header("x-server", &self.name);
        if let Some((name, value)) = query.get("header").and_then(|header| header.split_once(':')) {
            response = response.header(name, value);
        }
        if let Some(name) = query.get("cookie") {
            response = response.header("set-cookie", format!("{name}=from-{}", self.name));
        }
        // hyper leaves the body of an answer to HEAD to its users.
        let body = if head.method == http::Method::HEAD {
            response = response.header("content-length", body.len());
            Full::default()
        } else {
            Full::new(body)
        };
        if query.contains_key("trailer") {
            // hyper sends none in HTTP/1 that were not announced.
            response = response.header("trailer", "x-trailer");
            if head.version == http::Version::HTTP_11 {
                response = response.header("transfer-encoding", "chunked");
            }
        }
        let body = match query.get("trailer").and_then(|value| value.parse().ok()) {
            Some(value) => {
                let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("x-trailer"), value)]);
                body.with_trailers(async move { Some(Ok(trailers)) }).boxed_unsync()
            }
            None => body.boxed_unsync(),
        };
        response.body(body).map_err(|_| Broken)
    }
}

/// The next server of a chain, and connections to it that are idle.
struct Next {
    url: Uri,
    idle: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
}

impl Next {
    fn new(url: Uri) -> Self {
        Self { url, idle: Mutex::default() }
    }

    /// What it answers; 599 where it does not.
    async fn ask(&self, request: &Request<Incoming>) -> u16 {
        self.try_ask(request).await.unwrap_or(599)
    }

    async fn try_ask(&self, request: &Request<Incoming>) -> Result<u16> {
        let authority = self.url.authority().context("a URL has an authority")?.as_str();
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut sender = match idle.filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => {
                let stream = TcpStream::connect(authority).await?;
                stream.set_nodelay(true)?;
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                sender
            }
        };
        sender.ready().await?;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let request = Request::builder().uri(path).header("host", authority).body(Full::default())?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        response.into_body().collect().await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        Ok(status)
    }
}

/// Says back what it is told, in whatever protocol was asked for.
fn upgraded(mut request: Request<Incoming>) -> Response<Body> {
    let protocol = request.headers().get("upgrade").cloned();
    println!("begun: {}", request.uri());
    tokio::spawn(async move {
        if let Ok(stream) = hyper::upgrade::on(&mut request).await {
            let (mut reader, mut writer) = tokio::io::split(TokioIo::new(stream));
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
            println!("broken off: {}", request.uri());
        }
    });
    let mut response = Response::new(Full::default().boxed_unsync());
    *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert("connection", http::HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        response.headers_mut().insert("upgrade", protocol);
    }
    response
}

fn query(text: &str) -> HashMap<&str, &str> {
    text.split('&').filter_map(|pair| pair.split_once('=')).collect()
}

fn fields(headers: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in headers {
        fields.entry(name.to_string()).or_default().push(String::from_utf8_lossy(value.as_bytes()).into());
    }
    fields
}

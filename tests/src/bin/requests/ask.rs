//! The client: one request or many, over as many connections as are asked for; until SIGTERM at the latest.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::Args;
use http::{Request, Response, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;

#[derive(Args)]
pub struct Ask {
    /// `http://ADDRESS:PORT/path`.
    url: Uri,
    #[arg(long, default_value = "GET")]
    method: http::Method,
    /// `name: value`; may be given again.
    #[arg(long = "header")]
    headers: Vec<String>,
    /// The host that it asks for, instead of the address.
    #[arg(long)]
    host: Option<String>,
    /// What it asks for, as it is, instead of the URL's path.
    #[arg(long)]
    target: Option<Uri>,
    /// Speaks HTTP/2.
    #[arg(long)]
    http2: bool,
    /// Bytes of each request's body.
    #[arg(long, default_value_t = 0)]
    body: usize,
    /// Instead the body goes on, a byte at a time, with so long between them, and has no end.
    #[arg(long)]
    drip_ms: Option<u64>,
    /// `name: value` after the body; may be given again.
    #[arg(long = "trailer")]
    trailers: Vec<String>,
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Connections that ask at the same time, each one request after the other.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Between two requests of one connection.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
    /// For each request.
    #[arg(long, default_value_t = 10_000)]
    limit_ms: u64,
    /// A connection for each request.
    #[arg(long)]
    fresh: bool,
}

/// What came of the requests.
#[derive(Default)]
struct Found {
    by_server: BTreeMap<String, usize>,
    by_status: BTreeMap<u16, usize>,
    failed: BTreeMap<String, usize>,
    took_ns: Vec<u64>,
    last: Value,
}

impl Found {
    fn note(&mut self, took: Duration, answer: Result<Value>) {
        self.took_ns.push(took.as_nanos() as u64);
        match answer {
            Ok(answer) => {
                let server = answer["headers"]["x-server"].as_str().unwrap_or("nobody").to_owned();
                let status = answer["status"].as_u64().unwrap_or_default() as u16;
                *self.by_server.entry(server).or_default() += 1;
                *self.by_status.entry(status).or_default() += 1;
                self.last = answer;
            }
            Err(error) => *self.failed.entry(format!("{error:#}")).or_default() += 1,
        }
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

impl Ask {
    pub async fn run(self) -> Result<()> {
        let left = AtomicUsize::new(self.count);
        let found = Arc::new(Mutex::new(Found::default()));
        let clients = (0..self.connections).map(|_| self.client(&left, &found));
        let all = async {
            futures_util::future::join_all(clients).await;
        };
        let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut all = std::pin::pin!(all);
        tokio::select! {
            () = &mut all => {}
            // What is under way is waited for, or it would count as failed.
            _ = stop.recv() => {
                left.store(0, Ordering::Relaxed);
                all.await;
            }
        }
        let mut found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        found.took_ns.sort_unstable();
        let quantile = |share: f64| {
            let place =
                ((found.took_ns.len() as f64 * share) as usize).min(found.took_ns.len().saturating_sub(1));
            found.took_ns.get(place).copied()
        };
        let (p50_ns, p99_ns) = (quantile(0.5), quantile(0.99));
        let Found { by_server, by_status, failed, last, .. } = found;
        let by_status: BTreeMap<String, usize> =
            by_status.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        println!(
            "{}",
            json!({ "by_server": by_server, "by_status": by_status, "failed": failed, "last": last,
                    "p50_ns": p50_ns, "p99_ns": p99_ns })
        );
        Ok(())
    }

    async fn client(&self, left: &AtomicUsize, found: &Mutex<Found>) {
        let mut sender = None;
        let take =
            || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        while take() {
            let began = Instant::now();
            let limit = Duration::from_millis(self.limit_ms);
            let answer = tokio::time::timeout(limit, self.one(&mut sender)).await;
            let answer = answer.unwrap_or_else(|_| bail!("no answer in time"));
            if answer.is_err() {
                sender = None;
            }
            found.lock().unwrap_or_else(PoisonError::into_inner).note(began.elapsed(), answer);
            if self.fresh {
                sender = None;
            }
            if self.pause_ms > 0 {
                tokio::time::sleep(Duration::from_millis(self.pause_ms)).await;
            }
        }
    }

    async fn one(&self, kept: &mut Option<Sender>) -> Result<Value> {
        if kept.is_none() {
            *kept = Some(self.connect().await?);
        }
        let Some(sender) = kept else { bail!("no connection") };
        let answer = match sender {
            Sender::Http1(sender) => sender.try_send_request(self.request()?).await,
            Sender::Http2(sender) => sender.try_send_request(self.request()?).await,
        };
        let response = match answer {
            Ok(response) => response,
            // The server has ended the connection in order, and knows nothing of the request: as all clients do, again.
            Err(failed) if failed.message().is_some() => {
                let sender = kept.insert(self.connect().await?);
                match sender {
                    Sender::Http1(sender) => sender.send_request(self.request()?).await?,
                    Sender::Http2(sender) => sender.send_request(self.request()?).await?,
                }
            }
            Err(failed) => return Err(failed.into_error().into()),
        };
        read(response).await
    }

    async fn connect(&self) -> Result<Sender> {
        let authority = self.url.authority().context("a URL has an authority")?;
        let to: SocketAddr = authority.as_str().parse().context("the authority is an address and a port")?;
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        if self.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            return Ok(Sender::Http2(sender));
        }
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(Sender::Http1(sender))
    }

    fn request(&self) -> Result<Request<Body>> {
        let path = self.url.path_and_query().map_or("/", |path| path.as_str());
        let host = self.host.as_deref().or(self.url.authority().map(|authority| authority.as_str()));
        let host = host.unwrap_or_default();
        let mut request = Request::builder().method(self.method.clone());
        request = if let Some(target) = &self.target {
            let request = request.uri(target.clone());
            if self.http2 { request } else { request.header("host", host) }
        } else if self.http2 {
            request.uri(format!("http://{host}{path}"))
        } else {
            request.uri(path).header("host", host)
        };
        for header in &self.headers {
            let (name, value) = header.split_once(':').context("a header is `name: value`")?;
            request = request.header(name, value.trim());
        }
        let mut trailers = http::HeaderMap::new();
        for trailer in &self.trailers {
            let (name, value) = trailer.split_once(':').context("a trailer is `name: value`")?;
            trailers.append(http::HeaderName::try_from(name)?, value.trim().try_into()?);
            request = request.header("trailer", name);
        }
        let whole = Full::new(Bytes::from(vec![b'x'; self.body]));
        if !trailers.is_empty() {
            if !self.http2 {
                request = request.header("transfer-encoding", "chunked");
            }
            return Ok(request.body(whole.with_trailers(async { Some(Ok(trailers)) }).boxed_unsync())?);
        }
        let Some(every) = self.drip_ms.map(Duration::from_millis) else {
            return Ok(request.body(whole.boxed_unsync())?);
        };
        let more = futures_util::stream::unfold((), move |()| async move {
            tokio::time::sleep(every).await;
            Some((Ok(Frame::data(Bytes::from_static(b"."))), ()))
        });
        Ok(request.body(StreamBody::new(more).boxed_unsync())?)
    }
}

async fn read(response: Response<hyper::body::Incoming>) -> Result<Value> {
    if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
        // Nothing is said in it: it lasts until somebody else ends it.
        let other = TokioIo::new(hyper::upgrade::on(response).await?);
        tokio::io::copy(&mut { other }, &mut tokio::io::sink()).await?;
        bail!("the other protocol was ended");
    }
    let (head, body) = response.into_parts();
    let body = body.collect().await.context("the answer broke off")?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    // Several of one name are joined, as RFC 9110, section 5.3 has it.
    let fields = |headers: &http::HeaderMap| {
        let mut fields: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in headers {
            let value = String::from_utf8_lossy(value.as_bytes());
            let field = fields.entry(name.to_string()).or_default();
            *field = if field.is_empty() { value.into() } else { format!("{field}, {value}") };
        }
        fields
    };
    Ok(json!({
        "status": head.status.as_u16(),
        "headers": fields(&head.headers),
        "trailers": fields(&trailers),
        "saw": serde_json::from_str::<Value>(&text).ok(),
        "bytes": text.len(),
        "text": text.chars().take(300).collect::<String>(),
    }))
}

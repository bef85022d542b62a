//! The agent's own HTTP: health, metrics and a look inside, for kubelets, Prometheus and people with `curl`.
//!
//! It only reads: nothing here changes the agent, and nothing it shows is a secret. It does not know where the
//! configuration comes from, nor what the kernel does; it asks telemetry and the snapshot in force.

mod accept;
pub mod controller;
mod listener;
pub mod view;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use crate::telemetry::{MetricsFormat, Telemetry};
use listener::LimitedListener;

/// Pages that are rendered at the same time: each may take many megabytes, and two cores are enough for admins.
const RENDERERS: usize = 2;
/// How long answers under way may take when the agent ends.
const DRAIN: Duration = Duration::from_secs(2);

const INDEX: &str = "\
undermesh agent
/metrics            metrics: Prometheus text, or OpenMetrics to who accepts it
/healthz            200 while the agent lives
/readyz             200 when every pod of this node is enrolled or has a reason why not, and certificates are in order;
                    else 503 and what is missing
/debug/status       pods, rejected documents, readiness (JSON)
/debug/pods         the pods of this node and their enrolment (JSON)
/debug/connections  every open connection (JSON)
/debug/before       connections that pods had before they were enrolled (JSON)
/debug/plaintext    who has called the pods of this node in plaintext (JSON)
/debug/explain      what would become of a connection or a request, and why (JSON); `undermesh explain` asks it
/debug/certs        certificates, trusted roots and revocation lists (JSON)
/debug/config       the configuration in force (JSON)
";

/// The admin server, bound but not yet serving.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    telemetry: Arc<Telemetry>,
    on_demand: OnDemand,
}

/// Pages that others render.
#[derive(Clone, Debug, Default)]
struct OnDemand {
    certificates: Rendered,
    before: Rendered,
    explanations: ExplanationsPage,
}

/// Renders `/debug/explain` by what stands behind its `?`, or says what is wrong with that; none where nothing is to be explained.
#[derive(Clone, Default)]
struct ExplanationsPage(Option<Arc<Explain>>);

type Explain = dyn Fn(&str) -> Result<Vec<u8>, String> + Send + Sync;

/// Renders a page; none where there is nothing to show.
#[derive(Clone, Default)]
struct Rendered(Option<Arc<dyn Fn() -> Vec<u8> + Send + Sync>>);

/// The admin address cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on the admin address {address}: {source}; choose another one with --admin-address")]
pub struct BindError {
    /// The address asked for.
    pub address: SocketAddr,
    /// What the kernel says.
    pub source: io::Error,
}

impl Admin {
    /// Binds the address, so that a mistake shows at the start.
    ///
    /// # Errors
    /// When the address is in use, not of this host, or not permitted.
    pub async fn bind(address: SocketAddr, telemetry: Arc<Telemetry>) -> Result<Self, BindError> {
        let failed = |source| BindError { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, telemetry, on_demand: OnDemand::default() })
    }

    /// Shows this on `/debug/certs`: what it returns must have no secrets. It may block for a moment.
    #[must_use]
    pub fn with_certificates<V: Serialize>(mut self, view: impl Fn() -> V + Send + Sync + 'static) -> Self {
        self.on_demand.certificates = Rendered(Some(Arc::new(move || view::to_json(&view()))));
        self
    }

    /// Shows this on `/debug/before`, likewise.
    #[must_use]
    pub fn with_before(mut self, view: impl Fn() -> view::BeforeView + Send + Sync + 'static) -> Self {
        self.on_demand.before = Rendered(Some(Arc::new(move || view::to_json(&view()))));
        self
    }

    /// Answers on `/debug/explain` like this, by what stands behind the `?`: what it returns must have no secrets. It may block for a
    /// moment.
    #[must_use]
    pub fn with_explanations<V: Serialize>(
        mut self,
        explain: impl Fn(&str) -> Result<V, String> + Send + Sync + 'static,
    ) -> Self {
        let page = Arc::new(move |query: &str| Ok(view::to_json(&explain(query)?)));
        self.on_demand.explanations = ExplanationsPage(Some(page));
        self
    }

    /// Where it listens: with the port that the kernel chose, if it was asked to.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is done, then lets answers under way end for a moment.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        serve(self.listener, router(self.telemetry, self.on_demand), shutdown).await;
    }
}

async fn serve(listener: TcpListener, router: Router, shutdown: impl Future<Output = ()>) {
    let (drain, draining) = oneshot::channel::<()>();
    let server = axum::serve(LimitedListener::new(listener), router)
        .with_graceful_shutdown(async move { _ = draining.await })
        .into_future();
    tokio::pin!(server);
    tokio::select! {
        // It never ends by itself: errors of accepting are retried.
        _ = &mut server => {}
        () = shutdown => {
            drop(drain);
            _ = tokio::time::timeout(DRAIN, server).await;
        }
    }
}

#[derive(Clone)]
struct Pages {
    telemetry: Arc<Telemetry>,
    on_demand: OnDemand,
    renderers: Arc<Semaphore>,
}

fn router(telemetry: Arc<Telemetry>, on_demand: OnDemand) -> Router {
    Router::new()
        .route("/", get(INDEX))
        .route("/metrics", get(metrics))
        .route("/healthz", get("ok\n"))
        .route("/readyz", get(readyz))
        .route("/debug/status", get(async |State(pages): State<Pages>| pages.json(view::status).await))
        .route("/debug/pods", get(async |State(pages): State<Pages>| pages.json(view::pods).await))
        .route(
            "/debug/connections",
            get(async |State(pages): State<Pages>| pages.json(view::connections).await),
        )
        .route("/debug/plaintext", get(async |State(pages): State<Pages>| pages.json(view::plaintext).await))
        .route("/debug/explain", get(explain))
        .route(
            "/debug/before",
            get(async |State(pages): State<Pages>| {
                let page = pages.on_demand.before.clone();
                pages.rendered(page, "nothing is enrolled here\n").await
            }),
        )
        .route(
            "/debug/certs",
            get(async |State(pages): State<Pages>| {
                let page = pages.on_demand.certificates.clone();
                pages.rendered(page, "this agent has no certificate authority\n").await
            }),
        )
        .route("/debug/config", get(async |State(pages): State<Pages>| pages.json(view::config).await))
        .fallback(async || (StatusCode::NOT_FOUND, "not found; / lists the pages\n"))
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"))
        .with_state(Pages { telemetry, on_demand, renderers: Arc::new(Semaphore::new(RENDERERS)) })
}

async fn metrics(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    let format = accept::metrics_format(&headers);
    let mut response =
        pages.render(content_type(format), move |telemetry| telemetry.scrape(format).into_bytes()).await;
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

fn content_type(format: MetricsFormat) -> &'static str {
    match format {
        MetricsFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        MetricsFormat::PrometheusText => "text/plain; version=0.0.4; charset=utf-8",
    }
}

async fn readyz(State(pages): State<Pages>) -> Response {
    readiness(&pages.telemetry.status().missing())
}

/// Ready, or what is missing, a line each.
fn readiness(missing: &[String]) -> Response {
    if missing.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n").into_response()
}

async fn explain(State(pages): State<Pages>, RawQuery(query): RawQuery) -> Response {
    let Some(explain) = pages.on_demand.explanations.0.clone() else {
        return (StatusCode::NOT_FOUND, "nothing is explained here\n").into_response();
    };
    let rendered = pages.on_a_thread(move |_| explain(&query.unwrap_or_default())).await;
    match rendered {
        Ok(Err(why)) => (StatusCode::BAD_REQUEST, why + "\n").into_response(),
        Ok(Ok(body)) => answer("application/json", Ok(body)),
        Err(error) => answer("application/json", Err(error)),
    }
}

impl Pages {
    async fn rendered(self, page: Rendered, absent: &'static str) -> Response {
        match page.0 {
            Some(page) => self.render("application/json", move |_| page()).await,
            None => (StatusCode::NOT_FOUND, absent).into_response(),
        }
    }

    async fn json(self, page: fn(&Telemetry) -> Vec<u8>) -> Response {
        self.render("application/json", page).await
    }

    /// Renders a page on a thread that may block, a few at a time.
    async fn render(
        self,
        content_type: &'static str,
        page: impl FnOnce(&Telemetry) -> Vec<u8> + Send + 'static,
    ) -> Response {
        answer(content_type, self.on_a_thread(page).await)
    }

    async fn on_a_thread<T: Send + 'static>(
        self,
        render: impl FnOnce(&Telemetry) -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        // Nobody closes it.
        let turn = self.renderers.acquire_owned().await;
        let rendered = tokio::task::spawn_blocking(move || {
            let rendered = render(&self.telemetry);
            drop(turn);
            rendered
        });
        rendered.await
    }
}

fn answer(content_type: &'static str, rendered: Result<Vec<u8>, tokio::task::JoinError>) -> Response {
    match rendered {
        Ok(body) => ([(header::CONTENT_TYPE, content_type)], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "a page of the admin server could not be rendered");
            (StatusCode::INTERNAL_SERVER_ERROR, "this page failed; the agent's log has the error\n")
                .into_response()
        }
    }
}

impl fmt::Debug for ExplanationsPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ExplanationsPage").field(&self.0.is_some()).finish()
    }
}

impl fmt::Debug for Rendered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Rendered").field(&self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests;

//! The controller's admin pages: health and metrics, for a role that has neither pods nor connections to show.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::get;
use tokio::net::TcpListener;

use super::{BindError, accept, answer, content_type, readiness};
use crate::telemetry::ControllerTelemetry;

const INDEX: &str = "\
undermesh controller
/metrics            metrics: Prometheus text, or OpenMetrics to who accepts it
/healthz            200 while the controller lives
/readyz             200 when it can issue certificates; else 503 and what is missing
";

/// The controller's admin server, bound but not yet serving.
#[derive(Debug)]
pub struct ControllerAdmin {
    listener: TcpListener,
    address: SocketAddr,
    pages: Pages,
}

#[derive(Clone)]
struct Pages {
    telemetry: Arc<ControllerTelemetry>,
    missing: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
}

impl ControllerAdmin {
    /// Binds the address, so that a mistake shows at the start. `missing` says what keeps the controller from being
    /// ready.
    ///
    /// # Errors
    /// When the address is in use, not of this host, or not permitted.
    pub async fn bind(
        address: SocketAddr,
        telemetry: Arc<ControllerTelemetry>,
        missing: impl Fn() -> Vec<String> + Send + Sync + 'static,
    ) -> Result<Self, BindError> {
        let failed = |source| BindError { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, pages: Pages { telemetry, missing: Arc::new(missing) } })
    }

    /// Where it listens: with the port that the kernel chose, if it was asked to.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` is done, then lets answers under way end for a moment.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let router = Router::new()
            .route("/", get(INDEX))
            .route("/metrics", get(metrics))
            .route("/healthz", get("ok\n"))
            .route("/readyz", get(async |State(pages): State<Pages>| readiness(&(pages.missing)())))
            .fallback(async || (StatusCode::NOT_FOUND, "not found; / lists the pages\n"))
            .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"))
            .with_state(self.pages);
        super::serve(self.listener, router, shutdown).await;
    }
}

async fn metrics(State(pages): State<Pages>, headers: HeaderMap) -> Response {
    let format = accept::metrics_format(&headers);
    // It reads /proc, which may block.
    let rendered = tokio::task::spawn_blocking(move || pages.telemetry.scrape(format).into_bytes());
    let mut response = answer(content_type(format), rendered.await);
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

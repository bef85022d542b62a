//! The admission webhook: what agents would say of an object, said to whoever writes it (`kubectl` shows it as a warning).
//!
//! What is not ours it does not refuse. Of our own kinds it refuses what agents cannot read, and its writer hears why while still
//! there. The API server goes on without it when it is away, and is told by the leader which roots to trust. `review` decides, here
//! is the wire.

mod review;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::post;
use axum::{Json, Router};
use futures_util::StreamExt as _;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::debug;

use super::listener::{Connection, incoming};
use crate::telemetry::{Checked, ControllerTelemetry};
use review::{Review, judge};

/// Connections at one time: an API server keeps a few.
const CONNECTIONS: usize = 256;
/// How long a connection may be idle, or a request's head on its way. API servers close theirs after 90 s.
const IDLE: Duration = Duration::from_secs(120);
/// An object has 1.5 MiB at most (etcd's limit), and comes with the one before it.
const MOST_BYTES: usize = 8 << 20;

/// Serves until `shutdown` is done, and then what is under way.
pub(super) async fn serve(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    telemetry: Arc<ControllerTelemetry>,
    shutdown: impl Future<Output = ()>,
) {
    let router = Router::new()
        .route("/check", post(check))
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .with_state(telemetry);
    let (stop, stopped) = watch::channel(());
    let mut open = JoinSet::new();
    let (mut connections, mut shutdown) = (pin!(incoming(listener, tls, CONNECTIONS)), pin!(shutdown));
    loop {
        tokio::select! {
            connection = connections.next() => match connection {
                Some(Ok(connection)) => drop(open.spawn(serve_one(connection, router.clone(), stopped.clone()))),
                Some(Err(error)) => debug!(%error, "a connection to the webhook failed"),
                None => break,
            },
            Some(_) = open.join_next() => {}
            () = &mut shutdown => break,
        }
    }
    drop(stop);
    open.join_all().await;
}

/// API servers speak HTTP/1.1 to webhooks, so that their requests are spread over the replicas.
async fn serve_one(connection: Connection, router: Router, mut stopped: watch::Receiver<()>) {
    let service = TowerToHyperService::new(router);
    let serve = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(connection), service);
    let mut serve = pin!(serve);
    let ended = tokio::select! {
        ended = &mut serve => ended,
        _ = stopped.changed() => {
            serve.as_mut().graceful_shutdown();
            serve.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection to the webhook broke");
    }
}

async fn check(
    State(telemetry): State<Arc<ControllerTelemetry>>,
    Json(review): Json<AdmissionReview<DynamicObject>>,
) -> impl IntoResponse {
    let request: Result<AdmissionRequest<DynamicObject>, _> = review.try_into();
    let Ok(request) = request else {
        return (StatusCode::BAD_REQUEST, "there is no request in it").into_response();
    };
    let mut response = AdmissionResponse::from(&request);
    match judge(&request) {
        Review::Clean => telemetry.checked(Checked::Clean),
        Review::Warn(warnings) => {
            telemetry.checked(Checked::Warned);
            response.warnings = Some(warnings);
        }
        Review::Refuse(why) => {
            telemetry.checked(Checked::Refused);
            response = response.deny(why);
        }
    }
    Json(response.into_review()).into_response()
}

//! The admission webhook: what agents would say of an object, said to whoever writes it (`kubectl` shows it as a warning).
//!
//! What is not ours it does not refuse. Of our own kinds it refuses what agents cannot read, and its writer hears why while still
//! there. The API server goes on without it when it is away, and is told by the leader which roots to trust. `review` decides, here
//! is the wire.

mod review;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode};
use axum::response::IntoResponse;
use axum::routing::post;
use axum::{Json, Router};
use futures_util::StreamExt as _;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::debug;

use super::listener::{Bounds, Connection, incoming};
use crate::telemetry::{Checked, ControllerTelemetry};
use review::{Review, judge};

/// An API server keeps a few connections, and gives up after two seconds.
const BOUNDS: Bounds = Bounds { connections: 256, of_one_address: 32, request: Duration::from_secs(5) };
/// How long a connection may be idle. API servers close theirs after 90 s: where they do, no request of theirs meets the end of one.
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
    let (mut connections, mut shutdown) = (pin!(incoming(listener, tls, BOUNDS)), pin!(shutdown));
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
    let (seat, router) = (connection.seat.clone(), TowerToHyperService::new(router));
    let service = service_fn(move |request| {
        // Its body as well must come in time.
        seat.limit(BOUNDS.request);
        let (seat, answer) = (seat.clone(), router.call(request));
        async move {
            let mut answer = answer.await?;
            match answer.status() {
                // The idle time is hyper's to measure from here on.
                StatusCode::OK => seat.keep(),
                // Who asks for something else is no API server.
                _ => drop(answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"))),
            }
            Ok::<_, Infallible>(answer)
        }
    });
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

//! The collector: one batch of spans as one request of OTLP, over gRPC or HTTP.
//!
//! Both go over one HTTP client, with connections that are made when they are needed. Secrets are in no error and no `Debug`.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use ::http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use ::http::uri::{PathAndQuery, Scheme};
use ::http::{Method, Request, StatusCode, Uri};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use prost::Message as _;
use rustls::ClientConfig;
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::{TraceProtocol, TraceSettings};
use crate::web_roots;

/// For an answer, with the connection if there is none.
const LIMIT: Duration = Duration::from_secs(5);

/// An answer says little.
const MOST_OF_ANSWER: usize = 64 * 1024;

/// Where collectors take spans in HTTP requests.
const PATH: &str = "/v1/traces";

/// A header that the collector is shown: who we are, as a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    /// Its name.
    pub name: HeaderName,
    /// Its value.
    pub value: TraceHeaderValue,
}

/// Where the value of a header comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceHeaderValue {
    /// From the settings. It is marked as sensitive.
    Given(HeaderValue),
    /// The first line of a file, read for each batch: tokens are replaced while we run.
    File(PathBuf),
}

/// The settings cannot be right.
#[derive(Debug, thiserror::Error)]
pub enum TraceSettingsError {
    /// No address that can be asked.
    #[error("the address of the traces' collector, {0:?}, {1}")]
    Endpoint(String, &'static str),
    /// Nobody can be believed.
    #[error("the roots of the traces' collector: {0}")]
    Roots(String),
}

/// The way to the collector.
#[derive(Debug)]
pub(super) struct Collector {
    client: HttpClient,
    target: Uri,
    protocol: TraceProtocol,
    headers: Vec<TraceHeader>,
}

type HttpClient = Client<HttpsConnector<HttpConnector>, tonic::body::Body>;

/// A batch that the collector has taken, or most of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Spans that it does not want.
    pub(super) rejected: u64,
    /// Why.
    pub(super) message: String,
}

/// It has not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// It may later.
    pub(super) is_passing: bool,
    pub(super) why: String,
}

impl Collector {
    pub(super) fn new(settings: &TraceSettings) -> Result<Self, TraceSettingsError> {
        let target = target(&settings.endpoint, settings.protocol)?;
        let is_grpc = settings.protocol == TraceProtocol::Grpc;
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls(settings, &target)?).https_or_http();
        let connector = match is_grpc {
            true => connector.enable_http2().build(),
            false => connector.enable_http1().build(),
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .http2_only(is_grpc)
            .build(connector);
        Ok(Self { client, target, protocol: settings.protocol, headers: settings.headers.clone() })
    }

    /// Has the collector take the spans.
    pub(super) async fn export(&self, spans: &ExportTraceServiceRequest) -> Result<Taken, Failure> {
        let headers = self.headers()?;
        let asked = async {
            match self.protocol {
                TraceProtocol::Grpc => self.by_grpc(spans, headers).await,
                TraceProtocol::Http => self.by_http(spans, headers).await,
            }
        };
        let answer = timeout(LIMIT, asked).await.unwrap_or_else(|_elapsed| {
            Err(Failure { is_passing: true, why: format!("no answer within {} s", LIMIT.as_secs()) })
        })?;
        let ExportTracePartialSuccess { rejected_spans, error_message } =
            answer.partial_success.unwrap_or_default();
        Ok(Taken { rejected: rejected_spans.try_into().unwrap_or(0), message: error_message })
    }

    async fn by_grpc(
        &self,
        spans: &ExportTraceServiceRequest,
        headers: HeaderMap,
    ) -> Result<ExportTraceServiceResponse, Failure> {
        let mut client = TraceServiceClient::with_origin(self.client.clone(), self.target.clone())
            .max_decoding_message_size(MOST_OF_ANSWER);
        let mut request = tonic::Request::new(spans.clone());
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        request.set_timeout(LIMIT);
        let answer = client.export(request).await.map_err(|status| of_grpc(&status))?;
        Ok(answer.into_inner())
    }

    async fn by_http(
        &self,
        spans: &ExportTraceServiceRequest,
        headers: HeaderMap,
    ) -> Result<ExportTraceServiceResponse, Failure> {
        let mut request = Request::new(tonic::body::Body::new(Full::from(spans.encode_to_vec())));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.target.clone();
        *request.headers_mut() = headers;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        let answer = self.client.request(request).await.map_err(|error| passing(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MOST_OF_ANSWER).collect().await;
        if !status.is_success() {
            return Err(of_http(status));
        }
        let body: Bytes = body.map_err(|error| passing(&*error))?.to_bytes();
        // What some answer in place of an empty message is not ours to mind.
        Ok(ExportTraceServiceResponse::decode(body).unwrap_or_default())
    }

    fn headers(&self) -> Result<HeaderMap, Failure> {
        let mut headers = HeaderMap::with_capacity(self.headers.len() + 2);
        let agent = concat!("undermesh/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        for TraceHeader { name, value } in &self.headers {
            let value = match value {
                TraceHeaderValue::Given(value) => value.clone(),
                TraceHeaderValue::File(path) => {
                    let unread = |what: &dyn std::fmt::Display| Failure {
                        is_passing: true,
                        why: format!("the file of the header {name}, {}: {what}", path.display()),
                    };
                    let text = std::fs::read_to_string(path).map_err(|error| unread(&error))?;
                    let line = text.lines().next().unwrap_or_default().trim();
                    let mut value = HeaderValue::try_from(line).map_err(|error| unread(&error))?;
                    value.set_sensitive(true);
                    value
                }
            };
            headers.append(name, value);
        }
        Ok(headers)
    }
}

/// Where requests go: for HTTP with the path that they go to.
fn target(endpoint: &Uri, protocol: TraceProtocol) -> Result<Uri, TraceSettingsError> {
    let wrong = |what| TraceSettingsError::Endpoint(endpoint.to_string(), what);
    let is_http = endpoint.scheme().is_some_and(|scheme| [Scheme::HTTP, Scheme::HTTPS].contains(scheme));
    let Some(authority) = endpoint.authority().filter(|_| is_http) else {
        return Err(wrong("is not http://HOST:PORT or https://HOST:PORT"));
    };
    if authority.as_str().contains('@') {
        return Err(TraceSettingsError::Endpoint(
            authority.host().to_owned(),
            "has a user before it: who we are is for a header to say",
        ));
    }
    let has_path = endpoint.path() != "/" || endpoint.query().is_some();
    let path = match (protocol, has_path) {
        (TraceProtocol::Grpc, true) => return Err(wrong("has a path, which gRPC has no use for")),
        (TraceProtocol::Grpc, false) => None,
        (TraceProtocol::Http, true) => endpoint.path_and_query().cloned(),
        (TraceProtocol::Http, false) => Some(PathAndQuery::from_static(PATH)),
    };
    let mut parts = endpoint.clone().into_parts();
    parts.path_and_query = Some(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    Uri::from_parts(parts).map_err(|_| wrong("is no address"))
}

/// Whom to believe; nobody where no certificate is asked for.
fn tls(settings: &TraceSettings, target: &Uri) -> Result<ClientConfig, TraceSettingsError> {
    let config = match target.scheme() == Some(&Scheme::HTTPS) {
        true => web_roots::client(settings.ca.as_deref()),
        false => web_roots::client_of_nobody(),
    };
    config.map_err(TraceSettingsError::Roots)
}

/// As the specification of OTLP has it: which answers are worth another try.
fn of_http(status: StatusCode) -> Failure {
    let is_passing = matches!(status.as_u16(), 429 | 502..=504);
    Failure { is_passing, why: format!("it answers {status}") }
}

fn of_grpc(status: &Status) -> Failure {
    let is_passing = matches!(
        status.code(),
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
            | Code::ResourceExhausted
            // What never became an answer.
            | Code::Unknown
    );
    match status.source() {
        Some(cause) => Failure { is_passing: true, why: chain(cause) },
        None => {
            Failure { is_passing, why: format!("it answers {:?}: {:?}", status.code(), status.message()) }
        }
    }
}

fn passing(error: &(dyn Error + 'static)) -> Failure {
    Failure { is_passing: true, why: chain(error) }
}

/// The error and its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

//! The part of istiod that an agent asks for certificates, `istio.v1.auth.IstioCertificateService` over TLS: to answer it, and to ask it.
//!
//! Here is what travels; what is asked and answered is for the caller to say. The messages are written from Istio's definition and
//! not from the agent's code, so that the two check each other.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http::uri::PathAndQuery;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::net::TcpListener;
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// The metadata of a request that names whose certificate it asks for.
const IDENTITY: &str = "ImpersonatedIdentity";
/// The longest that an authority may take, which for a pod that is not there waits a while.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a node asks for.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The header `authorization`; `-` without one.
    pub authorization: String,
    /// The header `clusterid`; `-` without one.
    pub cluster: String,
    /// `ImpersonatedIdentity`; empty without one.
    pub identity: String,
    /// PKCS #10 in PEM.
    pub csr: String,
    /// How long the certificate is to live.
    pub validity_seconds: i64,
}

/// The answer's certificates in PEM, or why there are none.
pub type Answer = Result<Vec<String>, Status>;

/// Answers for as long as it is polled, with this certificate and key of its own in PEM.
///
/// # Errors
/// When the certificate or the key cannot be used.
pub async fn serve<F, R>(
    listener: TcpListener,
    (certificate, key): (String, String),
    answer: F,
) -> Result<(), tonic::transport::Error>
where
    F: Fn(Asked) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Answer> + Send + 'static,
{
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
    let mut server = Server::builder().tls_config(tls)?;
    server.add_service(Istiod(answer)).serve_with_incoming(TcpIncoming::from(listener)).await
}

/// Asks the authority at this address, which is to show a certificate for this name by this root in PEM. Fails where it does not answer.
pub async fn ask(address: SocketAddr, (name, root): (&str, &str), asked: Asked) -> Result<Answer> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name(name);
    let endpoint = Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?;
    let channel = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE).connect().await?;
    let Asked { authorization, cluster, identity, csr, validity_seconds } = asked;
    let identity = Value { kind: Some(Kind::StringValue(identity)) };
    let metadata = Struct { fields: [(IDENTITY.to_owned(), identity)].into() };
    let message =
        IstioCertificateRequest { csr, validity_duration: validity_seconds, metadata: Some(metadata) };
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", authorization.parse()?);
    request.metadata_mut().insert("clusterid", cluster.parse()?);
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let codec = ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
    let answer = client.unary(request, PathAndQuery::from_static(CREATE_CERTIFICATE), codec).await;
    Ok(answer.map(|answer| answer.into_inner().cert_chain))
}

#[derive(Clone, PartialEq, prost::Message)]
struct IstioCertificateRequest {
    #[prost(string, tag = "1")]
    csr: String,
    #[prost(int64, tag = "3")]
    validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IstioCertificateResponse {
    #[prost(string, repeated, tag = "1")]
    cert_chain: Vec<String>,
}

#[derive(Clone)]
struct Istiod<F>(F);

impl<F> NamedService for Istiod<F> {
    const NAME: &'static str = "istio.v1.auth.IstioCertificateService";
}

impl<F, R> UnaryService<IstioCertificateRequest> for Istiod<F>
where
    F: Fn(Asked) -> R,
    R: Future<Output = Answer> + Send + 'static,
{
    type Response = IstioCertificateResponse;
    type Future = BoxFuture<Response<IstioCertificateResponse>, Status>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let answer = (self.0)(asked(request));
        Box::pin(async { Ok(Response::new(IstioCertificateResponse { cert_chain: answer.await? })) })
    }
}

impl<F, R, B> Service<http::Request<B>> for Istiod<F>
where
    F: Fn(Asked) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Answer> + Send + 'static,
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("istiod has one method here").into_http());
            }
            let codec = ProstCodec::<IstioCertificateResponse, IstioCertificateRequest>::default();
            Ok(Grpc::new(codec).unary(this, request).await)
        })
    }
}

fn asked(request: Request<IstioCertificateRequest>) -> Asked {
    let header =
        |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let (authorization, cluster) = (header("authorization"), header("clusterid"));
    let IstioCertificateRequest { csr, validity_duration, metadata } = request.into_inner();
    let mut fields = metadata.unwrap_or_default().fields;
    let identity = match fields.remove(IDENTITY).and_then(|value| value.kind) {
        Some(Kind::StringValue(identity)) => identity,
        _ => String::new(),
    };
    Asked { authorization, cluster, identity, csr, validity_seconds: validity_duration }
}

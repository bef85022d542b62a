//! The authority that Istio's mesh asks: istiod, istio-csr and others speak `istio.v1.auth.IstioCertificateService`.
//!
//! One connection, made when it is needed. The token is read at each call, the authority's root whenever its file has
//! changed: Kubernetes replaces both while we run.

pub mod message;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::uri::PathAndQuery;
use rustls_pki_types::CertificateDer;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use super::super::x509::certificates_of_pem;
use super::{CaError, CertificateAuthority, CertificateRequest, IssueFuture, Issued, Roots, Stamp, stamp};
use crate::sentence::in_one_sentence;
use message::{CREATE_CERTIFICATE, IstioCertificateRequest, IstioCertificateResponse, impersonating};

const CONNECT: Duration = Duration::from_secs(5);
/// A chain is a few kilobytes.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Certificates that an answer may have, roots included.
const MAX_CERTIFICATES: usize = 32;

/// How to reach the authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcSettings {
    /// `https://istiod.istio-system.svc:15012`, say.
    pub address: String,
    /// The name in the authority's certificate, if it is not that of the address.
    pub server_name: Option<String>,
    /// The roots, in PEM, that the authority's own certificate must lead to. They are believed for the mesh as well.
    pub root: PathBuf,
    /// Whose token this node shows: a projected service account token.
    pub token: PathBuf,
    /// The name of this cluster (`Kubernetes` where Istio was not told another).
    pub cluster: String,
}

/// The authority as an agent uses it.
#[derive(Debug)]
pub struct GrpcCa {
    settings: GrpcSettings,
    channel: Mutex<Option<(Option<Stamp>, Channel)>>,
    roots: Mutex<Option<(Option<Stamp>, Vec<CertificateDer<'static>>)>>,
}

/// The settings cannot be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrpcSettingsError {
    /// Not `https://host:port`.
    #[error("the address of the certificate authority, {0:?}, is not https://HOST:PORT")]
    Address(String),
    /// Not fit for a header.
    #[error("the cluster name {0:?} has characters that no header may have")]
    Cluster(String),
}

impl GrpcCa {
    /// Checks the settings; connects when it is first asked.
    ///
    /// # Errors
    /// When they cannot be right. Files that are not there yet are no error.
    pub fn new(settings: GrpcSettings) -> Result<Self, GrpcSettingsError> {
        let address = settings.address.parse::<http::Uri>();
        let https = |uri: &http::Uri| uri.scheme_str() == Some("https") && uri.host().is_some();
        if !address.as_ref().is_ok_and(https) {
            return Err(GrpcSettingsError::Address(settings.address));
        }
        if settings.cluster.parse::<MetadataValue<Ascii>>().is_err() {
            return Err(GrpcSettingsError::Cluster(settings.cluster));
        }
        Ok(Self { settings, channel: Mutex::default(), roots: Mutex::default() })
    }

    async fn ask(&self, asked: &CertificateRequest) -> Result<Issued, CaError> {
        let mut client = Grpc::new(self.channel()?).max_decoding_message_size(MAX_ANSWER_BYTES);
        let request = self.request(asked)?;
        client.ready().await.map_err(|error| CaError::Unavailable(in_one_sentence(&error)))?;
        let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
        let codec = ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
        let answer = client.unary(request, path, codec).await.map_err(|status| failure(&status))?;
        read_chain(&answer.into_inner().cert_chain)
    }

    fn request(&self, asked: &CertificateRequest) -> Result<Request<IstioCertificateRequest>, CaError> {
        let mut request = Request::new(IstioCertificateRequest {
            csr: asked.csr.clone(),
            validity_duration: i64::try_from(asked.validity.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(asked.id.as_str())),
        });
        let token = Zeroizing::new(read(&self.settings.token)?);
        let token = std::str::from_utf8(&token).unwrap_or_default().trim();
        let bearer = Zeroizing::new(format!("Bearer {token}"));
        let mut bearer: MetadataValue<Ascii> = match token.is_empty() {
            false => bearer.parse().map_err(|_| bad_token(&self.settings.token))?,
            true => return Err(bad_token(&self.settings.token)),
        };
        bearer.set_sensitive(true);
        request.metadata_mut().insert("authorization", bearer);
        if let Ok(cluster) = self.settings.cluster.parse() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        Ok(request)
    }

    /// The connection: a new one whenever the authority's root has changed.
    fn channel(&self) -> Result<Channel, CaError> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.settings.root);
        if let Some((_, channel)) = channel.as_ref().filter(|(seen, _)| *seen == now) {
            return Ok(channel.clone());
        }
        let root = read(&self.settings.root)?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root));
        if let Some(name) = &self.settings.server_name {
            tls = tls.domain_name(name);
        }
        let unavailable = |error: tonic::transport::Error| CaError::Unavailable(in_one_sentence(&error));
        let endpoint = Endpoint::from_shared(self.settings.address.clone())
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(unavailable)?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_while_idle(false);
        let made = endpoint.connect_lazy();
        *channel = Some((now, made.clone()));
        Ok(made)
    }

    fn configured_roots(&self) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.settings.root);
        if let Some((_, roots)) = roots.as_ref().filter(|(seen, _)| *seen == now) {
            return Ok(roots.clone());
        }
        let path = &self.settings.root;
        let read = certificates_of_pem(&read(path)?)
            .map_err(|error| CaError::Unavailable(format!("{}: {error}", path.display())))?;
        *roots = Some((now, read.clone()));
        Ok(read)
    }
}

impl CertificateAuthority for GrpcCa {
    fn issue<'a>(&'a self, request: &'a CertificateRequest) -> IssueFuture<'a> {
        Box::pin(self.ask(request))
    }

    fn roots(&self) -> Result<Roots, CaError> {
        self.configured_roots().map(Roots::AndThoseIssued)
    }
}

/// The last text of an answer has the roots, the others have one certificate each.
fn read_chain(answer: &[String]) -> Result<Issued, CaError> {
    let bad = |why: String| CaError::BadAnswer(why);
    let Some((roots, chain)) = answer.split_last().filter(|(_, chain)| !chain.is_empty()) else {
        return Err(bad(format!("{} certificates, and a leaf and a root are the least", answer.len())));
    };
    let read = |pem: &String| certificates_of_pem(pem.as_bytes()).map_err(|error| bad(error.to_string()));
    let roots = read(roots)?;
    let chain = chain.iter().map(read).collect::<Result<Vec<_>, _>>()?.concat();
    match chain.len() + roots.len() > MAX_CERTIFICATES {
        true => Err(bad(format!("more than {MAX_CERTIFICATES} certificates"))),
        false => Ok(Issued { chain, roots }),
    }
}

/// Who has to act on it: nobody, or whoever set up the permissions.
fn failure(status: &Status) -> CaError {
    let told = format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::PermissionDenied
        | Code::Unauthenticated
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::Unimplemented
        | Code::NotFound => CaError::Refused(told),
        _ => CaError::Unavailable(match std::error::Error::source(status) {
            Some(source) => format!("{told}: {}", in_one_sentence(source)),
            None => told,
        }),
    }
}

/// An error with its causes: tonic's own says no more than "transport error".
fn read(path: &Path) -> Result<Vec<u8>, CaError> {
    std::fs::read(path).map_err(|error| CaError::Unavailable(format!("{}: {error}", path.display())))
}

fn bad_token(path: &Path) -> CaError {
    CaError::Unavailable(format!("{} holds no token", path.display()))
}

#[cfg(test)]
mod tests;

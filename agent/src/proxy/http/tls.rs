//! TLS with the endpoints of Service ports that want it: begun for one dialect of HTTP, with a server that shows a certificate as the
//! port's policy asks for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, DnsName, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webpki::EndEntityCert;

use super::talk::Dialect;
use crate::model::{AltName, Authorities, BackendTls};
use crate::proxy::reach::{Assurance, InTheWay};
use crate::sentence::in_one_sentence;
use crate::telemetry::RefuseReason;
use crate::web_roots;

/// A client for each way in which TLS is begun.
#[derive(Debug, Default)]
pub struct BackendTlsClients(Mutex<HashMap<Arc<BackendTls>, Client>>);

/// What connections of one way share.
#[derive(Clone, Debug)]
struct Client {
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// TLS was not begun.
#[derive(Debug)]
pub(super) struct NotBegun {
    reason: RefuseReason,
    detail: String,
}

const H2: &[u8] = b"h2";

impl BackendTlsClients {
    /// Begins TLS on the connection, for requests of this dialect.
    pub(super) async fn begin<S>(
        &self,
        tls: &Arc<BackendTls>,
        dialect: Dialect,
        stream: S,
        within: Duration,
    ) -> Result<Box<TlsStream<S>>, NotBegun>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Client { http1, http2, name } = self.client(tls)?;
        let config = match dialect {
            Dialect::Http1 => http1,
            Dialect::Http2 => http2,
        };
        let handshake = TlsConnector::from(config).connect(name, stream);
        let stream = match timeout(within, handshake).await {
            Ok(begun) => begun.map_err(|error| NotBegun::of(&error))?,
            Err(_elapsed) => {
                let detail = "TLS was not begun within the time that a connection may take".to_owned();
                return Err(NotBegun { reason: RefuseReason::ConnectTimeout, detail });
            }
        };
        // A server that has not heard of ALPN is one of HTTP/1.
        if dialect == Dialect::Http2 && stream.get_ref().1.alpn_protocol() != Some(H2) {
            let detail = "it does not agree to HTTP/2 (ALPN)".to_owned();
            return Err(NotBegun { reason: RefuseReason::TlsFailed, detail });
        }
        Ok(Box::new(stream))
    }

    fn client(&self, tls: &Arc<BackendTls>) -> Result<Client, NotBegun> {
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(tls) {
            return Ok(client.clone());
        }
        let client =
            Client::new(tls).map_err(|detail| NotBegun { reason: RefuseReason::InvalidBackend, detail })?;
        // Those that nobody else has any more are of policies that have changed.
        clients.retain(|tls, _| Arc::strong_count(tls) > 1);
        clients.insert(tls.clone(), client.clone());
        Ok(client)
    }
}

impl Client {
    fn new(tls: &BackendTls) -> Result<Self, String> {
        let unusable = |name: &str| format!("{name:?} is no name of a server");
        let name = DnsName::try_from(tls.hostname.to_string()).map_err(|_| unusable(&tls.hostname))?;
        let verifier = Arc::new(Verifier::new(tls)?);
        let config = |protocol: &[u8]| -> Result<_, String> {
            let builder =
                web_roots::builder()?.dangerous().with_custom_certificate_verifier(verifier.clone());
            let mut config = builder.with_no_client_auth();
            config.alpn_protocols = vec![protocol.to_vec()];
            Ok(Arc::new(config))
        };
        Ok(Self { http1: config(b"http/1.1")?, http2: config(H2)?, name: ServerName::DnsName(name) })
    }
}

impl NotBegun {
    fn of(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|error| error.downcast_ref::<Error>());
        let (reason, detail) = match tls {
            Some(Error::InvalidCertificate(why)) => {
                let why = match why {
                    CertificateError::UnknownIssuer => {
                        "none of the authorities that are believed has made it".to_owned()
                    }
                    CertificateError::Other(other) => other.0.to_string(),
                    why => why.to_string(),
                };
                (RefuseReason::CertificateRefused, format!("its certificate is refused: {why}"))
            }
            Some(Error::NoCertificatesPresented) => {
                (RefuseReason::CertificateRefused, "it shows no certificate".to_owned())
            }
            _ => (RefuseReason::TlsFailed, format!("TLS was not begun: {}", in_one_sentence(error))),
        };
        Self { reason, detail }
    }

    pub(super) fn in_the_way(self, assurance: Assurance) -> InTheWay {
        InTheWay::new(self.reason, assurance).because(self.detail)
    }
}

/// Believes a certificate that leads to one of the roots and has one of the names.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    /// Where there are none, that by which the server is asked for.
    alt_names: Vec<Name>,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum Name {
    Host(ServerName<'static>),
    /// Every host below; begins with the dot.
    Below(String),
    Uri(String),
}

/// A certificate has none of the names.
#[derive(Debug, thiserror::Error)]
#[error("it has none of the names that the policy asks for, but {0}")]
struct OtherNames(String);

impl Verifier {
    fn new(tls: &BackendTls) -> Result<Self, String> {
        let roots = match &tls.authorities {
            Authorities::System => web_roots::of_system(),
            Authorities::Given(certificates) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates {
                    let added = roots.add(CertificateDer::from(certificate.as_slice()));
                    added.map_err(|error| in_one_sentence(&error))?;
                }
                Arc::new(roots)
            }
        };
        let name = |name: &AltName| match name {
            AltName::Uri(uri) => Ok(Name::Uri(uri.to_string())),
            AltName::Hostname(name) => match name.strip_prefix('*') {
                Some(below) => Ok(Name::Below(below.to_owned())),
                None => DnsName::try_from(name.to_string()).map(|name| Name::Host(ServerName::DnsName(name))),
            },
        };
        let alt_names = tls.alt_names.iter().map(name).collect::<Result<_, _>>();
        let alt_names = alt_names.map_err(|error| in_one_sentence(&error))?;
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        Ok(Self { roots, alt_names, algorithms })
    }

    fn has_one_of_the_names(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let names = EndEntityCert::try_from(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let is_its = |name: &Name| match name {
            Name::Host(name) => verify_server_name(&parsed, name).is_ok(),
            Name::Below(below) => names.valid_dns_names().any(|name| is_below(name, below)),
            Name::Uri(uri) => names.valid_uri_names().any(|name| name == uri),
        };
        if self.alt_names.iter().any(is_its) {
            return Ok(());
        }
        let found: Vec<&str> = names.valid_dns_names().chain(names.valid_uri_names()).collect();
        let found = if found.is_empty() { "none at all".to_owned() } else { found.join(", ") };
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(OtherNames(found))))))
    }
}

/// Whether a certificate's name, which may be a wildcard itself, is one of those below.
fn is_below(name: &str, below: &str) -> bool {
    name.len() > below.len() && name.to_ascii_lowercase().ends_with(below)
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        match self.alt_names.is_empty() {
            true => verify_server_name(&parsed, server_name)?,
            false => self.has_one_of_the_names(end_entity)?,
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;

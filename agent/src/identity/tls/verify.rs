//! What rustls asks during a handshake: whether the peer's certificate holds, and which one we show.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::Expected;
use crate::identity::reason::PeerRejected;
use crate::identity::trust::{Chain, Role};
use crate::identity::{Clock, Trust};

/// The client's check: the chain leads to a root of the trust domain that the server claims, and the server is one of
/// those that were meant.
#[derive(Debug)]
pub(super) struct MeshServerVerifier {
    pub(super) trust: Arc<Trust>,
    pub(super) clock: Clock,
    pub(super) expected: Expected,
}

/// The server's check: there is a certificate, and its chain leads to a root of the trust domain that it claims, ours
/// or a federated one.
#[derive(Debug)]
pub(super) struct MeshClientVerifier {
    pub(super) trust: Arc<Trust>,
    pub(super) clock: Clock,
}

/// Shows one certificate, whatever is asked for.
#[derive(Debug)]
pub(super) struct Present(pub(super) Arc<CertifiedKey>);

impl ServerCertVerifier for MeshServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _ocsp_response: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = Chain { leaf: end_entity, intermediates };
        let peer = self.trust.verify(chain, Role::Server, self.clock.now())?;
        if !self.expected.allows(&peer) {
            let expected = self.expected.to_string();
            return Err(PeerRejected::WrongIdentity { presented: peer, expected }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for MeshClientVerifier {
    /// No hints: a client has one certificate, and the names of our roots are nobody's business.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = Chain { leaf: end_entity, intermediates };
        self.trust.verify(chain, Role::Client, self.clock.now())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ResolvesServerCert for Present {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Present {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    // Two references to tables, but the function that returns them makes a few vectors as well.
    static ALGORITHMS: std::sync::OnceLock<WebPkiSupportedAlgorithms> = std::sync::OnceLock::new();
    *ALGORITHMS.get_or_init(|| aws_lc_rs::default_provider().signature_verification_algorithms)
}

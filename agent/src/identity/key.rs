//! Private keys: made here, used here, never written down, gone from memory when dropped.

use std::fmt;
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroize as _;

use super::SpiffeId;

/// A P-256 key pair. The bytes are zeroised on drop; AWS-LC does the same with its own copy.
pub(super) struct PrivateKey(KeyPair);

/// The cryptography library did not do its part.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot make or use a private key: {0}")]
pub struct KeyError(String);

impl PrivateKey {
    /// A new one.
    pub(super) fn generate() -> Result<Self, KeyError> {
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map(Self).map_err(failed)
    }

    /// The one of a PEM text (PKCS #8).
    pub(super) fn from_pem(pem: &str) -> Result<Self, KeyError> {
        KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ECDSA_P256_SHA256).map(Self).map_err(failed)
    }

    /// The one of a PEM text of somebody else's making: PKCS #8, SEC 1 or PKCS #1, on a curve or RSA.
    pub(super) fn from_foreign_pem(pem: &str) -> Result<Self, KeyError> {
        KeyPair::from_pem(pem).map(Self).map_err(failed)
    }

    /// As PEM, for the roots of the embedded authority: the only keys that are ever written down.
    pub(super) fn to_pem(&self) -> zeroize::Zeroizing<String> {
        self.0.serialize_pem().into()
    }

    /// The public half, as SubjectPublicKeyInfo in DER.
    pub(super) fn public_key(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// A request for a certificate: no subject, the id as one critical SAN, signed with this key.
    pub(super) fn request(&self, id: &SpiffeId) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(failed)?)];
        params.serialize_request(&self.0).and_then(|request| request.pem()).map_err(failed)
    }

    /// For TLS.
    pub(super) fn signing_key(&self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialized_der()));
        rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der).map_err(failed)
    }

    /// For signing certificates.
    pub(super) fn pair(&self) -> &KeyPair {
        &self.0
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey")
    }
}

fn failed(error: impl fmt::Display) -> KeyError {
    KeyError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_never_shows_itself() {
        let key = PrivateKey::generate().unwrap();
        let pem = key.to_pem();
        let secret = pem.lines().nth(1).unwrap();
        let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let shown = format!("{key:?} {:?} {}", key.signing_key().unwrap(), key.request(&id).unwrap());
        assert!(!shown.contains(secret), "{shown}");
        assert!(format!("{key:?}").len() < 20);
        let broken = pem.replace(secret, "AAAA");
        let error = PrivateKey::from_pem(&broken).unwrap_err();
        assert!(!format!("{error} {error:?}").contains(pem.lines().nth(2).unwrap()));
    }

    #[test]
    fn a_request_has_no_subject_and_one_critical_uri() {
        use x509_parser::prelude::*;

        let key = PrivateKey::generate().unwrap();
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let pem = key.request(&id).unwrap();
        let (_, pem) = parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        assert_eq!(info.subject_pki.raw, key.public_key());
        let extensions: Vec<_> = csr.requested_extensions().unwrap().collect();
        let [ParsedExtension::SubjectAlternativeName(san)] = extensions[..] else { panic!("{extensions:?}") };
        assert!(matches!(san.general_names[..], [GeneralName::URI(uri)] if uri == id.as_str()));
    }
}

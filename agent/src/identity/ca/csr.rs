//! Requests for certificates (PKCS #10), as far as an authority believes them: that whoever asks holds the key.
//!
//! Nothing else of a request counts. Whose certificate it is to be comes from elsewhere, and so do its usages.

use x509_parser::prelude::{FromDer as _, X509CertificationRequest, parse_x509_pem};
use x509_parser::x509::SubjectPublicKeyInfo;

/// Ten times what one of ours has.
const MOST_BYTES: usize = 16 * 1024;

const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const CURVES: [&str; 2] = ["1.2.840.10045.3.1.7", "1.3.132.0.34"];

/// Why a request gets no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// It cannot be read.
    #[error("not a request for a certificate: {0}")]
    Malformed(String),
    /// RSA, say, which nobody of the mesh makes and which is slow.
    #[error("the key is not on the curve P-256 or P-384")]
    Key,
    /// Somebody else's public key, perhaps.
    #[error("the request is not signed with the key that it asks a certificate for")]
    Signature,
}

/// The key that a request in PEM asks a certificate for, as SubjectPublicKeyInfo in DER. Whoever made the request holds
/// its other half.
///
/// # Errors
/// When it cannot be read, is not signed with that key, or the key is of a kind that we do not sign for.
pub fn proven_key(pem: &str) -> Result<Vec<u8>, CsrError> {
    let malformed = |why: &dyn std::fmt::Display| CsrError::Malformed(why.to_string());
    if pem.len() > MOST_BYTES {
        return Err(malformed(&"it is too long"));
    }
    let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(|error| malformed(&error))?;
    if !matches!(pem.label.as_str(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
        return Err(malformed(&format!("it is a {:?}", pem.label)));
    }
    proven_key_of_der(&pem.contents)
}

pub(in super::super) fn proven_key_of_der(der: &[u8]) -> Result<Vec<u8>, CsrError> {
    let malformed = |why: &dyn std::fmt::Display| CsrError::Malformed(why.to_string());
    let (rest, request) = X509CertificationRequest::from_der(der).map_err(|error| malformed(&error))?;
    if !rest.is_empty() {
        return Err(malformed(&"something follows it"));
    }
    let key = &request.certification_request_info.subject_pki;
    if !is_on_a_curve(key) {
        return Err(CsrError::Key);
    }
    request.verify_signature().map_err(|_| CsrError::Signature)?;
    Ok(key.raw.to_vec())
}

fn is_on_a_curve(key: &SubjectPublicKeyInfo<'_>) -> bool {
    let curve = key.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
    key.algorithm.algorithm.to_id_string() == EC_PUBLIC_KEY
        && curve.is_some_and(|curve| CURVES.contains(&curve.to_id_string().as_str()))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::identity::key::PrivateKey;

    fn request_of(key: &PrivateKey) -> String {
        key.request(&"spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()).unwrap()
    }

    fn der(pem: &str) -> Vec<u8> {
        STANDARD.decode(pem.lines().filter(|line| !line.starts_with('-')).collect::<String>()).unwrap()
    }

    fn to_pem(label: &str, der: &[u8]) -> String {
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
    }

    #[test]
    fn only_who_holds_the_key_proves_it() {
        const LABEL: &str = "CERTIFICATE REQUEST";
        let (mine, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        assert_eq!(proven_key(&request_of(&mine)), Ok(mine.public_key()));

        // Another's key in a request that we signed.
        let stolen = der(&request_of(&mine));
        let (from, to) = (mine.public_key(), other.public_key());
        let at = stolen.windows(from.len()).position(|window| window == from).unwrap();
        let stolen = [&stolen[..at], &to, &stolen[at + from.len()..]].concat();
        assert_eq!(proven_key(&to_pem(LABEL, &stolen)), Err(CsrError::Signature));

        let whole = der(&request_of(&mine));
        for broken in [&whole[..whole.len() - 1], &[&whole[..], b"x"].concat(), b""] {
            assert!(matches!(proven_key(&to_pem(LABEL, broken)), Err(CsrError::Malformed(_))));
        }
        for text in ["", "hello", &to_pem("CERTIFICATE", &whole), &"x".repeat(MOST_BYTES + 1)] {
            assert!(matches!(proven_key(text), Err(CsrError::Malformed(_))), "{text:.40}");
        }
        let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&ed25519).unwrap();
        assert_eq!(proven_key(&request.pem().unwrap()), Err(CsrError::Key));
    }
}

//! Doors for the fuzz targets (`tests/fuzz`), compiled for them alone.

use super::{ca::csr, crl, x509};

/// A certificate as a peer shows it: whatever is in it, it has an identity or an error.
pub fn certificate(der: &[u8]) {
    if let Ok(facts) = x509::Facts::read(der)
        && let Ok(id) = facts.identity()
    {
        assert_eq!(id.as_str().parse().as_ref(), Ok(&id), "an identity is what its text says");
    }
}

/// A trust bundle.
pub fn bundle(pem: &[u8]) {
    for certificate in x509::certificates_of_pem(pem).unwrap_or_default() {
        let _ = x509::Facts::read(&certificate);
    }
}

/// A revocation list, in PEM or DER.
pub fn revocation_list(bytes: &[u8]) {
    let _ = crl::parse(bytes);
}

/// A request for a certificate as anybody may send it, in PEM or DER.
pub fn certificate_request(bytes: &[u8]) {
    let _ = csr::proven_key_of_der(bytes);
    if let Ok(pem) = std::str::from_utf8(bytes) {
        let _ = csr::proven_key(pem);
    }
}

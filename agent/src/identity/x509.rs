//! What a certificate says, read once. Whether it may be believed is for `trust` to find out.

use std::time::SystemTime;

use data_encoding::HEXLOWER;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::SpiffeId;
use super::clock::from_unix;

/// The fields that anybody here asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Every SAN that is a URI.
    pub(super) uris: Vec<String>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// In hexadecimal digits.
    pub(super) serial: String,
    pub(super) subject: String,
    /// SubjectPublicKeyInfo in DER.
    pub(super) public_key: Vec<u8>,
    /// basicConstraints says so, or keyUsage lets it sign certificates or CRLs.
    pub(super) is_authority: bool,
    /// keyUsage, where there is one, lets it sign a handshake.
    pub(super) signs_handshakes: bool,
}

/// The certificate cannot be read, or is no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct X509Error(pub(super) String);

impl Facts {
    /// Reads a certificate in DER.
    pub(super) fn read(der: &[u8]) -> Result<Self, X509Error> {
        let unreadable = |why: String| X509Error(format!("not an X.509 certificate: {why}"));
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
        if !rest.is_empty() {
            return Err(unreadable("something follows it".into()));
        }
        let mut facts = Self {
            uris: Vec::new(),
            not_before: from_unix(certificate.validity().not_before.timestamp()),
            not_after: from_unix(certificate.validity().not_after.timestamp()),
            serial: HEXLOWER.encode(certificate.raw_serial()),
            subject: certificate.subject().to_string(),
            public_key: certificate.public_key().raw.to_vec(),
            is_authority: false,
            signs_handshakes: true,
        };
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    facts.uris.extend(san.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some((*uri).to_owned()),
                        _ => None,
                    }));
                }
                ParsedExtension::BasicConstraints(constraints) => facts.is_authority |= constraints.ca,
                ParsedExtension::KeyUsage(usage) => {
                    facts.is_authority |= usage.key_cert_sign() || usage.crl_sign();
                    facts.signs_handshakes = usage.digital_signature();
                }
                ParsedExtension::ParseError { error } => return Err(unreadable(error.to_string())),
                _ => {}
            }
        }
        Ok(facts)
    }

    /// The identity of a leaf, by the rules of the X.509-SVID specification: exactly one URI, not an authority's.
    pub(super) fn identity(&self) -> Result<SpiffeId, X509Error> {
        let [uri] = &self.uris[..] else {
            return Err(X509Error(format!(
                "the certificate has {} URIs, and must have one",
                self.uris.len()
            )));
        };
        if self.is_authority {
            return Err(X509Error(format!("{uri} is the certificate of an authority, not of a workload")));
        }
        if !self.signs_handshakes {
            return Err(X509Error(format!("the certificate of {uri} is not for digital signatures")));
        }
        uri.parse()
            .map_err(|error| X509Error(format!("{uri} is not the identity of a service account: {error}")))
    }
}

/// Every certificate of a PEM text, which must have one at least.
pub(super) fn certificates_of_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, X509Error> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| X509Error(format!("not PEM: {error}")))?;
    match certificates.is_empty() {
        true => Err(X509Error("there is no certificate in it".into())),
        false => Ok(certificates),
    }
}

/// Certificates as one PEM text, in their order.
pub(super) fn pem_of_certificates<'a>(
    certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>,
) -> String {
    use base64::Engine as _;
    let mut pem = String::new();
    for certificate in certificates {
        let text = base64::engine::general_purpose::STANDARD.encode(certificate);
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        // RFC 7468, section 2: lines of 64 characters. Base64 is ASCII, so no character is cut.
        for at in (0..text.len()).step_by(64) {
            pem.push_str(&text[at..text.len().min(at + 64)]);
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
    }
    pem
}

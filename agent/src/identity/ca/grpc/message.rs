//! The messages of `istio.v1.auth`, field by field. Written by hand: there are two, and no build needs protoc for them.

use std::collections::BTreeMap;

use prost_types::{Struct, Value, value::Kind};

/// The method.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The key of [`IstioCertificateRequest::metadata`] under which a node names whom it asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateRequest {
    /// PKCS #10 in PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// In seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// What the request says beside it.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateResponse {
    /// PEM: the leaf, the intermediates, and last the roots, which may be several in one text.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// The service, whose only method this is.
pub const SERVICE: &str = "istio.v1.auth.IstioCertificateService";

/// The identity that a request's metadata names; none where there is none, or it is no text.
pub fn impersonated(metadata: &Struct) -> Option<&str> {
    match &metadata.fields.get(IMPERSONATED)?.kind {
        Some(Kind::StringValue(id)) => Some(id),
        _ => None,
    }
}

/// The metadata that names an identity.
pub fn impersonating(id: &str) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(id.to_owned())) };
    Struct { fields: BTreeMap::from([(IMPERSONATED.to_owned(), value)]) }
}

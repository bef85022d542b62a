//! The messages of `istio.v1.auth`, field by field. Written by hand: there are two, and no build needs protoc for them.

use std::collections::BTreeMap;

use prost_types::{Struct, Value, value::Kind};

/// The method.
pub(super) const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The key of [`IstioCertificateRequest::metadata`] under which a node names whom it asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct IstioCertificateRequest {
    /// PKCS #10 in PEM.
    #[prost(string, tag = "1")]
    pub(super) csr: String,
    /// In seconds.
    #[prost(int64, tag = "3")]
    pub(super) validity_duration: i64,
    /// What the request says beside it.
    #[prost(message, optional, tag = "4")]
    pub(super) metadata: Option<Struct>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct IstioCertificateResponse {
    /// PEM: the leaf, the intermediates, and last the roots, which may be several in one text.
    #[prost(string, repeated, tag = "1")]
    pub(super) cert_chain: Vec<String>,
}

/// The metadata that names an identity.
pub(super) fn impersonating(id: &str) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(id.to_owned())) };
    Struct { fields: BTreeMap::from([(IMPERSONATED.to_owned(), value)]) }
}

//! Makes certificates: self-signed roots, and the leaves that they sign.

use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;

use super::super::key::PrivateKey;
use super::super::{SpiffeId, TrustDomain};

/// How far before its making a certificate of ours begins: a node whose clock is five minutes behind must accept it,
/// and one whose clock is five minutes ahead must make certificates that the others accept.
pub const BACKDATE: Duration = Duration::from_secs(10 * 60);

/// A root made just now.
pub(in super::super) struct NewRoot {
    pub(in super::super) pem: String,
    pub(in super::super) key: PrivateKey,
}

/// What signs leaves: a root's certificate and its key.
pub(in super::super) struct Signer {
    certificate: CertificateDer<'static>,
    key: PrivateKey,
}

/// The certificate could not be made.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot make a certificate: {0}")]
pub struct SignError(String);

/// Makes a root of the trust domain, valid from a little before `now`. Each has a subject of its own: two roots of one
/// name would make CRLs and error messages ambiguous during a rotation.
pub(in super::super) fn new_root(
    domain: &TrustDomain,
    number: u32,
    now: SystemTime,
    life: Duration,
) -> Result<NewRoot, SignError> {
    let key = PrivateKey::generate().map_err(failed)?;
    let serial = serial()?;
    let mut params = validity(now, now + life);
    params.distinguished_name.push(DnType::OrganizationName, domain.as_str());
    let tag = HEXLOWER.encode(&serial[..4]);
    params.distinguished_name.push(DnType::CommonName, format!("Undermesh root {number} {tag}"));
    params.subject_alt_names = vec![SanType::URI(domain.id().as_str().try_into().map_err(failed)?)];
    // Room for one intermediate authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let certificate = params.self_signed(key.pair()).map_err(failed)?;
    Ok(NewRoot { pem: certificate.pem(), key })
}

impl Signer {
    /// Puts together what belongs together.
    pub(in super::super) fn new(certificate: CertificateDer<'static>, key: PrivateKey) -> Self {
        Self { certificate, key }
    }

    /// Signs a leaf for the public key (SubjectPublicKeyInfo in DER), valid until `not_after`.
    pub(in super::super) fn leaf(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        now: SystemTime,
        not_after: SystemTime,
    ) -> Result<CertificateDer<'static>, SignError> {
        let mut params = validity(now, not_after);
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(failed)?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.end_entity(params, public_key)
    }

    /// Signs the certificate of a server with these DNS names or addresses, which no mesh peer takes for a workload's:
    /// it has no SPIFFE id.
    pub(in super::super) fn server(
        &self,
        names: &[String],
        public_key: &[u8],
        now: SystemTime,
        not_after: SystemTime,
    ) -> Result<CertificateDer<'static>, SignError> {
        let mut params = validity(now, not_after);
        params.subject_alt_names = CertificateParams::new(names.to_vec()).map_err(failed)?.subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.end_entity(params, public_key)
    }

    fn end_entity(
        &self,
        mut params: CertificateParams,
        public_key: &[u8],
    ) -> Result<CertificateDer<'static>, SignError> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, self.key.pair()).map_err(failed)?;
        // Says that it is no authority, and makes a subject key identifier.
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&serial()?));
        let key = SubjectPublicKeyInfo::from_der(public_key).map_err(failed)?;
        params.signed_by(&key, &issuer).map(Into::into).map_err(failed)
    }
}

/// No subject, which makes the SAN critical, and an empty rest.
fn validity(now: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now.checked_sub(BACKDATE).unwrap_or(now).into();
    params.not_after = not_after.into();
    params
}

/// Sixteen random bytes that make a positive number: no two certificates share one (RFC 5280, section 4.1.2.2).
fn serial() -> Result<[u8; 16], SignError> {
    let mut serial = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut serial)
        .map_err(|_| SignError("no random bytes".into()))?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

fn failed(error: impl std::fmt::Display) -> SignError {
    SignError(error.to_string())
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::*;

    use super::*;
    use crate::identity::x509;

    #[test]
    fn leaf_and_root_have_what_the_wire_asks_for() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let root = new_root(&"cluster.local".parse().unwrap(), 7, now, Duration::from_secs(86_400)).unwrap();
        let key = PrivateKey::generate().unwrap();
        let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let certificate = x509::certificates_of_pem(root.pem.as_bytes()).unwrap().remove(0);
        let signer = Signer::new(certificate.clone(), root.key);
        let leaf = signer.leaf(&id, &key.public_key(), now, now + Duration::from_secs(60)).unwrap();

        let (_, root) = X509Certificate::from_der(&certificate).unwrap();
        let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
        let names = |der: &X509Certificate<'_>| {
            let san = der.subject_alternative_name().unwrap().unwrap();
            format!("{} {:?}", if san.critical { "critical" } else { "plain" }, san.value.general_names)
        };
        assert_eq!(names(&leaf), r#"critical [URI("spiffe://cluster.local/ns/shop/sa/web")]"#);
        assert_eq!(names(&root), r#"plain [URI("spiffe://cluster.local")]"#);
        assert_eq!(leaf.subject().iter().count(), 0);
        assert!(root.subject().to_string().starts_with("O=cluster.local, CN=Undermesh root 7 "));
        assert_eq!(leaf.issuer(), root.subject());
        assert!(leaf.verify_signature_algorithm_is_p256());
        let usage = leaf.key_usage().unwrap().unwrap().value;
        assert_eq!(usage.to_string(), "Digital Signature");
        let purpose = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(purpose.server_auth && purpose.client_auth);
        assert!(!leaf.is_ca() && root.is_ca());
        assert_eq!(root.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(1));
        let key_id = |der: &X509Certificate<'_>, authority: bool| {
            der.extensions().iter().find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) if !authority => Some(id.0.to_vec()),
                ParsedExtension::AuthorityKeyIdentifier(id) if authority => {
                    id.key_identifier.as_ref().map(|id| id.0.to_vec())
                }
                _ => None,
            })
        };
        assert!(key_id(&leaf, false).is_some());
        assert_eq!(key_id(&leaf, true), key_id(&root, false));
        let (not_before, not_after) =
            (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
        assert_eq!((not_before, not_after), (1_800_000_000 - 600, 1_800_000_060));
        assert_ne!(leaf.raw_serial(), root.raw_serial());
    }

    trait IsP256 {
        fn verify_signature_algorithm_is_p256(&self) -> bool;
    }

    impl IsP256 for X509Certificate<'_> {
        fn verify_signature_algorithm_is_p256(&self) -> bool {
            let key = &self.public_key().algorithm;
            let curve = key.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
            curve.is_some_and(|curve| curve.to_id_string() == "1.2.840.10045.3.1.7")
        }
    }
}

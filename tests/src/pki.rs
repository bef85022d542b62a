//! Certificates that tests make by themselves: right ones, of the lab's own authority, and wrong ones of every kind.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::lab::Lab;
use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};

/// Who every pod of the namespace `shop` is.
pub const SHOP_ID: &str = "spiffe://cluster.local/ns/shop/sa/default";

const HOUR: i64 = 3600;

/// Somebody who signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

/// What a certificate is to say.
#[derive(Clone, Copy)]
pub struct Leaf<'a> {
    /// The URI that it is for.
    pub id: &'a str,
    /// Hours from now.
    pub valid: (i64, i64),
}

impl Leaf<'_> {
    /// Whom the mesh lets in, if the mesh's own authority signs it.
    pub const GOOD: Leaf<'static> = Leaf { id: SHOP_ID, valid: (-1, 24) };
}

impl Authority {
    /// The one that the lab's agents believe.
    pub fn of_lab(lab: &Lab) -> Result<Self> {
        Self::of_folder(lab, "ca")
    }

    /// Another one in a folder of the lab, made by `undermesh ca init`.
    pub fn of_folder(lab: &Lab, folder: &str) -> Result<Self> {
        Self::read(&lab.dir().join(folder))
    }

    /// One whose folder `undermesh ca init` has made.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| fs::read_to_string(folder.join(name));
        let root = read("root-1.pem")?;
        let key = KeyPair::from_pem(&read("root-1.key.pem")?)?;
        Ok(Self { issuer: Issuer::from_ca_cert_pem(&root, key)?, root })
    }

    /// One that nobody knows, which says that it is of this trust domain.
    pub fn stranger(domain: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "somebody else's root");
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").try_into()?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    /// Its own certificate, in PEM.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// A certificate with its chain and its key, in one file of this name in the folder. By the name it can be revoked.
    pub fn sign(&self, folder: &Path, name: &str, leaf: Leaf<'_>) -> Result<PathBuf> {
        let mut params = workload(leaf.id)?;
        params.not_before = hours_from_now(leaf.valid.0).into();
        params.not_after = hours_from_now(leaf.valid.1).into();
        params.serial_number = Some(serial(name));
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        let file = folder.join(format!("{name}.pem"));
        fs::write(&file, certificate + &self.root + &key.serialize_pem())?;
        Ok(file)
    }

    /// A list in PEM that takes the certificates of these names back, for a day.
    pub fn revoke(&self, names: &[&str]) -> Result<String> {
        let revoked = names.iter().map(|name| RevokedCertParams {
            serial_number: serial(name),
            revocation_time: hours_from_now(-1).into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: hours_from_now(-1).into(),
            next_update: hours_from_now(24).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }

    /// A certificate for the key of a request (PKCS #10 in PEM), valid from a minute ago, and the root.
    pub fn sign_request(&self, csr: &str, id: &str, life: Duration) -> Result<Vec<String>> {
        let mut request = CertificateSigningRequestParams::from_pem(csr)?;
        request.params = workload(id)?;
        request.params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        request.params.not_after = (SystemTime::now() + life).into();
        Ok(vec![request.signed_by(&self.issuer)?.pem(), self.root.clone()])
    }

    /// A certificate for a server of this name or address, and its key, in PEM.
    pub fn server(&self, name: &str) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([name.to_owned()])?.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// A request (PKCS #10 in PEM) for a certificate, and says nothing but its own key.
pub fn request() -> Result<String> {
    let key = KeyPair::generate()?;
    Ok(CertificateParams::default().serialize_request(&key)?.pem()?)
}

/// A name of at most 20 bytes, as a number (RFC 5280, section 4.1.2.2).
fn serial(name: &str) -> SerialNumber {
    SerialNumber::from_slice(name.as_bytes())
}

/// What every certificate of a workload has.
fn workload(id: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn hours_from_now(hours: i64) -> SystemTime {
    let distance = Duration::from_secs((hours * HOUR).unsigned_abs());
    if hours < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
}

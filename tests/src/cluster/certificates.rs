//! The cluster's authority, what it signs, and the kubeconfigs that carry it.
//!
//! Made anew for every cluster and gone with it, so keys lie about as plain files. It knows who the parts of a
//! cluster are by their Kubernetes names, and nothing of where they run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde_json::json;

/// Who signs, and the folder where the results go.
pub(super) struct Authority {
    dir: PathBuf,
    name: &'static str,
    issuer: Issuer<'static, KeyPair>,
}

/// Who a certificate is for.
pub(super) struct Subject<'a> {
    /// The file's name, without its ending.
    pub(super) file: &'a str,
    /// The user, as RBAC names it.
    pub(super) user: &'a str,
    /// The user's group.
    pub(super) group: &'a str,
    /// The names and addresses at which it serves.
    pub(super) names: Vec<String>,
}

/// A certificate's file and its key's.
pub(super) struct Files {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

impl Authority {
    /// A new root, in files of this name.
    pub(super) fn create(dir: &Path, name: &'static str) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let files = files(dir, name);
        fs::write(&files.certificate, params.self_signed(&key)?.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(Self { dir: dir.to_owned(), name, issuer: Issuer::new(params, key) })
    }

    /// Its own certificate and key.
    pub(super) fn files(&self) -> Files {
        files(&self.dir, self.name)
    }

    /// A certificate with which one can serve and call.
    pub(super) fn sign(&self, subject: &Subject<'_>) -> Result<Files> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(subject.names.clone())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.user);
        if !subject.group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, subject.group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let files = files(&self.dir, subject.file);
        fs::write(&files.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }

    /// A kubeconfig of this user, for a server at this URL. It carries what it names, so it can be copied anywhere.
    pub(super) fn kubeconfig(&self, subject: &Subject<'_>, server: &str) -> Result<PathBuf> {
        let signed = self.sign(subject)?;
        let data = |path: &Path| -> Result<String> { Ok(BASE64.encode(fs::read(path)?)) };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "cluster",
            "clusters": [{ "name": "cluster", "cluster": {
                "server": server, "certificate-authority-data": data(&self.files().certificate)? } }],
            "users": [{ "name": subject.user, "user": {
                "client-certificate-data": data(&signed.certificate)?,
                "client-key-data": data(&signed.key)? } }],
            "contexts": [{ "name": "cluster", "context": { "cluster": "cluster", "user": subject.user } }],
        });
        let path = self.dir.join(format!("{}.kubeconfig", subject.file));
        fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(path)
    }
}

/// The files of the key with which the tokens of service accounts are signed.
pub(super) struct TokenKey {
    pub(super) private: PathBuf,
    pub(super) public: PathBuf,
}

impl TokenKey {
    /// A new one.
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let files = Self { private: dir.join("tokens.key"), public: dir.join("tokens.pub") };
        let key = KeyPair::generate()?;
        fs::write(&files.private, key.serialize_pem())?;
        fs::write(&files.public, key.public_key_pem())?;
        Ok(files)
    }
}

fn files(dir: &Path, name: &str) -> Files {
    Files { certificate: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) }
}

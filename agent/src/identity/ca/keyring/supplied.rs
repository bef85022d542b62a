//! An authority that an operator supplies: an intermediate, or a root, with what lies between it and the roots.

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;

use super::super::super::svid::Svid;
use super::super::super::x509::Facts;
use super::super::super::{SpiffeId, TrustDomain};
use super::{Files, Issued, KeyringError, PrivateKey, Signer, certificates, key, malformed};

pub(super) const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";

pub(super) struct Supplied {
    pub(super) signer: Signer,
    pub(super) certificate: CertificateDer<'static>,
    /// The certificate and those above it, without the roots.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// When the first of the chain expires.
    pub(super) expires: SystemTime,
}

impl Supplied {
    pub(super) fn read(files: &Files, domain: &TrustDomain, now: SystemTime) -> Result<Self, KeyringError> {
        let certificate = certificates(files, CERTIFICATE)?.swap_remove(0);
        let roots = certificates(files, ROOTS)?;
        let above = match files.contains_key(CHAIN) {
            true => certificates(files, CHAIN)?,
            false => Vec::new(),
        };
        let mut chain: Vec<CertificateDer<'static>> = Vec::new();
        for link in std::iter::once(&certificate).chain(&above) {
            // Some tools put the certificate itself or the root into the chain, some do not.
            if !roots.contains(link) && !chain.contains(link) {
                chain.push(link.clone());
            }
        }
        let facts = Facts::read(&certificate).map_err(|error| malformed(CERTIFICATE, error))?;
        if !facts.is_authority {
            return Err(malformed(CERTIFICATE, "it is not the certificate of an authority"));
        }
        let mut expires = facts.not_after;
        for link in &chain {
            expires = expires.min(Facts::read(link).map_err(|error| malformed(CHAIN, error))?.not_after);
        }
        let signer = Signer::new(certificate.clone(), key(files, KEY, &certificate)?);
        let supplied = Self { signer, certificate, chain, roots, expires };
        supplied.check(domain, now)?;
        Ok(supplied)
    }

    /// Signs a leaf for nobody, and looks at it as an agent will look at those that it gets.
    fn check(&self, domain: &TrustDomain, now: SystemTime) -> Result<(), KeyringError> {
        let wrong = |why: &dyn std::fmt::Display| malformed(CERTIFICATE, why);
        let nobody = SpiffeId::new(domain, "none", "none").map_err(|error| wrong(&error))?;
        let key = PrivateKey::generate().map_err(|error| wrong(&error))?;
        let until = now + Duration::from_secs(60);
        let leaf = self.signer.leaf(&nobody, &key.public_key(), now, until).map_err(|error| wrong(&error))?;
        let chain = [&[leaf], &self.chain[..]].concat();
        let issued = Issued { chain, roots: self.roots.clone() };
        Svid::accept(&nobody, &key, issued, now).map_err(|error| wrong(&error))?;
        Ok(())
    }
}

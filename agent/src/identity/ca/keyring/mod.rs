//! The authority of a cluster: roots or an intermediate with its key, as files by name, wherever they are kept.
//!
//! Nothing here knows where the files come from or go to: whoever does brings all of them, and gets all of them when they
//! are to be others. Those of an authority of our own making are the ones that the directory authority has, so that
//! either can become the other; those of an operator's own are named as Istio has them in its Secret `cacerts`.

mod supplied;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::super::key::{KeyError, PrivateKey};
use super::super::x509::{self, Facts};
use super::super::{SpiffeId, TrustDomain};
use super::directory::InitOptions;
use super::sign::{self, SignError, Signer};
use super::state::{CaState, Phase, RotationUnderWay, StateError, whole_seconds};
use super::{CaError, Issued};
use supplied::Supplied;

/// What an authority consists of, by name. Wiped when dropped.
pub type Files = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// The file that says which roots there are.
pub const STATE: &str = "state.json";

/// An authority that can sign.
pub struct Keyring {
    files: Files,
    kind: Kind,
}

enum Kind {
    Generated { state: CaState, roots: Vec<Root> },
    Supplied(Box<Supplied>),
}

struct Root {
    number: u32,
    certificate: CertificateDer<'static>,
    /// `None` for one that does not sign any more.
    signer: Option<Signer>,
}

/// What signs now.
struct Signing<'a> {
    signer: &'a Signer,
    certificate: &'a CertificateDer<'static>,
    /// What lies between it and a root, itself included unless it is one.
    chain: &'a [CertificateDer<'static>],
    expires: SystemTime,
}

/// A certificate for a server, with its key.
#[derive(Clone, Debug)]
pub struct ServerCertificate {
    /// For rustls: the chain without the root, and the key.
    pub key: Arc<CertifiedKey>,
    /// When it was made.
    pub made: SystemTime,
    /// When it expires.
    pub not_after: SystemTime,
    /// What has signed it.
    pub issuer: CertificateDer<'static>,
}

/// Why the files are no authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    /// Neither ours nor an operator's.
    #[error(
        "there is neither `state.json` nor `ca-cert.pem` among the keys: {0}; remove all of them for a new authority"
    )]
    Unknown(String),
    /// Both: whose roots are to count?
    #[error(
        "there are both `state.json` and `ca-cert.pem`; keep either what was generated or what you supply"
    )]
    Both,
    /// One is not there.
    #[error("`{0}` is missing")]
    Missing(String),
    /// One cannot be used.
    #[error("`{0}`: {1}")]
    Malformed(String, String),
    /// It speaks for others.
    #[error("it is the authority of the trust domain {found}, and --trust-domain is {wanted}")]
    TrustDomain {
        /// Its own.
        found: TrustDomain,
        /// The one that was asked for.
        wanted: TrustDomain,
    },
}

/// Why there is no new root.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RotateError {
    /// The one before has not come into use yet.
    #[error(transparent)]
    UnderWay(#[from] RotationUnderWay),
    /// It is not ours to make.
    #[error("the authority's certificate was supplied; whoever supplies it replaces it")]
    Supplied,
    /// It could not be made.
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl Keyring {
    /// The files of a new authority, whose first root signs at once.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn generate(options: &InitOptions, now: SystemTime) -> Result<Files, SignError> {
        let now = whole_seconds(now);
        let domain = options.trust_domain.clone();
        let state = CaState::new(domain.clone(), options.leaf_life, now, now + options.root_life);
        let mut files = Files::new();
        add_root(&mut files, &domain, 1, now, options.root_life)?;
        files.insert(STATE.into(), state.to_text().into_bytes().into());
        Ok(files)
    }

    /// Reads all that is needed to sign, and checks that it fits together.
    ///
    /// # Errors
    /// When it does not, with the name of the file.
    pub fn read(files: Files, domain: &TrustDomain, now: SystemTime) -> Result<Self, KeyringError> {
        let kind = match (files.contains_key(STATE), files.contains_key(supplied::CERTIFICATE)) {
            (true, true) => return Err(KeyringError::Both),
            (true, false) => read_generated(&files, domain, now)?,
            (false, true) => Kind::Supplied(Box::new(Supplied::read(&files, domain, now)?)),
            (false, false) => {
                let names: Vec<_> = files.keys().map(String::as_str).collect();
                return Err(KeyringError::Unknown(names.join(", ")));
            }
        };
        Ok(Self { files, kind })
    }

    /// What it was read from.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// True if an operator supplied it.
    pub fn is_supplied(&self) -> bool {
        matches!(self.kind, Kind::Supplied(_))
    }

    /// Signs a leaf for the public key (SubjectPublicKeyInfo in DER), which lives as long as is asked for and no longer
    /// than what signs it.
    ///
    /// # Errors
    /// When the id is of another trust domain, or what signs has expired.
    pub fn sign(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        validity: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        if let Kind::Generated { state, .. } = &self.kind
            && !id.is_of(&state.trust_domain)
        {
            return Err(CaError::Refused(format!("{id} is not of the trust domain {}", state.trust_domain)));
        }
        let signing = self.signing(now)?;
        let not_after = self.not_after(&signing, validity, now)?;
        let leaf = signing.signer.leaf(id, public_key, now, not_after).map_err(unavailable)?;
        let mut chain = vec![leaf];
        chain.extend_from_slice(signing.chain);
        Ok(Issued { chain, roots: self.trusted(now) })
    }

    /// A certificate and a new key for a server of these names or addresses.
    ///
    /// # Errors
    /// When what signs has expired, or a name cannot be one.
    pub fn server(
        &self,
        names: &[String],
        validity: Duration,
        now: SystemTime,
    ) -> Result<ServerCertificate, CaError> {
        let signing = self.signing(now)?;
        let not_after = self.not_after(&signing, validity, now)?;
        let key = PrivateKey::generate().map_err(unavailable)?;
        let leaf = signing.signer.server(names, &key.public_key(), now, not_after).map_err(unavailable)?;
        let mut chain = vec![leaf];
        chain.extend_from_slice(signing.chain);
        let key = CertifiedKey::new(chain, key.signing_key().map_err(unavailable::<KeyError>)?);
        Ok(ServerCertificate {
            key: Arc::new(key),
            made: now,
            not_after,
            issuer: signing.certificate.clone(),
        })
    }

    /// The certificate that signs now.
    pub fn issuer(&self, now: SystemTime) -> Option<&CertificateDer<'static>> {
        self.signing(now).ok().map(|signing| signing.certificate)
    }

    /// When the certificate that signs now expires.
    pub fn expires(&self, now: SystemTime) -> SystemTime {
        match &self.kind {
            Kind::Generated { state, .. } => state.signing(now).expires,
            Kind::Supplied(supplied) => supplied.expires,
        }
    }

    /// The roots to be trusted now.
    pub fn trusted(&self, now: SystemTime) -> Vec<CertificateDer<'static>> {
        match &self.kind {
            Kind::Generated { state, roots } => {
                let trusted = state.phases(now).filter(|(_, phase)| *phase != Phase::Dropped);
                let certificate = |number: u32| roots.iter().find(|root| root.number == number);
                trusted
                    .filter_map(|(root, _)| certificate(root.number))
                    .map(|root| root.certificate.clone())
                    .collect()
            }
            Kind::Supplied(supplied) => supplied.roots.clone(),
        }
    }

    /// The same as one PEM text.
    pub fn bundle(&self, now: SystemTime) -> String {
        pem(&self.trusted(now))
    }

    /// The files with a new root besides, which signs after the overlap; and without those that are dropped.
    ///
    /// # Errors
    /// When another rotation is under way, or the roots are an operator's.
    pub fn rotated(
        &self,
        overlap: Duration,
        root_life: Duration,
        now: SystemTime,
    ) -> Result<Files, RotateError> {
        let Kind::Generated { state, .. } = &self.kind else { return Err(RotateError::Supplied) };
        let (mut state, now) = (state.clone(), whole_seconds(now));
        let dropped = state.prune(now);
        let number = state.rotate(now, overlap, now + root_life)?;
        let mut files = self.without(&dropped);
        add_root(&mut files, &state.trust_domain, number, now, root_life)?;
        files.insert(STATE.into(), state.to_text().into_bytes().into());
        Ok(files)
    }

    /// The files without roots that are dropped; none if there are no such.
    pub fn pruned(&self, now: SystemTime) -> Option<Files> {
        let Kind::Generated { state, .. } = &self.kind else { return None };
        let mut state = state.clone();
        let dropped = state.prune(now);
        if dropped.is_empty() {
            return None;
        }
        let mut files = self.without(&dropped);
        files.insert(STATE.into(), state.to_text().into_bytes().into());
        Some(files)
    }

    /// True if nine tenths of the signing root's life are over and nobody has done anything about it: an authority
    /// that expires takes the mesh with it.
    pub fn is_ageing(&self, now: SystemTime) -> bool {
        let Kind::Generated { state, .. } = &self.kind else { return false };
        let signing = state.signing(now);
        let life = signing.expires.duration_since(signing.signs_from).unwrap_or_default();
        let left = signing.expires.duration_since(now).unwrap_or_default();
        !self.is_rotating(now) && left < life / 10
    }

    /// True while a new root waits to sign.
    pub fn is_rotating(&self, now: SystemTime) -> bool {
        match &self.kind {
            Kind::Generated { state, .. } => state.roots.iter().any(|root| root.signs_from > now),
            Kind::Supplied(_) => false,
        }
    }

    /// True if the other is the same authority after further rotations: this one comes from a backup.
    pub fn is_older_than(&self, other: &Self) -> bool {
        let (Kind::Generated { roots: mine, .. }, Kind::Generated { roots: others, .. }) =
            (&self.kind, &other.kind)
        else {
            return false;
        };
        let latest = |roots: &[Root]| roots.iter().map(|root| root.number).max();
        let related = mine.iter().any(|root| others.iter().any(|o| o.certificate == root.certificate));
        related && latest(mine) < latest(others)
    }

    fn signing(&self, now: SystemTime) -> Result<Signing<'_>, CaError> {
        match &self.kind {
            Kind::Generated { state, roots } => {
                let due = state.signing(now);
                let root = roots.iter().find(|root| root.number == due.number);
                let signer = root.and_then(|root| Some((root, root.signer.as_ref()?)));
                let Some((root, signer)) = signer else {
                    return Err(unavailable(format!("the key of root {} is not there", due.number)));
                };
                Ok(Signing { signer, certificate: &root.certificate, chain: &[], expires: due.expires })
            }
            Kind::Supplied(supplied) => Ok(Signing {
                signer: &supplied.signer,
                certificate: &supplied.certificate,
                chain: &supplied.chain,
                expires: supplied.expires,
            }),
        }
    }

    /// When what is signed now expires.
    fn not_after(
        &self,
        signing: &Signing<'_>,
        validity: Duration,
        now: SystemTime,
    ) -> Result<SystemTime, CaError> {
        let longest = match &self.kind {
            // Longer, and a leaf could outlive its root's place among those that are trusted.
            Kind::Generated { state, .. } => state.leaf_life,
            Kind::Supplied(_) => validity,
        };
        let not_after = (now + validity.min(longest)).min(signing.expires);
        match not_after > now {
            true => Ok(not_after),
            false => Err(unavailable("the certificate that signs has expired; rotate or replace it")),
        }
    }

    fn without(&self, dropped: &[u32]) -> Files {
        let names: Vec<_> =
            dropped.iter().flat_map(|number| [certificate_name(*number), key_name(*number)]).collect();
        self.files
            .iter()
            .filter(|(name, _)| !names.contains(name))
            .map(|(name, content)| (name.clone(), content.clone()))
            .collect()
    }
}

/// Certificates as one PEM text, in their order.
pub fn pem(certificates: &[CertificateDer<'static>]) -> String {
    x509::pem_of_certificates(certificates)
}

fn read_generated(files: &Files, domain: &TrustDomain, now: SystemTime) -> Result<Kind, KeyringError> {
    let state = CaState::parse(file(files, STATE)?)
        .map_err(|error: StateError| KeyringError::Malformed(STATE.into(), error.to_string()))?;
    if state.trust_domain != *domain {
        return Err(KeyringError::TrustDomain { found: state.trust_domain, wanted: domain.clone() });
    }
    let mut roots = Vec::new();
    for (root, phase) in state.phases(now) {
        let name = certificate_name(root.number);
        let [certificate] = &certificates(files, &name)?[..] else {
            return Err(KeyringError::Malformed(name, "it must have one certificate".into()));
        };
        let signer = match phase {
            Phase::Next | Phase::Signing => {
                let name = key_name(root.number);
                Some(Signer::new(certificate.clone(), key(files, &name, certificate)?))
            }
            Phase::Retiring | Phase::Dropped => None,
        };
        roots.push(Root { number: root.number, certificate: certificate.clone(), signer });
    }
    Ok(Kind::Generated { state, roots })
}

fn add_root(
    files: &mut Files,
    domain: &TrustDomain,
    number: u32,
    now: SystemTime,
    life: Duration,
) -> Result<(), SignError> {
    let root = sign::new_root(domain, number, now, life)?;
    files.insert(key_name(number), root.key.to_pem().as_bytes().to_vec().into());
    files.insert(certificate_name(number), root.pem.into_bytes().into());
    Ok(())
}

fn certificate_name(number: u32) -> String {
    format!("root-{number}.pem")
}

fn key_name(number: u32) -> String {
    format!("root-{number}.key.pem")
}

fn file<'a>(files: &'a Files, name: &str) -> Result<&'a [u8], KeyringError> {
    files.get(name).map(|content| content.as_slice()).ok_or_else(|| KeyringError::Missing(name.into()))
}

fn certificates(files: &Files, name: &str) -> Result<Vec<CertificateDer<'static>>, KeyringError> {
    x509::certificates_of_pem(file(files, name)?).map_err(|error| malformed(name, error))
}

/// The key of a certificate.
fn key(files: &Files, name: &str, certificate: &CertificateDer<'static>) -> Result<PrivateKey, KeyringError> {
    let text = std::str::from_utf8(file(files, name)?).map_err(|error| malformed(name, error))?;
    let key = PrivateKey::from_foreign_pem(text).map_err(|error| malformed(name, error))?;
    let facts = Facts::read(certificate).map_err(|error| malformed(name, error))?;
    match facts.public_key == key.public_key() {
        true => Ok(key),
        false => Err(malformed(name, "it is not the key of the certificate that it comes with")),
    }
}

fn malformed(name: &str, why: impl fmt::Display) -> KeyringError {
    KeyringError::Malformed(name.into(), why.to_string())
}

fn unavailable<E: fmt::Display>(error: E) -> CaError {
    CaError::Unavailable(error.to_string())
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Keyring");
        match &self.kind {
            Kind::Generated { state, .. } => shown.field("state", state),
            Kind::Supplied(supplied) => shown.field("expires", &supplied.expires),
        };
        shown.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

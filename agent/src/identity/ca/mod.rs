//! Certificate authorities: whoever signs the certificates of this node's service accounts.
//!
//! An authority answers requests and says which roots it wants trusted. It does not know when to be asked, nor what
//! becomes of the answer: `store` does, and believes none of it unchecked.

pub mod csr;
pub mod directory;
mod files;
pub mod grpc;
pub mod keyring;
pub(super) mod sign;
mod state;

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use rustls_pki_types::CertificateDer;

use super::SpiffeId;
pub(super) use files::{Stamp, stamp};

/// A certificate authority. Its two implementations are [`directory::DirectoryCa`] and [`grpc::GrpcCa`].
pub trait CertificateAuthority: fmt::Debug + Send + Sync {
    /// Asks for one certificate. May take as long as it likes: the caller has a time-out.
    fn issue<'a>(&'a self, request: &'a CertificateRequest) -> IssueFuture<'a>;

    /// The roots that it wants trusted for its own trust domain. Called every few seconds, so it must be cheap and not
    /// wait for a network.
    ///
    /// # Errors
    /// When they cannot be known just now; those known before stay in force.
    fn roots(&self) -> Result<Roots, CaError>;

    /// How far before the moment of signing it dates certificates, if that is known: what tells a certificate made by
    /// a clock ahead of ours from one made a while ago.
    fn backdates_by(&self) -> Option<Duration> {
        None
    }
}

/// What [`CertificateAuthority::issue`] returns.
pub type IssueFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, CaError>> + Send + 'a>>;

/// A request for a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateRequest {
    /// Whose it is to be.
    pub id: SpiffeId,
    /// PKCS #10 in PEM, signed by the key that it asks a certificate for.
    pub csr: String,
    /// The same key's public half, as SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// How long it should live; the authority may give less.
    pub validity: Duration,
}

/// An authority's answer, not checked yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The leaf, then the intermediates up to the root, which is not in it.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that came with it: one of them has signed the last of the chain.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Which roots an authority wants trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// These and no others.
    These(Vec<CertificateDer<'static>>),
    /// These, and those that came with the certificates in use.
    AndThoseIssued(Vec<CertificateDer<'static>>),
}

/// Why there is no certificate. The renewals go on trying in each case; the kinds tell people where to look.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// It does not answer, or cannot work.
    #[error("the certificate authority is not available: {0}")]
    Unavailable(String),
    /// It does not want to.
    #[error("the certificate authority refuses: {0}")]
    Refused(String),
    /// What it sent must not be used.
    #[error("the certificate authority's answer is not usable: {0}")]
    BadAnswer(String),
}

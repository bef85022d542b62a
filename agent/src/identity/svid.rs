//! A certificate in use, with its key: what a service account shows to its peers.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;

use super::SpiffeId;
use super::ca::Issued;
use super::clock::rfc3339;
use super::key::{KeyError, PrivateKey};
use super::trust::{Chain, DomainRoots, Role};
use super::x509::{Facts, X509Error};

/// An X.509-SVID of one service account. Nothing in it changes; renewal makes another one.
pub struct Svid {
    /// Whose it is.
    pub id: SpiffeId,
    /// The chain, leaf first and root last, and the key, for rustls.
    pub key: Arc<CertifiedKey>,
    /// From when on it is valid.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
    /// Its serial number in hexadecimal digits.
    pub serial: String,
    /// The certificate that signed it.
    pub issuer: Signatory,
    /// The root that it leads to; the issuer itself where there is no intermediate.
    pub root: Signatory,
    /// When it was received, by our clock.
    pub received: SystemTime,
    /// The roots that came with it.
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// An authority's certificate, as far as it matters to those below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signatory {
    /// Its subject.
    pub subject: String,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

/// Why an authority's answer is not used.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it has no certificate")]
    Empty,
    #[error("it has no root")]
    NoRoot,
    #[error(transparent)]
    Malformed(#[from] X509Error),
    #[error("the certificate is for {given}, and one for {asked} was asked for")]
    WrongIdentity { asked: SpiffeId, given: SpiffeId },
    #[error("the certificate is for another key than ours")]
    WrongKey,
    #[error("the certificate of {id} expired at {at}, and it is {now}")]
    Expired { id: SpiffeId, at: String, now: String },
    #[error("the chain of {id} does not lead to a root that came with it: {why}")]
    Untrusted { id: SpiffeId, why: String },
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl Svid {
    /// Checks what an authority has answered, and takes it into use. A certificate that begins in our future is taken:
    /// it is our clock that is behind, and the peers will find it valid.
    pub(super) fn accept(
        id: &SpiffeId,
        key: &PrivateKey,
        issued: Issued,
        now: SystemTime,
    ) -> Result<Self, Unusable> {
        let (leaf, intermediates) = issued.chain.split_first().ok_or(Unusable::Empty)?;
        let facts = Facts::read(leaf)?;
        let given = facts.identity()?;
        if given != *id {
            return Err(Unusable::WrongIdentity { asked: id.clone(), given });
        }
        if facts.public_key != key.public_key() {
            return Err(Unusable::WrongKey);
        }
        if facts.not_after <= now {
            return Err(Unusable::Expired { id: given, at: rfc3339(facts.not_after), now: rfc3339(now) });
        }
        let roots = DomainRoots::read(&issued.roots)?;
        if roots.certificates.is_empty() {
            return Err(Unusable::NoRoot);
        }
        let mut valid_at = now.max(facts.not_before);
        for intermediate in intermediates {
            valid_at = valid_at.max(Facts::read(intermediate)?.not_before);
        }
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        let root = [Role::Server, Role::Client]
            .map(|role| roots.verify(Chain { leaf, intermediates }, role, valid_at, algorithms, None))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Unusable::Untrusted { id: given.clone(), why: error.to_string() })?[0];
        let signatory =
            |facts: &Facts| Signatory { subject: facts.subject.clone(), not_after: facts.not_after };
        let root_signatory = signatory(&roots.facts[root]);
        let issuer = match intermediates.first() {
            Some(intermediate) => signatory(&Facts::read(intermediate)?),
            None => root_signatory.clone(),
        };
        let mut chain = issued.chain.clone();
        chain.push(roots.certificates[root].clone());
        Ok(Self {
            id: given,
            key: Arc::new(CertifiedKey::new(chain, key.signing_key()?)),
            not_before: facts.not_before,
            not_after: facts.not_after,
            serial: facts.serial,
            issuer,
            root: root_signatory,
            received: now,
            roots: issued.roots,
        })
    }

    /// The chain, leaf first and root last.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// What is left of its life.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// How far our clock was behind its beginning when it came.
    pub fn skew(&self) -> Option<Duration> {
        self.not_before.duration_since(self.received).ok().filter(|skew| !skew.is_zero())
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &rfc3339(self.not_after))
            .finish_non_exhaustive()
    }
}

//! Certificate revocation lists: which certificates their issuers have taken back.

use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject as _;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use super::clock::from_unix;
use super::x509::X509Error;

/// What revocation lists count for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CrlMode {
    /// Every certificate of a peer's chain must be covered by a list of its issuer that has not expired. Where the list
    /// is missing, expired or not readable, the peer is refused.
    Require,
    /// What a list names is refused, also if the list has expired. A certificate that no list covers is let in.
    #[default]
    Prefer,
    /// Lists are not looked at.
    Off,
}

/// One list. What its issuer signed is only checked when a chain leads to the issuer.
#[derive(Clone, Debug)]
pub(super) struct Crl {
    pub(super) list: Arc<CertRevocationList<'static>>,
    pub(super) issuer: String,
    /// When its issuer promised the next one.
    pub(super) next_update: Option<SystemTime>,
}

/// Reads lists in PEM, or one in DER.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Crl>, X509Error> {
    const MARK: &[u8] = b"-----BEGIN";
    if !bytes.windows(MARK.len()).any(|window| window == MARK) {
        return Ok(vec![parse_der(bytes)?]);
    }
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| X509Error(format!("not PEM: {error}")))?;
    if lists.is_empty() {
        return Err(X509Error("there is no revocation list in it".into()));
    }
    lists.iter().map(|der| parse_der(der)).collect()
}

fn parse_der(der: &[u8]) -> Result<Crl, X509Error> {
    let broken = |why: String| X509Error(format!("not a revocation list: {why}"));
    let list = OwnedCertRevocationList::from_der(der).map_err(|error| broken(error.to_string()))?;
    let (_, read) = CertificateRevocationList::from_der(der).map_err(|error| broken(error.to_string()))?;
    Ok(Crl {
        list: Arc::new(list.into()),
        issuer: read.issuer().to_string(),
        next_update: read.next_update().map(|time| from_unix(time.timestamp())),
    })
}

impl CrlMode {
    /// Its name in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::Prefer => "prefer",
            Self::Off => "off",
        }
    }
}

impl std::str::FromStr for CrlMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Require, Self::Prefer, Self::Off]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not one of require, prefer, off"))
    }
}

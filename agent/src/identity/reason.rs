//! Why a handshake failed: a closed set with stable names, and how every error becomes one of them.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, OtherError};

use super::SpiffeId;
use super::x509::X509Error;

/// Why a handshake failed. The values of a metric's `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HandshakeReason {
    /// The certificate, or one that it leads to, has expired.
    Expired,
    /// It is not valid yet: clocks differ.
    NotYetValid,
    /// No root of the trust domain that it claims has signed it.
    UnknownIssuer,
    /// It is another workload's.
    WrongIdentity,
    /// It is of a trust domain that is neither ours nor federated.
    WrongTrustDomain,
    /// There is none.
    NoCertificate,
    /// Its issuer has taken it back.
    Revoked,
    /// Revocation lists are required, and there is none in force that covers it.
    CrlUnavailable,
    /// It breaks the rules for certificates or for SPIFFE ids, or its owner does not hold its key.
    BadCertificate,
    /// TLS other than 1.3, no cipher or group in common, no `h2`, or no TLS at all.
    Protocol,
    /// The handshake took too long.
    Timeout,
    /// The peer went away before it was done.
    Closed,
    /// The agent could not go on; its log has the error.
    Internal,
}

/// A handshake that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandshakeError {
    /// Why.
    pub reason: HandshakeReason,
    /// True if it was the peer who refused us.
    pub by_peer: bool,
    /// What exactly, with the culprit's name where it is known.
    pub detail: String,
}

/// Why a peer's certificate is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PeerRejected {
    #[error("the certificate does not hold: {0}")]
    Chain(#[from] webpki::Error),
    #[error("{0}")]
    Bad(#[from] X509Error),
    #[error("{presented} answers, and {expected} was meant")]
    WrongIdentity { presented: SpiffeId, expected: String },
    #[error("{id} is of a trust domain that is neither ours nor federated")]
    WrongTrustDomain { id: SpiffeId },
    #[error("revocation lists are required and there is none")]
    NoCrl,
}

impl PeerRejected {
    pub(super) fn reason(&self) -> HandshakeReason {
        use HandshakeReason as Reason;
        use webpki::Error as E;
        match self {
            Self::Bad(_) => Reason::BadCertificate,
            Self::WrongIdentity { .. } => Reason::WrongIdentity,
            Self::WrongTrustDomain { .. } => Reason::WrongTrustDomain,
            Self::NoCrl => Reason::CrlUnavailable,
            Self::Chain(error) => match error {
                E::CertExpired { .. } | E::InvalidCertValidity => Reason::Expired,
                E::CertNotValidYet { .. } => Reason::NotYetValid,
                // A root of the same name but another key is an issuer that we do not know.
                E::UnknownIssuer | E::InvalidSignatureForPublicKey => Reason::UnknownIssuer,
                E::CertRevoked => Reason::Revoked,
                E::CrlExpired { .. }
                | E::UnknownRevocationStatus
                | E::InvalidCrlSignatureForPublicKey
                | E::IssuerNotCrlSigner => Reason::CrlUnavailable,
                _ => Reason::BadCertificate,
            },
        }
    }
}

impl From<PeerRejected> for rustls::Error {
    /// Wherever TLS has an alert of that meaning, the peer gets it.
    fn from(rejected: PeerRejected) -> Self {
        use webpki::Error as E;
        let error = match rejected {
            PeerRejected::Chain(E::CertExpired { time, not_after }) => {
                CertificateError::ExpiredContext { time, not_after }
            }
            PeerRejected::Chain(E::CertNotValidYet { time, not_before }) => {
                CertificateError::NotValidYetContext { time, not_before }
            }
            PeerRejected::Chain(E::CertRevoked) => CertificateError::Revoked,
            PeerRejected::Chain(E::UnknownIssuer | E::InvalidSignatureForPublicKey) => {
                CertificateError::UnknownIssuer
            }
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        Self::InvalidCertificate(error)
    }
}

impl HandshakeError {
    /// What a TLS error means.
    pub fn of(error: &rustls::Error) -> Self {
        let by_peer = matches!(error, rustls::Error::AlertReceived(_));
        let detail = match error {
            rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.0.to_string(),
            other => other.to_string(),
        };
        Self { reason: reason_of(error), by_peer, detail }
    }

    /// What an error of the stream under the handshake means; also one that reading or writing returns later: a TLS 1.3
    /// client learns only then that the server refused its certificate.
    pub fn of_io(error: &io::Error) -> Self {
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Self::of(tls);
        }
        let reason = match error.kind() {
            io::ErrorKind::TimedOut => HandshakeReason::Timeout,
            _ => HandshakeReason::Closed,
        };
        Self { reason, by_peer: false, detail: error.to_string() }
    }

    /// A failure that no error of TLS tells of.
    pub fn new(reason: HandshakeReason, detail: impl fmt::Display) -> Self {
        Self { reason, by_peer: false, detail: detail.to_string() }
    }

    pub(super) fn protocol(detail: &str) -> Self {
        Self::new(HandshakeReason::Protocol, detail)
    }
}

fn reason_of(error: &rustls::Error) -> HandshakeReason {
    use HandshakeReason as Reason;
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(error) => match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Reason::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Reason::NotYetValid
            }
            CertificateError::UnknownIssuer => Reason::UnknownIssuer,
            CertificateError::Revoked => Reason::Revoked,
            CertificateError::Other(other) => match other.0.downcast_ref::<PeerRejected>() {
                Some(rejected) => rejected.reason(),
                None => Reason::BadCertificate,
            },
            _ => Reason::BadCertificate,
        },
        E::NoCertificatesPresented => Reason::NoCertificate,
        E::InvalidCertRevocationList(_) => Reason::CrlUnavailable,
        E::AlertReceived(alert) => match *alert {
            AlertDescription::CertificateExpired => Reason::Expired,
            AlertDescription::UnknownCA => Reason::UnknownIssuer,
            AlertDescription::CertificateRequired | AlertDescription::NoCertificate => Reason::NoCertificate,
            AlertDescription::CertificateRevoked => Reason::Revoked,
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::DecryptError => Reason::BadCertificate,
            AlertDescription::AccessDenied => Reason::WrongIdentity,
            AlertDescription::CloseNotify | AlertDescription::UserCanceled => Reason::Closed,
            AlertDescription::InternalError => Reason::Internal,
            _ => Reason::Protocol,
        },
        E::FailedToGetCurrentTime | E::FailedToGetRandomBytes | E::EncryptError | E::General(_) => {
            Reason::Internal
        }
        _ => Reason::Protocol,
    }
}

impl HandshakeReason {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 13] = [
        Self::Expired,
        Self::NotYetValid,
        Self::UnknownIssuer,
        Self::WrongIdentity,
        Self::WrongTrustDomain,
        Self::NoCertificate,
        Self::Revoked,
        Self::CrlUnavailable,
        Self::BadCertificate,
        Self::Protocol,
        Self::Timeout,
        Self::Closed,
        Self::Internal,
    ];

    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::WrongIdentity => "wrong_identity",
            Self::WrongTrustDomain => "wrong_trust_domain",
            Self::NoCertificate => "no_certificate",
            Self::Revoked => "revoked",
            Self::CrlUnavailable => "crl_unavailable",
            Self::BadCertificate => "bad_certificate",
            Self::Protocol => "protocol",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = if self.by_peer { " by the peer" } else { "" };
        write!(f, "TLS handshake refused{by} ({}): {}", self.reason.as_str(), self.detail)
    }
}

impl std::error::Error for HandshakeError {}

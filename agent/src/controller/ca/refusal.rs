//! Why somebody gets no certificate: for the caller as a status, for the log in words, for metrics as a stable name.

use tonic::{Code, Status};

use crate::telemetry::DenyReason;

/// A request that is not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: DenyReason,
    /// The fact and the culprit. Without anything secret: the caller reads it too.
    pub(super) why: String,
    /// The caller's node, once it is proven.
    pub(super) node: Option<String>,
    /// True if what is missing may be on its way here.
    pub(super) may_pass: bool,
}

impl Refusal {
    pub(super) fn new(reason: DenyReason, why: String) -> Self {
        Self { reason, why, node: None, may_pass: false }
    }

    /// For want of something that may be on its way here.
    pub(super) fn for_now(reason: DenyReason, why: String) -> Self {
        Self { may_pass: true, ..Self::new(reason, why) }
    }

    pub(super) fn bad_request(error: impl std::fmt::Display) -> Self {
        Self::new(DenyReason::BadRequest, error.to_string())
    }

    pub(super) fn busy() -> Self {
        Self::new(DenyReason::Busy, "too many requests at one time; ask again".into())
    }

    /// On this node.
    pub(super) fn on(self, node: &str) -> Self {
        self.perhaps_on(Some(node))
    }

    /// On this node, if it is known.
    pub(super) fn perhaps_on(self, node: Option<&str>) -> Self {
        Self { node: node.map(str::to_owned), ..self }
    }

    /// As the caller is told. Callers go on asking after each of them; the code says whether somebody has to do
    /// something first.
    pub(super) fn status(&self) -> Status {
        Status::new(self.reason.code(), self.why.clone())
    }
}

impl DenyReason {
    fn code(self) -> Code {
        match self {
            Self::NoToken | Self::TokenRefused => Code::Unauthenticated,
            Self::NotAnAgent | Self::UnknownNode | Self::NoPodOnNode | Self::WrongTrustDomain => {
                Code::PermissionDenied
            }
            Self::BadRequest => Code::InvalidArgument,
            Self::NotSynced | Self::ApiUnavailable | Self::NoAuthority => Code::Unavailable,
            Self::Busy => Code::ResourceExhausted,
            Self::Timeout => Code::DeadlineExceeded,
        }
    }
}

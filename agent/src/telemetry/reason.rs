//! Why a connection or a request ended, or never got through: closed sets with stable names, the values of the `reason` label.
//!
//! The sets answer "whose doing was it, and what is there to fix?", not "which errno was it": each reason points at
//! one party, and two errors with the same cure share one.

/// Why a relayed connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// Both sides ended their stream in order (FIN).
    Done,
    /// The client broke it off (`ECONNRESET`, `EPIPE` on the client's socket).
    ClientReset,
    /// The upstream broke it off: the server, or the agent of its node.
    UpstreamReset,
    /// The client's end fell silent: unacknowledged data or keepalives, or an unreachable host (`ETIMEDOUT`,
    /// `EHOSTUNREACH`).
    ClientTimeout,
    /// The upstream's end fell silent: a dead peer node, a cut network.
    UpstreamTimeout,
    /// Nothing had moved on it for as long as its Service port allows.
    Idle,
    /// Policies do not let it in: not any more, or not as what it turned out to carry.
    Denied,
    /// The agent shut down, or dropped the connection without a verdict.
    Cancelled,
    /// The agent could not go on: out of memory or descriptors, or a bug. Its log has the error.
    Internal,
}

/// Why a captured connection got no upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefuseReason {
    /// The Service has the port, but no endpoint that may be used.
    NoEndpoints,
    /// The Service does not have the dialled port.
    UnknownPort,
    /// The dialled address stands for nothing the mesh knows (any more).
    UnknownDestination,
    /// The upstream answered with a reset: nothing listens there (`ECONNREFUSED`).
    ConnectRefused,
    /// The upstream did not answer in time.
    ConnectTimeout,
    /// There is no way to the upstream (`EHOSTUNREACH`, `ENETUNREACH`).
    ConnectUnreachable,
    /// Dialling the upstream failed in another way; the log has the error.
    ConnectFailed,
    /// The two sides of a tunnel did not come to trust each other; the log has the reason.
    HandshakeFailed,
    /// The client's pod has no certificate yet, and cannot speak mutual TLS without one.
    NoCertificate,
    /// The endpoint did not begin TLS, which it is to be spoken to in.
    TlsFailed,
    /// The endpoint's certificate is not what the policy asks for that has it spoken to in TLS.
    CertificateRefused,
    /// Policies of the destination do not let this client in.
    Denied,
    /// The client went away before there was an upstream.
    ClientGone,
    /// The upstream reset the connection while it was being set up.
    ConnectReset,
    /// Nothing listens on the tunnel's port of the destination: its agent is down.
    AgentDown,
    /// Plaintext without proof of its origin, for a pod that takes none.
    PlaintextRefused,
    /// There are routes for the port, and none is for this connection.
    NoRoute,
    /// The route leads to a backend that nothing can be sent to.
    InvalidBackend,
    /// The endpoint takes no more connections in this time.
    RateLimited,
    /// As many connections to the Service port are open as it allows.
    Overloaded,
    /// A limit on open connections was reached.
    Limit,
    /// The agent could not go on: out of memory or descriptors, or a bug. Its log has the error.
    Internal,
}

/// Why an HTTP request ended as it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestEnd {
    /// An upstream answered, and all of the answer has gone to the client.
    Done,
    /// There are routes for the destination, and the request falls under none of their rules.
    NoRoute,
    /// The rule sends it to a backend that does not exist or that it must not refer to.
    InvalidBackend,
    /// The rule has no backend, or all of them weigh nothing.
    NoBackend,
    /// The rule redirects it.
    Redirected,
    /// The agent answered a CORS preflight.
    Preflight,
    /// The backend has no endpoint that may be used.
    NoEndpoints,
    /// The upstream answered with a reset: nothing listens there (`ECONNREFUSED`).
    ConnectRefused,
    /// The upstream did not answer in time.
    ConnectTimeout,
    /// Connecting to the upstream failed in another way.
    ConnectFailed,
    /// The upstream did not begin TLS, which it is to be spoken to in.
    TlsFailed,
    /// The upstream's certificate is not what the policy asks for that has it spoken to in TLS.
    CertificateRefused,
    /// Policies of the destination do not let this client in.
    Denied,
    /// It showed a token that does not hold.
    Unauthenticated,
    /// The upstream broke off before the end of its answer.
    UpstreamReset,
    /// One attempt took longer than the rule (`backendRequest`) or the Service port allows, and there was no further one.
    UpstreamTimeout,
    /// The request took longer than the rule (`request`) or the Service port allows.
    RequestTimeout,
    /// The client broke off before it had the answer.
    ClientGone,
    /// What the client sent is no HTTP, or none that may be forwarded.
    BadRequest,
    /// As many requests wait for each endpoint as may, or as much is under way to the Service port as it allows.
    Overloaded,
    /// The endpoint takes no more requests in this time.
    RateLimited,
    /// It was made to fail on purpose.
    FaultInjected,
    /// Its connection had become another protocol, and nothing had moved on it for as long as the Service port allows.
    Idle,
    /// A limit was reached: on requests, on the size of a head, on what may wait.
    Limit,
    /// The agent could not go on: out of memory or descriptors, or a bug. Its log has the error.
    Internal,
}

impl CloseReason {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::ClientReset,
        Self::UpstreamReset,
        Self::ClientTimeout,
        Self::UpstreamTimeout,
        Self::Idle,
        Self::Denied,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::ClientReset => "client_reset",
            Self::UpstreamReset => "upstream_reset",
            Self::ClientTimeout => "client_timeout",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::Idle => "idle",
            Self::Denied => "denied",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }
}

impl RefuseReason {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 22] = [
        Self::NoEndpoints,
        Self::UnknownPort,
        Self::UnknownDestination,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectUnreachable,
        Self::ConnectFailed,
        Self::HandshakeFailed,
        Self::NoCertificate,
        Self::TlsFailed,
        Self::CertificateRefused,
        Self::Denied,
        Self::ClientGone,
        Self::ConnectReset,
        Self::AgentDown,
        Self::PlaintextRefused,
        Self::NoRoute,
        Self::InvalidBackend,
        Self::RateLimited,
        Self::Overloaded,
        Self::Limit,
        Self::Internal,
    ];

    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::UnknownPort => "unknown_port",
            Self::UnknownDestination => "unknown_destination",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectUnreachable => "connect_unreachable",
            Self::ConnectFailed => "connect_failed",
            Self::TlsFailed => "tls_failed",
            Self::CertificateRefused => "certificate_refused",
            Self::HandshakeFailed => "handshake_failed",
            Self::NoCertificate => "no_certificate",
            Self::Denied => "denied",
            Self::ClientGone => "client_gone",
            Self::ConnectReset => "connect_reset",
            Self::AgentDown => "agent_down",
            Self::PlaintextRefused => "plaintext_refused",
            Self::NoRoute => "no_route",
            Self::InvalidBackend => "invalid_backend",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
            Self::Limit => "limit",
            Self::Internal => "internal",
        }
    }
}

impl RequestEnd {
    /// Every end, in the order of the declaration.
    pub const ALL: [Self; 25] = [
        Self::Done,
        Self::NoRoute,
        Self::InvalidBackend,
        Self::NoBackend,
        Self::Redirected,
        Self::Preflight,
        Self::NoEndpoints,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::TlsFailed,
        Self::CertificateRefused,
        Self::Denied,
        Self::Unauthenticated,
        Self::UpstreamReset,
        Self::UpstreamTimeout,
        Self::RequestTimeout,
        Self::ClientGone,
        Self::BadRequest,
        Self::Overloaded,
        Self::RateLimited,
        Self::FaultInjected,
        Self::Idle,
        Self::Limit,
        Self::Internal,
    ];

    /// The stable name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NoRoute => "no_route",
            Self::InvalidBackend => "invalid_backend",
            Self::NoBackend => "no_backend",
            Self::Redirected => "redirected",
            Self::Preflight => "preflight",
            Self::NoEndpoints => "no_endpoints",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::TlsFailed => "tls_failed",
            Self::CertificateRefused => "certificate_refused",
            Self::Denied => "denied",
            Self::Unauthenticated => "unauthenticated",
            Self::UpstreamReset => "upstream_reset",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::RequestTimeout => "request_timeout",
            Self::ClientGone => "client_gone",
            Self::BadRequest => "bad_request",
            Self::Overloaded => "overloaded",
            Self::RateLimited => "rate_limited",
            Self::FaultInjected => "fault_injected",
            Self::Idle => "idle",
            Self::Limit => "limit",
            Self::Internal => "internal",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters are arrays indexed by `reason as usize`, so `ALL` must be complete and in order.
    #[test]
    fn all_lists_every_reason_in_order_and_names_differ() {
        for (i, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        assert_eq!(CloseReason::Internal as usize + 1, CloseReason::ALL.len());
        for (i, reason) in RefuseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        assert_eq!(RefuseReason::Internal as usize + 1, RefuseReason::ALL.len());

        for (i, end) in RequestEnd::ALL.iter().enumerate() {
            assert_eq!(*end as usize, i);
        }
        assert_eq!(RequestEnd::Internal as usize + 1, RequestEnd::ALL.len());

        assert_differ(RefuseReason::ALL.map(RefuseReason::as_str));
        assert_differ(RequestEnd::ALL.map(RequestEnd::as_str));
    }

    fn assert_differ<const N: usize>(mut names: [&str; N]) {
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}

//! The certificates of this node, as the wiring reads them from `identity` for each scrape.

/// What the metrics tell of certificates. What is missing here is gone from the metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CertificateFigures {
    /// What expires when.
    pub lifetimes: Vec<CertificateLifetime>,
    /// How late the renewal of each identity is, in seconds.
    pub renewal_lags: Vec<(String, f64)>,
    /// How much of its life each identity's certificate has left: 1 when it was received, 0 when it expires.
    pub lives_left: Vec<(String, f64)>,
    /// Requests for certificates, by the stable name of their result.
    pub renewals: Vec<(&'static str, u64)>,
    /// By how much another clock was seen to be ahead of this node's, in seconds.
    pub clock_skew: f64,
}

/// When one certificate expires.
#[derive(Clone, Debug, PartialEq)]
pub struct CertificateLifetime {
    /// `leaf`, `issuer`, `root` or `trusted_root`.
    pub kind: &'static str,
    /// The SPIFFE id that it belongs to.
    pub identity: String,
    /// Seconds since 1970.
    pub expires: i64,
    /// Seconds that are left; negative when it is over.
    pub remaining: f64,
}

//! How a Service port wants TLS begun with its endpoints, and whose certificates are believed there.
//!
//! Values alone: what is done with them is for `proxy` to know.

use std::hash::{Hash, Hasher};

use super::Name;

/// What a BackendTLSPolicy asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendTls {
    /// Whose certificates are believed.
    pub authorities: Authorities,
    /// The server's name: what it is asked for (SNI), and what its certificate has to name where no other names are given.
    pub hostname: Name,
    /// What its certificate has to name instead, one of them.
    pub alt_names: Vec<AltName>,
}

/// Whose certificates are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authorities {
    /// Those whom the system believes.
    System,
    /// Just these, each a certificate in DER.
    Given(Vec<Vec<u8>>),
}

/// A name that a certificate may have (RFC 5280, section 4.2.1.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AltName {
    /// The name of a host; `*.example.com` is every host below `example.com`.
    Hostname(Name),
    /// A URI, such as a SPIFFE id.
    Uri(Name),
}

/// Equal values have equal names. Certificates are long, and this is asked for at each request.
impl Hash for BackendTls {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hostname.hash(state);
    }
}

//! What the controller is told, validated once.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use crate::identity::TrustDomain;

/// Validated settings of the controller.
#[derive(Clone, Debug)]
pub struct ControllerSettings {
    /// The namespace that it runs in, and keeps everything of its own in.
    pub namespace: String,
    /// The pod that it runs in: who holds the lease.
    pub pod_name: String,
    /// Where it issues certificates.
    pub ca_listen: SocketAddr,
    /// DNS names and addresses under which callers reach it.
    pub ca_names: Vec<String>,
    /// Where health and metrics are.
    pub admin_address: SocketAddr,
    /// The longest that a certificate may live.
    pub certificate_lifetime: Duration,
    /// The root.
    pub root: RootSettings,
    /// ConfigMap in which the roots are published.
    pub bundle_config_map: String,
    /// The admission webhook, if there is to be one.
    pub webhook: Option<WebhookSettings>,
    /// What a caller's token must be for.
    pub token_audience: String,
    /// Who may ask for certificates.
    pub agent: ServiceAccount,
    /// How long an agent must have been ready before pods may come to its node.
    pub settle: Duration,
}

/// The admission webhook.
#[derive(Clone, Debug)]
pub struct WebhookSettings {
    /// Where the API server asks.
    pub listen: SocketAddr,
    /// ValidatingWebhookConfiguration that leads it there, and is told which roots to trust.
    pub configuration: String,
}

/// How the root is made and kept.
#[derive(Clone, Debug)]
pub struct RootSettings {
    /// The trust domain that it is for.
    pub trust_domain: TrustDomain,
    /// Secret that holds it.
    pub secret: String,
    /// How long a root lives.
    pub life: Duration,
    /// How long a new root is trusted before it signs: the time for it to reach every agent.
    pub overlap: Duration,
}

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl FromStr for ServiceAccount {
    type Err = String;

    /// Reads `namespace/name`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.into(), name: name.into() })
            }
            _ => Err("expected NAMESPACE/NAME".into()),
        }
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// True for what may be a name in Kubernetes (a DNS subdomain, RFC 1123), by its characters.
pub(crate) fn is_name(text: &str) -> bool {
    let fits = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(fits)
}

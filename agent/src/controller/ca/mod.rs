//! The certificate authority: who asks, may they, sign.
//!
//! It speaks `istio.v1.auth.IstioCertificateService`, so that agents can ask it, istiod or istio-csr alike. Unlike those
//! it takes nothing on trust from a node: an agent gets certificates only for the service accounts whose pods run beside
//! it, so that whoever takes over one node has the identities of that node and no others.

mod authorize;
mod caller;
mod keys;
mod own;
mod refusal;
pub(super) mod server;
mod service;
mod waiting;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::Client;
use tokio::sync::Semaphore;
use tracing::{debug, warn};
use zeroize::Zeroizing;

use super::pods::Pods;
use super::root::Root;
use super::settings::ControllerSettings;
use crate::identity::SpiffeId;
use crate::identity::ca::csr::proven_key;
use crate::identity::ca::{CaError, keyring};
use crate::telemetry::{ControllerTelemetry, DenyReason};
use authorize::{Authorized, authorize};
use caller::TokenReviews;
use own::OwnCertificate;
use refusal::Refusal;
use waiting::WaitingRoom;

/// Questions to the API server at one time.
const AT_ONCE: usize = 128;
/// And requests that wait, for their turn or for a pod: all certificates of ten crowded nodes.
const WAITING: usize = 1024;
/// A whole request: agents give up after ten seconds.
const LONGEST: Duration = Duration::from_secs(8);
/// How long a pod that nobody has heard of may take to come over the watch: the kubelet, and so the agent, hears of a
/// pod from the same API server at about the same time.
const POD_DELAY: Duration = Duration::from_secs(2);
/// Shorter ones would be renewed without a pause.
const SHORTEST_VALIDITY: Duration = Duration::from_secs(30);

/// The authority, shared by its connections.
#[derive(Clone)]
pub(super) struct Ca(Arc<Shared>);

struct Shared {
    settings: Arc<ControllerSettings>,
    reviews: TokenReviews,
    pods: Arc<Pods>,
    root: Arc<Root>,
    own: Arc<OwnCertificate>,
    telemetry: Arc<ControllerTelemetry>,
    waiting: WaitingRoom,
    turns: Semaphore,
    queue: Semaphore,
}

/// A request, read and not yet believed.
#[derive(Debug)]
struct Asked {
    /// The header `authorization`.
    authorization: Option<Zeroizing<String>>,
    /// Whose certificate it asks for.
    identity: String,
    /// PKCS #10 in PEM.
    csr: String,
    /// How long the certificate shall live, in seconds.
    validity_seconds: i64,
}

impl Ca {
    pub(super) fn new(
        settings: Arc<ControllerSettings>,
        client: Client,
        pods: Arc<Pods>,
        root: Arc<Root>,
        telemetry: Arc<ControllerTelemetry>,
    ) -> Self {
        let audience = settings.token_audience.clone();
        let reviews = TokenReviews::new(client, audience, pods.clone(), telemetry.clone());
        let (turns, queue) = (Semaphore::new(AT_ONCE), Semaphore::new(AT_ONCE + WAITING));
        let (own, waiting) = (Arc::default(), WaitingRoom::default());
        Self(Arc::new(Shared { settings, reviews, pods, root, own, telemetry, waiting, turns, queue }))
    }

    /// Sees to it that there is always a certificate to show to callers.
    pub(super) async fn renew_own_certificate(&self) {
        let Shared { settings, root, own, telemetry, .. } = &*self.0;
        own.keep(settings, root, telemetry).await;
    }

    /// Keeps what callers are told apart by while the API server cannot be asked whose token it is that they show.
    pub(super) async fn keep_token_keys(&self) {
        self.0.reviews.keys.keep_fresh().await;
    }

    /// For servers that show the authority's own certificate and speak this protocol (RFC 7301).
    pub(super) fn tls(&self, protocol: &[u8]) -> Result<rustls::ServerConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.0.own.clone());
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(config)
    }

    /// What keeps it from answering.
    pub(super) fn missing(&self) -> Option<String> {
        let none = self.0.own.current().is_none();
        none.then(|| "there is no certificate yet to show to callers".into())
    }

    /// Answers one request: the chain as texts in PEM, leaf first, all roots in the last.
    async fn answer(&self, asked: Asked) -> Result<Vec<String>, Refusal> {
        let answer = match tokio::time::timeout(LONGEST, self.issue(&asked)).await {
            Ok(answer) => answer,
            Err(_) => Err(Refusal::new(DenyReason::Timeout, "it took too long".into())),
        };
        match &answer {
            Ok(_) => self.0.telemetry.issued(),
            Err(refusal) => {
                self.0.telemetry.denied(refusal.reason);
                warn!(
                    reason = refusal.reason.as_str(),
                    node = refusal.node.as_deref().unwrap_or("unknown"),
                    identity = shown(&asked.identity),
                    "no certificate: {}",
                    refusal.why
                );
            }
        }
        answer
    }

    async fn issue(&self, asked: &Asked) -> Result<Vec<String>, Refusal> {
        let Shared { settings, reviews, pods, .. } = &*self.0;
        // Before anything is read: what is beyond this is not worth an answer that comes too late.
        let _place = self.0.queue.try_acquire().map_err(|_| Refusal::busy())?;
        let turn = self.0.turns.acquire().await.map_err(|_| Refusal::busy())?;
        let (_, now) = self.0.root.current();
        let caller = reviews.caller(asked.authorization.as_deref().map(String::as_str), now).await?;
        // Whoever waits for a pod from here on holds up nobody.
        drop(turn);

        let key = proven_key(&asked.csr).map_err(Refusal::bad_request)?;
        let id: SpiffeId = asked.identity.parse().map_err(Refusal::bad_request)?;
        let node = caller.node.as_deref().or(caller.pod_uid.as_deref()).unwrap_or_default();
        let seat = self.0.waiting.seat(node);
        let authorized = pods
            .wait_for(
                if seat.is_some() { POD_DELAY } else { Duration::ZERO },
                |index| authorize(&caller, &id, settings, index),
                |refusal| refusal.may_pass,
            )
            .await?;
        self.sign(&authorized, &key, validity(asked.validity_seconds, settings.certificate_lifetime))
    }

    fn sign(&self, for_whom: &Authorized, key: &[u8], validity: Duration) -> Result<Vec<String>, Refusal> {
        let (keyring, now) = self.0.root.current();
        let none = || CaError::Unavailable("there is no root yet".into());
        let issued = keyring
            .ok_or_else(none)
            .and_then(|keyring| keyring.sign(for_whom.id(), key, validity, now))
            .map_err(|error| Refusal::new(DenyReason::NoAuthority, error.to_string()).on(for_whom.node()))?;
        debug!(node = for_whom.node(), identity = %for_whom.id(), "certificate issued");
        let chain = issued.chain.iter().map(|certificate| keyring::pem(std::slice::from_ref(certificate)));
        Ok(chain.chain([keyring::pem(&issued.roots)]).collect())
    }
}

/// As long as is asked for, within what is right; the longest where nothing is said.
fn validity(asked_seconds: i64, longest: Duration) -> Duration {
    match u64::try_from(asked_seconds) {
        Ok(0) | Err(_) => longest,
        Ok(seconds) => Duration::from_secs(seconds).max(SHORTEST_VALIDITY).min(longest),
    }
}

/// What a caller says of itself, as far as a log should repeat it.
fn shown(text: &str) -> String {
    const MOST: usize = 256;
    text.chars().take(MOST).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// When to make something anew that was made then and ends then: at half of its life.
fn half_life(made: SystemTime, ends: SystemTime) -> SystemTime {
    made + ends.duration_since(made).unwrap_or_default() / 2
}

#[cfg(test)]
mod tests;

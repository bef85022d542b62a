//! The certificate that callers are shown: signed by the root that we issue from, and renewed at half of its life.
//!
//! Connections that stand are not touched by a renewal; the next one is shown the new certificate.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use tracing::{info, warn};

use super::super::root::Root;
use super::super::settings::ControllerSettings;
use super::half_life;
use crate::identity::ca::keyring::ServerCertificate;
use crate::telemetry::ControllerTelemetry;

/// How often it is looked at. A new root begins to sign by the clock, and nothing tells of it.
const LOOK: Duration = Duration::from_secs(1);
/// Between attempts that fail.
const RETRY: Duration = Duration::from_secs(10);

/// The certificate in use.
#[derive(Debug, Default)]
pub(super) struct OwnCertificate(ArcSwapOption<ServerCertificate>);

impl OwnCertificate {
    pub(super) fn current(&self) -> Option<Arc<ServerCertificate>> {
        self.0.load_full()
    }

    /// Makes it, and makes it anew when it is time, for as long as it is polled.
    pub(super) async fn keep(
        &self,
        settings: &ControllerSettings,
        root: &Root,
        telemetry: &ControllerTelemetry,
    ) {
        loop {
            let mut pause = LOOK;
            let (keyring, now) = root.current();
            if let Some(keyring) = keyring
                && is_due(self.current().as_deref(), keyring.issuer(now), now)
            {
                match keyring.server(&settings.ca_names, settings.certificate_lifetime, now) {
                    Ok(made) => {
                        info!(names = ?settings.ca_names, "the authority's own certificate was made");
                        telemetry.set_own_certificate(made.not_after);
                        self.0.store(Some(Arc::new(made)));
                    }
                    Err(error) => {
                        warn!(%error, "no certificate for the authority itself");
                        pause = RETRY;
                    }
                }
            }
            tokio::time::sleep(pause).await;
        }
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // Whatever name the caller has for us: it is the caller who checks it.
        self.current().map(|certificate| certificate.key.clone())
    }
}

/// There is none, half of its life is over, or another root signs: agents may be about to forget the one before.
fn is_due(
    current: Option<&ServerCertificate>,
    issuer: Option<&CertificateDer<'static>>,
    now: SystemTime,
) -> bool {
    current.is_none_or(|current| {
        half_life(current.made, current.not_after) <= now
            || issuer.is_some_and(|issuer| *issuer != current.issuer)
    })
}

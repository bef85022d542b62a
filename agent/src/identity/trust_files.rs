//! Trust that comes in files: the bundles of other trust domains, and revocation lists. Read again when they change.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::ca::{Stamp, stamp};
use super::crl::{self, Crl};
use super::trust::RootSource;
use super::x509::certificates_of_pem;
use super::{Trust, TrustDomain};

/// Which files there are.
#[derive(Clone, Debug, Default)]
pub struct TrustFilesSettings {
    /// Roots in PEM, for the trust domain named. For our own they are believed beside those of the authority.
    pub bundles: Vec<(TrustDomain, PathBuf)>,
    /// Revocation lists, in PEM or DER.
    pub crls: Vec<PathBuf>,
}

/// Follows the files. A file that is missing or broken leaves in force what was last read of it: a list that is taken
/// away would bring revoked certificates back.
#[derive(Debug)]
pub struct TrustFiles {
    settings: TrustFilesSettings,
    trust: Arc<Trust>,
    seen: HashMap<PathBuf, Option<Stamp>>,
    lists: HashMap<PathBuf, Vec<Crl>>,
}

impl TrustFiles {
    /// Reads all files for the first time.
    pub fn new(settings: TrustFilesSettings, trust: Arc<Trust>) -> Self {
        let mut files = Self { settings, trust, seen: HashMap::new(), lists: HashMap::new() };
        files.refresh();
        files
    }

    /// Follows the files for ever. Whoever spawns it ends it.
    pub async fn follow(mut self, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            self.refresh();
        }
    }

    /// Reads again what has changed.
    pub fn refresh(&mut self) {
        for (domain, path) in self.settings.bundles.clone() {
            if self.has_changed(&path) {
                self.read_bundle(&domain, &path);
            }
        }
        let mut changed = false;
        for path in self.settings.crls.clone() {
            changed |= self.has_changed(&path) && self.read_crls(&path);
        }
        if changed {
            self.trust.set_crls(self.lists.values().flatten().cloned().collect());
        }
    }

    fn has_changed(&mut self, path: &Path) -> bool {
        let now = stamp(path);
        self.seen.insert(path.to_owned(), now) != Some(now)
    }

    fn read_bundle(&self, domain: &TrustDomain, path: &Path) {
        let outcome = fs::read(path).map_err(|error| error.to_string()).and_then(|pem| {
            let roots = certificates_of_pem(&pem).map_err(|error| error.to_string())?;
            self.trust.set_roots(domain, RootSource::File, &roots).map_err(|error| error.to_string())
        });
        match outcome {
            Ok(_) => info!(trust_domain = %domain, path = %path.display(), "trust bundle read"),
            Err(error) => warn!(
                trust_domain = %domain, path = %path.display(), error,
                "the trust bundle cannot be read; what was read of it before stays in force"
            ),
        }
    }

    fn read_crls(&mut self, path: &Path) -> bool {
        let outcome = fs::read(path)
            .map_err(|error| error.to_string())
            .and_then(|bytes| crl::parse(&bytes).map_err(|error| error.to_string()));
        match outcome {
            Ok(lists) => {
                info!(path = %path.display(), lists = lists.len(), "revocation lists read");
                self.lists.insert(path.to_owned(), lists);
                true
            }
            Err(error) => {
                warn!(
                    path = %path.display(), error,
                    "the revocation list cannot be read; what was read of it before stays in force"
                );
                false
            }
        }
    }
}

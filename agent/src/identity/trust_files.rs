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

/// A file that cannot be read, or not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustFileError {
    /// Roots of a trust domain.
    #[error("the trust bundle of {domain}, {}, cannot be read: {why}", path.display())]
    Bundle {
        /// Whose roots.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A revocation list.
    #[error("the revocation list {} cannot be read: {why}", path.display())]
    Crl {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl TrustFiles {
    /// Reads all files for the first time, and insists on each: a name that was misspelt must not go unnoticed.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn open(settings: TrustFilesSettings, trust: Arc<Trust>) -> Result<Self, TrustFileError> {
        let mut files = Self { settings, trust, seen: HashMap::new(), lists: HashMap::new() };
        files.read_changed().into_iter().next().map_or(Ok(files), Err)
    }

    /// Follows the files for ever, if there are any. Whoever spawns it ends it.
    pub async fn follow(mut self, every: Duration) {
        if self.settings.bundles.is_empty() && self.settings.crls.is_empty() {
            return;
        }
        loop {
            tokio::time::sleep(every).await;
            self.refresh();
        }
    }

    /// Reads again what has changed.
    pub fn refresh(&mut self) {
        for error in self.read_changed() {
            warn!("{error}; what was read of it before stays in force");
        }
    }

    fn read_changed(&mut self) -> Vec<TrustFileError> {
        let mut errors = Vec::new();
        for (domain, path) in self.settings.bundles.clone() {
            if self.has_changed(&path)
                && let Err(why) = self.read_bundle(&domain, &path)
            {
                errors.push(TrustFileError::Bundle { domain, path, why });
            }
        }
        let mut is_news = false;
        for path in self.settings.crls.clone() {
            if !self.has_changed(&path) {
                continue;
            }
            match self.read_crls(&path) {
                Ok(()) => is_news = true,
                Err(why) => errors.push(TrustFileError::Crl { path, why }),
            }
        }
        if is_news {
            self.trust.set_crls(self.lists.values().flatten().cloned().collect());
        }
        errors
    }

    fn has_changed(&mut self, path: &Path) -> bool {
        let now = stamp(path);
        self.seen.insert(path.to_owned(), now) != Some(now)
    }

    fn read_bundle(&self, domain: &TrustDomain, path: &Path) -> Result<(), String> {
        let pem = fs::read(path).map_err(|error| error.to_string())?;
        let roots = certificates_of_pem(&pem).map_err(|error| error.to_string())?;
        self.trust.set_roots(domain, RootSource::File, &roots).map_err(|error| error.to_string())?;
        info!(trust_domain = %domain, path = %path.display(), "trust bundle read");
        Ok(())
    }

    fn read_crls(&mut self, path: &Path) -> Result<(), String> {
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        let lists = crl::parse(&bytes).map_err(|error| error.to_string())?;
        info!(path = %path.display(), lists = lists.len(), "revocation lists read");
        self.lists.insert(path.to_owned(), lists);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! The embedded authority: roots in a directory, read by every agent of one machine, or copied to each.
//!
//! An agent only reads, unless there is nothing to read yet: making and rotating roots is for `undermesh ca`. The directory holds `state.json` (see
//! [`CaState`]) and, for each root, `root-<number>.pem` and `root-<number>.key.pem`. A root's files never change and
//! are there before the state names them, so that replacing the state is the whole of a transaction.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;

use super::super::key::PrivateKey;
use super::super::{Clock, TrustDomain, x509};
use super::files::{self, FileError, Stamp};
use super::sign::{self, Signer};
use super::state::whole_seconds;
pub use super::state::{CaState, Phase, RootState, RotationUnderWay, StateError};
use super::{CaError, CertificateAuthority, CertificateRequest, IssueFuture, Issued, Roots};

/// Keeps two from changing the directory at one time.
const LOCK: &str = "lock";

/// What `undermesh ca init` is told.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The trust domain to speak for.
    pub trust_domain: TrustDomain,
    /// How long the root lives.
    pub root_life: Duration,
    /// The longest that a leaf may live.
    pub leaf_life: Duration,
}

impl Default for InitOptions {
    fn default() -> Self {
        let day = Duration::from_secs(86_400);
        Self { trust_domain: TrustDomain::default(), root_life: 3650 * day, leaf_life: day }
    }
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// It has an authority already.
    #[error("{} has a certificate authority already; `undermesh ca rotate` gives it a new root", .0.display())]
    Exists(PathBuf),
    /// It has none, and is in use for something else.
    #[error(
        "{} has no certificate authority and is not empty: a `state.json` may have been lost; name an empty \
         directory, or make an authority in this one with `undermesh ca init`",
        .0.display()
    )]
    Occupied(PathBuf),
    /// It has none.
    #[error("{} has no certificate authority; `undermesh ca init` makes one", .0.display())]
    None(PathBuf),
    /// Its state cannot be read.
    #[error("{}: {}", .0.display(), .1)]
    State(PathBuf, StateError),
    /// A root's file is not what it should be.
    #[error("{}: {}", .0.display(), .1)]
    Root(PathBuf, String),
    /// A rotation cannot begin yet.
    #[error(transparent)]
    Rotating(#[from] RotationUnderWay),
    /// A root could not be made.
    #[error(transparent)]
    Sign(#[from] sign::SignError),
}

/// Makes an authority in the directory, which is made as well unless it is there.
///
/// # Errors
/// When there is one already, or the directory cannot be used.
pub fn init(directory: &Path, options: &InitOptions, now: SystemTime) -> Result<CaState, DirectoryError> {
    files::private_directory(directory)?;
    let _lock = files::lock(&directory.join(LOCK))?;
    if state_path(directory).exists() {
        return Err(DirectoryError::Exists(directory.into()));
    }
    make(directory, options, now)
}

/// Makes an authority in a directory that is empty or not there, for whoever wants one without being asked: true if
/// there was none. Whoever does it at the same time agrees on the same.
///
/// # Errors
/// When the directory cannot be used, or has other files and no authority: what was there before may have been lost,
/// and another root in its place would divide the mesh.
pub fn ensure(directory: &Path, options: &InitOptions, now: SystemTime) -> Result<bool, DirectoryError> {
    if state_path(directory).exists() {
        return Ok(false);
    }
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(|source| FileError::Io { path: parent.to_owned(), source })?;
    }
    files::private_directory(directory)?;
    let _lock = files::lock(&directory.join(LOCK))?;
    // Another one may have been faster.
    if state_path(directory).exists() {
        return Ok(false);
    }
    let entries = fs::read_dir(directory)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| FileError::Io { path: directory.to_owned(), source })?;
    if entries.iter().any(|entry| entry.file_name() != LOCK) {
        return Err(DirectoryError::Occupied(directory.into()));
    }
    make(directory, options, now)?;
    Ok(true)
}

/// The caller holds the lock, and has seen that there is none.
fn make(directory: &Path, options: &InitOptions, now: SystemTime) -> Result<CaState, DirectoryError> {
    let now = whole_seconds(now);
    let domain = options.trust_domain.clone();
    let state = CaState::new(domain, options.leaf_life, now, now + options.root_life);
    write_root(directory, &state.trust_domain, 1, now, options.root_life)?;
    files::write(&state_path(directory), state.to_text().as_bytes())?;
    Ok(state)
}

/// Begins a rotation: a new root is trusted from now on and signs after the overlap. Removes what is left of roots
/// that are dropped.
///
/// # Errors
/// When one is under way, or the directory cannot be used.
pub fn rotate(
    directory: &Path,
    overlap: Duration,
    root_life: Duration,
    now: SystemTime,
) -> Result<CaState, DirectoryError> {
    // Before the lock, whose file would be all there is in a directory without an authority.
    read_state(directory)?;
    let _lock = files::lock(&directory.join(LOCK))?;
    let mut state = read_state(directory)?;
    let now = whole_seconds(now);
    let dropped = state.prune(now);
    let number = state.rotate(now, overlap, now + root_life)?;
    write_root(directory, &state.trust_domain, number, now, root_life)?;
    files::write(&state_path(directory), state.to_text().as_bytes())?;
    for number in dropped {
        // The state does not name them any more; what cannot be removed does no harm.
        _ = fs::remove_file(key_path(directory, number));
        _ = fs::remove_file(certificate_path(directory, number));
    }
    Ok(state)
}

/// Reads the state of the authority in the directory.
///
/// # Errors
/// When there is none or it cannot be used.
pub fn read_state(directory: &Path) -> Result<CaState, DirectoryError> {
    let path = state_path(directory);
    match files::check_directory(directory).and_then(|()| files::read(&path)) {
        Ok(text) => CaState::parse(&text).map_err(|error| DirectoryError::State(path, error)),
        Err(FileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(DirectoryError::None(directory.into()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The authority as an agent uses it.
#[derive(Debug)]
pub struct DirectoryCa {
    directory: PathBuf,
    clock: Clock,
    loaded: Mutex<Arc<Loaded>>,
}

/// The directory as it was read last.
struct Loaded {
    stamp: Option<Stamp>,
    state: CaState,
    roots: Vec<LoadedRoot>,
}

struct LoadedRoot {
    state: RootState,
    certificate: CertificateDer<'static>,
    /// `None` for one that does not sign any more.
    signer: Option<Signer>,
}

impl DirectoryCa {
    /// Opens the authority of the directory.
    ///
    /// # Errors
    /// When there is none, others may read it, or it is broken.
    pub fn open(directory: &Path, clock: Clock) -> Result<Self, DirectoryError> {
        let loaded = Mutex::new(Arc::new(Loaded::read(directory, clock.now())?));
        Ok(Self { directory: directory.into(), clock, loaded })
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).state.trust_domain.clone()
    }

    /// The directory as it is now; read anew only when the state has been replaced.
    fn current(&self) -> Result<Arc<Loaded>, CaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.stamp.is_none() || loaded.stamp != files::stamp(&state_path(&self.directory)) {
            let read = Loaded::read(&self.directory, self.clock.now()).map_err(unavailable)?;
            if read.state.trust_domain != loaded.state.trust_domain {
                let (before, now) = (&loaded.state.trust_domain, &read.state.trust_domain);
                return Err(unavailable(format!(
                    "its trust domain was {before} and is {now}: restart the agent"
                )));
            }
            *loaded = Arc::new(read);
        }
        Ok(loaded.clone())
    }

    fn sign(&self, request: &CertificateRequest) -> Result<Issued, CaError> {
        let loaded = self.current()?;
        if !request.id.is_of(&loaded.state.trust_domain) {
            let domain = &loaded.state.trust_domain;
            return Err(CaError::Refused(format!("{} is not of the trust domain {domain}", request.id)));
        }
        let now = self.clock.now();
        let signing = loaded.state.signing(now);
        let root = loaded.roots.iter().find(|root| root.state.number == signing.number);
        let Some(signer) = root.and_then(|root| root.signer.as_ref()) else {
            return Err(unavailable(format!("the key of root {} is not there", signing.number)));
        };
        let not_after = (now + request.validity.min(loaded.state.leaf_life)).min(signing.expires);
        if not_after <= now {
            return Err(unavailable(format!("root {} has expired; `undermesh ca rotate`", signing.number)));
        }
        let leaf = signer.leaf(&request.id, &request.public_key, now, not_after).map_err(unavailable)?;
        Ok(Issued { chain: vec![leaf], roots: loaded.trusted(now) })
    }
}

impl CertificateAuthority for DirectoryCa {
    fn issue<'a>(&'a self, request: &'a CertificateRequest) -> IssueFuture<'a> {
        Box::pin(async { self.sign(request) })
    }

    fn roots(&self) -> Result<Roots, CaError> {
        Ok(Roots::These(self.current()?.trusted(self.clock.now())))
    }

    fn backdates_by(&self) -> Option<Duration> {
        Some(sign::BACKDATE)
    }
}

impl Loaded {
    fn read(directory: &Path, now: SystemTime) -> Result<Self, DirectoryError> {
        // Before the state: what is replaced in between is read again next time.
        let stamp = files::stamp(&state_path(directory));
        let state = read_state(directory)?;
        let mut roots = Vec::new();
        for (root, phase) in state.phases(now) {
            if phase == Phase::Dropped {
                continue;
            }
            let certificate = read_certificate(directory, root.number)?;
            let signer = match phase {
                Phase::Next | Phase::Signing => Some(read_signer(directory, root.number, &certificate)?),
                Phase::Retiring | Phase::Dropped => None,
            };
            roots.push(LoadedRoot { state: root.clone(), certificate, signer });
        }
        Ok(Self { stamp, state, roots })
    }

    fn trusted(&self, now: SystemTime) -> Vec<CertificateDer<'static>> {
        let dropped: Vec<_> = self
            .state
            .phases(now)
            .filter(|(_, phase)| *phase == Phase::Dropped)
            .map(|(root, _)| root.number)
            .collect();
        let trusted = self.roots.iter().filter(|root| !dropped.contains(&root.state.number));
        trusted.map(|root| root.certificate.clone()).collect()
    }
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("state", &self.state).finish_non_exhaustive()
    }
}

fn write_root(
    directory: &Path,
    domain: &TrustDomain,
    number: u32,
    now: SystemTime,
    life: Duration,
) -> Result<(), DirectoryError> {
    let root = sign::new_root(domain, number, now, life)?;
    files::write(&key_path(directory, number), root.key.to_pem().as_bytes())?;
    Ok(files::write(&certificate_path(directory, number), root.pem.as_bytes())?)
}

/// The certificate of a root.
///
/// # Errors
/// When it is not there, others may read it, or it is broken.
pub fn read_certificate(directory: &Path, number: u32) -> Result<CertificateDer<'static>, DirectoryError> {
    let path = certificate_path(directory, number);
    let pem = files::read(&path)?;
    let certificates = x509::certificates_of_pem(&pem)
        .map_err(|error| DirectoryError::Root(path.clone(), error.to_string()))?;
    match <[_; 1]>::try_from(certificates) {
        Ok([certificate]) => Ok(certificate),
        Err(_) => Err(DirectoryError::Root(path, "there is more than one certificate in it".into())),
    }
}

fn read_signer(
    directory: &Path,
    number: u32,
    certificate: &CertificateDer<'static>,
) -> Result<Signer, DirectoryError> {
    let path = key_path(directory, number);
    let pem = files::read(&path)?;
    let broken = |why: String| DirectoryError::Root(path.clone(), why);
    let pem = std::str::from_utf8(&pem).map_err(|error| broken(error.to_string()))?;
    let key = PrivateKey::from_pem(pem).map_err(|error| broken(error.to_string()))?;
    let facts = x509::Facts::read(certificate).map_err(|error| broken(error.to_string()))?;
    if facts.public_key != key.public_key() {
        return Err(broken(format!(
            "it is not the key of {}",
            certificate_path(directory, number).display()
        )));
    }
    Ok(Signer::new(certificate.clone(), key))
}

fn state_path(directory: &Path) -> PathBuf {
    directory.join("state.json")
}

fn certificate_path(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("root-{number}.pem"))
}

fn key_path(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("root-{number}.key.pem"))
}

fn unavailable(error: impl std::fmt::Display) -> CaError {
    CaError::Unavailable(error.to_string())
}

#[cfg(test)]
mod tests;

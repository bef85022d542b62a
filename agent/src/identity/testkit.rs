//! What the tests of this module share: clocks that tests move, authorities that tests command.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls_pki_types::CertificateDer;

use super::ca::sign::{self, Signer};
use super::ca::{CaError, CertificateAuthority, CertificateRequest, IssueFuture, Issued, Roots};
use super::key::PrivateKey;
use super::svid::Svid;
use super::trust::RootSource;
use super::*;

pub(super) const DAY: Duration = Duration::from_secs(86_400);

/// Some time in 2027, and so many seconds.
pub(super) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

pub(super) fn id(text: &str) -> SpiffeId {
    let text =
        if text.contains("//") { text.into() } else { format!("spiffe://cluster.local/ns/shop/sa/{text}") };
    text.parse().unwrap()
}

pub(super) fn domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

/// A certificate as PEM.
pub(super) fn to_pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

/// A clock that stands still until it is moved.
#[derive(Clone, Debug, Default)]
pub(super) struct Hands(Arc<AtomicU64>);

impl Hands {
    pub(super) fn set(&self, seconds: u64) {
        self.0.store(seconds, Ordering::SeqCst);
    }

    pub(super) fn clock(&self) -> Clock {
        let hands = self.0.clone();
        Clock::of(move || at(hands.load(Ordering::SeqCst)))
    }
}

/// A clock that goes as tokio's does, which a test may pause: a day passes as soon as everybody waits.
pub(super) fn tokio_clock() -> Clock {
    let start = tokio::time::Instant::now();
    Clock::of(move || at(0) + start.elapsed())
}

/// A root and its key.
pub(super) struct Authority {
    pub(super) domain: TrustDomain,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
    pub(super) signer: Signer,
    key_pem: String,
}

impl Authority {
    pub(super) fn new(domain_name: &str, now: SystemTime, life: Duration) -> Arc<Self> {
        let domain = domain(domain_name);
        let root = sign::new_root(&domain, 1, now, life).unwrap();
        let certificate = x509::certificates_of_pem(root.pem.as_bytes()).unwrap().remove(0);
        let key_pem = root.key.to_pem().to_string();
        let signer = Signer::new(certificate.clone(), root.key);
        Arc::new(Self { domain, certificate, pem: root.pem, signer, key_pem })
    }

    pub(super) fn issue(&self, id: &SpiffeId, key: &[u8], now: SystemTime, until: SystemTime) -> Issued {
        let leaf = self.signer.leaf(id, key, now, until).unwrap();
        Issued { chain: vec![leaf], roots: vec![self.certificate.clone()] }
    }

    pub(super) fn svid(&self, id: &SpiffeId, now: SystemTime, until: SystemTime) -> Svid {
        let key = PrivateKey::generate().unwrap();
        Svid::accept(id, &key, self.issue(id, &key.public_key(), now, until), now).unwrap()
    }

    /// A revocation list in PEM that names these serial numbers (hexadecimal).
    pub(super) fn crl(&self, revoked: &[&str], now: SystemTime, next: SystemTime) -> String {
        let bytes = |serial: &str| -> Vec<u8> {
            (0..serial.len()).step_by(2).map(|i| u8::from_str_radix(&serial[i..i + 2], 16).unwrap()).collect()
        };
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&bytes(serial)),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: next.into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let key = PrivateKey::from_pem(&self.key_pem).unwrap();
        let issuer = Issuer::from_ca_cert_der(&self.certificate, key.pair()).unwrap();
        params.signed_by(&issuer).unwrap().pem().unwrap()
    }
}

/// An authority that does what the test says.
pub(super) struct FakeCa {
    pub(super) authority: Mutex<Arc<Authority>>,
    pub(super) clock: Clock,
    pub(super) down: Mutex<Option<CaError>>,
    pub(super) takes: Mutex<Duration>,
    pub(super) asked: AtomicU64,
}

impl FakeCa {
    pub(super) fn new(authority: &Arc<Authority>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            authority: Mutex::new(authority.clone()),
            clock,
            down: Mutex::default(),
            takes: Mutex::default(),
            asked: AtomicU64::new(0),
        })
    }

    pub(super) fn break_down(&self) {
        *self.down.lock().unwrap() = Some(CaError::Unavailable("nobody answers".into()));
    }

    pub(super) fn repair(&self) {
        *self.down.lock().unwrap() = None;
    }

    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

impl std::fmt::Debug for FakeCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeCa")
    }
}

impl CertificateAuthority for FakeCa {
    fn issue<'a>(&'a self, request: &'a CertificateRequest) -> IssueFuture<'a> {
        Box::pin(async {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let takes = *self.takes.lock().unwrap();
            tokio::time::sleep(takes).await;
            if let Some(error) = self.down.lock().unwrap().clone() {
                return Err(error);
            }
            let now = self.clock.now();
            let authority = self.authority.lock().unwrap().clone();
            Ok(authority.issue(&request.id, &request.public_key, now, now + request.validity))
        })
    }

    fn roots(&self) -> Result<Roots, CaError> {
        Ok(Roots::AndThoseIssued(Vec::new()))
    }

    fn backdates_by(&self) -> Option<Duration> {
        Some(sign::BACKDATE)
    }
}

/// One agent's identity side.
pub(super) struct Node {
    pub(super) trust: Arc<Trust>,
    pub(super) store: Arc<CertificateStore>,
    pub(super) tls: Arc<MeshTls>,
    running: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Of the authority's trust domain, with its store running.
    pub(super) fn start(
        ca: Arc<dyn CertificateAuthority>,
        own: &TrustDomain,
        clock: &Clock,
        settings: StoreSettings,
    ) -> Self {
        let trust = Trust::new(own.clone(), CrlMode::Prefer);
        let store = CertificateStore::new(ca, trust.clone(), clock.clone(), settings);
        let running = tokio::spawn(store.clone().run());
        let tls = MeshTls::new(store.clone(), trust.clone(), clock.clone());
        Self { trust, store, tls, running }
    }

    /// With an authority, whose certificates begin now by the clock, and one certificate.
    pub(super) async fn with(authority: &Arc<Authority>, clock: &Clock, holds: &SpiffeId) -> Self {
        let ca = FakeCa::new(authority, clock.clone());
        let node = Self::start(ca, &authority.domain, clock, StoreSettings::default());
        node.store.ensure(holds);
        node.store.get(holds).await.unwrap();
        node
    }

    pub(super) fn believe(&self, authority: &Authority) {
        self.trust
            .set_roots(&authority.domain, RootSource::File, std::slice::from_ref(&authority.certificate))
            .unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.running.abort();
    }
}

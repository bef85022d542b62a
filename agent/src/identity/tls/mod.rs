//! TLS between the nodes, as ztunnel has it: 1.3 only, AES-GCM, certificates on both sides, `h2`.
//!
//! Here rustls is put together, and here a handshake becomes a [`PeerIdentity`]. Which peer was meant, and what it may
//! do, is for others to say.

mod standing;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::reason::{HandshakeError, HandshakeReason};
use super::svid::Svid;
use super::x509::Facts;
use super::{CertificateStore, Clock, SpiffeId, Trust};
pub use standing::{Observer, Standing};
use verify::{MeshClientVerifier, MeshServerVerifier, Present};

/// The protocol inside: HBONE is HTTP/2.
const ALPN: &[u8] = b"h2";

/// How long a peer that is refused may take to notice.
const FAREWELL: Duration = Duration::from_millis(500);

/// Configurations for one local identity that are kept, one for each set of peers that it dials.
const MAX_CLIENTS: usize = 4096;

/// The identity of a peer whose certificate was checked in a handshake. Only that check makes one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerIdentity(SpiffeId);

/// Whom a client means: any of these identities will do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Expected(Arc<[SpiffeId]>);

/// Makes the two ends of a handshake, and keeps what they are made from until it changes.
#[derive(Debug)]
pub struct MeshTls {
    store: Arc<CertificateStore>,
    trust: Arc<Trust>,
    clock: Clock,
    provider: Arc<CryptoProvider>,
    kept: RwLock<HashMap<SpiffeId, Kept>>,
}

/// The server's end, with a certificate of its own.
#[derive(Clone, Debug)]
pub struct ServerTls(Arc<ServerConfig>);

/// The client's end, with a certificate of its own and a peer in mind.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<ClientConfig>);

/// There is no certificate to show: not received yet, or nobody asked for one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no certificate for {0} yet")]
pub struct NoCertificateYet(pub SpiffeId);

/// What was made for one certificate.
#[derive(Debug)]
struct Kept {
    svid: Arc<Svid>,
    server: ServerTls,
    clients: HashMap<Expected, ClientTls>,
}

impl MeshTls {
    /// Shows the store's certificates and believes what the trust says.
    pub fn new(store: Arc<CertificateStore>, trust: Arc<Trust>, clock: Clock) -> Arc<Self> {
        Arc::new(Self { store, trust, clock, provider: Arc::new(provider()), kept: RwLock::default() })
    }

    /// The server's end for a pod of this identity. Cheap, except once for each certificate.
    ///
    /// # Errors
    /// When the identity has no certificate yet.
    pub fn server(&self, local: &SpiffeId) -> Result<ServerTls, NoCertificateYet> {
        let svid = self.svid(local)?;
        if let Some(kept) = self.kept().get(local).filter(|kept| Arc::ptr_eq(&kept.svid, &svid)) {
            return Ok(kept.server.clone());
        }
        self.keep(local, svid, |kept| kept.server.clone())
    }

    /// The client's end for a pod of this identity that dials the expected peer. Cheap, except once for each
    /// certificate and expectation.
    ///
    /// # Errors
    /// When the identity has no certificate yet.
    pub fn client(&self, local: &SpiffeId, expected: &Expected) -> Result<ClientTls, NoCertificateYet> {
        let svid = self.svid(local)?;
        if let Some(kept) = self.kept().get(local).filter(|kept| Arc::ptr_eq(&kept.svid, &svid))
            && let Some(client) = kept.clients.get(expected)
        {
            return Ok(client.clone());
        }
        self.keep(local, svid, |kept| {
            if kept.clients.len() >= MAX_CLIENTS {
                kept.clients.clear();
            }
            let Kept { svid, clients, .. } = kept;
            clients.entry(expected.clone()).or_insert_with(|| self.new_client(svid, expected)).clone()
        })
    }

    /// To be taken before a handshake whose peer is to be kept an eye on.
    pub fn observer(&self) -> Observer {
        Observer::new(self.trust.clone(), self.clock.clone())
    }

    fn svid(&self, local: &SpiffeId) -> Result<Arc<Svid>, NoCertificateYet> {
        self.store.current(local).ok_or_else(|| NoCertificateYet(local.clone()))
    }

    fn kept(&self) -> std::sync::RwLockReadGuard<'_, HashMap<SpiffeId, Kept>> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what is missing, and forgets what belongs to certificates that are not in use any more: their keys go
    /// with it.
    fn keep<T>(
        &self,
        local: &SpiffeId,
        svid: Arc<Svid>,
        take: impl FnOnce(&mut Kept) -> T,
    ) -> Result<T, NoCertificateYet> {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        let in_use = |id: &SpiffeId, kept: &Kept| {
            self.store.current(id).is_some_and(|current| Arc::ptr_eq(&current, &kept.svid))
        };
        kept.retain(|id, kept| in_use(id, kept) || (id == local && Arc::ptr_eq(&kept.svid, &svid)));
        let entry = kept.entry(local.clone()).or_insert_with(|| Kept {
            server: self.new_server(&svid),
            clients: HashMap::new(),
            svid,
        });
        Ok(take(entry))
    }

    fn new_server(&self, svid: &Svid) -> ServerTls {
        let verifier = Arc::new(MeshClientVerifier { trust: self.trust.clone(), clock: self.clock.clone() });
        let builder = ServerConfig::builder_with_details(self.provider.clone(), Arc::new(self.clock.clone()));
        let mut config = builder
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Present(svid.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would outlive the check of the peer's certificate.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        ServerTls(Arc::new(config))
    }

    fn new_client(&self, svid: &Svid, expected: &Expected) -> ClientTls {
        let verifier = Arc::new(MeshServerVerifier {
            trust: self.trust.clone(),
            clock: self.clock.clone(),
            expected: expected.clone(),
        });
        let builder = ClientConfig::builder_with_details(self.provider.clone(), Arc::new(self.clock.clone()));
        let mut config = builder
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(Present(svid.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        ClientTls(Arc::new(config))
    }
}

impl ServerTls {
    /// Shakes hands with a client. Takes as long as the client does: the caller has the time-out.
    ///
    /// # Errors
    /// When the client is not to be trusted, speaks something else, or goes away.
    pub async fn accept<IO>(&self, io: IO) -> Result<(server::TlsStream<IO>, PeerIdentity), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = match TlsAcceptor::from(self.0.clone()).accept(io).into_fallible().await {
            Ok(stream) => stream,
            Err((error, io)) => {
                let error = HandshakeError::of_io(&error);
                if !error.by_peer && error.reason != HandshakeReason::Closed {
                    let _ = timeout(FAREWELL, farewell(io)).await;
                }
                return Err(error);
            }
        };
        let peer = self.peer(stream.get_ref().1)?;
        Ok((stream, peer))
    }

    /// The peer of a connection that was made with this configuration and whose handshake is done.
    ///
    /// # Errors
    /// When it is not done, or no protocol was agreed on.
    pub fn peer(&self, connection: &CommonState) -> Result<PeerIdentity, HandshakeError> {
        peer(connection)
    }

    /// For whoever drives rustls himself.
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.0
    }
}

impl ClientTls {
    /// Shakes hands with a server. Takes as long as the server does: the caller has the time-out. That the server
    /// refuses *us* shows only when the stream is read ([`HandshakeError::of_io`]).
    ///
    /// # Errors
    /// When the server is not the one that was meant, speaks something else, or goes away.
    pub async fn connect<IO>(&self, io: IO) -> Result<(client::TlsStream<IO>, PeerIdentity), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let connected = TlsConnector::from(self.0.clone()).connect(Self::server_name(), io).await;
        let stream = connected.map_err(|error| HandshakeError::of_io(&error))?;
        let peer = self.peer(stream.get_ref().1)?;
        Ok((stream, peer))
    }

    /// The peer of a connection that was made with this configuration and whose handshake is done.
    ///
    /// # Errors
    /// When it is not done, or no protocol was agreed on.
    pub fn peer(&self, connection: &CommonState) -> Result<PeerIdentity, HandshakeError> {
        peer(connection)
    }

    /// For whoever drives rustls himself, with [`ClientTls::server_name`].
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.0
    }

    /// What rustls wants to be told and never sends: names are no identities here.
    pub fn server_name() -> ServerName<'static> {
        ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
    }
}

/// Waits until the peer has closed as well: a connection that is dropped with unread bytes in it is reset, and the reset
/// overtakes the alert that tells the peer why.
async fn farewell<IO: AsyncRead + AsyncWrite + Unpin>(mut io: IO) -> io::Result<()> {
    io.shutdown().await?;
    tokio::io::copy(&mut io, &mut tokio::io::sink()).await?;
    Ok(())
}

fn peer(connection: &CommonState) -> Result<PeerIdentity, HandshakeError> {
    if connection.is_handshaking() {
        return Err(HandshakeError::protocol("the handshake is not done"));
    }
    // rustls refuses another protocol, but not a peer that asks for none.
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::protocol("the peer did not agree on h2"));
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    let leaf = leaf.ok_or_else(|| HandshakeError::of(&rustls::Error::NoCertificatesPresented))?;
    // The verifier has read the same; a certificate that it let pass has an identity.
    let id = Facts::read(leaf).and_then(|facts| facts.identity());
    id.map(PeerIdentity).map_err(|error| HandshakeError::of(&super::reason::PeerRejected::from(error).into()))
}

/// What is spoken: the two suites, and the groups in the order of preference.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    }
}

impl PeerIdentity {
    /// Who the peer is.
    pub fn id(&self) -> &SpiffeId {
        &self.0
    }
}

impl std::ops::Deref for PeerIdentity {
    type Target = SpiffeId;

    fn deref(&self) -> &SpiffeId {
        &self.0
    }
}

impl std::fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Expected {
    /// Any of these, in any order; none at all matches nobody.
    pub fn any_of(ids: impl IntoIterator<Item = SpiffeId>) -> Self {
        let mut ids: Vec<_> = ids.into_iter().collect();
        ids.sort_unstable();
        ids.dedup();
        Self(ids.into())
    }

    /// True if it is one of them.
    pub fn allows(&self, id: &SpiffeId) -> bool {
        self.0.contains(id)
    }
}

impl From<SpiffeId> for Expected {
    fn from(id: SpiffeId) -> Self {
        Self(Arc::from([id]))
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids: Vec<_> = self.0.iter().map(SpiffeId::as_str).collect();
        f.write_str(&ids.join(" or "))
    }
}

#[cfg(test)]
mod tests;

//! Which certificates are taken for a server's, and what is said of one that is not.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use super::*;

const SPIFFE: &str = "spiffe://cluster.local/ns/shop/sa/pay";

/// An authority, and a server with a certificate of it for these names.
struct Server {
    root: Vec<u8>,
    acceptor: TlsAcceptor,
}

impl Server {
    fn new(
        names: &[&str],
        protocols: &[&[u8]],
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Self {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // By its name a certificate's issuer is looked for.
        authority.distinguished_name.push(DnType::OrganizationName, fastrand::u64(..).to_string());
        let authority_key = KeyPair::generate().unwrap();
        let root = authority.self_signed(&authority_key).unwrap().der().to_vec();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.contains("://") {
                true => SanType::URI((*name).try_into().unwrap()),
                false => SanType::DnsName((*name).try_into().unwrap()),
            })
            .collect();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Self { root, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }

    /// Of both versions of HTTP.
    fn of(names: &[&str]) -> Self {
        Self::new(names, &[H2, b"http/1.1"], rustls::ALL_VERSIONS)
    }

    fn named(&self, hostname: &str, alt_names: &[AltName]) -> BackendTls {
        BackendTls {
            authorities: Authorities::Given(vec![self.root.clone()]),
            hostname: hostname.into(),
            alt_names: alt_names.to_vec(),
        }
    }

    /// How it goes for a client that asks for this: why not, if TLS is not begun.
    async fn meets(&self, tls: BackendTls, dialect: Dialect) -> Result<(), (RefuseReason, String)> {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let acceptor = self.acceptor.clone();
        let server = tokio::spawn(async move { acceptor.accept(theirs).await.is_ok() });
        let clients = BackendTlsClients::default();
        let begun = clients.begin(&Arc::new(tls), dialect, ours, Duration::from_secs(10)).await;
        let begun = begun.map(drop).map_err(|NotBegun { reason, detail }| (reason, detail));
        server.await.unwrap();
        begun
    }
}

fn host(name: &str) -> AltName {
    AltName::Hostname(name.into())
}

#[tokio::test]
async fn a_server_is_known_by_its_name_or_by_others_that_are_given_instead() {
    let server = Server::of(&["pay.test", "*.shop.test", SPIFFE]);
    let check = async |hostname: &str, alt_names: &[AltName], is_it: bool| {
        let met = server.meets(server.named(hostname, alt_names), Dialect::Http1).await;
        assert_eq!(met.is_ok(), is_it, "{hostname} {alt_names:?}: {met:?}");
        if let Err((reason, _)) = met {
            assert_eq!(reason, RefuseReason::CertificateRefused);
        }
    };
    check("pay.test", &[], true).await;
    check("a.shop.test", &[], true).await;
    check("other.test", &[], false).await;
    // The name that is asked for is not one that is believed beside others.
    check("pay.test", &[host("other.test")], false).await;
    check("other.test", &[host("pay.test")], true).await;
    check("other.test", &[host("nobody.test"), AltName::Uri(SPIFFE.into())], true).await;
    check("other.test", &[AltName::Uri(format!("{SPIFFE}s").into())], false).await;
    check("other.test", &[host("b.shop.test")], true).await;
    check("other.test", &[host("*.shop.test")], true).await;
    check("other.test", &[host("*.test")], true).await;
    check("other.test", &[host("*.pay.test")], false).await;
    check("other.test", &[host("*.ay.test")], false).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_told() {
    let (server, other) = (Server::of(&["pay.test"]), Server::of(&["pay.test"]));
    let told = async |tls| server.meets(tls, Dialect::Http1).await.unwrap_err().1;
    let of_another = told(other.named("pay.test", &[])).await;
    let expected = "its certificate is refused: none of the authorities that are believed has made it";
    assert_eq!(of_another, expected);
    let misnamed = told(server.named("other.test", &[])).await;
    assert!(misnamed.contains("other.test") && misnamed.contains("pay.test"), "{misnamed}");
    let unnamed = told(server.named("pay.test", &[host("other.test")])).await;
    assert_eq!(
        unnamed,
        "its certificate is refused: it has none of the names that the policy asks for, but pay.test"
    );
    // The system believes nobody whom a test has made.
    let system = BackendTls { authorities: Authorities::System, ..server.named("pay.test", &[]) };
    assert_eq!(server.meets(system, Dialect::Http1).await.unwrap_err().0, RefuseReason::CertificateRefused);
}

#[tokio::test]
async fn the_version_of_http_is_that_of_the_request() {
    let tls = |server: &Server| server.named("pay.test", &[]);
    let failed = async |server: &Server, dialect| {
        let (reason, detail) = server.meets(tls(server), dialect).await.unwrap_err();
        assert_eq!(reason, RefuseReason::TlsFailed, "{detail}");
        detail
    };
    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
        let both = Server::new(&["pay.test"], &[H2, b"http/1.1"], versions);
        both.meets(tls(&both), Dialect::Http1).await.unwrap();
        both.meets(tls(&both), Dialect::Http2).await.unwrap();
    }
    let old = Server::new(&["pay.test"], &[b"http/1.1"], rustls::ALL_VERSIONS);
    old.meets(tls(&old), Dialect::Http1).await.unwrap();
    failed(&old, Dialect::Http2).await;
    let silent = Server::new(&["pay.test"], &[], rustls::ALL_VERSIONS);
    silent.meets(tls(&silent), Dialect::Http1).await.unwrap();
    assert_eq!(failed(&silent, Dialect::Http2).await, "it does not agree to HTTP/2 (ALPN)");
    let new = Server::new(&["pay.test"], &[H2], rustls::ALL_VERSIONS);
    failed(&new, Dialect::Http1).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_not_waited_for_for_ever() {
    let server = Server::of(&["pay.test"]);
    let (ours, _theirs) = tokio::io::duplex(64 * 1024);
    let clients = BackendTlsClients::default();
    let tls = Arc::new(server.named("pay.test", &[]));
    let begun = clients.begin(&tls, Dialect::Http1, ours, Duration::from_secs(10)).await;
    assert_eq!(begun.unwrap_err().reason, RefuseReason::ConnectTimeout);
}

#[test]
fn clients_of_policies_that_have_changed_are_forgotten() {
    let server = Server::of(&["pay.test"]);
    let clients = BackendTlsClients::default();
    let count = || clients.0.lock().unwrap().len();
    let before = Arc::new(server.named("pay.test", &[]));
    clients.client(&before).unwrap();
    clients.client(&Arc::new(BackendTls::clone(&before))).unwrap();
    assert_eq!(count(), 1, "the same is not there twice");
    drop(before);
    clients.client(&Arc::new(server.named("other.test", &[]))).unwrap();
    assert_eq!(count(), 1);
}

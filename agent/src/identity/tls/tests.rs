//! Handshakes in memory: who gets in, who does not, and what both sides say about it.

use std::time::Duration;

use expect_test::{Expect, expect};
use rustls::version::{TLS12, TLS13};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;
use crate::identity::HandshakeReason;
use crate::identity::testkit::*;

/// What came of a handshake at one end: the peer's name, or why not.
fn told<T>(outcome: &Result<(T, PeerIdentity), HandshakeError>) -> String {
    match outcome {
        Ok((_, peer)) => peer.to_string(),
        Err(error) => reason(error),
    }
}

fn reason(error: &HandshakeError) -> String {
    format!("{}{}", error.reason.as_str(), if error.by_peer { " (says the peer)" } else { "" })
}

/// Both ends of a handshake, and for a client that got through what it reads then.
async fn shake(client: &ClientTls, server: &ServerTls) -> String {
    let (near, far) = duplex(64 * 1024);
    let serve = async {
        let outcome = server.accept(far).await;
        let told = told(&outcome);
        if let Ok((mut stream, _)) = outcome {
            stream.write_all(b"x").await.unwrap();
            _ = stream.shutdown().await;
        }
        told
    };
    let ask = async {
        match client.connect(near).await {
            Ok((mut stream, peer)) => match stream.read_u8().await {
                Ok(_) => peer.to_string(),
                Err(error) => reason(&HandshakeError::of_io(&error)),
            },
            Err(error) => reason(&error),
        }
    };
    let (client, server) = tokio::join!(ask, serve);
    format!("client: {client}; server: {server}")
}

/// The server's end against a client of rustls's own making.
async fn served(server: &ServerTls, client: ClientConfig) -> String {
    let (near, far) = duplex(64 * 1024);
    let ask = TlsConnector::from(Arc::new(client)).connect(ClientTls::server_name(), near);
    let (_, outcome) = tokio::join!(ask, server.accept(far));
    told(&outcome)
}

struct Mesh {
    hands: Hands,
    authority: Arc<crate::identity::testkit::Authority>,
    web: Node,
    db: Node,
}

impl Mesh {
    async fn new() -> Self {
        let hands = Hands::default();
        let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
        let web = Node::with(&authority, &hands.clock(), &id("web")).await;
        let db = Node::with(&authority, &hands.clock(), &id("db")).await;
        Self { hands, authority, web, db }
    }

    fn server(&self) -> ServerTls {
        self.db.tls.server(&id("db")).unwrap()
    }

    fn client(&self, expected: &str) -> ClientTls {
        self.web.tls.client(&id("web"), &id(expected).into()).unwrap()
    }
}

fn check(actual: &str, expected: Expect) {
    expected.assert_eq(actual);
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let mesh = Mesh::new().await;
    check(
        &shake(&mesh.client("db"), &mesh.server()).await,
        expect![
            "client: spiffe://cluster.local/ns/shop/sa/db; server: spiffe://cluster.local/ns/shop/sa/web"
        ],
    );
    let any = Expected::any_of([id("db-canary"), id("db")]);
    let client = mesh.web.tls.client(&id("web"), &any).unwrap();
    check(
        &shake(&client, &mesh.server()).await,
        expect![
            "client: spiffe://cluster.local/ns/shop/sa/db; server: spiffe://cluster.local/ns/shop/sa/web"
        ],
    );
    let nobody = mesh.web.tls.client(&id("web"), &Expected::any_of([])).unwrap();
    check(
        &shake(&nobody, &mesh.server()).await,
        expect!["client: wrong_identity; server: bad_certificate (says the peer)"],
    );
}

/// A stranger takes each role in turn.
#[tokio::test]
async fn strangers_and_what_both_sides_say_of_them() {
    let mesh = Mesh::new().await;
    let clock = |seconds: u64| {
        let hands = Hands::default();
        hands.set(seconds);
        hands.clock()
    };
    let now = 10 * 86_400;
    // Renewed at the new time, as the running agents would have.
    mesh.hands.set(now);
    let web = Node::with(&mesh.authority, &mesh.hands.clock(), &id("web")).await;
    let db = Node::with(&mesh.authority, &mesh.hands.clock(), &id("db")).await;
    let other = Authority::new("cluster.local", at(0), 3650 * DAY);
    let elsewhere = Authority::new("elsewhere.test", at(0), 3650 * DAY);
    let old_root = Authority::new("cluster.local", at(0), 5 * DAY);
    let far = "spiffe://elsewhere.test/ns/shop/sa/";

    let mut lines = String::new();
    for (name, authority, seconds, prefix) in [
        ("one of us", &mesh.authority, now, ""),
        ("signed by another authority", &other, now, ""),
        ("expired", &mesh.authority, now - 2 * 86_400, ""),
        ("not yet valid", &mesh.authority, now + 86_400, ""),
        ("another trust domain", &elsewhere, now, far),
        ("under a root that has expired", &old_root, now - 6 * 86_400, ""),
    ] {
        for role in ["web", "db"] {
            let name_of = |account: &str| id(&format!("{prefix}{account}"));
            let stranger = Node::with(authority, &clock(seconds), &name_of(role)).await;
            stranger.believe(&mesh.authority);
            if name.starts_with("under") {
                web.believe(&old_root);
                db.believe(&old_root);
            }
            let said = match role {
                "web" => {
                    let client = stranger.tls.client(&name_of("web"), &id("db").into()).unwrap();
                    // It checks nobody: by its own clock, we may not be valid.
                    let client = ClientTls(trusting(&client));
                    shake(&client, &db.tls.server(&id("db")).unwrap()).await
                }
                _ => {
                    let client = web.tls.client(&id("web"), &name_of("db").into()).unwrap();
                    shake(&client, &stranger.tls.server(&name_of("db")).unwrap()).await
                }
            };
            lines += &format!("{name}, as {}: {said}\n", if role == "web" { "client" } else { "server" });
        }
    }
    let wrong = web.tls.client(&id("web"), &id("pay").into()).unwrap();
    lines += &format!("not who was meant: {}\n", shake(&wrong, &db.tls.server(&id("db")).unwrap()).await);
    check(
        &lines,
        expect![[r#"
        one of us, as client: client: spiffe://cluster.local/ns/shop/sa/db; server: spiffe://cluster.local/ns/shop/sa/web
        one of us, as server: client: spiffe://cluster.local/ns/shop/sa/db; server: spiffe://cluster.local/ns/shop/sa/web
        signed by another authority, as client: client: unknown_issuer (says the peer); server: unknown_issuer
        signed by another authority, as server: client: unknown_issuer; server: unknown_issuer (says the peer)
        expired, as client: client: expired (says the peer); server: expired
        expired, as server: client: expired; server: expired (says the peer)
        not yet valid, as client: client: expired (says the peer); server: not_yet_valid
        not yet valid, as server: client: not_yet_valid; server: expired (says the peer)
        another trust domain, as client: client: bad_certificate (says the peer); server: wrong_trust_domain
        another trust domain, as server: client: wrong_trust_domain; server: bad_certificate (says the peer)
        under a root that has expired, as client: client: expired (says the peer); server: expired
        under a root that has expired, as server: client: expired; server: expired (says the peer)
        not who was meant: client: wrong_identity; server: bad_certificate (says the peer)
    "#]],
    );
}

/// The same client, believing whatever the server shows.
fn trusting(client: &ClientTls) -> Arc<ClientConfig> {
    #[derive(Debug)]
    struct Anybody(MeshServerVerifier);

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls_pki_types::{CertificateDer, UnixTime};

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.supported_verify_schemes()
        }
    }

    let mut config = ClientConfig::clone(&client.0);
    let verifier = MeshServerVerifier {
        trust: Trust::new(domain("td"), crate::identity::CrlMode::Off),
        clock: Clock::system(),
        expected: Expected::any_of([]),
    };
    config.dangerous().set_certificate_verifier(Arc::new(Anybody(verifier)));
    Arc::new(config)
}

#[tokio::test]
async fn clients_that_speak_something_else() {
    let mesh = Mesh::new().await;
    let base = ClientConfig::clone(&trusting(&mesh.client("db")));
    let server = mesh.server();
    let with = |change: &dyn Fn(&mut ClientConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    assert_eq!(served(&server, base.clone()).await, id("web").as_str());
    let alpn = |protocols: &[&str]| {
        with(&|config| config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect())
    };
    assert_eq!(served(&server, alpn(&["http/1.1"])).await, "protocol");
    assert_eq!(served(&server, alpn(&[])).await, "protocol");
    assert_eq!(served(&server, alpn(&["http/1.1", "h2"])).await, id("web").as_str());

    let no_certificate = with(&|config| {
        config.client_auth_cert_resolver = Arc::new(Nothing);
    });
    assert_eq!(served(&server, no_certificate).await, "no_certificate");

    let raw = |provider: CryptoProvider, version| {
        let builder = ClientConfig::builder_with_provider(Arc::new(provider));
        let mut config = builder
            .with_protocol_versions(&[version])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(MeshServerVerifier {
                trust: mesh.web.trust.clone(),
                clock: mesh.hands.clock(),
                expected: id("db").into(),
            }))
            .with_client_cert_resolver(base.client_auth_cert_resolver.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    };
    let all = aws_lc_rs::default_provider;
    assert_eq!(served(&server, raw(all(), &TLS13)).await, id("web").as_str());
    assert_eq!(served(&server, raw(all(), &TLS12)).await, "protocol");
    let suites = |suite| CryptoProvider { cipher_suites: vec![suite], ..all() };
    let chacha = suites(aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    assert_eq!(served(&server, raw(chacha, &TLS13)).await, "protocol");
    let aes128 = suites(aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256);
    assert_eq!(served(&server, raw(aes128, &TLS13)).await, id("web").as_str());
    let groups = |group| CryptoProvider { kx_groups: vec![group], ..all() };
    for group in [aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1] {
        assert_eq!(served(&server, raw(groups(group), &TLS13)).await, id("web").as_str());
    }
    assert_eq!(served(&server, raw(groups(aws_lc_rs::kx_group::SECP384R1), &TLS13)).await, "protocol");
}

/// Has no certificate.
#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn bytes_that_are_no_handshake() {
    let mesh = Mesh::new().await;
    let feed = async |bytes: &[u8]| {
        let (mut near, far): (DuplexStream, DuplexStream) = duplex(64 * 1024);
        near.write_all(bytes).await.unwrap();
        drop(near);
        mesh.server().accept(far).await.unwrap_err().reason
    };
    assert_eq!(feed(b"GET / HTTP/1.1\r\n\r\n").await, HandshakeReason::Protocol);
    assert_eq!(feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await, HandshakeReason::Protocol);
    assert_eq!(feed(&[0x16, 3, 1, 0xff, 0xff]).await, HandshakeReason::Protocol);
    assert_eq!(feed(b"").await, HandshakeReason::Closed);
    assert_eq!(feed(&[0x16, 3, 1, 0, 9, 1]).await, HandshakeReason::Closed);
}

#[tokio::test]
async fn the_handshake_is_post_quantum_nameless_and_never_resumed() {
    let mesh = Mesh::new().await;
    for _ in 0..2 {
        let (near, far) = duplex(64 * 1024);
        let (client, server) = (mesh.client("db"), mesh.server());
        let (client, server) = tokio::join!(client.connect(near), server.accept(far));
        let ((client, _), (mut server, _)) = (client.unwrap(), server.unwrap());
        server.write_all(b"x").await.unwrap();
        let (_, client) = client.into_inner();
        let (_, server) = server.into_inner();
        let group = client.negotiated_key_exchange_group().map(|group| group.name());
        assert_eq!(group, Some(rustls::NamedGroup::X25519MLKEM768));
        let suite = client.negotiated_cipher_suite().map(|suite| suite.suite());
        assert_eq!(suite, Some(rustls::CipherSuite::TLS13_AES_256_GCM_SHA384));
        assert_eq!(server.server_name(), None);
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(client.peer_certificates().map(<[_]>::len), Some(2), "leaf and root");
    }
}

#[tokio::test(start_paused = true)]
async fn configurations_are_made_once_for_each_certificate() {
    let clock = tokio_clock();
    let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
    let node = Node::with(&authority, &clock, &id("web")).await;
    let server = node.tls.server(&id("web")).unwrap();
    let client = node.tls.client(&id("web"), &id("db").into()).unwrap();
    let same = |node: &Node| {
        let again = node.tls.client(&id("web"), &Expected::any_of([id("db"), id("db")])).unwrap();
        let server_again = node.tls.server(&id("web")).unwrap();
        (Arc::ptr_eq(&again.0, &client.0), Arc::ptr_eq(&server_again.0, &server.0))
    };
    assert_eq!(same(&node), (true, true));
    tokio::time::sleep(Duration::from_secs(14 * 3_600)).await;
    assert_eq!(same(&node), (false, false), "renewed in between");
    assert_eq!(node.tls.kept().len(), 1);

    node.store.ensure(&id("pay"));
    node.store.get(&id("pay")).await.unwrap();
    node.store.release(&id("web"));
    assert_eq!(node.tls.server(&id("web")).unwrap_err(), NoCertificateYet(id("web")));
    node.tls.server(&id("pay")).unwrap();
    assert_eq!(node.tls.kept().keys().collect::<Vec<_>>(), [&id("pay")], "the key of web is gone");
}

#[tokio::test]
async fn a_federated_domain_is_let_in_while_it_is_believed() {
    let mesh = Mesh::new().await;
    let elsewhere = Authority::new("elsewhere.test", at(0), 3650 * DAY);
    let far = id("spiffe://elsewhere.test/ns/shop/sa/web");
    let stranger = Node::with(&elsewhere, &mesh.hands.clock(), &far).await;
    stranger.believe(&mesh.authority);
    let client = stranger.tls.client(&far, &id("db").into()).unwrap();
    let mut lines = shake(&client, &mesh.server()).await + "\n";
    mesh.db.believe(&elsewhere);
    lines += &(shake(&client, &mesh.server()).await + "\n");
    // The other domain's roots vouch for nobody of ours.
    let forged = elsewhere.svid(&id("web"), at(0), at(86_400));
    let mut config = ClientConfig::clone(client.config());
    config.client_auth_cert_resolver = Arc::new(Present(forged.key.clone()));
    lines += &(shake(&ClientTls(Arc::new(config)), &mesh.server()).await + "\n");
    mesh.db.trust.set_roots(&domain("elsewhere.test"), crate::identity::RootSource::File, &[]).unwrap();
    lines += &shake(&client, &mesh.server()).await;
    check(
        &lines,
        expect![[r#"
        client: bad_certificate (says the peer); server: wrong_trust_domain
        client: spiffe://cluster.local/ns/shop/sa/db; server: spiffe://elsewhere.test/ns/shop/sa/web
        client: unknown_issuer (says the peer); server: unknown_issuer
        client: bad_certificate (says the peer); server: wrong_trust_domain"#]],
    );
}

/// Each side believes both domains and shows one after the other: its own certificate, one of its own id that the other
/// domain's authority has signed, and one of the other domain's id that its own authority has signed.
#[tokio::test]
async fn no_domain_vouches_for_an_id_of_another() {
    let mesh = Mesh::new().await;
    let theirs = Authority::new("elsewhere.test", at(0), 3650 * DAY);
    let (web, db) = (id("web"), id("spiffe://elsewhere.test/ns/shop/sa/db"));
    let far = Node::with(&theirs, &mesh.hands.clock(), &db).await;
    far.believe(&mesh.authority);
    mesh.web.believe(&theirs);
    let forged = |authority: &Authority, id: &SpiffeId| {
        Arc::new(Present(authority.svid(id, at(0), at(86_400)).key.clone()))
    };
    let client = |expected: &SpiffeId| mesh.web.tls.client(&web, &expected.clone().into()).unwrap();
    let server = far.tls.server(&db).unwrap();
    let mut lines = format!("federated: {}\n", shake(&client(&db), &server).await);
    for (name, authority, shown) in
        [("ours signs for theirs", &mesh.authority, &db), ("theirs signs for ours", &theirs, &web)]
    {
        let mut config = ServerConfig::clone(server.config());
        config.cert_resolver = forged(authority, shown);
        let impostor = ServerTls(Arc::new(config));
        lines += &format!("{name}, as server: {}\n", shake(&client(shown), &impostor).await);

        let mut config = ClientConfig::clone(client(&db).config());
        config.client_auth_cert_resolver = forged(authority, shown);
        let impostor = ClientTls(Arc::new(config));
        lines += &format!("{name}, as client: {}\n", shake(&impostor, &server).await);
    }
    // The same account, but of the domain that was not meant.
    let ours = client(&id("db"));
    lines += &format!("another domain's namesake: {}\n", shake(&ours, &server).await);
    check(
        &lines,
        expect![[r#"
            federated: client: spiffe://elsewhere.test/ns/shop/sa/db; server: spiffe://cluster.local/ns/shop/sa/web
            ours signs for theirs, as server: client: unknown_issuer; server: unknown_issuer (says the peer)
            ours signs for theirs, as client: client: unknown_issuer (says the peer); server: unknown_issuer
            theirs signs for ours, as server: client: unknown_issuer; server: unknown_issuer (says the peer)
            theirs signs for ours, as client: client: unknown_issuer (says the peer); server: unknown_issuer
            another domain's namesake: client: wrong_identity; server: bad_certificate (says the peer)
        "#]],
    );
}

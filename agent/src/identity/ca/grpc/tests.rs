//! Against a server of ours that speaks Istio's protocol, over TLS on a loopback port.

use std::net::SocketAddr;
use std::sync::Arc;

use undermesh_tests::istiod::{self, Answer, Asked};
use x509_parser::prelude::{FromDer as _, X509CertificationRequest, parse_x509_pem};

use super::*;
use crate::identity::key::PrivateKey;
use crate::identity::testkit::*;

/// What the server does.
#[derive(Clone, Debug)]
enum Mode {
    Sign,
    SignWith(Vec<String>),
    Fail(Code),
    Answer(Vec<String>),
    Hang,
}

#[derive(Clone)]
struct FakeIstiod {
    authority: Arc<Authority>,
    mode: Arc<Mutex<Mode>>,
    /// What it was asked, as lines.
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeIstiod {
    async fn answer(self, asked: Asked) -> Answer {
        let Asked { authorization, cluster, identity, validity_seconds, .. } = &asked;
        let told = format!("{authorization} {cluster} {identity} {validity_seconds} s");
        self.asked.lock().unwrap().push(told);
        let mode = self.mode.lock().unwrap().clone();
        match mode {
            Mode::Sign => Ok(vec![self.leaf(&asked), self.authority.pem.clone()]),
            Mode::SignWith(rest) => Ok([vec![self.leaf(&asked)], rest].concat()),
            Mode::Fail(code) => Err(Status::new(code, "as told")),
            Mode::Answer(chain) => Ok(chain),
            Mode::Hang => std::future::pending().await,
        }
    }

    fn leaf(&self, asked: &Asked) -> String {
        let (_, pem) = parse_x509_pem(asked.csr.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let key = csr.certification_request_info.subject_pki.raw;
        let until = at(asked.validity_seconds.unsigned_abs());
        to_pem(&self.authority.issue(&asked.identity.parse().unwrap(), key, at(0), until).chain[0])
    }
}

struct Fixture {
    folder: tempfile::TempDir,
    server: FakeIstiod,
    ca: GrpcCa,
    address: SocketAddr,
}

impl Fixture {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
        let key = rcgen::KeyPair::generate().unwrap();
        let own =
            rcgen::CertificateParams::new(["istiod.test".to_owned()]).unwrap().self_signed(&key).unwrap();
        let server = FakeIstiod { authority, mode: Arc::new(Mutex::new(Mode::Sign)), asked: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answers = server.clone();
        let answer = move |asked| answers.clone().answer(asked);
        tokio::spawn(istiod::serve(listener, (own.pem(), key.serialize_pem()), answer));
        std::fs::write(folder.path().join("root.pem"), own.pem()).unwrap();
        std::fs::write(folder.path().join("token"), "first\n").unwrap();
        let ca = GrpcCa::new(settings(&folder, address)).unwrap();
        Self { folder, server, ca, address }
    }

    fn set(&self, mode: Mode) {
        *self.server.mode.lock().unwrap() = mode;
    }

    async fn ask(&self, ca: &GrpcCa) -> Result<Issued, CaError> {
        let key = PrivateKey::generate().unwrap();
        let web = id("web");
        let request = CertificateRequest {
            csr: key.request(&web).unwrap(),
            public_key: key.public_key(),
            validity: DAY,
            id: web,
        };
        let answer = tokio::time::timeout(Duration::from_secs(20), ca.issue(&request)).await.unwrap();
        if let Ok(issued) = &answer {
            let svid = crate::identity::Svid::accept(&request.id, &key, issued.clone(), at(0)).unwrap();
            assert_eq!(svid.not_after, at(86_400));
        }
        answer
    }
}

fn settings(folder: &tempfile::TempDir, address: SocketAddr) -> GrpcSettings {
    GrpcSettings {
        address: format!("https://{address}"),
        server_name: Some("istiod.test".into()),
        root: folder.path().join("root.pem"),
        token: folder.path().join("token"),
        cluster: "Kubernetes".into(),
    }
}

#[tokio::test]
async fn asks_as_a_node_agent_does_and_reads_the_token_each_time() {
    let fixture = Fixture::start().await;
    let issued = fixture.ask(&fixture.ca).await.unwrap();
    assert_eq!((issued.chain.len(), issued.roots.len()), (1, 1));
    std::fs::write(fixture.folder.path().join("token"), "second").unwrap();
    fixture.ask(&fixture.ca).await.unwrap();
    let line = |token| format!("Bearer {token} Kubernetes spiffe://cluster.local/ns/shop/sa/web 86400 s");
    assert_eq!(*fixture.server.asked.lock().unwrap(), [line("first"), line("second")]);
    assert!(!format!("{:?}", fixture.ca).contains("second"));
    std::fs::write(fixture.folder.path().join("token"), " \n").unwrap();
    assert!(
        matches!(fixture.ask(&fixture.ca).await, Err(CaError::Unavailable(text)) if text.ends_with("holds no token"))
    );
}

#[tokio::test]
async fn several_roots_may_come_as_one_text() {
    let fixture = Fixture::start().await;
    let next = Authority::new("cluster.local", at(0), 3650 * DAY);
    let both = format!("{}{}", next.pem, fixture.server.authority.pem);
    fixture.set(Mode::SignWith(vec![both]));
    let issued = fixture.ask(&fixture.ca).await.unwrap();
    assert_eq!(issued.roots, [next.certificate.clone(), fixture.server.authority.certificate.clone()]);
    let Roots::AndThoseIssued(own) = fixture.ca.roots().unwrap() else { panic!() };
    assert_eq!(own.len(), 1);
}

#[tokio::test]
async fn failures_say_who_has_to_act() {
    let fixture = Fixture::start().await;
    let root = fixture.server.authority.pem.clone();
    let many = vec![root.clone(); 40];
    let mut lines = String::new();
    for mode in [
        Mode::Fail(Code::PermissionDenied),
        Mode::Fail(Code::Unauthenticated),
        Mode::Fail(Code::Unavailable),
        Mode::Fail(Code::Internal),
        Mode::Fail(Code::ResourceExhausted),
        Mode::Answer(Vec::new()),
        Mode::Answer(vec![root.clone()]),
        Mode::Answer(vec!["rubbish".into(), root.clone()]),
        Mode::Answer(vec![
            root.clone(),
            "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n".into(),
        ]),
        Mode::Answer(many),
    ] {
        fixture.set(mode);
        lines += &(fixture.ask(&fixture.ca).await.unwrap_err().to_string() + "\n");
    }
    expect_test::expect![[r#"
        the certificate authority refuses: PermissionDenied: as told
        the certificate authority refuses: Unauthenticated: as told
        the certificate authority is not available: Unavailable: as told
        the certificate authority is not available: Internal: as told
        the certificate authority is not available: ResourceExhausted: as told
        the certificate authority's answer is not usable: 0 certificates, and a leaf and a root are the least
        the certificate authority's answer is not usable: 1 certificates, and a leaf and a root are the least
        the certificate authority's answer is not usable: there is no certificate in it
        the certificate authority's answer is not usable: not PEM: base64 decode error: InvalidCharacter(33)
        the certificate authority's answer is not usable: more than 32 certificates
    "#]]
    .assert_eq(&lines);
    // Nothing of that spoils the connection.
    fixture.set(Mode::Sign);
    fixture.ask(&fixture.ca).await.unwrap();
}

#[tokio::test]
async fn an_authority_that_hangs_lies_about_its_name_or_is_not_there() {
    let fixture = Fixture::start().await;
    fixture.set(Mode::Hang);
    let key = PrivateKey::generate().unwrap();
    let request = CertificateRequest {
        id: id("web"),
        csr: key.request(&id("web")).unwrap(),
        public_key: key.public_key(),
        validity: DAY,
    };
    assert!(tokio::time::timeout(Duration::from_millis(200), fixture.ca.issue(&request)).await.is_err());

    let check = async |settings: GrpcSettings, what: &str| {
        let error = fixture.ask(&GrpcCa::new(settings).unwrap()).await.unwrap_err();
        assert!(matches!(&error, CaError::Unavailable(text) if text.contains(what)), "{what}: {error}");
    };
    let good = settings(&fixture.folder, fixture.address);
    check(GrpcSettings { server_name: Some("else.test".into()), ..good.clone() }, "not valid for name").await;
    check(GrpcSettings { address: "https://127.0.0.1:1".into(), ..good.clone() }, "refused").await;
    check(GrpcSettings { root: "/none".into(), ..good.clone() }, "/none: No such file").await;
    check(GrpcSettings { token: "/none".into(), ..good.clone() }, "/none: No such file").await;
    let stranger = fixture.folder.path().join("stranger.pem");
    std::fs::write(&stranger, &fixture.server.authority.pem).unwrap();
    check(GrpcSettings { root: stranger, ..good.clone() }, "UnknownIssuer").await;

    // The authority's root is replaced while we run.
    let path = fixture.folder.path().join("late.pem");
    let late = GrpcCa::new(GrpcSettings { root: path.clone(), ..good }).unwrap();
    assert!(fixture.ask(&late).await.is_err());
    std::fs::copy(fixture.folder.path().join("root.pem"), path).unwrap();
    fixture.set(Mode::Sign);
    fixture.ask(&late).await.unwrap();
}

#[test]
fn settings_that_cannot_be_right() {
    let good = GrpcSettings {
        address: "https://istiod.istio-system.svc:15012".into(),
        server_name: None,
        root: "/root.pem".into(),
        token: "/token".into(),
        cluster: "Kubernetes".into(),
    };
    assert!(GrpcCa::new(good.clone()).is_ok());
    for address in ["", "istiod:15012", "http://istiod:15010", "https://", "unix:/run/x"] {
        let error = GrpcCa::new(GrpcSettings { address: address.into(), ..good.clone() }).unwrap_err();
        assert_eq!(error, GrpcSettingsError::Address(address.into()));
    }
    let error = GrpcCa::new(GrpcSettings { cluster: "a\nb".into(), ..good }).unwrap_err();
    assert_eq!(error, GrpcSettingsError::Cluster("a\nb".into()));
}

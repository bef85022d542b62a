//! Our own client asks the authority over TLS on a loopback port; the API server behind it does what the test says.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use undermesh_tests::issuer::{SigningKey, key_set};

use super::super::listener::Bounds;
use super::super::pods::Index;
use super::super::settings::ControllerSettings;
use super::super::testkit::{finished, pod, settings};
use super::*;
use crate::identity::Clock;
use crate::identity::ca::directory::InitOptions;
use crate::identity::ca::grpc::{GrpcCa, GrpcSettings};
use crate::identity::ca::keyring::Keyring;
use crate::identity::ca::{CertificateAuthority as _, CertificateRequest, Issued};
use crate::kubernetes::testkit::{Answer, FakeApi, Question, failure};

const AGENT: &str = "undermesh-system/undermesh-agent";

/// The authority with its server, and a client on the node `n1`.
struct Fixture {
    folder: tempfile::TempDir,
    address: SocketAddr,
    ca: Ca,
    pods: Arc<Pods>,
    root: Arc<Root>,
    api: FakeApi,
    api_is_down: Arc<AtomicBool>,
    /// What signs service account tokens.
    token_key: SigningKey,
    /// By which the authority's clock is ahead.
    ahead: Arc<AtomicU64>,
    client: GrpcCa,
}

/// Whose tokens the API server knows: each names its node.
fn review(question: &Question) -> Answer {
    assert_eq!(question.path, "/apis/authentication.k8s.io/v1/tokenreviews");
    assert_eq!(question.body["spec"]["audiences"], json!(["undermesh.io"]));
    let token = question.body["spec"]["token"].as_str().unwrap();
    let account = |name: &str, node: &str| {
        json!({
            "authenticated": true,
            "audiences": ["undermesh.io"],
            "user": {
                "username": format!("system:serviceaccount:{name}"),
                "extra": {"authentication.kubernetes.io/node-name": [node]},
            },
        })
    };
    let status = match token.split_once('@') {
        Some(("agent", node)) => account("undermesh-system:undermesh-agent", node),
        Some(("web", node)) => account("shop:web", node),
        _ => json!({"authenticated": false, "error": "token has expired"}),
    };
    Some((201, json!({"metadata": {}, "spec": {}, "status": status})))
}

impl Fixture {
    async fn start() -> Self {
        let fixture = Self::without_root(settings()).await;
        let options = InitOptions { leaf_life: Duration::from_secs(3_600), ..InitOptions::default() };
        fixture.take(&Keyring::generate(&options, fixture.root.current().1).unwrap());
        let fixture = fixture.with_own_certificate().await;
        fixture.pods.change(|index| {
            *index = Index::of(&[
                pod("a1", "n1", AGENT),
                pod("w1", "n1", "shop/web"),
                pod("d1", "n2", "shop/db"),
                finished("j1", "n1", "shop/job"),
            ]);
        });
        fixture
    }

    async fn without_root(settings: ControllerSettings) -> Self {
        let api_is_down = Arc::new(AtomicBool::new(false));
        let down = api_is_down.clone();
        let token_key = SigningKey::new("a", "ES256").unwrap();
        let published = key_set([&token_key]);
        let api = FakeApi::new(move |question| match (down.load(Ordering::SeqCst), question.path.as_str()) {
            (true, _) => failure(500, "InternalError"),
            (_, "/.well-known/openid-configuration") => {
                Some((200, json!({ "issuer": "https://issuer.test" })))
            }
            (_, "/openid/v1/jwks") => Some((200, published.clone().into())),
            _ => review(question),
        });
        let ahead = Arc::new(AtomicU64::new(0));
        let seconds = ahead.clone();
        let clock =
            Clock::of(move || SystemTime::now() + Duration::from_secs(seconds.load(Ordering::SeqCst)));
        let (settings, telemetry) = (Arc::new(settings), Arc::new(ControllerTelemetry::default()));
        let root = Arc::new(Root::new(settings.clone(), clock, telemetry.clone()));
        let pods = Arc::new(Pods::default());
        let ca = Ca::new(settings, api.client(), pods.clone(), root.clone(), telemetry);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(server::serve(listener, ca.clone(), server::BOUNDS, std::future::pending()));
        let folder = tempfile::tempdir().unwrap();
        let client = client(&folder, address);
        Self { folder, address, ca, pods, root, api, api_is_down, token_key, ahead, client }
    }

    /// As the watch of the Secret does it; and as the kubelet mounts the bundle.
    fn take(&self, files: &crate::identity::ca::keyring::Files) {
        let data = files.iter().map(|(name, content)| (name.clone(), ByteString(content.to_vec())));
        self.root.take(Secret { data: Some(data.collect()), ..Secret::default() });
        let (keyring, now) = self.root.current();
        std::fs::write(self.folder.path().join("roots.pem"), keyring.unwrap().bundle(now)).unwrap();
        std::fs::write(self.folder.path().join("token"), "agent@n1").unwrap();
    }

    async fn with_own_certificate(self) -> Self {
        let ca = self.ca.clone();
        tokio::spawn(async move { ca.renew_own_certificate().await });
        while self.ca.missing().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self
    }

    /// What the client makes of the answer.
    async fn ask(&self, account: &str) -> String {
        told(&ask(&self.client, account, Duration::from_secs(600)).await)
    }

    /// The same with this token.
    async fn ask_with(&self, token: &str, account: &str) -> String {
        std::fs::write(self.folder.path().join("token"), token).unwrap();
        self.ask(account).await
    }
}

fn client(folder: &tempfile::TempDir, address: SocketAddr) -> GrpcCa {
    GrpcCa::new(GrpcSettings {
        address: format!("https://{address}"),
        server_name: Some("ca.test".into()),
        root: folder.path().join("roots.pem"),
        token: folder.path().join("token"),
        cluster: "Kubernetes".into(),
    })
    .unwrap()
}

async fn ask(client: &GrpcCa, account: &str, validity: Duration) -> Result<Issued, CaError> {
    let id: SpiffeId = match account.contains("//") {
        true => account.parse().unwrap(),
        false => format!("spiffe://cluster.local/ns/{}", account.replace('/', "/sa/")).parse().unwrap(),
    };
    let key = KeyPair::generate().unwrap();
    // What a request says beside its key must not count.
    let lie = CertificateParams::new(["kubernetes.default.svc".to_owned()]).unwrap();
    let csr = lie.serialize_request(&key).unwrap().pem().unwrap();
    let public_key = key.subject_public_key_info();
    let issued = client.issue(&CertificateRequest { id, csr, public_key, validity }).await?;
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let signed = issued.roots.iter().any(|root| {
        let (_, root) = X509Certificate::from_der(root).unwrap();
        leaf.verify_signature(Some(root.public_key())).is_ok()
    });
    assert!(signed, "no root that came with it has signed it");
    Ok(issued)
}

fn told(answer: &Result<Issued, CaError>) -> String {
    let issued = match answer {
        Ok(issued) => issued,
        Err(error) => return error.to_string(),
    };
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp() - 600;
    format!("{:?}, {life} s, {} roots", san.value.general_names, issued.roots.len())
}

/// An agent has one connection for half an hour, and may be silent on it; who was given nothing has none.
#[tokio::test]
async fn who_was_given_something_stays() {
    let fixture = Fixture::start().await;
    let [listener, relay] =
        [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
    let (address, relayed) = (listener.local_addr().unwrap(), relay.local_addr().unwrap());
    let bounds = Bounds { request: Duration::from_millis(300), ..server::BOUNDS };
    tokio::spawn(server::serve(listener, fixture.ca.clone(), bounds, std::future::pending()));
    let connections = Arc::new(AtomicU64::new(0));
    let (count, ended) = (connections.clone(), Arc::new(AtomicU64::new(0)));
    let end = ended.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = relay.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let (mut far, end) = (TcpStream::connect(address).await.unwrap(), end.clone());
            tokio::spawn(async move {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                end.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    let agent = client(&fixture.folder, relayed);
    for _ in 0..2 {
        ask(&agent, "shop/web", Duration::from_secs(600)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    assert_eq!((connections.load(Ordering::SeqCst), ended.load(Ordering::SeqCst)), (1, 0));
}

#[tokio::test]
async fn an_agent_gets_certificates_for_the_pods_of_its_node_and_no_others() {
    let fixture = Fixture::start().await;
    let web = r#"[URI("spiffe://cluster.local/ns/shop/sa/web")], 600 s, 1 roots"#;
    assert_eq!(fixture.ask("shop/web").await, web);
    let refused = "the certificate authority refuses: PermissionDenied: ";
    // The agent lies.
    assert_eq!(
        fixture.ask("shop/db").await,
        format!("{refused}no pod of the service account shop/db is on the node n1")
    );
    assert_eq!(
        fixture.ask("shop/job").await,
        format!("{refused}no pod of the service account shop/job is on the node n1")
    );
    assert_eq!(
        fixture.ask("spiffe://other.test/ns/shop/sa/web").await,
        format!("{refused}spiffe://other.test/ns/shop/sa/web is not of the trust domain cluster.local")
    );
    assert_eq!(
        fixture.ask_with("web@n1", "shop/web").await,
        format!("{refused}shop/web is not the service account of the agents, {AGENT}")
    );
    assert_eq!(
        fixture.ask_with("agent@n2", "shop/web").await,
        format!("{refused}no pod of the service account shop/web is on the node n2")
    );
    assert_eq!(
        fixture.ask_with("expired", "shop/web").await,
        "the certificate authority refuses: Unauthenticated: the API server does not take the token: token has expired"
    );
    assert_eq!(fixture.ask_with("agent@n1", "shop/web").await, web);
    let page = fixture.ca.0.telemetry.scrape(crate::telemetry::MetricsFormat::PrometheusText);
    for line in [
        "undermesh_ca_certificates_issued_total 2",
        "undermesh_ca_requests_denied_total{reason=\"no_pod_on_node\"} 3",
        "undermesh_ca_requests_denied_total{reason=\"token_refused\"} 1",
        "undermesh_ca_token_reviews_total{result=\"authenticated\"} 7",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }
    assert_eq!(fixture.api.asked.lock().unwrap().len(), 8, "nothing is kept of an answer");
}

#[tokio::test]
async fn a_life_is_what_was_asked_for_within_what_is_right() {
    let fixture = Fixture::start().await;
    for (asked, given) in [(600, 600), (1, 30), (86_400 * 365, 3_600)] {
        let answer = ask(&fixture.client, "shop/web", Duration::from_secs(asked)).await;
        assert!(told(&answer).contains(&format!(", {given} s,")), "{asked}: {}", told(&answer));
    }
    let hour = Duration::from_secs(3_600);
    assert_eq!([0, -1, i64::MIN].map(|seconds| validity(seconds, hour)), [hour; 3]);
}

#[tokio::test]
async fn what_is_nobodys_fault_is_told_apart_from_a_refusal() {
    let fixture = Fixture::start().await;
    fixture.api_is_down.store(true, Ordering::SeqCst);
    let answer = fixture.ask("shop/web").await;
    assert!(
        answer.starts_with(
            "the certificate authority is not available: Unavailable: the API server cannot be asked whose token it is"
        ),
        "{answer}"
    );
    fixture.api_is_down.store(false, Ordering::SeqCst);
    fixture.pods.change(|index| *index = Index::default());
    assert_eq!(
        fixture.ask("shop/web").await,
        "the certificate authority is not available: Unavailable: the pods of the cluster are not known yet"
    );
}

/// By its keys, which were fetched while it answered, and only for as long as it does not.
#[tokio::test]
async fn without_an_api_server_tokens_of_pods_that_are_known_are_taken() {
    let fixture = Fixture::start().await;
    let token = |uid: &str| {
        let now = fixture.root.current().1.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({
            "iss": "https://issuer.test", "aud": ["undermesh.io"], "exp": now + 600,
            "sub": "system:serviceaccount:undermesh-system:undermesh-agent",
            "kubernetes.io": { "pod": { "uid": uid }, "node": { "name": "n1" } },
        });
        fixture.token_key.token(&claims).unwrap()
    };
    let web = r#"[URI("spiffe://cluster.local/ns/shop/sa/web")], 600 s, 1 roots"#;
    let away = "the certificate authority is not available: Unavailable: the API server cannot be asked whose token it is: \
                InternalError, says the API server; by itself it does not hold: ";
    fixture.api_is_down.store(true, Ordering::SeqCst);
    let unknown = format!("{away}the keys of its issuer are not known");
    assert_eq!(fixture.ask_with(&token("a1"), "shop/web").await, unknown);
    fixture.api_is_down.store(false, Ordering::SeqCst);
    assert_eq!(fixture.ca.0.reviews.keys.fetch().await, Ok(()));
    // What it refuses is refused, whatever its keys say.
    assert_eq!(
        fixture.ask_with(&token("a1"), "shop/web").await,
        "the certificate authority refuses: Unauthenticated: the API server does not take the token: token has expired"
    );
    fixture.api_is_down.store(true, Ordering::SeqCst);
    assert_eq!(fixture.ask_with(&token("a1"), "shop/web").await, web);
    assert_eq!(
        fixture.ask_with(&token("a1"), "shop/db").await,
        "the certificate authority refuses: PermissionDenied: no pod of the service account shop/db is on the node n1"
    );
    let gone = format!("{away}the pod that the token is bound to, a9, is not known");
    assert_eq!(fixture.ask_with(&token("a9"), "shop/web").await, gone);
    let page = fixture.ca.0.telemetry.scrape(crate::telemetry::MetricsFormat::PrometheusText);
    for (result, count) in [("authenticated", 0), ("refused", 1), ("by_keys", 2), ("unavailable", 2)] {
        let line = format!("undermesh_ca_token_reviews_total{{result=\"{result}\"}} {count}");
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }
}

#[tokio::test]
async fn a_pod_that_is_just_being_made_is_waited_for() {
    let fixture = Fixture::start().await;
    let pods = fixture.pods.clone();
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        pods.change(|index| index.apply(&pod("n1", "n1", "shop/new")));
    };
    let (answer, ()) = tokio::join!(fixture.ask("shop/new"), late);
    assert!(answer.contains("sa/new"), "{answer}");
}

#[tokio::test]
async fn a_caller_that_knows_the_roots_follows_a_rotation_and_a_renewal() {
    let fixture = Fixture::start().await;
    let shown = || fixture.ca.0.own.current().unwrap();
    let first = shown();
    assert!(fixture.ask("shop/web").await.ends_with("1 roots"));
    let (keyring, now) = fixture.root.current();
    let rotated =
        keyring.unwrap().rotated(Duration::from_secs(300), Duration::from_secs(86_400 * 10), now).unwrap();
    fixture.take(&rotated);
    assert!(fixture.ask("shop/web").await.ends_with("2 roots"));
    assert_eq!(shown().issuer, first.issuer);

    // The overlap is over: the new root signs, also for the authority itself. What it signs is dated back by more than
    // its clock is ahead of the caller's.
    fixture.ahead.store(400, Ordering::SeqCst);
    while shown().issuer == first.issuer {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // On the connection that stands, and on a new one.
    assert!(fixture.ask("shop/web").await.ends_with("2 roots"));
    let fresh = client(&fixture.folder, fixture.address);
    assert!(told(&ask(&fresh, "shop/web", Duration::from_secs(60)).await).ends_with("2 roots"));

    // Half of its life, and then it is made anew by the same root.
    let second = shown();
    fixture.ahead.store(400 + 1_900, Ordering::SeqCst);
    while shown().made == second.made {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(shown().issuer, second.issuer);
    assert!(fixture.ask("shop/web").await.ends_with("2 roots"));
}

#[tokio::test]
async fn without_a_root_nobody_is_shown_anything() {
    let fixture = Fixture::without_root(settings()).await;
    assert!(fixture.ca.missing().is_some());
    let stranger = Keyring::generate(&InitOptions::default(), SystemTime::now()).unwrap();
    std::fs::write(fixture.folder.path().join("roots.pem"), &*stranger["root-1.pem"]).unwrap();
    std::fs::write(fixture.folder.path().join("token"), "agent@n1").unwrap();
    let answer = fixture.ask("shop/web").await;
    assert!(answer.starts_with("the certificate authority is not available: "), "{answer}");
    assert!(fixture.api.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_before_anybody_is_asked_for_pods() {
    let fixture = Fixture::start().await;
    let refusal = |asked: Asked| fixture.ca.answer(asked);
    let asked = |authorization: Option<&str>, identity: &str, csr: &str| Asked {
        authorization: authorization.map(|text| text.to_owned().into()),
        identity: identity.into(),
        csr: csr.into(),
        validity_seconds: 60,
    };
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let agent = Some("Bearer agent@n1");
    for (asked, reason) in [
        (asked(None, web, &csr), DenyReason::NoToken),
        (asked(Some("agent@n1"), web, &csr), DenyReason::NoToken),
        (asked(agent, web, "nonsense"), DenyReason::BadRequest),
        (asked(agent, "", &csr), DenyReason::BadRequest),
        (asked(agent, "spiffe://cluster.local/ns/shop", &csr), DenyReason::BadRequest),
    ] {
        let shown = format!("{:?} {}", asked.authorization.is_some(), asked.identity);
        assert_eq!(refusal(asked).await.unwrap_err().reason, reason, "{shown}");
    }
    assert!(refusal(asked(agent, web, &csr)).await.is_ok());
    assert_eq!(shown("a\n\u{1b}[31mb"), "a??[31mb");
}

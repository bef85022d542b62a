//! Keys are fetched when they are needed, and used for as long as they may be.

use std::sync::Mutex;

use http::HeaderValue;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::{advance, sleep, timeout};
use undermesh_tests::issuer::{self, SigningKey, answer, key_set};
use undermesh_tests::pki::Authority;

use super::fetch::{Answer, Terms};
use super::*;

/// An issuer that answers as it is told to, and whoever fetches from there.
struct Stage {
    jwks: Arc<Jwks>,
    address: Name,
    /// The next answer, and the heads of all requests.
    issuer: Arc<Mutex<(String, Vec<String>)>>,
    _roots: TempDir,
}

impl Stage {
    async fn set(first: String) -> Self {
        let authority = Authority::stranger("id.example").unwrap();
        let (certificate, key) = authority.server("127.0.0.1").unwrap();
        let roots = tempfile::tempdir().unwrap();
        let ca = roots.path().join("ca.pem");
        std::fs::write(&ca, authority.root()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}/keys", listener.local_addr().unwrap()).into();
        let issuer = Arc::new(Mutex::new((first, Vec::new())));
        let answers = issuer.clone();
        let acceptor = issuer::acceptor(&certificate, &key).unwrap();
        tokio::spawn(issuer::publish(listener, acceptor, move |head| {
            let mut issuer = answers.lock().unwrap();
            issuer.1.push(head.to_ascii_lowercase());
            issuer.0.clone()
        }));
        let jwks = Jwks::new(&JwksSettings { ca: Some(ca) }).unwrap();
        let running = jwks.clone();
        tokio::spawn(async move { running.run().await });
        Self { jwks, address, issuer, _roots: roots }
    }

    fn wants(&self) {
        self.jwks.want([self.address.clone()].into());
    }

    fn answers(&self, answer: String) {
        self.issuer.lock().unwrap().0 = answer;
    }

    fn asked(&self) -> Vec<String> {
        self.issuer.lock().unwrap().1.clone()
    }

    /// Whether there are others than the keys that are at hand.
    async fn newer(&self) -> bool {
        let told = self.jwks.held(&self.address).told;
        self.jwks.newer(&self.address, told, Instant::now()).await
    }

    fn keys(&self) -> Option<Arc<KeySet>> {
        self.jwks.held(&self.address).keys
    }

    fn counted(&self) -> [u64; 3] {
        self.jwks.read().fetches.map(|(_, count)| count)
    }
}

fn published(name: &str) -> (String, KeySet) {
    let keys = key_set([&SigningKey::new(name, "EdDSA").unwrap()]);
    let parsed = KeySet::parse(keys.as_bytes()).unwrap();
    (keys, parsed)
}

#[tokio::test]
async fn keys_are_fetched_once_for_all_and_anew_when_somebody_misses_one() {
    let ((first, first_keys), (second, second_keys)) = (published("a"), published("b"));
    let stage = Stage::set(answer("200 OK", &["etag: \"1\""], &first)).await;
    assert!(!stage.newer().await, "nobody wants keys of there");
    stage.wants();
    assert!(stage.newer().await, "the first are waited for");
    assert_eq!(stage.keys().as_deref(), Some(&first_keys));
    let head = &stage.asked()[0];
    assert!(head.starts_with("get /keys http/1.1\r\n") && !head.contains("if-none-match"), "{head}");

    // They are others by now; the tag tells the issuer which there were.
    stage.answers(answer("200 OK", &["etag: \"2\""], &second));
    let all = [stage.newer(), stage.newer(), stage.newer()];
    assert_eq!(futures_util::future::join_all(all).await, [true; 3], "who misses a key waits for it");
    assert_eq!(stage.keys().as_deref(), Some(&second_keys));
    assert_eq!(stage.asked().len(), 2, "one fetch is for all that wait");
    assert!(stage.asked()[1].contains("\r\nif-none-match: \"1\"\r\n"), "{}", stage.asked()[1]);

    // Whoever shows tokens of keys that there are not has nobody fetch all the time.
    assert!(!stage.newer().await);
    assert_eq!(stage.asked().len(), 2);
    assert_eq!(stage.counted(), [2, 0, 0]);
    assert_eq!(stage.jwks.read().ages.len(), 1);

    // What is not wanted any more is forgotten.
    stage.jwks.want(BTreeSet::new());
    assert!(stage.keys().is_none() && !stage.newer().await && stage.jwks.read().ages.is_empty());
    stage.wants();
    assert!(stage.newer().await);
    assert!(!stage.asked()[2].contains("if-none-match"), "{}", stage.asked()[2]);
}

#[tokio::test]
async fn keys_that_are_the_same_are_told_to_be() {
    let (keys, parsed) = published("a");
    let stage = Stage::set(answer("200 OK", &["etag: \"1\""], &keys)).await;
    stage.wants();
    assert!(stage.newer().await);
    stage.answers(answer("304 Not Modified", &[], ""));
    assert!(stage.newer().await, "they were told anew");
    assert_eq!(stage.keys().as_deref(), Some(&parsed));
    assert_eq!(stage.counted(), [1, 1, 0]);
}

#[tokio::test]
async fn what_is_no_answer_with_keys_changes_nothing() {
    let (keys, parsed) = published("a");
    let far = format!("location: https://127.0.0.1:1/{}", "x");
    for (told, why) in [
        (answer("404 Not Found", &[], &keys), "a status"),
        (answer("302 Found", &[&far], &keys), "a redirect"),
        (answer("204 No Content", &[], ""), "nothing"),
        (answer("200 OK", &[], "{\"keys\":[]}"), "no keys"),
        (answer("200 OK", &[], "<html>"), "no JSON"),
        (answer("200 OK", &[], &format!("{keys}{}", " ".repeat(KeySet::MOST_BYTES))), "too much"),
        (answer("304 Not Modified", &[], ""), "the same as nothing"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n{".to_owned(), "the beginning of an answer"),
        ("nonsense\r\n\r\n".to_owned(), "no HTTP"),
    ] {
        let stage = Stage::set(told).await;
        stage.wants();
        assert!(!stage.newer().await, "{why}");
        assert!(stage.keys().is_none() && stage.counted()[2] >= 1, "{why}");
        // It is tried again without being asked.
        stage.answers(answer("200 OK", &[], &keys));
        let comes = async {
            while stage.keys().is_none() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(20), comes).await.unwrap_or_else(|_| panic!("{why}"));
        assert_eq!(stage.keys().as_deref(), Some(&parsed));
    }
}

#[tokio::test]
async fn only_servers_that_prove_who_they_are_are_believed() {
    let (keys, _) = published("a");
    let stage = Stage::set(answer("200 OK", &[], &keys)).await;
    let fetched = async |fetcher: &Fetcher, address: &str| {
        fetcher.fetch(address, None).await.map(|_| ()).map_err(|error| error.to_ascii_lowercase())
    };
    let fetcher = &stage.jwks.fetcher;
    assert_eq!(fetched(fetcher, &stage.address).await, Ok(()));
    let other_name = stage.address.replace("127.0.0.1", "localhost");
    assert!(fetched(fetcher, &other_name).await.unwrap_err().contains("certificate"), "another name");
    let stranger = Fetcher::new(None).unwrap();
    assert!(fetched(&stranger, &stage.address).await.unwrap_err().contains("certificate"), "unknown roots");
    let plain = stage.address.replace("https", "http");
    assert!(fetched(fetcher, &plain).await.is_err(), "plaintext");
    assert!(fetched(fetcher, "no address").await.is_err());
}

#[test]
fn roots_that_are_given_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str| {
        let ca = Some(folder.path().join(name));
        Jwks::new(&JwksSettings { ca }).map(|_| ()).unwrap_err()
    };
    assert!(error("none.pem").contains("none.pem"), "{}", error("none.pem"));
    std::fs::write(folder.path().join("empty.pem"), "").unwrap();
    assert!(error("empty.pem").ends_with("empty.pem: there is no certificate in it"));
}

/// What a source makes of outcomes; time is told to pass.
struct Time {
    source: Source,
    counts: Counts,
}

impl Time {
    fn begins() -> Self {
        Self { source: Source::new("https://id/keys".into()), counts: Counts::default() }
    }

    /// How many seconds it waits after keys that are good for so long by what their issuer says.
    fn told(&self, max_age: Option<u64>) -> f64 {
        let terms =
            Terms { tag: Some(HeaderValue::from_static("\"1\"")), max_age: max_age.map(Duration::from_secs) };
        let keys = KeySet::parse(include_bytes!("../policy/jwt/cases/rfc7515.json")).unwrap();
        self.source.take(Ok(Answer::Keys(keys, terms)), &self.counts).as_secs_f64()
    }

    /// How many seconds it waits after a failure.
    fn failed(&self) -> f64 {
        self.source.take(Err("no answer".to_owned()), &self.counts).as_secs_f64()
    }
}

#[tokio::test(start_paused = true)]
async fn issuers_say_for_how_long_keys_are_good_within_bounds() {
    for (max_age, expected) in [
        (None, 300.0),
        (Some(600), 600.0),
        (Some(0), 60.0),
        (Some(60), 60.0),
        (Some(3600), 3600.0),
        (Some(u64::MAX), 3600.0),
    ] {
        let waits = Time::begins().told(max_age);
        assert!((expected * 0.9..=expected).contains(&waits), "{max_age:?}: {waits} s");
    }
}

#[tokio::test(start_paused = true)]
async fn failures_are_tried_again_ever_more_rarely() {
    let time = Time::begins();
    for (i, most) in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0].into_iter().enumerate() {
        let waits = time.failed();
        assert!((most / 2.0..=most).contains(&waits), "after failure {i}: {waits} s");
    }
    time.told(None);
    assert!(time.failed() <= 1.0, "after a success it begins anew");
}

#[tokio::test(start_paused = true)]
async fn keys_are_used_for_a_day_without_their_issuer() {
    let time = Time::begins();
    time.told(None);
    advance(Duration::from_secs(24 * 3600 - 1)).await;
    time.failed();
    assert!(time.source.held().keys.is_some());
    assert_eq!(time.source.age(), Some(Duration::from_secs(24 * 3600 - 1)));
    advance(Duration::from_secs(1)).await;
    time.failed();
    assert!(time.source.held().keys.is_none() && time.source.age().is_none());
    // It must tell them, and not that they are the same.
    assert_eq!(time.source.state.borrow().tag, None);
    time.told(None);
    assert!(time.source.held().keys.is_some());
}

#[tokio::test(start_paused = true)]
async fn whoever_misses_a_key_has_it_fetched_every_ten_seconds_at_most() {
    let time = Time::begins();
    time.told(None);
    assert!(time.source.ask() && time.source.ask(), "they wait for the same");
    time.told(None);
    assert!(!time.source.ask());
    advance(Duration::from_secs(9)).await;
    assert!(!time.source.ask());
    advance(Duration::from_secs(1)).await;
    assert!(time.source.ask());
}

#[test]
fn addresses_are_bounded() {
    let jwks = Jwks::new(&JwksSettings::default()).unwrap();
    jwks.want((0..300).map(|i| Name::from(format!("https://id/{i}"))).collect());
    assert_eq!(jwks.sources.load().len(), MOST_ADDRESSES);
}

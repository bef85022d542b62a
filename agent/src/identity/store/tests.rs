//! A store's life, with days that pass in an instant.

use super::*;
use crate::identity::testkit::*;
use crate::identity::trust::{Chain, Role};

fn authority() -> Arc<Authority> {
    Authority::new("cluster.local", at(0), 3650 * DAY)
}

async fn hours(hours: f64) {
    tokio::time::sleep(Duration::from_secs_f64(hours * 3_600.0)).await;
}

fn result(node: &Node, wanted: RenewalResult) -> u64 {
    node.store.results().iter().find(|(result, _)| *result == wanted).unwrap().1
}

#[tokio::test(start_paused = true)]
async fn one_certificate_for_each_account_until_nobody_wants_it() {
    let clock = tokio_clock();
    let ca = FakeCa::new(&authority(), clock.clone());
    let node = Node::start(ca.clone(), &domain("cluster.local"), &clock, StoreSettings::default());
    assert_eq!(node.store.get(&id("web")).await.unwrap_err(), NotHeld(id("web")));
    for name in ["web", "web", "db"] {
        node.store.ensure(&id(name));
    }
    assert!(node.store.current(&id("web")).is_none());
    let web = node.store.get(&id("web")).await.unwrap();
    node.store.get(&id("db")).await.unwrap();
    assert_eq!((web.id.as_str(), web.not_after, ca.asked()), (id("web").as_str(), at(86_400), 2));
    assert_eq!(web.not_before, at(0) - Duration::from_secs(600));
    assert_eq!(web.chain().len(), 2);
    node.store.release(&id("web"));
    assert!(node.store.current(&id("web")).is_some());
    node.store.release(&id("web"));
    assert!(node.store.current(&id("web")).is_none());
    node.store.release(&id("web"));
    hours(30.0).await;
    assert_eq!(node.store.standings().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn renewed_at_half_life_within_the_jitter() {
    let clock = tokio_clock();
    let node = Node::with(&authority(), &clock, &id("web")).await;
    let mut halves = Vec::new();
    let mut svid = node.store.current(&id("web")).unwrap();
    for _ in 0..20 {
        let next = loop {
            hours(0.01).await;
            let next = node.store.current(&id("web")).unwrap();
            if !Arc::ptr_eq(&svid, &next) {
                break next;
            }
        };
        assert_ne!(svid.serial, next.serial);
        assert!(!Arc::ptr_eq(&svid.key, &next.key));
        halves.push(next.received.duration_since(svid.received).unwrap().as_secs_f64() / 86_400.0);
        svid = next;
    }
    assert!(halves.iter().all(|half| (0.449..0.552).contains(half)), "{halves:?}");
    let spread = halves.iter().cloned().fold(0.0, f64::max) - halves.iter().cloned().fold(1.0, f64::min);
    assert!(spread > 0.01, "no jitter: {halves:?}");
    assert_eq!(result(&node, RenewalResult::Success), 21);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_away_harms_nothing_until_the_expiry() {
    let clock = tokio_clock();
    let ca = FakeCa::new(&authority(), clock.clone());
    let node = Node::start(ca.clone(), &domain("cluster.local"), &clock, StoreSettings::default());
    node.store.ensure(&id("web"));
    let first = node.store.get(&id("web")).await.unwrap();
    ca.break_down();
    hours(23.9).await;
    assert!(Arc::ptr_eq(&first, &node.store.current(&id("web")).unwrap()));
    let tries = ca.asked() - 1;
    assert!((120..400).contains(&tries), "{tries} tries in half a day");
    assert_eq!(result(&node, RenewalResult::Unavailable), tries);
    let standing = node.store.standings().remove(0);
    assert_eq!(u64::from(standing.failures), tries);
    let lag = clock.now().duration_since(standing.due).unwrap().as_secs_f64() / 3600.0;
    assert!((10.6..13.2).contains(&lag), "{lag} hours late");
    assert!(standing.last_error.is_some());

    ca.repair();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let second = node.store.current(&id("web")).unwrap();
    assert!(second.not_after > first.not_after, "noticed in time");
    assert_eq!(node.store.standings()[0].failures, 0);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_back_serves_all_who_wait() {
    let clock = tokio_clock();
    let ca = FakeCa::new(&authority(), clock.clone());
    ca.break_down();
    let node = Node::start(ca.clone(), &domain("cluster.local"), &clock, StoreSettings::default());
    node.store.ensure(&id("web"));
    hours(1.0).await;
    ca.repair();
    // The first answer, to somebody who has just come, tells that there is one.
    node.store.ensure(&id("db"));
    node.store.get(&id("db")).await.unwrap();
    tokio::time::sleep(HURRY * 2).await;
    assert!(node.store.current(&id("web")).is_some());
}

#[tokio::test(start_paused = true)]
async fn the_first_certificate_is_waited_for() {
    let clock = tokio_clock();
    let ca = FakeCa::new(&authority(), clock.clone());
    ca.break_down();
    let node = Node::start(ca.clone(), &domain("cluster.local"), &clock, StoreSettings::default());
    node.store.ensure(&id("web"));
    node.store.ensure(&id("gone"));
    let wait = |name: &str| {
        let (store, id) = (node.store.clone(), id(name));
        tokio::spawn(async move { store.get(&id).await })
    };
    let (web, gone) = (wait("web"), wait("gone"));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!web.is_finished());
    node.store.release(&id("gone"));
    assert_eq!(gone.await.unwrap().unwrap_err(), NotHeld(id("gone")));
    ca.repair();
    assert_eq!(web.await.unwrap().unwrap().id, id("web"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_authority_is_not_waited_for_for_ever_nor_asked_by_all_at_once() {
    let clock = tokio_clock();
    let ca = FakeCa::new(&authority(), clock.clone());
    *ca.takes.lock().unwrap() = Duration::from_secs(60);
    let node = Node::start(ca.clone(), &domain("cluster.local"), &clock, StoreSettings::default());
    for i in 0..20 {
        node.store.ensure(&id(&format!("pod-{i}")));
    }
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert_eq!(ca.asked(), 8);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(result(&node, RenewalResult::Unavailable), 8);
    *ca.takes.lock().unwrap() = Duration::from_secs(1);
    hours(0.2).await;
    assert_eq!(result(&node, RenewalResult::Success), 20);
    let error = node.store.standings()[0].last_error.clone();
    assert_eq!(error, None);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_goes_back_makes_new_certificates() {
    let hands = Hands::default();
    hands.set(1_000_000);
    let node = Node::with(&authority(), &hands.clock(), &id("web")).await;
    let first = node.store.current(&id("web")).unwrap();
    hands.set(0);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let second = node.store.current(&id("web")).unwrap();
    assert_eq!((first.received, second.received), (at(1_000_000), at(0)));
}

#[tokio::test(start_paused = true)]
async fn answers_that_lie_are_refused() {
    use crate::identity::ca::Issued;

    type Lie = fn(Issued, &CertificateRequest) -> Issued;

    #[derive(Debug)]
    struct Liar(Lie, Arc<FakeCa>);

    impl CertificateAuthority for Liar {
        fn issue<'a>(&'a self, request: &'a CertificateRequest) -> crate::identity::ca::IssueFuture<'a> {
            Box::pin(async { self.1.issue(request).await.map(|issued| (self.0)(issued, request)) })
        }

        fn roots(&self) -> Result<Roots, CaError> {
            self.1.roots()
        }
    }

    let lies: [(&str, Lie); 7] = [
        ("no certificate", |issued, _| Issued { chain: Vec::new(), ..issued }),
        ("no root", |issued, _| Issued { roots: Vec::new(), ..issued }),
        ("another identity", |_, request| {
            authority().issue(&id("admin"), &request.public_key, at(0), at(86_400))
        }),
        ("another key", |_, request| {
            let key = PrivateKey::generate().unwrap();
            authority().issue(&request.id, &key.public_key(), at(0), at(86_400))
        }),
        ("expired", |_, request| authority().issue(&request.id, &request.public_key, at(0) - DAY, at(0))),
        ("another root", |issued, _| Issued { roots: vec![authority().certificate.clone()], ..issued }),
        ("rubbish", |issued, _| Issued { chain: vec![vec![0x30, 3, 1, 2].into()], ..issued }),
    ];
    let mut lines = String::new();
    for (name, lie) in lies {
        let clock = tokio_clock();
        let ca = Arc::new(Liar(lie, FakeCa::new(&authority(), clock.clone())));
        let node = Node::start(ca, &domain("cluster.local"), &clock, StoreSettings::default());
        node.store.ensure(&id("web"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(node.store.current(&id("web")).is_none(), "{name}");
        assert!(result(&node, RenewalResult::BadAnswer) > 0, "{name}");
        let error = node.store.standings()[0].last_error.clone().unwrap().to_string();
        let error = error.strip_prefix("the certificate authority's answer is not usable: ").unwrap();
        lines += &format!("{name}: {error}\n");
    }
    expect_test::expect![[r#"
        no certificate: it has no certificate
        no root: it has no root
        another identity: the certificate is for spiffe://cluster.local/ns/shop/sa/admin, and one for spiffe://cluster.local/ns/shop/sa/web was asked for
        another key: the certificate is for another key than ours
        expired: the certificate of spiffe://cluster.local/ns/shop/sa/web expired at 2027-01-15T08:00:00Z, and it is 2027-01-15T08:00:00Z
        another root: the chain of spiffe://cluster.local/ns/shop/sa/web does not lead to a root that came with it: the certificate does not hold: UnknownIssuer
        rubbish: not an X.509 certificate: Parsing Error: NomError(Eof)
    "#]].assert_eq(&lines);
}

#[tokio::test(start_paused = true)]
async fn nothing_shows_a_key() {
    let node = Node::with(&authority(), &tokio_clock(), &id("web")).await;
    let svid = node.store.current(&id("web")).unwrap();
    let shown = format!("{:?} {svid:?} {:?} {:?}", node.store, node.tls, svid.key);
    for word in ["PRIVATE", "private_key", "serialized_der"] {
        assert!(!shown.contains(word), "{word}: {shown}");
    }
    assert!(format!("{svid:?}").len() < 300, "{svid:?}");
}

#[tokio::test(start_paused = true)]
async fn an_authority_whose_clock_is_ahead_is_reported() {
    let hands = Hands::default();
    hands.set(1_500);
    let ca = FakeCa::new(&authority(), hands.clock());
    let behind = Hands::default();
    behind.set(300);
    let node = Node::start(ca, &domain("cluster.local"), &behind.clock(), StoreSettings::default());
    node.store.ensure(&id("web"));
    let svid = node.store.get(&id("web")).await.unwrap();
    assert_eq!(svid.skew(), Some(Duration::from_secs(600)));
    assert_eq!(node.trust.clock_skew(), Some(Duration::from_secs(600)));
}

#[tokio::test(start_paused = true)]
async fn another_authority_of_our_domain_is_not_thought_to_date_back() {
    let (ours, theirs) = (authority(), Authority::new("cluster.local", at(0), 3650 * DAY));
    let node = Node::with(&ours, &Hands::default().clock(), &id("web")).await;
    node.believe(&theirs);
    let skew_after = |authority: &Authority| {
        // These date back by ten minutes; made ten minutes ahead, it begins now.
        let svid = authority.svid(&id("db"), at(600), at(86_400));
        let (leaf, intermediates) = svid.chain().split_first().unwrap();
        node.trust.verify(Chain { leaf, intermediates }, Role::Client, at(0)).unwrap();
        node.trust.clock_skew()
    };
    assert_eq!(skew_after(&theirs), None);
    assert_eq!(skew_after(&ours), Some(Duration::from_secs(600)));
}

#[tokio::test(start_paused = true)]
async fn only_our_own_authorities_are_believed_about_the_time() {
    let ours = authority();
    let node = Node::with(&ours, &Hands::default().clock(), &id("web")).await;
    let strangers = Authority::new("cluster.local", at(0), 3650 * DAY);
    let abroad = Authority::new("elsewhere.test", at(0), 3650 * DAY);
    node.believe(&abroad);
    let far = id("spiffe://elsewhere.test/ns/shop/sa/db");
    let day = 86_400;
    // Made a day ahead, and dated back by ten minutes.
    let mut lines = String::new();
    for (name, authority, id) in [
        ("a stranger", &strangers, &id("db")),
        ("a stranger of another domain", &strangers, &far),
        ("a federated authority", &abroad, &far),
        ("a federated authority, for one of us", &abroad, &id("db")),
        ("ours, for another domain", &ours, &far),
        ("ours", &ours, &id("db")),
    ] {
        let svid = authority.svid(id, at(day), at(2 * day));
        let (leaf, intermediates) = svid.chain().split_first().unwrap();
        let refused = node.trust.verify(Chain { leaf, intermediates }, Role::Client, at(0)).unwrap_err();
        let skew = node.trust.clock_skew().map_or(0, |skew| skew.as_secs());
        lines += &format!("{name}: {}, {skew} s\n", refused.reason().as_str());
    }
    expect_test::expect![[r#"
        a stranger: not_yet_valid, 0 s
        a stranger of another domain: not_yet_valid, 0 s
        a federated authority: not_yet_valid, 0 s
        a federated authority, for one of us: not_yet_valid, 0 s
        ours, for another domain: not_yet_valid, 0 s
        ours: not_yet_valid, 86400 s
    "#]]
    .assert_eq(&lines);
}

//! What the radar says as time goes by.

use expect_test::expect;

use super::*;
use crate::identity::testkit::*;
use crate::identity::{StoreSettings, TrustDomain};

struct Scene {
    ca: Arc<FakeCa>,
    node: Node,
    radar: Arc<Radar>,
    start: tokio::time::Instant,
}

impl Scene {
    async fn new(root_life: Duration) -> Self {
        let clock = tokio_clock();
        let authority = Authority::new("cluster.local", at(0), root_life);
        let ca = FakeCa::new(&authority, clock.clone());
        let node = Node::start(ca.clone(), &TrustDomain::default(), &clock, StoreSettings::default());
        let radar = Radar::new(node.store.clone(), node.trust.clone());
        Self { ca, node, radar, start: tokio::time::Instant::now() }
    }

    async fn until(&self, hours: f64) {
        tokio::time::sleep_until(self.start + Duration::from_secs_f64(hours * 3_600.0)).await;
    }

    fn lines(&self) -> String {
        let warnings = self.radar.warnings().into_iter().map(|warning| format!("warning: {warning}\n"));
        let missing = self.radar.missing().into_iter().map(|missing| format!("missing: {missing}\n"));
        self.without_random(&warnings.chain(missing).collect::<String>())
    }

    /// Without the random part of the root's name.
    fn without_random(&self, all: &str) -> String {
        let mut shown = String::new();
        let mut rest = all;
        while let Some((before, after)) = rest.split_once("root 1 ") {
            shown += before;
            shown += "root 1";
            rest = &after[8..];
        }
        shown + rest
    }
}

#[tokio::test(start_paused = true)]
async fn a_day_without_the_authority() {
    let scene = Scene::new(3650 * DAY).await;
    let mut story = format!("before:\n{}", scene.lines());
    scene.node.store.ensure(&id("web"));
    story += &format!("asked:\n{}", scene.lines());
    scene.node.store.get(&id("web")).await.unwrap();
    story += &format!("issued:\n{}", scene.lines());
    scene.ca.break_down();
    scene.node.store.ensure(&id("new"));
    for hours in [1.0, 17.9, 18.1, 23.9, 24.1] {
        scene.until(hours).await;
        story += &format!("after {hours} hours:\n{}", scene.lines());
    }
    scene.radar.tell();
    scene.ca.repair();
    scene.until(25.0).await;
    story += &format!("repaired:\n{}", scene.lines());
    expect![[r#"
        before:
        missing: no root of the trust domain cluster.local is known yet
        asked:
        missing: no root of the trust domain cluster.local is known yet
        missing: spiffe://cluster.local/ns/shop/sa/web has no certificate yet
        issued:
        after 1 hours:
        missing: spiffe://cluster.local/ns/shop/sa/new has no certificate: the certificate authority is not available: nobody answers
        after 17.9 hours:
        missing: spiffe://cluster.local/ns/shop/sa/new has no certificate: the certificate authority is not available: nobody answers
        after 18.1 hours:
        warning: the certificate of spiffe://cluster.local/ns/shop/sa/web expires in 21240 s and should have been renewed long ago: the certificate authority is not available: nobody answers
        missing: spiffe://cluster.local/ns/shop/sa/new has no certificate: the certificate authority is not available: nobody answers
        after 23.9 hours:
        warning: the certificate of spiffe://cluster.local/ns/shop/sa/web expires in 360 s and should have been renewed long ago: the certificate authority is not available: nobody answers
        missing: spiffe://cluster.local/ns/shop/sa/new has no certificate: the certificate authority is not available: nobody answers
        after 24.1 hours:
        warning: the certificate of spiffe://cluster.local/ns/shop/sa/web expired at 2027-01-16T08:00:00Z: the certificate authority is not available: nobody answers
        missing: spiffe://cluster.local/ns/shop/sa/new has no certificate: the certificate authority is not available: nobody answers
        missing: the certificate of spiffe://cluster.local/ns/shop/sa/web expired at 2027-01-16T08:00:00Z: the certificate authority is not available: nobody answers
        repaired:
    "#]].assert_eq(&story);
}

#[tokio::test(start_paused = true)]
async fn a_root_that_nobody_rotates() {
    let scene = Scene::new(40 * DAY).await;
    scene.node.store.ensure(&id("web"));
    scene.node.store.get(&id("web")).await.unwrap();
    let mut story = String::new();
    for days in [9.0, 10.1, 25.0, 26.5, 37.5] {
        scene.until(days * 24.0).await;
        story += &format!("day {days}: {}\n", scene.lines().trim());
    }
    expect![[r#"
        day 9: 
        day 10.1: warning: the authority O=cluster.local, CN=Undermesh root 1 expires in 29 days; rotate it, or no certificate will be valid
        day 25: warning: the authority O=cluster.local, CN=Undermesh root 1 expires in 15 days; rotate it, or no certificate will be valid
        day 26.5: warning: the authority O=cluster.local, CN=Undermesh root 1 expires in 13 days; rotate it, or no certificate will be valid
        day 37.5: warning: the authority O=cluster.local, CN=Undermesh root 1 expires in 2 days; rotate it, or no certificate will be valid
    "#]].assert_eq(&story);
}

#[tokio::test(start_paused = true)]
async fn figures_of_each_identity() {
    let scene = Scene::new(100 * DAY).await;
    scene.node.store.ensure(&id("web"));
    scene.node.store.get(&id("web")).await.unwrap();
    scene.ca.break_down();
    scene.until(20.0).await;
    let reading = scene.radar.read();
    let lines: Vec<_> = reading
        .lifetimes
        .iter()
        .map(|l| format!("{} {} {} {:.0}", l.kind.as_str(), l.identity, l.expires, l.remaining / 3_600.0))
        .collect();
    expect![[r#"
        leaf spiffe://cluster.local/ns/shop/sa/web 1800086400 4
        issuer spiffe://cluster.local/ns/shop/sa/web 1808640000 2380
        root spiffe://cluster.local/ns/shop/sa/web 1808640000 2380
        trusted_root spiffe://cluster.local 1808640000 2380"#]]
    .assert_eq(&lines.join("\n"));
    let [lag] = &reading.lags[..] else { panic!("{:?}", reading.lags) };
    assert!((6.7..9.3).contains(&(lag.lag.as_secs_f64() / 3_600.0)), "{lag:?}");
    assert_eq!(reading.renewals[0], (RenewalResult::Success, 1));
    assert!(reading.renewals[1].1 > 10);
    let view = scene.radar.view();
    assert_eq!(view.certificates[0].remaining_seconds, Some(4 * 3_600));
    assert!(view.certificates[0].renewal_lag_seconds > 20_000);
    assert_eq!((view.roots.len(), view.trust_domain.as_str()), (1, "cluster.local"));
    let json = serde_json::to_string(&view).unwrap();
    assert!(!json.contains("PRIVATE") && json.contains("nobody answers"), "{json}");
}

/// With the time that it ends and without the time that is left: what is told only when it changes does not change by itself.
#[tokio::test(start_paused = true)]
async fn what_endangers_a_certificate() {
    let scene = Scene::new(29 * DAY).await;
    let told = || {
        let dangers = scene.radar.dangers();
        let told: Vec<_> =
            dangers.iter().map(|(id, it)| format!("{id}, {}: {}", it.is_expired, it.text)).collect();
        scene.without_random(&told.join("\n"))
    };
    scene.node.store.ensure(&id("web"));
    scene.node.store.get(&id("web")).await.unwrap();
    scene.ca.break_down();
    let mut story = String::new();
    for hours in [17.9, 18.1, 23.9, 24.1] {
        scene.until(hours).await;
        story += &format!("after {hours} hours: {}\n", told());
    }
    scene.ca.repair();
    scene.until(25.0).await;
    story += &format!("repaired: {}\n", told());
    expect![[r#"
        after 17.9 hours: spiffe://cluster.local/ns/shop/sa/web, false: the authority O=cluster.local, CN=Undermesh root 1 of its certificate expires at 2027-02-13T08:00:00Z: rotate it, or no certificate will be valid
        after 18.1 hours: spiffe://cluster.local/ns/shop/sa/web, false: its certificate expires at 2027-01-16T08:00:00Z and is not renewed: ask `undermesh certs` on its node for the reason; the authority O=cluster.local, CN=Undermesh root 1 of its certificate expires at 2027-02-13T08:00:00Z: rotate it, or no certificate will be valid
        after 23.9 hours: spiffe://cluster.local/ns/shop/sa/web, false: its certificate expires at 2027-01-16T08:00:00Z and is not renewed: ask `undermesh certs` on its node for the reason; the authority O=cluster.local, CN=Undermesh root 1 of its certificate expires at 2027-02-13T08:00:00Z: rotate it, or no certificate will be valid
        after 24.1 hours: spiffe://cluster.local/ns/shop/sa/web, true: its certificate expired at 2027-01-16T08:00:00Z and is not renewed: ask `undermesh certs` on its node for the reason; the authority O=cluster.local, CN=Undermesh root 1 of its certificate expires at 2027-02-13T08:00:00Z: rotate it, or no certificate will be valid
        repaired: spiffe://cluster.local/ns/shop/sa/web, false: the authority O=cluster.local, CN=Undermesh root 1 of its certificate expires at 2027-02-13T08:00:00Z: rotate it, or no certificate will be valid
    "#]].assert_eq(&story);
}

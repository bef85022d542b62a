//! The directory as agents and people use it.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::identity::store::StoreSettings;
use crate::identity::testkit::*;
use crate::identity::{MeshTls, SpiffeId};

fn options(leaf_life: u64) -> InitOptions {
    InitOptions { leaf_life: Duration::from_secs(leaf_life), ..InitOptions::default() }
}

/// One handshake; the server's and the client's names if it succeeds.
async fn talk(from: &MeshTls, client: &SpiffeId, to: &MeshTls, server: &SpiffeId) -> Result<(), String> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let ends = (from.client(client, &server.clone().into()), to.server(server));
    let (Ok(connect), Ok(accept)) = ends else { return Err("no certificate".into()) };
    let (asked, served) = tokio::join!(connect.connect(near), accept.accept(far));
    asked.map_err(|error| format!("client: {error}"))?;
    let (_, peer) = served.map_err(|error| format!("server: {error}"))?;
    (peer.id() == client).then_some(()).ok_or_else(|| format!("{peer} called"))
}

#[tokio::test(start_paused = true)]
async fn a_rotation_costs_no_connection_between_two_agents() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("ca");
    let clock = tokio_clock();
    let minute = Duration::from_secs(60);
    init(&directory, &options(60), clock.now()).unwrap();
    let settings = StoreSettings { leaf_life: minute, ..StoreSettings::default() };
    let agent = || {
        let ca = Arc::new(DirectoryCa::open(&directory, clock.clone()).unwrap());
        Node::start(ca, &domain("cluster.local"), &clock, settings)
    };
    let (one, two) = (agent(), agent());
    let (web, db) = (id("web"), id("db"));
    one.store.ensure(&web);
    two.store.ensure(&db);
    one.store.get(&web).await.unwrap();
    two.store.get(&db).await.unwrap();

    let mut story: Vec<String> = Vec::new();
    for second in (0..1_000).step_by(4) {
        if second == 100 {
            rotate(&directory, Duration::from_secs(20), 3650 * DAY, clock.now()).unwrap();
        }
        talk(&one.tls, &web, &two.tls, &db).await.unwrap_or_else(|error| panic!("at {second}: {error}"));
        talk(&two.tls, &db, &one.tls, &web).await.unwrap_or_else(|error| panic!("at {second}: {error}"));
        let roots =
            |node: &Node| node.trust.believed().bundle.roots("cluster.local").unwrap().certificates.len();
        let root = |node: &Node, id| {
            node.store.current(id).unwrap().root.subject.split(' ').nth(3).unwrap().to_owned()
        };
        let now = format!(
            "believed {} {}, leaves of {} {}",
            roots(&one),
            roots(&two),
            root(&one, &web),
            root(&two, &db)
        );
        if story.last() != Some(&now) {
            story.push(now);
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    // In between, one leaf may be of the new root before the other.
    story.retain(|line| !line.ends_with("1 2") && !line.ends_with("2 1"));
    let expected = [
        "believed 1 1, leaves of 1 1",
        "believed 2 2, leaves of 1 1",
        "believed 2 2, leaves of 2 2",
        "believed 1 1, leaves of 2 2",
    ];
    assert_eq!(story, expected);
    assert!(one.store.results()[0].1 > 25, "renewed all the time");
    assert_eq!(one.store.results()[1..].iter().map(|(_, count)| count).sum::<u64>(), 0);
}

#[test]
fn agents_that_share_a_directory_agree() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("ca");
    let hands = Hands::default();
    init(&directory, &options(3_600), at(0)).unwrap();
    let agents: Vec<_> = (0..2).map(|_| DirectoryCa::open(&directory, hands.clock()).unwrap()).collect();
    let roots = || {
        let told: Vec<_> = agents.iter().map(|agent| agent.roots().unwrap()).collect();
        assert_eq!(told[0], told[1]);
        let Roots::These(roots) = &told[0] else { panic!() };
        roots.len()
    };
    assert_eq!(roots(), 1);
    rotate(&directory, Duration::from_secs(60), 3650 * DAY, at(10)).unwrap();
    assert_eq!(roots(), 2);
    // The clock alone drops the first one; the files go at the next rotation.
    hands.set(10 + 60 + 3_600 + 600);
    assert_eq!(roots(), 1);
    assert!(key_path(&directory, 1).exists());
    rotate(&directory, Duration::from_secs(60), 3650 * DAY, at(5_000)).unwrap();
    assert!(!key_path(&directory, 1).exists() && !certificate_path(&directory, 1).exists());
    hands.set(5_000);
    assert_eq!(roots(), 2);
}

#[tokio::test]
async fn what_it_signs_never_outlives_what_it_may() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("ca");
    let hands = Hands::default();
    init(&directory, &InitOptions { root_life: Duration::from_secs(7_200), ..options(3_600) }, at(0))
        .unwrap();
    let ca = DirectoryCa::open(&directory, hands.clock()).unwrap();
    let issue = async |account: &SpiffeId, validity: u64| {
        let key = PrivateKey::generate().unwrap();
        let request = CertificateRequest {
            id: account.clone(),
            csr: key.request(account).unwrap(),
            public_key: key.public_key(),
            validity: Duration::from_secs(validity),
        };
        let issued = ca.issue(&request).await.map_err(|error| error.to_string())?;
        Ok::<_, String>(x509::Facts::read(&issued.chain[0]).unwrap().not_after)
    };
    let web = id("web");
    assert_eq!(issue(&web, 60).await, Ok(at(60)));
    assert_eq!(issue(&web, 86_400).await, Ok(at(3_600)), "no longer than the authority's leaves live");
    hands.set(7_000);
    assert_eq!(issue(&web, 3_600).await, Ok(at(7_200)), "no longer than the root");
    hands.set(7_200);
    assert!(issue(&web, 60).await.unwrap_err().contains("root 1 has expired; `undermesh ca rotate`"));
    let error = issue(&id("spiffe://elsewhere.test/ns/a/sa/b"), 60).await.unwrap_err();
    assert!(error.ends_with("is not of the trust domain cluster.local"), "{error}");
}

#[test]
fn directories_that_are_refused() {
    let base = tempfile::tempdir().unwrap();
    let fresh = |name: &str| {
        let directory = base.path().join(name);
        init(&directory, &options(60), at(0)).unwrap();
        directory
    };
    let check = |directory: &Path, what: &str| {
        let error = DirectoryCa::open(directory, Hands::default().clock()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    check(&base.path().join("none"), "has no certificate authority");
    let open = fresh("open");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    check(&open, "has mode 0755 and must be for its owner alone");
    for file in ["state.json", "root-1.pem", "root-1.key.pem"] {
        let directory = fresh(&format!("open-{file}"));
        fs::set_permissions(directory.join(file), fs::Permissions::from_mode(0o644)).unwrap();
        check(&directory, &format!("{file} has mode 0644"));
        let directory = fresh(&format!("broken-{file}"));
        files::write(&directory.join(file), b"-----BEGIN NOTHING-----").unwrap();
        check(&directory, file);
    }
    let (a, b) = (fresh("a"), fresh("b"));
    files::write(&key_path(&a, 1), &files::read(&key_path(&b, 1)).unwrap()).unwrap();
    check(&a, "is not the key of");
    assert!(matches!(init(&b, &options(60), at(0)), Err(DirectoryError::Exists(_))));
    let names: Vec<_> = fs::read_dir(&b).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    for name in names {
        let mode = fs::metadata(b.join(&name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name:?}");
    }
}

#[test]
fn a_directory_that_breaks_later_leaves_in_force_what_was_read() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("ca");
    init(&directory, &options(60), at(0)).unwrap();
    let ca = DirectoryCa::open(&directory, Hands::default().clock()).unwrap();
    let before = ca.roots().unwrap();
    files::write(&state_path(&directory), b"{").unwrap();
    assert!(matches!(ca.roots(), Err(CaError::Unavailable(_))));
    fs::remove_dir_all(&directory).unwrap();
    init(&directory, &InitOptions { trust_domain: domain("other"), ..options(60) }, at(0)).unwrap();
    let error = ca.roots().unwrap_err().to_string();
    assert!(error.contains("was cluster.local and is other"), "{error}");
    assert_eq!(ca.trust_domain(), domain("cluster.local"));
    assert_ne!(before, Roots::These(Vec::new()));
    assert!(!format!("{ca:?}").contains("PRIVATE"));
}

#[test]
fn an_authority_is_made_where_there_is_nothing_yet() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("var/lib/ca");
    let options = InitOptions::default();
    // All who start at one moment agree.
    let made: Vec<bool> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| ensure(&directory, &InitOptions::default(), at(0)).unwrap()))
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 1, "{made:?}");
    let root = read_certificate(&directory, 1).unwrap();
    assert!(!ensure(&directory, &options, at(1)).unwrap());
    assert_eq!(read_certificate(&directory, 1).unwrap(), root);

    // Its state lost, it is not made anew.
    fs::remove_file(state_path(&directory)).unwrap();
    let error = ensure(&directory, &options, at(2)).unwrap_err();
    assert!(matches!(error, DirectoryError::Occupied(_)), "{error}");
    assert_eq!(read_certificate(&directory, 1).unwrap(), root);
}

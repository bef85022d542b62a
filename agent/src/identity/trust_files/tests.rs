//! Bundles and revocation lists, as operators hand them over.

use expect_test::expect;

use super::*;
use crate::identity::testkit::*;
use crate::identity::trust::{Chain, Role};
use crate::identity::{CrlMode, Svid};

struct Files {
    folder: tempfile::TempDir,
    trust: Arc<Trust>,
    files: TrustFiles,
}

impl Files {
    fn new(authority: &Authority, mode: CrlMode) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let trust = Trust::new(domain("cluster.local"), mode);
        trust
            .set_roots(
                &domain("cluster.local"),
                RootSource::Authority,
                std::slice::from_ref(&authority.certificate),
            )
            .unwrap();
        let settings = TrustFilesSettings {
            bundles: vec![(domain("elsewhere.test"), folder.path().join("elsewhere.pem"))],
            crls: vec![folder.path().join("crl")],
        };
        // The files are to come: as after a start at which they were there.
        let (seen, lists) = (HashMap::new(), HashMap::new());
        let files = TrustFiles { settings, trust: trust.clone(), seen, lists };
        Self { folder, trust, files }
    }

    fn write(&mut self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.folder.path().join(name), content).unwrap();
        self.files.refresh();
    }

    fn check(&self, svid: &Svid, seconds: u64) -> String {
        let (leaf, intermediates) = svid.chain().split_first().unwrap();
        match self.trust.verify(Chain { leaf, intermediates }, Role::Client, at(seconds)) {
            Ok(id) => id.service_account().to_owned(),
            Err(error) => error.reason().as_str().to_owned(),
        }
    }
}

#[test]
fn what_each_mode_makes_of_each_list() {
    let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
    let other = Authority::new("cluster.local", at(0), 3650 * DAY);
    let good = authority.svid(&id("good"), at(0), at(86_400));
    let bad = authority.svid(&id("bad"), at(0), at(86_400));
    let list = |authority: &Authority, until: u64| authority.crl(&[&bad.serial], at(0), at(until));
    let mut lines = String::new();
    for (name, content) in [
        ("no list", None),
        ("a list", Some(list(&authority, 3_600))),
        ("an expired list", Some(list(&authority, 50))),
        ("another authority's list", Some(list(&other, 3_600))),
        ("rubbish", Some("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into())),
    ] {
        for mode in [CrlMode::Require, CrlMode::Prefer, CrlMode::Off] {
            let mut files = Files::new(&authority, mode);
            if let Some(content) = &content {
                files.write("crl", content);
            }
            let (good, bad) = (files.check(&good, 100), files.check(&bad, 100));
            lines += &format!("{name}, {}: {good}, {bad}\n", mode.as_str());
        }
    }
    expect![[r#"
        no list, require: crl_unavailable, crl_unavailable
        no list, prefer: good, bad
        no list, off: good, bad
        a list, require: good, revoked
        a list, prefer: good, revoked
        a list, off: good, bad
        an expired list, require: crl_unavailable, crl_unavailable
        an expired list, prefer: good, revoked
        an expired list, off: good, bad
        another authority's list, require: crl_unavailable, crl_unavailable
        another authority's list, prefer: good, bad
        another authority's list, off: good, bad
        rubbish, require: crl_unavailable, crl_unavailable
        rubbish, prefer: good, bad
        rubbish, off: good, bad
    "#]]
    .assert_eq(&lines);
}

#[test]
fn lists_are_read_again_and_outlive_a_broken_file() {
    let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
    let web = authority.svid(&id("web"), at(0), at(86_400));
    let mut files = Files::new(&authority, CrlMode::Prefer);
    files.write("crl", authority.crl(&["01"], at(0), at(3_600)));
    assert_eq!(files.check(&web, 1), "web");
    files.write("crl", authority.crl(&[&web.serial, "01"], at(0), at(3_600)));
    assert_eq!(files.check(&web, 1), "revoked");
    files.write("crl", "half a li");
    assert_eq!(files.check(&web, 1), "revoked");
    fs::remove_file(files.folder.path().join("crl")).unwrap();
    files.files.refresh();
    assert_eq!(files.check(&web, 1), "revoked");
    // DER is read as well.
    let pem = authority.crl(&["01"], at(0), at(3_600));
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    files.write("crl", &pem.contents);
    assert_eq!(files.check(&web, 1), "web");
}

#[test]
fn bundles_of_other_domains_with_several_roots() {
    let own = Authority::new("cluster.local", at(0), 3650 * DAY);
    let [old, new] = [0, 1].map(|_| Authority::new("elsewhere.test", at(0), 3650 * DAY));
    let far = id("spiffe://elsewhere.test/ns/shop/sa/far");
    let (by_old, by_new) = (old.svid(&far, at(0), at(86_400)), new.svid(&far, at(0), at(86_400)));
    let mut files = Files::new(&own, CrlMode::Off);
    let both = |files: &Files| format!("{} {}", files.check(&by_old, 1), files.check(&by_new, 1));
    assert_eq!(both(&files), "wrong_trust_domain wrong_trust_domain");
    files.write("elsewhere.pem", &old.pem);
    assert_eq!(both(&files), "far unknown_issuer");
    files.write("elsewhere.pem", format!("{}\n# the next\n{}", old.pem, new.pem));
    assert_eq!(both(&files), "far far");
    files.write("elsewhere.pem", "");
    assert_eq!(both(&files), "far far", "an empty file is no bundle");
    files.write("elsewhere.pem", &new.pem);
    assert_eq!(both(&files), "unknown_issuer far");
}

proptest::proptest! {
    #[test]
    fn no_list_or_bundle_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        _ = crl::parse(&bytes);
        _ = certificates_of_pem(&bytes);
        _ = crate::identity::x509::Facts::read(&bytes);
    }

    #[test]
    fn nor_one_that_is_damaged(at_byte in 0usize..400, with in proptest::prelude::any::<u8>(), cut in 1usize..400) {
        use std::sync::LazyLock;
        static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let root = Authority::new("cluster.local", at(0), DAY);
            root.certificate.to_vec()
        });
        let mut damaged = GOOD.clone();
        let place = at_byte % damaged.len();
        damaged[place] = with;
        damaged.truncate(damaged.len().max(cut));
        if let Ok(facts) = crate::identity::x509::Facts::read(&damaged) {
            _ = facts.identity();
        }
        _ = super::super::trust::DomainRoots::read(&[damaged.into()]);
    }
}

#[test]
fn the_start_insists_on_every_file() {
    let authority = Authority::new("elsewhere.test", at(0), 3650 * DAY);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |bundles: &[&str], crls: &[&str]| {
        let trust = Trust::new(domain("cluster.local"), CrlMode::Prefer);
        let settings = TrustFilesSettings {
            bundles: bundles.iter().map(|name| (domain("elsewhere.test"), path(name))).collect(),
            crls: crls.iter().map(|name| path(name)).collect(),
        };
        let error = TrustFiles::open(settings, trust).err().map(|error| error.to_string());
        error.unwrap_or_else(|| "open".into()).replace(&*folder.path().to_string_lossy(), "/base")
    };
    fs::write(path("roots"), &authority.pem).unwrap();
    fs::write(path("list"), authority.crl(&[], at(0), at(86_400))).unwrap();
    fs::write(path("broken"), "no PEM").unwrap();
    let lines = [
        open(&["roots"], &["list"]),
        open(&["none"], &[]),
        open(&["broken"], &[]),
        open(&["roots"], &["none"]),
        open(&["roots"], &["list", "broken"]),
    ];
    expect![[r#"
        open
        the trust bundle of elsewhere.test, /base/none, cannot be read: No such file or directory (os error 2)
        the trust bundle of elsewhere.test, /base/broken, cannot be read: there is no certificate in it
        the revocation list /base/none cannot be read: No such file or directory (os error 2)
        the revocation list /base/broken cannot be read: not a revocation list: TrailingData(CertRevocationList)
    "#]].assert_eq(&lines.map(|line| line + "\n").concat());
}

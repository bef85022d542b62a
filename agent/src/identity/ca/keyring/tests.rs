//! An authority's life as files: made, rotated, supplied, and broken in every way that an editor finds.

use expect_test::expect;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};

use super::*;
use crate::identity::Svid;
use crate::identity::testkit::{DAY, at, domain, id};

const HOUR: Duration = Duration::from_secs(3_600);

fn options() -> InitOptions {
    InitOptions { trust_domain: domain("cluster.local"), root_life: 100 * DAY, leaf_life: HOUR }
}

fn read(files: Files, seconds: u64) -> Keyring {
    Keyring::read(files, &domain("cluster.local"), at(seconds)).unwrap()
}

/// What a client makes of a certificate: who signed it, how long it lives, how many roots came with it.
fn issue(keyring: &Keyring, validity: Duration, seconds: u64) -> String {
    let key = PrivateKey::generate().unwrap();
    let web = id("web");
    match keyring.sign(&web, &key.public_key(), validity, at(seconds)) {
        Ok(issued) => {
            let roots = issued.roots.len();
            let svid = Svid::accept(&web, &key, issued, at(seconds)).unwrap();
            let signer = svid.issuer.subject.rsplit_once(' ').map_or("", |(name, _)| name).to_owned();
            format!("{signer}, {} s, {roots} roots", svid.remaining(at(seconds)).as_secs())
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_rotation_overlaps_and_its_end_takes_the_old_root_with_it() {
    let first = read(Keyring::generate(&options(), at(0)).unwrap(), 0);
    let names = |keyring: &Keyring| keyring.files().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(names(&first), "root-1.key.pem root-1.pem state.json");
    assert_eq!(issue(&first, DAY, 0), "O=cluster.local, CN=Undermesh root 1, 3600 s, 1 roots");
    assert!(first.pruned(at(0)).is_none());

    let second = read(first.rotated(HOUR, 100 * DAY, at(1_000)).unwrap(), 1_000);
    assert!(matches!(second.rotated(HOUR, DAY, at(1_001)), Err(RotateError::UnderWay(_))));
    assert_eq!(issue(&second, 60 * HOUR, 1_000), "O=cluster.local, CN=Undermesh root 1, 3600 s, 2 roots");
    assert_eq!(second.bundle(at(1_000)).matches("BEGIN CERTIFICATE").count(), 2);
    assert!(second.bundle(at(1_000)).starts_with(&first.bundle(at(0))));
    assert_ne!(second.issuer(at(1_000)), second.issuer(at(5_000)));
    // The very same keyring: nobody has to read anything for the change.
    assert_eq!(issue(&second, HOUR, 4_600), "O=cluster.local, CN=Undermesh root 2, 3600 s, 2 roots");
    assert!(second.pruned(at(8_700)).is_none());
    assert_eq!(issue(&second, HOUR, 8_800), "O=cluster.local, CN=Undermesh root 2, 3600 s, 1 roots");
    let third = read(second.pruned(at(8_800)).unwrap(), 8_800);
    assert_eq!(names(&third), "root-2.key.pem root-2.pem state.json");
    assert_eq!(third.bundle(at(8_800)), second.bundle(at(8_800)));

    assert!(first.is_older_than(&second) && !second.is_older_than(&first) && !third.is_older_than(&second));
    let stranger = read(Keyring::generate(&options(), at(0)).unwrap(), 0);
    assert!(!stranger.is_older_than(&second));
    assert!(!first.is_ageing(at(89 * 86_400)) && first.is_ageing(at(91 * 86_400)));
    let renewed = first.rotated(HOUR, 100 * DAY, at(91 * 86_400)).unwrap();
    assert!(!read(renewed, 91 * 86_400).is_ageing(at(91 * 86_400)));
    assert_eq!(
        issue(&first, HOUR, 101 * 86_400),
        "the certificate authority is not available: the certificate that signs has expired; rotate or replace it"
    );
}

#[test]
fn a_key_of_the_authority_never_shows_itself() {
    let keyring = read(Keyring::generate(&options(), at(0)).unwrap(), 0);
    let key = String::from_utf8(keyring.files()["root-1.key.pem"].to_vec()).unwrap();
    assert!(!format!("{keyring:?}").contains(key.lines().nth(1).unwrap()));
}

#[test]
fn a_server_certificate_has_names_and_no_identity() {
    let keyring = read(Keyring::generate(&options(), at(0)).unwrap(), 0);
    let names = ["ca.mesh.svc".to_owned(), "10.0.0.1".to_owned()];
    let made = keyring.server(&names, DAY, at(0)).unwrap();
    assert_eq!(made.not_after, at(3_600));
    let facts = Facts::read(&made.key.cert[0]).unwrap();
    assert!(facts.identity().is_err());
    assert_eq!(Some(&made.issuer), keyring.issuer(at(0)));
}

/// A root, an intermediate under it with its key, and who it is for.
fn intermediate() -> Files {
    let authority = |name: &str, constraint| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(constraint);
        (params.not_before, params.not_after) = (at(0).into(), (at(0) + 10 * DAY).into());
        params
    };
    let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let root = authority("corporate", BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let mut params = authority("mesh", BasicConstraints::Constrained(0));
    params.not_after = (at(0) + DAY).into();
    let pem = params.signed_by(&key, &Issuer::new(root, root_key)).unwrap().pem();
    let file = |name: &str, text: String| (name.to_owned(), text.into_bytes().into());
    Files::from([
        file("ca-cert.pem", pem.clone()),
        file("ca-key.pem", key.serialize_pem()),
        // As some tools write it: the certificate itself, and the root as well.
        file("cert-chain.pem", pem + &root_pem),
        file("root-cert.pem", root_pem),
    ])
}

#[test]
fn a_supplied_intermediate_comes_with_what_it_signs() {
    let keyring = read(intermediate(), 100);
    let key = PrivateKey::generate().unwrap();
    let issued = keyring.sign(&id("web"), &key.public_key(), HOUR, at(100)).unwrap();
    assert_eq!((issued.chain.len(), issued.roots.len()), (2, 1));
    let svid = Svid::accept(&id("web"), &key, issued, at(100)).unwrap();
    assert_eq!((&*svid.issuer.subject, &*svid.root.subject), ("CN=mesh", "CN=corporate"));
    // Never longer than the intermediate.
    let issued = keyring.sign(&id("web"), &key.public_key(), 3 * DAY, at(100)).unwrap();
    assert_eq!(Facts::read(&issued.chain[0]).unwrap().not_after, at(86_400));
    assert!(keyring.is_supplied() && keyring.pruned(at(0)).is_none() && !keyring.is_ageing(at(86_000)));
    assert!(matches!(keyring.rotated(HOUR, DAY, at(100)), Err(RotateError::Supplied)));
    assert_eq!(keyring.server(&["ca".into()], HOUR, at(100)).unwrap().key.cert.len(), 2);

    let mut bare = intermediate();
    bare.remove("cert-chain.pem");
    read(bare, 100);
}

#[test]
fn what_is_broken_is_named() {
    let generated = || Keyring::generate(&options(), at(0)).unwrap();
    let without = |mut files: Files, name: &str| {
        files.remove(name).unwrap();
        files
    };
    let with = |mut files: Files, name: &str, text: &[u8]| {
        files.insert(name.into(), text.to_vec().into());
        files
    };
    let stranger = generated();
    let cases = [
        ("nothing", Files::new()),
        ("something else", with(Files::new(), "tls.crt", b"x")),
        ("both", with(generated(), "ca-cert.pem", b"x")),
        ("no key", without(generated(), "root-1.key.pem")),
        ("no root", without(generated(), "root-1.pem")),
        ("state", with(generated(), "state.json", b"{}")),
        ("another's key", with(generated(), "root-1.key.pem", &stranger["root-1.key.pem"])),
        ("half a key", with(generated(), "root-1.key.pem", &stranger["root-1.key.pem"][..80])),
        ("root is text", with(generated(), "root-1.pem", b"hello")),
        ("supplied without key", without(intermediate(), "ca-key.pem")),
        ("supplied with another's key", with(intermediate(), "ca-key.pem", &stranger["root-1.key.pem"])),
        ("supplied without root", without(intermediate(), "root-cert.pem")),
        ("supplied with a chain of nothing", with(intermediate(), "cert-chain.pem", b"")),
    ];
    let mut text = String::new();
    for (name, files) in cases {
        let error = Keyring::read(files, &domain("cluster.local"), at(0)).unwrap_err();
        text += &format!("{name}: {error}\n");
    }
    let other = Keyring::read(generated(), &domain("other.test"), at(0)).unwrap_err();
    text += &format!("another domain: {other}\n");
    let unrelated = with(intermediate(), "root-cert.pem", &stranger["root-1.pem"]);
    let error = Keyring::read(unrelated, &domain("cluster.local"), at(0)).unwrap_err().to_string();
    assert!(error.contains("does not lead to a root that came with it"), "{error}");
    expect![[r#"
        nothing: there is neither `state.json` nor `ca-cert.pem` among the keys: ; remove all of them for a new authority
        something else: there is neither `state.json` nor `ca-cert.pem` among the keys: tls.crt; remove all of them for a new authority
        both: there are both `state.json` and `ca-cert.pem`; keep either what was generated or what you supply
        no key: `root-1.key.pem` is missing
        no root: `root-1.pem` is missing
        state: `state.json`: not the state of a certificate authority: missing field `version` at line 1 column 2
        another's key: `root-1.key.pem`: it is not the key of the certificate that it comes with
        half a key: `root-1.key.pem`: cannot make or use a private key: PEM error: malformedframing
        root is text: `root-1.pem`: there is no certificate in it
        supplied without key: `ca-key.pem` is missing
        supplied with another's key: `ca-key.pem`: it is not the key of the certificate that it comes with
        supplied without root: `root-cert.pem` is missing
        supplied with a chain of nothing: `cert-chain.pem`: there is no certificate in it
        another domain: it is the authority of the trust domain cluster.local, and --trust-domain is other.test
    "#]].assert_eq(&text);
}

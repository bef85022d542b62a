//! What can be said of tokens, and what is wrong with how it is said.

use std::cell::RefCell;

use expect_test::{Expect, expect};
use serde_json::Value;

use super::*;
use crate::config::Kind;
use crate::model::ObjectRef;

const KEYS: &str = include_str!("../../../../policy/jwt/cases/rfc7515.json");

/// A section as it is written, and what is wrong with it, a line each.
fn read_section(yaml: &str) -> (Option<Rules>, String) {
    let object: Value = serde_saphyr::from_str(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let found = RefCell::new(Vec::new());
    let place = Place::root(&found);
    let key = Key::of(Kind::MeshPolicy, &ObjectRef::new("shop", "a"));
    let rules = place.typed::<wire::Jwt>(&object).map(|wire| read(&key, &wire, &place));
    let found = found.into_inner();
    (rules, found.iter().map(|problem| format!("{problem}\n")).collect())
}

/// With one issuer that has this beside its name.
fn issuer(rest: &str) -> (Option<Issuer>, String) {
    let (rules, problems) = read_section(&format!("{{issuers: [{{issuer: a, {rest}}}]}}"));
    (rules.and_then(|mut rules| rules.issuers.pop()), problems)
}

const FROM_THERE: &str = "jwks: {uri: 'https://id.example.com/keys'}";

#[test]
fn all_that_can_be_said() {
    let (rules, problems) = read_section(&format!(
        "{{leeway: 5s, issuers: [
           {{issuer: 'https://id.example.com/', audiences: [shop, web], {FROM_THERE}, forward: true,
             from: {{headers: [{{name: Authorization, prefix: 'Bearer '}}, {{name: X-Token}}], params: [token]}},
             claimsToHeaders: [{{claim: [sub], header: X-User}}, {{claim: [org, name], header: x-org}}]}},
           {{issuer: other, jwks: {{inline: '{KEYS}'}}}}]}}"
    ));
    assert_eq!(problems, "");
    let rules = rules.unwrap();
    assert_eq!((&*rules.policy, rules.leeway, &rules.invalid), ("MeshPolicy shop/a", 5, &None));
    let [first, other] = &rules.issuers[..] else { panic!("{rules:?}") };
    let header = |name, prefix: &str| Shown::Header { name, prefix: prefix.into() };
    let claim = |path: &[&str], header| ClaimHeader {
        claim: path.iter().map(|name| Name::from(*name)).collect(),
        header: HeaderName::from_static(header),
    };
    assert_eq!(
        *first,
        Issuer {
            name: "https://id.example.com/".into(),
            audiences: vec!["shop".into(), "web".into()],
            keys: Keys::At("https://id.example.com/keys".into()),
            places: vec![
                Shown::bearer(),
                header(HeaderName::from_static("x-token"), ""),
                Shown::Param("token".into())
            ],
            forward: true,
            headers: vec![claim(&["sub"], "x-user"), claim(&["org", "name"], "x-org")],
        }
    );
    let keys = Keys::Given(Arc::new(KeySet::parse(KEYS.as_bytes()).unwrap()));
    assert_eq!((&other.keys, &other.places, other.forward), (&keys, &vec![Shown::bearer()], false));
    assert_eq!(read_section(&format!("{{issuers: [{{issuer: a, {FROM_THERE}}}]}}")).0.unwrap().leeway, 60);
}

#[test]
fn what_is_wrong_with_a_section() {
    let check = |yaml: &str, expected: Expect| expected.assert_eq(&read_section(yaml).1);
    check(
        "{}",
        expect![[r#"
        missing field `issuers`
    "#]],
    );
    check(
        "{issuers: [], leeway: 11m}",
        expect![[r#"
            leeway: expected a duration such as 500ms, 10s or 1h30m, from 0s to 600s, found "11m"
            issuers: expected at least one
        "#]],
    );
    check(
        &format!("{{issuers: [{{issuer: a, {FROM_THERE}}}, {{issuer: a, {FROM_THERE}, audience: b}}]}}"),
        expect![[r#"
            issuers[1].audience: there is no such field, or this version of Undermesh does not know it
            issuers[1].issuer: expected each issuer once
        "#]],
    );
    let many: Vec<String> = (0..17).map(|i| format!("{{issuer: a{i}, {FROM_THERE}}}")).collect();
    check(
        &format!("{{issuers: [{}]}}", many.join(", ")),
        expect![[r#"
        issuers: expected 16 at most, found 17
    "#]],
    );
}

#[test]
fn what_is_wrong_with_an_issuer() {
    let check = |rest: &str, expected: Expect| expected.assert_eq(&issuer(rest).1);
    check(
        &format!("{FROM_THERE}, audiences: []"),
        expect![[r#"
        issuers[0].audiences: expected at least one, or no such field
    "#]],
    );
    check(
        &format!("{FROM_THERE}, audiences: ['']"),
        expect![[r#"
        issuers[0].audiences[0]: expected 1 to 1024 characters, found 0
    "#]],
    );
    check(
        "jwks: {}",
        expect![[r#"
        issuers[0].jwks: expected either inline or uri
    "#]],
    );
    check(
        "jwks: {uri: 'https://a/', inline: '{}'}",
        expect![[r#"
        issuers[0].jwks: expected either inline or uri
    "#]],
    );
    check(
        "jwks: {inline: '{\"keys\":[{\"kty\":\"oct\",\"k\":\"c2VjcmV0\"}]}'}",
        expect![[r#"
        issuers[0].jwks.inline: no key that can be used: key 1 is a shared secret
    "#]],
    );
    for uri in [
        "http://id/keys",
        "https://",
        "https:///keys",
        "id/keys",
        "https://u:p@id/",
        "https://id/#a",
        "ftp://id",
    ] {
        let (_, problems) = issuer(&format!("jwks: {{uri: '{uri}'}}"));
        let expected = format!(
            "issuers[0].jwks.uri: expected an address such as https://id.example.com/keys, found {uri:?}\n"
        );
        assert_eq!(problems, expected);
    }
    check(
        &format!("{FROM_THERE}, from: {{}}"),
        expect![[r#"
        issuers[0].from: expected headers, params or both
    "#]],
    );
    check(
        &format!(
            "{FROM_THERE}, from: {{headers: [{{name: cookie}}, {{name: 'a b'}}, {{name: Host}}, {{name: x, prefix: 'ü'}}], params: ['']}}"
        ),
        expect![[r#"
            issuers[0].from.headers[0].name: tokens in cookies are not looked for
            issuers[0].from.headers[1].name: expected the name of a header, found "a b"
            issuers[0].from.headers[2].name: expected a header that is not part of how messages are passed on, found "Host"
            issuers[0].from.headers[3].prefix: expected up to 64 characters of ASCII, found "ü"
            issuers[0].from.params[0]: expected 1 to 1024 characters, found 0
        "#]],
    );
    check(
        &format!(
            "{FROM_THERE}, claimsToHeaders: [{{claim: [], header: x-a}}, {{claim: [''], header: x-b}}, {{claim: [sub], header: X-A}}, {{claim: [sub], header: content-length}}]"
        ),
        expect![[r#"
            issuers[0].claimsToHeaders[0].claim: expected 1 to 8 names, found 0
            issuers[0].claimsToHeaders[1].claim[0]: expected 1 to 1024 characters, found 0
            issuers[0].claimsToHeaders[2].header: expected each header once
            issuers[0].claimsToHeaders[3].header: expected a header that is not part of how messages are passed on, found "content-length"
        "#]],
    );
}

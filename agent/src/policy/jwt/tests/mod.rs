//! Which tokens hold, as tables that people can read; the examples of the RFCs; and that nothing of a token can be changed.

mod written;

use http::{HeaderMap, HeaderValue, Uri};
use serde_json::json;

use super::algorithm::Algorithm;
use super::*;
use written::{Lab, rows};

const JOE: &str =
    "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
const A1: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const A2: &str = "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdb\
    F9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi\
    12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe\
    77Rw";
const A3: &str = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";

/// An issuer whose tokens are where they are as a rule.
fn issuer(name: &str, keys: Keys) -> Issuer {
    Issuer {
        name: name.into(),
        audiences: Vec::new(),
        keys,
        places: vec![Place::bearer()],
        forward: false,
        headers: Vec::new(),
    }
}

fn rules(issuers: Vec<Issuer>, leeway: u64) -> Rules {
    Rules { policy: "a".into(), issuers, leeway, invalid: None }
}

fn given(json: &str) -> Keys {
    Keys::Given(Arc::new(KeySet::parse(json.as_bytes()).unwrap()))
}

/// What becomes of a token that is shown as a rule is: `holds`, or why not.
fn judged(rules: &Rules, token: &str, now: u64) -> String {
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_bytes(format!("Bearer {token}").as_bytes());
    let Ok(value) = value else { return "no header".to_owned() };
    headers.insert("authorization", value);
    match rules.check(&headers, &Uri::from_static("/"), |_| None, now) {
        Ok(Some(_)) => "holds".to_owned(),
        Ok(None) => "none".to_owned(),
        Err(Refusal { why, .. }) => why.to_string(),
    }
}

#[test]
fn tokens_hold_if_their_issuer_says_it_now_for_this_audience() {
    rows(include_str!("../cases/tokens.txt"), |lab: &Lab, head, line| {
        let (token, now) = lab.token(line);
        judged(&lab.believed(head), &token, now)
    });
}

#[test]
fn applications_get_what_tokens_say_and_no_one_else() {
    rows(include_str!("../cases/requests.txt"), |lab: &Lab, head, line| lab.passed(head, line));
}

/// RFC 7515, appendix A; A.1 is the example of RFC 7519 too.
#[test]
fn examples_of_the_rfcs_hold_if_they_are_of_public_keys() {
    let rules = rules(vec![issuer("joe", given(include_str!("../cases/rfc7515.json")))], 0);
    for (name, token, now, expected) in [
        ("A.2", format!("eyJhbGciOiJSUzI1NiJ9.{JOE}.{A2}"), 1_300_819_379, "holds".to_owned()),
        ("A.3", format!("eyJhbGciOiJFUzI1NiJ9.{JOE}.{A3}"), 1_300_819_379, "holds".to_owned()),
        (
            "A.3, later",
            format!("eyJhbGciOiJFUzI1NiJ9.{JOE}.{A3}"),
            1_300_819_380,
            Invalid::Expired.to_string(),
        ),
        (
            "mixed up",
            format!("eyJhbGciOiJFUzI1NiJ9.{JOE}.{A2}"),
            1_300_819_379,
            Invalid::UnknownKey.to_string(),
        ),
        (
            "A.1",
            format!("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{JOE}.{A1}"),
            0,
            Invalid::Algorithm.to_string(),
        ),
        ("A.5", format!("eyJhbGciOiJub25lIn0.{JOE}."), 0, Invalid::Algorithm.to_string()),
    ] {
        assert_eq!(judged(&rules, &token, now), expected, "{name}");
    }
}

/// RFC 8037, appendix A.4: it signs a text, which is no token.
#[test]
fn the_example_of_ed25519_is_signed() {
    let key = json!({ "keys": [{
        "kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" }] });
    let keys = KeySet::parse(key.to_string().as_bytes()).unwrap();
    let signed = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    let signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    let algorithm = Algorithm::named("EdDSA").unwrap();
    assert!(keys.candidates(None).all(|key| key.has_signed(signed, signature, algorithm)));
    assert!(!keys.candidates(None).any(|key| key.has_signed(&signed[1..], signature, algorithm)));
}

/// RFC 7515, appendix A.4: likewise.
#[test]
fn the_example_of_p521_is_signed() {
    let key = json!({ "keys": [{
        "kty": "EC", "crv": "P-521",
        "x": "AekpBQ8ST8a8VcfVOTNl353vSrDCLLJXmPk06wTjxrrjcBpXp5EOnYG_NjFZ6OvLFV1jSfS9tsz4qUxcWceqwQGk",
        "y": "ADSmRA43Z1DSNx_RvcLI87cdL07l6jQyyBXMoxVg_l2Th-x3S1WDhjDly79ajL4Kkd0AZMaZmh9ubmf63e3kyMj2" }] });
    let keys = KeySet::parse(key.to_string().as_bytes()).unwrap();
    let signed = "eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA";
    let signature = "AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_7XdtAG8GaSwFKdCAPZgoXD2Y\
        BJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXolLzeO_Jn";
    let has_signed = |signed, signature| {
        keys.candidates(None).all(|key| key.has_signed(signed, signature, Algorithm::Es512))
    };
    assert!(has_signed(signed, signature));
    assert!(!has_signed(&signed[1..], signature));
    assert!(!has_signed(signed, &signature[..signature.len() - 2]));
    let other = Algorithm::named("ES384").unwrap();
    assert!(!keys.candidates(None).any(|key| key.has_signed(signed, signature, other)));
}

#[test]
fn sets_of_keys_have_what_can_be_used_of_them() {
    let examples = KeySet::parse(include_bytes!("../cases/rfc7517.json")).unwrap();
    assert_eq!(
        examples.left_out(),
        ["key 1 is not for signatures", "key 3 is a shared secret", "key 4 is a shared secret"]
    );
    let named: Vec<_> = examples.candidates(None).map(|key| key.id()).collect();
    assert_eq!(named, [Some("2011-04-29")]);

    let lab = Lab::new();
    let check = |changes: serde_json::Value, expected: &str| {
        let mut key = lab.key("p256").jwk();
        let changes = changes.as_object().unwrap();
        key.as_object_mut().unwrap().extend(changes.clone());
        key.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        let read = KeySet::parse(json!({ "keys": [key] }).to_string().as_bytes());
        let got = read.map_or_else(|error| error.to_string(), |_| "taken".to_owned());
        assert_eq!(got, expected, "{changes:?}");
    };
    check(json!({}), "taken");
    check(json!({ "use": null, "kid": null }), "taken");
    check(json!({ "alg": "ES256", "key_ops": ["verify"], "x5t": "abc", "new": {} }), "taken");
    check(
        json!({ "alg": "ES384" }),
        "no key that can be used: key 1 has an algorithm that is not of its type",
    );
    check(
        json!({ "alg": "ES512" }),
        "no key that can be used: key 1 has an algorithm that is not of its type",
    );
    check(
        json!({ "alg": "HS256" }),
        "no key that can be used: key 1 has an algorithm that is not known here",
    );
    check(json!({ "use": "enc" }), "no key that can be used: key 1 is not for signatures");
    check(json!({ "key_ops": ["sign"] }), "no key that can be used: key 1 is not for verifying");
    check(json!({ "crv": "P-384" }), "no key that can be used: key 1 has coordinates of a wrong length");
    check(json!({ "crv": "P-521" }), "no key that can be used: key 1 has coordinates of a wrong length");
    check(json!({ "crv": "Ed25519" }), "no key that can be used: key 1 is of a curve that is not known here");
    check(json!({ "y": null }), "no key that can be used: key 1 is of a type that is not known here");
    check(json!({ "x": "~" }), "no key that can be used: key 1 has coordinates of a wrong length");
    check(json!({ "kty": "oct", "k": "c2VjcmV0" }), "no key that can be used: key 1 is a shared secret");
    check(
        json!({ "kty": "RSA", "n": "c2hvcnQ", "e": "AQAB" }),
        "no key that can be used: key 1 is not of 2048 to 8192 bits",
    );
    check(
        json!({ "kty": "OKP", "crv": "Ed25519" , "x": "AAAA" }),
        "no key that can be used: key 1 has a coordinate of a wrong length",
    );

    let whole = |json: &str| KeySet::parse(json.as_bytes()).unwrap_err().to_string();
    assert_eq!(whole(r#"{"keys":[]}"#), "no key that can be used");
    assert_eq!(whole("{}"), "not a JSON Web Key Set: missing field `keys` at line 1 column 2");
    assert_eq!(whole(&format!("{{\"keys\":[{}0]}}", "0,".repeat(100))), "101 keys, 100 at most");
    assert_eq!(whole(&" ".repeat(KeySet::MOST_BYTES + 1)), "longer than 256 KiB");
}

/// Keys of an address are those that are at hand; where others could do, their address is told.
#[test]
fn keys_that_may_have_been_replaced_are_asked_for() {
    let lab = Lab::new();
    let rules = rules(vec![issuer("https://id/", Keys::At("https://id/keys".into()))], 60);
    let check = |line: &str, keys: Option<&[&str]>, expected: Result<(), (Invalid, bool)>| {
        let (token, now) = lab.token(line);
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::try_from(format!("Bearer {token}")).unwrap());
        let keys = |address: &Name| {
            assert_eq!(&**address, "https://id/keys");
            keys.map(|keys| Arc::new(KeySet::parse(lab.published(keys).as_bytes()).unwrap()))
        };
        let got = rules.check(&headers, &Uri::from_static("/"), keys, now);
        let got = got.map(|_| ()).map_err(|refusal| (refusal.why, refusal.outdated.is_some()));
        assert_eq!(got, expected, "{line}");
    };
    let claims = r#"says {"iss":"https://id/","exp":1001}"#;
    check(&format!("rsa {claims}"), Some(&["rsa"]), Ok(()));
    check(&format!("rsa {claims}"), None, Err((Invalid::NoKeys, true)));
    check(&format!("rsa {claims}"), Some(&["p256"]), Err((Invalid::UnknownKey, true)));
    check(
        &format!("rsa as {{\"alg\":\"RS256\"}} {claims}"),
        Some(&["p256"]),
        Err((Invalid::UnknownKey, true)),
    );
    check(&format!("rsa {claims} at 2000"), Some(&["rsa"]), Err((Invalid::Expired, false)));
    check(
        &format!("stranger as {{\"alg\":\"ES256\",\"kid\":\"p256\"}} {claims}"),
        Some(&["p256"]),
        Err((Invalid::Signature, false)),
    );
}

#[test]
fn tokens_that_are_too_long_are_not_read() {
    let lab = Lab::new();
    let rules = rules(vec![issuer("https://id/", given(&lab.published(&["ed"])))], 60);
    let with = |length: usize| {
        let claims = json!({ "iss": "https://id/", "exp": 1001, "x": "y".repeat(length) });
        lab.key("ed").token(&claims).unwrap()
    };
    assert_eq!(judged(&rules, &with(12_000), 1000), "holds");
    assert_eq!(judged(&rules, &with(12_300), 1000), "the token is longer than 16 KiB");
}

#[test]
fn deep_nesting_is_refused_and_not_followed() {
    let lab = Lab::new();
    let rules = rules(vec![issuer("https://id/", given(&lab.published(&["ed"])))], 60);
    let claims =
        format!("{{\"iss\":\"https://id/\",\"exp\":1001,\"x\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
    let token = lab.key("ed").token_of(r#"{"alg":"EdDSA"}"#, &claims, "EdDSA").unwrap();
    assert_eq!(judged(&rules, &token, 1000), Invalid::Malformed.to_string());
}

/// Not one bit of a token can be another.
#[test]
fn a_token_with_any_bit_changed_does_not_hold() {
    let lab = Lab::new();
    for key in ["rsa", "p256", "ed"] {
        let rules = rules(vec![issuer("https://id/", given(&lab.published(&[key])))], 60);
        let (token, now) = lab.token(&format!(r#"{key} says {{"iss":"https://id/","exp":1001}}"#));
        assert_eq!(judged(&rules, &token, now), "holds");
        for bit in 0..token.len() * 8 {
            let mut changed = token.clone().into_bytes();
            changed[bit / 8] ^= 1 << (bit % 8);
            let changed = [b"Bearer ", &*changed].concat();
            let Ok(value) = HeaderValue::from_bytes(&changed) else { continue };
            let headers = HeaderMap::from_iter([(http::header::AUTHORIZATION, value)]);
            let checked = rules.check(&headers, &Uri::from_static("/"), |_| None, now);
            assert!(checked.is_err(), "{key}: bit {bit} of {token} makes no difference");
        }
    }
}

#[test]
fn nothing_of_a_token_is_in_what_is_said_of_it() {
    let lab = Lab::new();
    let rules = rules(vec![issuer("https://id/", given(&lab.published(&["p256"])))], 0);
    for line in [
        r#"stranger as {"alg":"sesame","kid":"sesame"} says {"iss":"sesame","exp":1}"#,
        r#"stranger as {"alg":"ES256","kid":"sesame"} says {"iss":"https://id/","exp":1}"#,
        r#"p256 says {"iss":"sesame","exp":1}"#,
        r#"p256 says {"iss":"https://id/","exp":"sesame"}"#,
        r#"p256 says "sesame""#,
    ] {
        let (token, now) = lab.token(line);
        let said = judged(&rules, &token, now);
        assert!(!said.contains("sesame") && !said.contains(&token[..8]) && said != "holds", "{said}");
    }
}

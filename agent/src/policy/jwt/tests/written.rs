//! Issuers, tokens and requests as the tables of `cases` write them, a line each.

use std::collections::BTreeMap;

use http::HeaderName;
use serde_json::json;
use undermesh_tests::issuer::SigningKey;

use super::*;

/// Keys, made anew for each test.
pub struct Lab {
    keys: BTreeMap<&'static str, (SigningKey, &'static str)>,
}

/// Lines at the margin, and below them, indented, questions with their answers. An empty line ends both.
pub fn rows(table: &str, answer: impl Fn(&Lab, &[&str], &str) -> String) {
    let lab = Lab::new();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for block in table.split("\n\n") {
        let lines = block.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with('#'));
        let (questions, head): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with(' '));
        for line in questions {
            let (question, expected) = line.rsplit_once("=> ").expect("a question has an answer");
            let got = answer(&lab, &head, question.trim());
            checked += 1;
            if got != expected {
                wrong.push(format!("{}\n{question}\n => {got}\n not {expected}", head.join("\n")));
            }
        }
    }
    assert!(checked > 0, "no question is asked");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n----\n\n"));
}

impl Lab {
    pub fn new() -> Self {
        let kinds = [
            ("rsa", "RS256"),
            ("p256", "ES256"),
            ("p384", "ES384"),
            ("p521", "ES512"),
            ("ed", "EdDSA"),
            ("stranger", "ES256"),
        ];
        let key = |name, algorithm| (SigningKey::new(name, algorithm).unwrap(), algorithm);
        Self { keys: kinds.into_iter().map(|(name, algorithm)| (name, key(name, algorithm))).collect() }
    }

    pub fn key(&self, name: &str) -> &SigningKey {
        &self.keys[name].0
    }

    /// What somebody publishes who has these keys; `nameless:` is before those without a name.
    pub fn published(&self, names: &[&str]) -> String {
        let keys = names.iter().map(|name| match name.strip_prefix("nameless:") {
            Some(name) => {
                let mut jwk = self.key(name).jwk();
                jwk.as_object_mut().unwrap().remove("kid");
                jwk
            }
            None => self.key(name).jwk(),
        });
        json!({ "keys": keys.collect::<Vec<_>>() }).to_string()
    }

    /// `believed: NAME [for AUDIENCES] with KEYS`, a line for each.
    pub fn believed(&self, head: &[&str]) -> Rules {
        let issuers = head.iter().map(|line| {
            let (name, keys) = line.strip_prefix("believed: ").unwrap().split_once(" with ").unwrap();
            let (name, audiences) = name.split_once(" for ").unwrap_or((name, ""));
            let keys: Vec<&str> = keys.split(',').collect();
            let audiences = audiences.split(',').filter(|one| !one.is_empty()).map(Name::from).collect();
            Issuer { audiences, ..issuer(name, given(&self.published(&keys))) }
        });
        rules(issuers.collect(), 60)
    }

    /// `KEY[:ALGORITHM] [as HEADER] says CLAIMS [at TIME]` or `raw TEXT`: a token, and the time at which it is shown.
    pub fn token(&self, line: &str) -> (String, u64) {
        if let Some(text) = line.strip_prefix("raw") {
            return (text.trim().to_owned(), 1000);
        }
        let (who, claims) = line.split_once(" says ").expect("a token says something");
        let (claims, now) = match claims.rsplit_once(" at ") {
            Some((claims, now)) => (claims, now.parse().unwrap()),
            None => (claims, 1000),
        };
        let (who, header) = match who.split_once(" as ") {
            Some((who, header)) => (who, Some(header)),
            None => (who, None),
        };
        (self.signed(who, header, claims), now)
    }

    fn signed(&self, who: &str, header: Option<&str>, claims: &str) -> String {
        if who == "nobody" {
            let token = self.signed("ed", header, claims);
            return format!("{}.", token.rsplit_once('.').unwrap().0);
        }
        if let Some(name) = who.strip_prefix("secret:") {
            let secret = self.key(name).jwk();
            let secret = secret["n"].as_str().or(secret["x"].as_str()).unwrap();
            return SigningKey::token_of_secret(header.unwrap(), claims, secret);
        }
        let (name, algorithm) =
            who.split_once(':').unwrap_or((who, self.keys[who.split(':').next().unwrap()].1));
        let usual = json!({ "alg": algorithm, "kid": name }).to_string();
        self.key(name).token_of(header.unwrap_or(&usual), claims, algorithm).unwrap()
    }

    /// What the application gets of `PATH | HEADER: VALUE | ...`, written alike, or why it gets nothing. Heads are
    /// `NAME in PLACES... [forward] [headers CLAIM=HEADER,...]`, where a place is `HEADER:PREFIX`, with `_` for a space, or `?PARAM`. What
    /// is escaped in headers is so as in Rust.
    pub fn passed(&self, head: &[&str], line: &str) -> String {
        let rules = self.placed(head);
        let claims = |name: &str, sub: &str| {
            let claims = json!({ "iss": name, "exp": 1001, "sub": sub, "admin": true, "level": 7, "nothing": null,
                "groups": ["dev", "ops"], "org": { "name": "Ümläut" } });
            self.key("ed").token(&claims).unwrap()
        };
        let tokens =
            [("$a", claims("a", "ann")), ("$b", claims("b", "bob")), ("$c", claims("c", "new\nline"))];
        let line = line.replace("\\t", "\t").replace("\\u{a0}", "\u{a0}");
        let written = tokens.iter().fold(line, |line, (name, token)| line.replace(name, token));
        let mut parts = written.split(" | ");
        let mut uri: Uri = parts.next().unwrap().parse().unwrap();
        let mut headers = HeaderMap::new();
        for header in parts {
            let (name, value) = header.split_once(": ").unwrap();
            headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
        }
        let accepted = match rules.check(&headers, &uri, |_| None, 1000) {
            Ok(accepted) => accepted,
            Err(Refusal { why, .. }) => return why.to_string(),
        };
        rules.apply(accepted.as_ref(), &mut headers, &mut uri).unwrap();
        let mut shown: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
            .collect();
        shown.sort();
        shown.insert(0, uri.to_string());
        tokens.iter().fold(shown.join(" | "), |line, (name, token)| line.replace(token, name))
    }

    fn placed(&self, head: &[&str]) -> Rules {
        if head == ["broken"] {
            return Rules { invalid: Some("spec.jwt".into()), ..rules(Vec::new(), 0) };
        }
        let issuers = head.iter().map(|line| {
            let mut words = line.split_whitespace();
            let mut issuer = issuer(words.next().unwrap(), given(&self.published(&["ed"])));
            issuer.places.clear();
            while let Some(word) = words.next() {
                match word {
                    "in" => {}
                    "forward" => issuer.forward = true,
                    "headers" => {
                        issuer.headers = words.next().unwrap().split(',').map(claim_header).collect()
                    }
                    place => issuer.places.push(match place.split_once(':') {
                        Some((name, prefix)) => Place::Header {
                            name: HeaderName::try_from(name).unwrap(),
                            prefix: prefix.replace('_', " ").into(),
                        },
                        None => Place::Param(place.trim_start_matches('?').into()),
                    }),
                }
            }
            issuer
        });
        rules(issuers.collect(), 0)
    }
}

fn claim_header(text: &str) -> ClaimHeader {
    let (claim, header) = text.split_once('=').unwrap();
    ClaimHeader {
        claim: claim.split('.').map(Name::from).collect(),
        header: HeaderName::try_from(header).unwrap(),
    }
}

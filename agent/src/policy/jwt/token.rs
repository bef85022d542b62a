//! A token, and whether it holds.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::algorithm::Algorithm;
use super::keys::{Key, KeySet};
use super::{Invalid, Issuer};

/// The longest that a token may be.
pub(super) const MOST_BYTES: usize = 16 * 1024;

/// So many keys are tried at most: a stranger's token costs a verification with each.
pub(super) const MOST_TRIED: usize = 8;

/// A token that has been read, and that nothing has been believed of yet.
pub(super) struct Token<'t> {
    /// Header and claims as they were signed.
    signed: &'t str,
    signature: &'t str,
    algorithm: Algorithm,
    key_id: Option<String>,
    claims: Map<String, Value>,
}

impl<'t> Token<'t> {
    pub(super) fn parse(text: &'t str) -> Result<Self, Invalid> {
        if text.len() > MOST_BYTES {
            return Err(Invalid::TooLong);
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return Err(Invalid::Malformed);
        }
        // Five parts are those of an encrypted one (RFC 7516, section 3.1).
        if text.matches('.').count() == 4 {
            return Err(Invalid::Encrypted);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(Invalid::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(Invalid::Malformed)?;
        let header = object(header)?;
        if header.contains_key("crit") {
            return Err(Invalid::Critical);
        }
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(Invalid::Malformed)?;
        let algorithm = Algorithm::named(algorithm).ok_or(Invalid::Algorithm)?;
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(_) => return Err(Invalid::Malformed),
        };
        Ok(Self { signed, signature, algorithm, key_id, claims: object(claims)? })
    }

    /// Who is said to have made it.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }

    /// What it says, if the issuer has signed it, for this audience, and for now.
    pub(super) fn verified(
        self,
        issuer: &Issuer,
        keys: &KeySet,
        leeway: u64,
        now: u64,
    ) -> Result<Map<String, Value>, Invalid> {
        self.is_signed(keys)?;
        self.is_of_now(leeway as f64, now as f64)?;
        if !self.is_for(issuer) {
            return Err(Invalid::Audience);
        }
        Ok(self.claims)
    }

    fn is_signed(&self, keys: &KeySet) -> Result<(), Invalid> {
        let id = self.key_id.as_deref();
        let fitting: Vec<&Key> = keys.candidates(id).filter(|key| key.fits(self.algorithm)).collect();
        if fitting.len() > MOST_TRIED {
            return Err(Invalid::Unnamed);
        }
        if fitting.iter().any(|key| key.has_signed(self.signed, self.signature, self.algorithm)) {
            return Ok(());
        }
        let named = keys.candidates(id).filter(|key| id.is_some() && key.id() == id);
        Err(match named.map(|key| key.fits(self.algorithm)).max() {
            None => Invalid::UnknownKey,
            Some(false) => Invalid::KeyMismatch,
            Some(true) => Invalid::Signature,
        })
    }

    fn is_of_now(&self, leeway: f64, now: f64) -> Result<(), Invalid> {
        let expires = self.time("exp")?.ok_or(Invalid::NoExpiry)?;
        let (begins, issued) = (self.time("nbf")?, self.time("iat")?);
        if now >= expires + leeway {
            return Err(Invalid::Expired);
        }
        if begins.is_some_and(|begins| now + leeway < begins) {
            return Err(Invalid::NotYet);
        }
        if issued.is_some_and(|issued| now + leeway < issued) {
            return Err(Invalid::IssuedLater);
        }
        Ok(())
    }

    /// A claim in seconds since 1970, which may have fractions.
    fn time(&self, claim: &str) -> Result<Option<f64>, Invalid> {
        let Some(value) = self.claims.get(claim) else { return Ok(None) };
        value.as_f64().map(Some).ok_or(Invalid::Time)
    }

    fn is_for(&self, issuer: &Issuer) -> bool {
        let is_one = |value: &Value| {
            value.as_str().is_some_and(|one| issuer.audiences.iter().any(|audience| **audience == *one))
        };
        issuer.audiences.is_empty()
            || match self.claims.get("aud") {
                Some(Value::Array(all)) => all.iter().any(is_one),
                Some(one) => is_one(one),
                None => false,
            }
    }
}

/// A part of the token that is a JSON object.
fn object(part: &str) -> Result<Map<String, Value>, Invalid> {
    let json = URL_SAFE_NO_PAD.decode(part).map_err(|_| Invalid::Malformed)?;
    let Unambiguous(map) = serde_json::from_slice(&json).map_err(|_| Invalid::Malformed)?;
    Ok(map)
}

/// An object with each name once: of two, others could see the other one (RFC 7519, section 4).
struct Unambiguous(Map<String, Value>);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Unambiguous;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Unambiguous, A::Error> {
                let mut map = Map::new();
                while let Some((name, value)) = entries.next_entry::<String, Value>()? {
                    if map.insert(name, value).is_some() {
                        return Err(A::Error::custom("a name twice"));
                    }
                }
                Ok(Unambiguous(map))
            }
        }

        deserializer.deserialize_map(Reader)
    }
}

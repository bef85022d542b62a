//! The keys of an issuer, as it publishes them: a JSON Web Key Set (RFC 7517).
//!
//! Only public keys for signatures are taken. A shared secret never is, whatever it says of itself: who can check with it can also sign,
//! and whoever knows a public key could sign with that.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
use jsonwebtoken::DecodingKey;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use serde::Deserialize;
use serde_json::Value;

use super::algorithm::Algorithm::{self, Es512, Known};
use super::algorithm::Verifier;

/// Keys of an issuer: at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct KeySet {
    keys: Vec<Key>,
    left_out: Vec<String>,
}

/// Keys that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Longer than anybody needs.
    #[error("longer than {} KiB", KeySet::MOST_BYTES / 1024)]
    TooLong,
    /// No set of keys.
    #[error("not a JSON Web Key Set: {0}")]
    Malformed(String),
    /// More than anybody needs.
    #[error("{0} keys, {most} at most", most = KeySet::MOST_KEYS)]
    TooMany(usize),
    /// Nothing that tokens could be held against.
    #[error("no key that can be used{}", list(.0))]
    NoKey(Vec<String>),
}

/// A public key for signatures.
#[derive(Clone, Debug)]
pub(super) struct Key {
    jwk: Jwk,
    algorithms: &'static [Algorithm],
    verifier: Verifier,
}

#[derive(Deserialize)]
struct Wire {
    keys: Vec<Value>,
}

const RSA: &[Algorithm] =
    &[Known(RS256), Known(RS384), Known(RS512), Known(PS256), Known(PS384), Known(PS512)];

/// The bytes of a modulus: 2048 to 8192 bits.
const MODULUS: std::ops::RangeInclusive<usize> = 256..=1024;

/// What a point begins with that has both of its coordinates.
const UNCOMPRESSED: u8 = 4;

impl KeySet {
    /// The longest that a set may be.
    pub const MOST_BYTES: usize = 256 * 1024;

    /// The most keys that a set may have.
    pub const MOST_KEYS: usize = 100;

    /// Reads a set. What it has beside keys that can be used is left out, as RFC 7517, section 5, wants it.
    ///
    /// # Errors
    /// When there is no such key in it, or it is too large.
    pub fn parse(json: &[u8]) -> Result<Self, KeySetError> {
        if json.len() > Self::MOST_BYTES {
            return Err(KeySetError::TooLong);
        }
        let Wire { keys } =
            serde_json::from_slice(json).map_err(|error| KeySetError::Malformed(error.to_string()))?;
        if keys.len() > Self::MOST_KEYS {
            return Err(KeySetError::TooMany(keys.len()));
        }
        let mut set = Self { keys: Vec::new(), left_out: Vec::new() };
        for (place, key) in keys.into_iter().enumerate() {
            match Key::read(key) {
                Ok(key) => set.keys.push(key),
                Err(why) => set.left_out.push(format!("key {} {why}", place + 1)),
            }
        }
        if set.keys.is_empty() {
            return Err(KeySetError::NoKey(set.left_out));
        }
        Ok(set)
    }

    /// The keys that are of no use here, each with the reason: `key 2 is a shared secret`.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// The keys that may have signed a token that names this one, or none.
    pub(super) fn candidates(&self, id: Option<&str>) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(move |key| id.is_none() || key.id().is_none() || key.id() == id)
    }
}

impl Key {
    fn read(value: Value) -> Result<Self, &'static str> {
        // The library knows fewer algorithms.
        let own = value.get("alg").and_then(Value::as_str).map(str::to_owned);
        let jwk: Jwk = serde_json::from_value(value).map_err(|_| "lacks something or is of another kind")?;
        let algorithms = algorithms(&jwk.algorithm)?;
        let common = &jwk.common;
        if common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature) {
            return Err("is not for signatures");
        }
        if common.key_operations.as_ref().is_some_and(|all| !all.contains(&KeyOperations::Verify)) {
            return Err("is not for verifying");
        }
        let algorithms = match own {
            None => algorithms,
            Some(own) => {
                let own = Algorithm::named(&own).ok_or("has an algorithm that is not known here")?;
                let place = algorithms.iter().position(|algorithm| *algorithm == own);
                let place = place.ok_or("has an algorithm that is not of its type")?;
                &algorithms[place..=place]
            }
        };
        let verifier = match &jwk.algorithm {
            AlgorithmParameters::EllipticCurve(point) if point.curve == EllipticCurve::P521 => {
                let parts = [&point.x, &point.y].map(|part| octets(part).unwrap_or_default());
                Verifier::P521([vec![UNCOMPRESSED], parts.concat()].concat())
            }
            _ => Verifier::Known(DecodingKey::from_jwk(&jwk).map_err(|_| "is not in base64url")?),
        };
        Ok(Self { jwk, algorithms, verifier })
    }

    pub(super) fn id(&self) -> Option<&str> {
        self.jwk.common.key_id.as_deref()
    }

    pub(super) fn fits(&self, algorithm: Algorithm) -> bool {
        self.algorithms.contains(&algorithm)
    }

    /// Whether it has signed this.
    pub(super) fn has_signed(&self, signed: &str, signature: &str, algorithm: Algorithm) -> bool {
        self.fits(algorithm) && self.verifier.holds(signed, signature, algorithm)
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.jwk == other.jwk
    }
}

/// What a key of this type signs with.
fn algorithms(parameters: &AlgorithmParameters) -> Result<&'static [Algorithm], &'static str> {
    match parameters {
        AlgorithmParameters::RSA(rsa) => match length(&rsa.n) {
            Some(length) if MODULUS.contains(&length) => Ok(RSA),
            _ => Err("is not of 2048 to 8192 bits"),
        },
        AlgorithmParameters::EllipticCurve(point) => {
            let (algorithms, expected): (&[_], _) = match point.curve {
                EllipticCurve::P256 => (&[Known(ES256)], 32),
                EllipticCurve::P384 => (&[Known(ES384)], 48),
                EllipticCurve::P521 => (&[Es512], 66),
                _ => return Err("is of a curve that is not known here"),
            };
            match [&point.x, &point.y].iter().all(|part| length(part) == Some(expected)) {
                true => Ok(algorithms),
                false => Err("has coordinates of a wrong length"),
            }
        }
        AlgorithmParameters::OctetKeyPair(pair) => match pair.curve {
            EllipticCurve::Ed25519 if length(&pair.x) == Some(32) => Ok(&[Known(EdDSA)]),
            EllipticCurve::Ed25519 => Err("has a coordinate of a wrong length"),
            _ => Err("is of a curve that is not known here"),
        },
        AlgorithmParameters::OctetKey(_) => Err("is a shared secret"),
        _ => Err("is of a type that is not known here"),
    }
}

/// The bytes that the text is in base64url, without padding.
fn octets(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

fn length(text: &str) -> Option<usize> {
    octets(text).map(|bytes| bytes.len())
}

fn list(reasons: &[String]) -> String {
    match reasons {
        [] => String::new(),
        reasons => format!(": {}", reasons.join(", ")),
    }
}

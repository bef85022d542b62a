//! The ways of signing that prove something: those of public keys (RFC 7518, section 3.1, and RFC 8037).

use std::str::FromStr as _;

use aws_lc_rs::signature::{ECDSA_P521_SHA512_FIXED, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{AlgorithmFamily, DecodingKey, crypto};

/// A way of signing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// One that the library knows.
    Known(jsonwebtoken::Algorithm),
    /// ECDSA by P-521 and SHA-512, which it does not.
    Es512,
}

/// What signatures are held against.
#[derive(Clone, Debug)]
pub(super) enum Verifier {
    /// A key that the library knows.
    Known(DecodingKey),
    /// A point of P-521, uncompressed (SEC 1, section 2.3.3).
    P521(Vec<u8>),
}

impl Algorithm {
    /// The one that headers and keys call so. None: it is not known, or is one of shared secrets, and a secret that is shared with us
    /// proves nothing.
    pub(super) fn named(name: &str) -> Option<Self> {
        if name == "ES512" {
            return Some(Self::Es512);
        }
        let known = jsonwebtoken::Algorithm::from_str(name).ok()?;
        (known.family() != AlgorithmFamily::Hmac).then_some(Self::Known(known))
    }
}

impl Verifier {
    /// Whether the signature is of this, in base64url, by this algorithm.
    pub(super) fn holds(&self, signed: &str, signature: &str, algorithm: Algorithm) -> bool {
        match (self, algorithm) {
            (Self::Known(key), Algorithm::Known(algorithm)) => {
                crypto::verify(signature, signed.as_bytes(), key, algorithm).unwrap_or(false)
            }
            (Self::P521(point), Algorithm::Es512) => {
                URL_SAFE_NO_PAD.decode(signature).is_ok_and(|signature| {
                    let key = UnparsedPublicKey::new(&ECDSA_P521_SHA512_FIXED, point);
                    key.verify(signed.as_bytes(), &signature).is_ok()
                })
            }
            _ => false,
        }
    }
}

//! JSON Web Tokens of callers: which of them are believed, and what they say (RFC 7519, 7515, 8725).
//!
//! Keys and the time are arguments: where keys come from is not known here, nor what becomes of a request that shows a bad token.
//! Nothing of a token is in an error.

mod algorithm;
mod check;
#[cfg(fuzzing)]
pub mod fuzzing;
mod keys;
mod place;
#[cfg(test)]
mod tests;
mod token;

pub use check::{Accepted, Refusal};
pub use keys::{KeySet, KeySetError};
pub use place::Place;

use std::sync::Arc;

use http::HeaderName;

use crate::model::Name;

/// What a workload says of its callers' tokens. Without a token a request has no claims; with one that does not hold it is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Who says it, as people know it: `MeshPolicy shop/tokens`.
    pub policy: Name,
    /// Who makes tokens that are believed.
    pub issuers: Vec<Issuer>,
    /// By how many seconds clocks may be apart.
    pub leeway: u64,
    /// What is wrong with what was said of tokens, if it cannot be used: then every request is refused, for a header that was to be
    /// taken out could be somebody's word.
    pub invalid: Option<Name>,
}

impl Rules {
    /// Whether applications are told things in headers that only tokens may say.
    pub fn make_headers(&self) -> bool {
        self.invalid.is_some() || self.issuers.iter().any(|issuer| !issuer.headers.is_empty())
    }
}

/// Somebody who makes tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Issuer {
    /// As its tokens name it in `iss`.
    pub name: Name,
    /// Whom its tokens are for: one of these is in `aud`. If there are none, whomever.
    pub audiences: Vec<Name>,
    /// What it signs with.
    pub keys: Keys,
    /// Where its tokens are: [`Place::bearer`], or what was said.
    pub places: Vec<Place>,
    /// The application is shown the token.
    pub forward: bool,
    /// What the application is told of claims.
    pub headers: Vec<ClaimHeader>,
}

/// What tokens are signed with.
#[derive(Clone, Debug, PartialEq)]
pub enum Keys {
    /// These.
    Given(Arc<KeySet>),
    /// Those that are to be had from this address.
    At(Name),
}

/// A header that says what a claim does, and that nobody else may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimHeader {
    /// The claim's name, and the names in it where it is an object.
    pub claim: Vec<Name>,
    /// The header's name.
    pub header: HeaderName,
}

/// Why a request is refused for what it shows as a token. It prints as a sentence, without anything of the token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// What was said of tokens cannot be used.
    #[error("what is asked of tokens cannot be used: {0}")]
    Rules(Name),
    /// More than one.
    #[error("more than one token is shown")]
    Several,
    /// Nobody needs as long a one.
    #[error("the token is longer than {} KiB", token::MOST_BYTES / 1024)]
    TooLong,
    /// It is not one.
    #[error(
        "the token is not three parts of base64url, of which the first two are JSON objects with each name once"
    )]
    Malformed,
    /// Only its reader could say what it says.
    #[error("the token is encrypted")]
    Encrypted,
    /// It has to be understood in a way that is not known here.
    #[error("the token's header has \"crit\"")]
    Critical,
    /// It is signed in a way that proves nothing, or not at all.
    #[error("the token is not signed by an algorithm of public keys that is known here")]
    Algorithm,
    /// Nobody whose tokens are believed.
    #[error("the token's issuer is none that is believed")]
    Issuer,
    /// Its issuer's tokens are elsewhere.
    #[error("tokens of its issuer are not taken from where it is shown")]
    Place,
    /// Nothing to hold it against, yet or any more.
    #[error("there are no keys of the token's issuer")]
    NoKeys,
    /// None of the keys has made it.
    #[error("no known key of the token's issuer has signed it")]
    UnknownKey,
    /// To try each would take long.
    #[error(
        "the token does not name its key, and more than {} of its issuer's could be the one",
        token::MOST_TRIED
    )]
    Unnamed,
    /// A key is for another way of signing.
    #[error("the token's algorithm is not that of the key that it names")]
    KeyMismatch,
    /// It is not what its issuer has signed.
    #[error("the token's signature is not that of the key that it names")]
    Signature,
    /// It could be used forever.
    #[error("the token has no \"exp\"")]
    NoExpiry,
    /// A point in time that is none.
    #[error("the token's \"exp\", \"nbf\" or \"iat\" is not a number")]
    Time,
    /// It was valid.
    #[error("the token has expired")]
    Expired,
    /// It will be valid.
    #[error("the token does not hold yet")]
    NotYet,
    /// It has not been made yet.
    #[error("the token is from the future")]
    IssuedLater,
    /// It is for somebody else.
    #[error("the token is not for this audience")]
    Audience,
}

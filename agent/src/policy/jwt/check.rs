//! What a request shows, held against what is asked for; and what the application gets to see of it.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde_json::{Map, Value};

use super::keys::KeySet;
use super::token::Token;
use super::{Invalid, Issuer, Keys, Place, Rules};
use crate::model::Name;

/// A token that holds.
#[derive(Debug)]
pub struct Accepted<'s> {
    /// What it says.
    pub claims: Map<String, Value>,
    issuer: &'s Issuer,
    place: &'s Place,
}

/// A request is refused for what it shows as a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal<'s> {
    /// Why.
    pub why: Invalid,
    /// The address of keys that would have to be others for it to hold.
    pub outdated: Option<&'s Name>,
}

impl Issuer {
    /// What a token of this issuer says that has come by another way than with a request; `now` is in seconds since 1970.
    ///
    /// # Errors
    /// When it does not hold.
    pub fn check(
        &self,
        text: &str,
        keys: &KeySet,
        leeway: u64,
        now: u64,
    ) -> Result<Map<String, Value>, Invalid> {
        let token = Token::parse(text)?;
        if token.issuer() != Some(&self.name) {
            return Err(Invalid::Issuer);
        }
        token.verified(self, keys, leeway, now)
    }
}

impl Rules {
    /// Where keys are to be had from.
    pub fn addresses(&self) -> impl Iterator<Item = &Name> {
        self.issuers.iter().filter_map(|issuer| match &issuer.keys {
            Keys::At(address) => Some(address),
            Keys::Given(_) => None,
        })
    }

    /// The token of a request, if it shows one; `keys` are those that an address has given, `now` is in seconds since 1970.
    ///
    /// # Errors
    /// When it shows one that does not hold.
    pub fn check(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        keys: impl FnOnce(&Name) -> Option<Arc<KeySet>>,
        now: u64,
    ) -> Result<Option<Accepted<'_>>, Refusal<'_>> {
        if let Some(problem) = &self.invalid {
            return Err(Invalid::Rules(problem.clone()).into());
        }
        let mut shown = Vec::new();
        for place in self.places() {
            shown.extend(place.find(headers, uri).into_iter().map(|text| (place, text)));
        }
        let (place, text) = match shown.len() {
            0 => return Ok(None),
            1 => shown.remove(0),
            _ => return Err(Invalid::Several.into()),
        };
        let token = Token::parse(&text)?;
        let issuer = self.issuers.iter().find(|issuer| token.issuer() == Some(&issuer.name));
        let issuer = issuer.ok_or(Invalid::Issuer)?;
        if !issuer.places.contains(place) {
            return Err(Invalid::Place.into());
        }
        let (keys, address) = match &issuer.keys {
            Keys::Given(keys) => (Some(keys.clone()), None),
            Keys::At(address) => (keys(address), Some(address)),
        };
        let Some(keys) = keys else { return Err(Refusal { why: Invalid::NoKeys, outdated: address }) };
        match token.verified(issuer, &keys, self.leeway, now) {
            Ok(claims) => Ok(Some(Accepted { claims, issuer, place })),
            Err(why) => {
                let outdated = address.filter(|_| why == Invalid::UnknownKey);
                Err(Refusal { why, outdated })
            }
        }
    }

    /// Makes of a request what the application gets: headers that are for claims say what those of the token do and nothing else, and the
    /// token is taken out unless its issuer's are shown.
    ///
    /// # Errors
    /// When the token cannot be taken out, which cannot be.
    pub fn apply(
        &self,
        accepted: Option<&Accepted<'_>>,
        headers: &mut HeaderMap,
        uri: &mut Uri,
    ) -> Result<(), Invalid> {
        self.clear_headers(headers);
        let Some(Accepted { claims, issuer, place }) = accepted else { return Ok(()) };
        if !issuer.forward {
            place.clear(headers, uri).ok_or(Invalid::Malformed)?;
        }
        for own in &issuer.headers {
            if let Some(value) = claim(claims, &own.claim).and_then(header_value) {
                headers.insert(own.header.clone(), value);
            }
        }
        Ok(())
    }

    /// Nobody but us writes what claims say. To many an application (RFC 3875, section 4.1.18) names are the same that differ in what is
    /// neither letter nor digit: all of that becomes `_`.
    pub fn clear_headers(&self, headers: &mut HeaderMap) {
        let mut owned =
            self.issuers.iter().flat_map(|issuer| &issuer.headers).map(|own| &own.header).peekable();
        if owned.peek().is_none() {
            return;
        }
        let owned: Vec<String> = owned.map(plain).collect();
        let forged = headers.keys().filter(|name| owned.contains(&plain(name)));
        for name in forged.cloned().collect::<Vec<_>>() {
            headers.remove(name);
        }
    }

    /// Each place once.
    fn places(&self) -> Vec<&Place> {
        let mut places = Vec::new();
        for place in self.issuers.iter().flat_map(|issuer| &issuer.places) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        places
    }
}

impl From<Invalid> for Refusal<'_> {
    fn from(why: Invalid) -> Self {
        Self { why, outdated: None }
    }
}

fn plain(name: &HeaderName) -> String {
    name.as_str().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

fn claim<'c>(claims: &'c Map<String, Value>, path: &[Name]) -> Option<&'c Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(claims.get(&**first)?, |value, name| value.get(&**name))
}

/// Texts, numbers and truths as they are, lists and objects as JSON. None for what no header can have in it.
fn header_value(value: &Value) -> Option<HeaderValue> {
    let text = match value {
        Value::Null => return None,
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    HeaderValue::try_from(text.into_bytes()).ok()
}

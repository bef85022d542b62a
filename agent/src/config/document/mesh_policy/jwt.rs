//! What a MeshPolicy says of its callers' tokens.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::Scheme;
use http::{HeaderName, Uri};

use super::super::Key;
use super::super::place::Place;
use super::wire;
use crate::model::Name;
use crate::policy::jwt::{ClaimHeader, Issuer, KeySet, Keys, Place as Shown, Rules};

pub(super) const MOST_ISSUERS: usize = 16;
pub(super) const MOST_AUDIENCES: usize = 64;
pub(super) const MOST_PLACES: usize = 8;
pub(super) const MOST_HEADERS: usize = 32;
/// Of objects in objects.
pub(super) const DEEPEST: usize = 8;
/// The longest name of an issuer, an audience, a claim, a parameter; and the longest address.
pub(super) const LONGEST: usize = 1024;
/// The longest name of a header.
pub(super) const LONGEST_HEADER: usize = 256;
/// The longest that comes before a token in a header.
pub(super) const LONGEST_PREFIX: usize = 64;

const LEEWAY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(600);
const USUAL_LEEWAY: Duration = Duration::from_secs(60);

pub(super) fn read(key: &Key, wire: &wire::Jwt, place: &Place<'_>) -> Rules {
    let leeway = wire
        .leeway
        .as_deref()
        .map_or(Some(USUAL_LEEWAY), |text| place.key("leeway").duration_within(text, LEEWAY));
    if wire.issuers.is_empty() {
        place.key("issuers").refuse("expected at least one");
    }
    if wire.issuers.len() > MOST_ISSUERS {
        let found = wire.issuers.len();
        place.key("issuers").refuse(format!("expected {MOST_ISSUERS} at most, found {found}"));
    }
    let mut known = BTreeSet::new();
    let issuers = wire.issuers.iter().enumerate().filter_map(|(index, issuer)| {
        let place = place.key("issuers").index(index);
        if !known.insert(&issuer.issuer) {
            place.key("issuer").refuse("expected each issuer once");
        }
        read_issuer(issuer, &place)
    });
    Rules {
        policy: key.to_string().into(),
        issuers: issuers.collect(),
        leeway: leeway.unwrap_or_default().as_secs(),
        invalid: None,
    }
}

fn read_issuer(wire: &wire::Issuer, place: &Place<'_>) -> Option<Issuer> {
    let name = text(&wire.issuer, &place.key("issuer"));
    let audiences = place.some("audiences", &wire.audiences, MOST_AUDIENCES);
    let audiences: Vec<Name> = audiences.filter_map(|(place, audience)| text(audience, &place)).collect();
    let keys = read_keys(&wire.jwks, &place.key("jwks"));
    let places = match &wire.from {
        Some(from) => read_places(from, &place.key("from")),
        None => vec![Shown::bearer()],
    };
    let mut known = BTreeSet::new();
    let headers = place.some("claimsToHeaders", &wire.claims_to_headers, MOST_HEADERS);
    let headers: Vec<ClaimHeader> = headers
        .filter_map(|(place, wire::ClaimToHeader { claim, header })| {
            let claim = read_claim(claim, &place.key("claim"));
            let header = header_name(header, &place.key("header"))?;
            if !known.insert(header.as_str().to_owned()) {
                place.key("header").refuse("expected each header once");
            }
            Some(ClaimHeader { claim, header })
        })
        .collect();
    Some(Issuer {
        name: name?,
        audiences,
        keys: keys?,
        places,
        forward: wire.forward.unwrap_or(false),
        headers,
    })
}

fn read_keys(wire: &wire::Jwks, place: &Place<'_>) -> Option<Keys> {
    match (&wire.inline, &wire.uri) {
        (Some(inline), None) => {
            let keys = place.key("inline").take(KeySet::parse(inline.as_bytes()))?;
            Some(Keys::Given(Arc::new(keys)))
        }
        (None, Some(uri)) => {
            let place = place.key("uri");
            match is_address(uri) {
                true => Some(Keys::At(uri.as_str().into())),
                false => {
                    place.expected("an address such as https://id.example.com/keys", uri);
                    None
                }
            }
        }
        _ => {
            place.refuse("expected either inline or uri");
            None
        }
    }
}

/// Keys are nobody's word but that of whoever proves to be the server.
fn is_address(text: &str) -> bool {
    text.len() <= LONGEST
        && !text.contains('#')
        && text.parse::<Uri>().is_ok_and(|uri| {
            let has_host =
                uri.authority().is_some_and(|it| !it.host().is_empty() && !it.as_str().contains('@'));
            uri.scheme() == Some(&Scheme::HTTPS) && has_host
        })
}

fn read_places(wire: &wire::TokenPlaces, place: &Place<'_>) -> Vec<Shown> {
    if wire.headers.is_none() && wire.params.is_none() {
        place.refuse("expected headers, params or both");
    }
    let headers = place.some("headers", &wire.headers, MOST_PLACES).filter_map(|(place, header)| {
        let wire::TokenHeader { name, prefix } = header;
        let name = header_name(name, &place.key("name"))?;
        if name == COOKIE {
            place.key("name").refuse("tokens in cookies are not looked for");
        }
        let prefix = prefix.as_deref().unwrap_or_default();
        let is_text = prefix.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !is_text || prefix.len() > LONGEST_PREFIX {
            place.key("prefix").expected(&format!("up to {LONGEST_PREFIX} characters of ASCII"), prefix);
        }
        Some(Shown::Header { name, prefix: prefix.into() })
    });
    let headers: Vec<Shown> = headers.collect();
    let params = place.some("params", &wire.params, MOST_PLACES);
    let params = params.filter_map(|(place, param)| Some(Shown::Param(text(param, &place)?)));
    headers.into_iter().chain(params).collect()
}

fn read_claim(claim: &[String], place: &Place<'_>) -> Vec<Name> {
    if claim.is_empty() || claim.len() > DEEPEST {
        place.refuse(format!("expected 1 to {DEEPEST} names, found {}", claim.len()));
    }
    let names = claim.iter().enumerate();
    names.filter_map(|(index, name)| text(name, &place.index(index))).collect()
}

/// A header that is nobody's to take out, or to write, but HTTP's own.
fn header_name(text: &str, place: &Place<'_>) -> Option<HeaderName> {
    let name = place.header_name(text)?;
    let is_framing = [
        CONNECTION,
        CONTENT_LENGTH,
        EXPECT,
        HOST,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ]
    .contains(&name);
    if text.len() > LONGEST_HEADER {
        place.refuse(format!("expected {LONGEST_HEADER} characters at most, found {}", text.len()));
    }
    if is_framing || matches!(name.as_str(), "keep-alive" | "proxy-connection") {
        place.expected("a header that is not part of how messages are passed on", text);
        return None;
    }
    Some(name)
}

fn text(text: &str, place: &Place<'_>) -> Option<Name> {
    if text.is_empty() || text.len() > LONGEST {
        place.refuse(format!("expected 1 to {LONGEST} characters, found {}", text.len()));
        return None;
    }
    Some(text.into())
}

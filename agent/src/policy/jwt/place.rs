//! Where in a request tokens are: how one is found there, and taken out.

use std::borrow::Cow;

use http::header::AUTHORIZATION;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};

use crate::model::Name;

/// A place of tokens in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A header's value, or what follows these words in it.
    Header {
        /// The header's name.
        name: HeaderName,
        /// What comes before the token, without regard to case; values that do not begin with it are none.
        prefix: Name,
    },
    /// A parameter of the query.
    Param(Name),
}

impl Place {
    /// `Authorization: Bearer`, where RFC 6750 has them.
    pub fn bearer() -> Self {
        Self::Header { name: AUTHORIZATION, prefix: "Bearer ".into() }
    }

    /// What is there. What cannot be a token for the bytes that it has is empty.
    pub(super) fn find<'r>(&self, headers: &'r HeaderMap, uri: &'r Uri) -> Vec<Cow<'r, str>> {
        match self {
            Self::Header { name, prefix } => {
                let values = headers.get_all(name).iter();
                values.filter_map(|value| after(value, prefix)).map(Cow::Borrowed).collect()
            }
            Self::Param(name) => {
                let named = pairs(uri).filter(|pair| is_named(pair, name));
                named.filter_map(decoded).map(|(_, value)| value).collect()
            }
        }
    }

    /// Leaves nothing there that is found. None where what is left would be no address, which cannot be.
    pub(super) fn clear(&self, headers: &mut HeaderMap, uri: &mut Uri) -> Option<()> {
        match self {
            Self::Header { name, prefix } => {
                let all: Vec<HeaderValue> = headers.get_all(name).iter().cloned().collect();
                headers.remove(name);
                for value in all.into_iter().filter(|value| after(value, prefix).is_none()) {
                    headers.append(name.clone(), value);
                }
            }
            Self::Param(name) => {
                let left: Vec<&str> = pairs(uri).filter(|pair| !is_named(pair, name)).collect();
                let path = match left.is_empty() {
                    true => uri.path().to_owned(),
                    false => format!("{}?{}", uri.path(), left.join("&")),
                };
                let mut parts = uri.clone().into_parts();
                parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
                *uri = Uri::from_parts(parts).ok()?;
            }
        }
        Some(())
    }
}

/// What follows the prefix, without the white space around it, which the application does not see either. One that ends in a space is a
/// scheme (RFC 9110, section 11.1): it ends wherever its characters do, for servers differ in what they take for the space behind it, and
/// what one of them could read as a token is none that may pass as something else.
fn after<'v>(value: &'v HeaderValue, prefix: &str) -> Option<&'v str> {
    let scheme = prefix.trim_end_matches(' ');
    let (start, rest) = value.as_bytes().trim_ascii_start().split_at_checked(scheme.len())?;
    let is_prefix = start.eq_ignore_ascii_case(scheme.as_bytes())
        && (scheme == prefix || rest.first().is_some_and(|byte| !is_of_scheme(*byte)));
    is_prefix.then(|| str::from_utf8(rest.trim_ascii()).unwrap_or_default())
}

/// The characters of a token of HTTP (RFC 9110, section 5.6.2).
fn is_of_scheme(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn pairs(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.query().into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty())
}

fn is_named(pair: &str, name: &str) -> bool {
    decoded(pair).is_some_and(|(own, _)| own == name)
}

fn decoded(pair: &str) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    form_urlencoded::parse(pair.as_bytes()).next()
}

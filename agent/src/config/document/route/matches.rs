//! The matches of a rule.

use http::Method;

use super::super::place::Place;
use super::wire;
use crate::route::{HeaderMatch, Match, PathMatch, Pattern, QueryMatch, ValueMatch};

/// The methods that an HTTPRoute may name.
pub(super) const METHODS: [Method; 9] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::CONNECT,
    Method::OPTIONS,
    Method::TRACE,
    Method::PATCH,
];

/// Longer than any of the Gateway API may be, and short enough that many do no harm.
const LONGEST: usize = 4096;

pub(super) fn of_http(wire: &wire::HttpMatch, place: &Place<'_>) -> Option<Match> {
    let method = match &wire.method {
        None => None,
        Some(text) => Some(method(text, &place.key("method"))?),
    };
    let path = match &wire.path {
        None => PathMatch::default(),
        Some(path) => of_path(path, &place.key("path"))?,
    };
    let mut query: Vec<QueryMatch> = Vec::new();
    for (place, param) in place.each("queryParams", &wire.query_params) {
        let value = value(param, &place)?;
        // Of several with one name the first counts.
        if !query.iter().any(|other| *other.name == *param.name) {
            query.push(QueryMatch { name: param.name.as_str().into(), value });
        }
    }
    Some(Match { path, method, headers: headers(&wire.headers, place)?, query })
}

/// A method of gRPC is a path: `/service/method`.
pub(super) fn of_grpc(wire: &wire::GrpcMatch, place: &Place<'_>) -> Option<Match> {
    let path = match &wire.method {
        None => PathMatch::default(),
        Some(method) => of_grpc_method(method, &place.key("method"))?,
    };
    Some(Match { path, method: None, headers: headers(&wire.headers, place)?, query: Vec::new() })
}

pub(super) fn method(text: &str, place: &Place<'_>) -> Option<Method> {
    let method = METHODS.into_iter().find(|method| method.as_str() == text);
    if method.is_none() {
        place.expected("a method such as GET or POST", text);
    }
    method
}

fn of_path(wire: &wire::PathMatch, place: &Place<'_>) -> Option<PathMatch> {
    let text = wire.value.as_deref().unwrap_or("/");
    let at = place.key("value");
    match wire.kind.as_deref() {
        Some("RegularExpression") => pattern(text, &at).map(PathMatch::Regex),
        Some("Exact") => plain_path(text, &at).map(|path| PathMatch::Exact(path.into())),
        None | Some("PathPrefix") => plain_path(text, &at).map(PathMatch::prefix),
        Some(other) => {
            place.key("type").expected("Exact, PathPrefix or RegularExpression", other);
            None
        }
    }
}

/// What the CRD asks of a path, whoever has checked it.
fn plain_path<'t>(text: &'t str, place: &Place<'_>) -> Option<&'t str> {
    let wrong = [
        (!text.starts_with('/'), "expected a path that begins with /"),
        (text.len() > LONGEST, "expected a path of at most 4096 characters"),
        (text.contains("//"), "expected a path without //, which no segment is between"),
        (
            text.contains("/./") || text.contains("/../") || text.ends_with("/.") || text.ends_with("/.."),
            "expected a path without the segments . and .., which clients resolve",
        ),
        (text.contains("%2f") || text.contains("%2F"), "expected a path without an encoded /"),
        (
            text.contains(['#', '?']) || text.bytes().any(|byte| !(b'!'..=b'~').contains(&byte)),
            "expected a path of visible ASCII characters, without a query and a fragment",
        ),
    ];
    match wrong.iter().find(|(is_so, _)| *is_so) {
        Some((_, message)) => {
            place.refuse(format!("{message}, found {text:?}"));
            None
        }
        None => Some(text),
    }
}

fn headers(wire: &Option<Vec<wire::NamedMatch>>, place: &Place<'_>) -> Option<Vec<HeaderMatch>> {
    let mut headers: Vec<HeaderMatch> = Vec::new();
    for (place, header) in place.each("headers", wire) {
        let name = place.key("name").header_name(&header.name)?;
        let value = value(header, &place)?;
        // Of several with one name the first counts, however it is capitalised.
        if !headers.iter().any(|other| other.name == name) {
            headers.push(HeaderMatch { name, value });
        }
    }
    Some(headers)
}

fn value(wire: &wire::NamedMatch, place: &Place<'_>) -> Option<ValueMatch> {
    let at = place.key("value");
    match wire.kind.as_deref() {
        None | Some("Exact") => Some(ValueMatch::Exact(wire.value.as_str().into())),
        Some("RegularExpression") => pattern(&wire.value, &at).map(ValueMatch::Regex),
        Some(other) => {
            place.key("type").expected("Exact or RegularExpression", other);
            None
        }
    }
}

fn pattern(text: &str, place: &Place<'_>) -> Option<Pattern> {
    if text.len() > LONGEST {
        place.refuse("expected a pattern of at most 4096 characters");
        return None;
    }
    place.take(Pattern::new(text))
}

fn of_grpc_method(wire: &wire::GrpcMethodMatch, place: &Place<'_>) -> Option<PathMatch> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (service, method) = (text(&wire.service), text(&wire.method));
    if service.is_empty() && method.is_empty() {
        place.refuse("expected a service, a method or both");
        return None;
    }
    match wire.kind.as_deref() {
        Some("RegularExpression") => {
            for (key, text) in [("service", &service), ("method", &method)] {
                pattern(text, &place.key(key))?;
            }
            place.take(Pattern::grpc(&service, &method)).map(PathMatch::Regex)
        }
        None | Some("Exact") => {
            for (key, text) in [("service", &service), ("method", &method)] {
                let is_name = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte));
                if !is_name {
                    place.key(key).expected("a name of gRPC, without a /", text);
                    return None;
                }
            }
            Some(match (service.is_empty(), method.is_empty()) {
                (false, false) => PathMatch::Exact(format!("/{service}/{method}").into()),
                (false, true) => PathMatch::prefix(&format!("/{service}")),
                _ => PathMatch::GrpcMethod(method.into()),
            })
        }
        Some(other) => {
            place.key("type").expected("Exact or RegularExpression", other);
            None
        }
    }
}

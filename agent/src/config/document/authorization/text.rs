//! The texts of AuthorizationPolicies: names, patterns, paths and addresses. What could never match is refused, for a rule that
//! denies would be none.

use std::net::IpAddr;

use ipnet::IpNet;

use super::super::place::Place;
use crate::model::{Name, SpiffeId};
use crate::policy::authorization::{PathPattern, Pattern, Segment, ServiceAccount};

/// The longest text.
pub(super) const LONGEST: usize = 2048;

/// `*`, `a*`, `*a` or just this.
pub(super) fn pattern(text: &str, place: &Place<'_>) -> Option<Pattern> {
    let read = match (text, text.strip_suffix('*'), text.strip_prefix('*')) {
        ("*", ..) => Some(Pattern::Present),
        (_, Some(prefix), _) => has_no_star(prefix).then(|| Pattern::Prefix(prefix.into())),
        (_, _, Some(suffix)) => has_no_star(suffix).then(|| Pattern::Suffix(suffix.into())),
        (exact, ..) => (has_no_star(exact) && !exact.is_empty()).then(|| Pattern::Exact(exact.into())),
    };
    let read = read.filter(|_| text.len() <= LONGEST);
    if read.is_none() {
        place.expected("a text, alone or with one * at its beginning or end", text);
    }
    read
}

pub(super) fn identity(text: &str, place: &Place<'_>) -> Option<Pattern> {
    let pattern = pattern(text, place)?;
    let mends = match &pattern {
        Pattern::Exact(id) => id.parse::<SpiffeId>().map(drop).map_err(|error| error.to_string()),
        Pattern::Prefix(start) if !start.starts_with("spiffe://") => {
            Err("it does not begin with spiffe://".into())
        }
        Pattern::Prefix(_) | Pattern::Suffix(_) | Pattern::Present => Ok(()),
    };
    match mends {
        Ok(()) => Some(pattern),
        Err(error) => {
            place.refuse(format!(
                "expected a SPIFFE id such as spiffe://cluster.local/ns/shop/sa/web, found {text:?}: {error}"
            ));
            None
        }
    }
}

pub(super) fn service_account(own: &Name, text: &str, place: &Place<'_>) -> Option<ServiceAccount> {
    let (namespace, name) = text.split_once('/').unwrap_or((own, text));
    if is_name(namespace) && is_name(name) {
        return Some(ServiceAccount { namespace: namespace.into(), name: name.into() });
    }
    place.expected("a service account, as NAME or NAMESPACE/NAME", text);
    None
}

pub(super) fn namespace(text: &str, place: &Place<'_>) -> Option<Pattern> {
    of_characters(text, place, "the name of a namespace", |byte| is_of_name(byte) && byte != b'.')
}

pub(super) fn trust_domain(text: &str, place: &Place<'_>) -> Option<Pattern> {
    of_characters(text, place, "a trust domain", |byte| is_of_name(byte) || byte == b'_')
}

pub(super) fn method(text: &str, place: &Place<'_>) -> Option<Pattern> {
    of_characters(text, place, "a method in upper case", |byte| {
        byte.is_ascii_uppercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
    })
}

/// Hosts are the same in any case, and kept in lower case.
pub(super) fn host(text: &str, place: &Place<'_>) -> Option<Pattern> {
    of_characters(&text.to_ascii_lowercase(), place, "a host", |byte| {
        is_of_name(byte) || matches!(byte, b'_' | b':' | b'[' | b']')
    })
}

/// A network, or a single address. Addresses of IPv4 that are written as such of IPv6 are not told apart from them anywhere, so
/// they are no blocks of IPv6.
pub(super) fn ip_block(text: &str, place: &Place<'_>) -> Option<IpNet> {
    let block = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let is_mapped = |block: &IpNet| block.addr().to_canonical() != block.addr();
    match block {
        Ok(block) if !is_mapped(&block) => Some(block.trunc()),
        _ => {
            place.expected("addresses such as 10.0.0.0/8, fd00::/8 or 10.1.2.3", text);
            None
        }
    }
}

pub(super) fn path(text: &str, place: &Place<'_>) -> Option<PathPattern> {
    match read_path(text) {
        Ok(path) => Some(path),
        Err(why) => {
            place.refuse(format!(
                "expected a path such as /a, /a/*, *.php or /a/{{*}}/b/{{**}}, found {text:?}: {why}"
            ));
            None
        }
    }
}

fn read_path(text: &str) -> Result<PathPattern, &'static str> {
    if text.len() > LONGEST {
        return Err("it is too long");
    }
    if text.contains(['?', '#']) {
        return Err("the query is no part of it");
    }
    if !is_normal(text) {
        return Err(
            "requests have what needs no escape without one, and what needs one as %XX in upper case",
        );
    }
    if let Some(suffix) = text.strip_prefix('*') {
        // What comes before the first slash is the end of a segment.
        check_segments(suffix.split('/').skip(1))?;
        return match has_no_star(suffix) && !suffix.contains(['{', '}']) {
            true if suffix.is_empty() => Ok(PathPattern::Prefix("".into())),
            true => Ok(PathPattern::Suffix(suffix.into())),
            false => Err("one * is all that may be there"),
        };
    }
    let rest = text.strip_prefix('/').ok_or("it does not begin with /")?;
    let segments: Vec<&str> = rest.split('/').collect();
    let (last, before) = segments.split_last().ok_or("it is empty")?;
    check_segments(segments.iter().copied())?;
    if text.contains(['{', '}']) {
        let is_last = |index: usize| index == segments.len() - 1;
        let segment = |(index, segment): (usize, &&str)| match *segment {
            "{*}" => Ok(Segment::One),
            "{**}" if is_last(index) => Ok(Segment::Any),
            "{**}" => Err("{**} is for the last segment"),
            literal if literal.contains(['{', '}', '*']) => Err("{*} and {**} are whole segments"),
            literal => Ok(Segment::Literal(literal.into())),
        };
        return segments.iter().enumerate().map(segment).collect::<Result<_, _>>().map(PathPattern::Template);
    }
    match (before.iter().all(|segment| has_no_star(segment)), last.strip_suffix('*')) {
        (true, Some(prefix)) if has_no_star(prefix) => Ok(PathPattern::Prefix(text[..text.len() - 1].into())),
        (true, None) if has_no_star(last) => Ok(PathPattern::Exact(text.into())),
        _ => Err("* is for its end, {*} for a segment"),
    }
}

/// Refuses segments that requests have lost before anybody looks at them: a pattern with one would match nothing.
fn check_segments<'t>(segments: impl Iterator<Item = &'t str>) -> Result<(), &'static str> {
    let mut segments = segments.peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "" if segments.peek().is_some() => return Err("it has //, which is / in requests by then"),
            "." | ".." => return Err("it has a segment . or .., which requests have lost by then"),
            _ => {}
        }
    }
    Ok(())
}

/// Whether its characters are as requests have them by then: unescaped where they need no escape (RFC 3986, section 3.3).
fn is_normal(path: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&byte);
    let digit = |byte: Option<&u8>| match byte {
        Some(digit @ (b'0'..=b'9' | b'A'..=b'F')) => char::from(*digit).to_digit(16),
        _ => None,
    };
    let mut rest = path.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte == b'%' {
            let Some((high, low)) = digit(behind.first()).zip(digit(behind.get(1))) else { return false };
            // An escaped slash or semicolon is none, where it is let in at all.
            let loses_escape = |byte| is_plain(byte) && !matches!(byte, b'/' | b';');
            if u8::try_from(high << 4 | low).is_ok_and(loses_escape) {
                return false;
            }
            rest = &behind[2..];
        } else if !is_plain(byte) && !matches!(byte, b'{' | b'}') {
            return false;
        }
    }
    true
}

/// A name of gRPC, which is one of Protocol Buffers.
pub(super) fn grpc_name(text: &str, place: &Place<'_>, what: &str) -> Option<Name> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.');
    let is_name = !text.is_empty() && text.len() <= LONGEST && text.bytes().all(fits);
    if !is_name {
        place.expected(what, text);
    }
    is_name.then(|| text.into())
}

fn of_characters(text: &str, place: &Place<'_>, what: &str, fits: fn(u8) -> bool) -> Option<Pattern> {
    let pattern = pattern(text, place)?;
    let (Pattern::Exact(literal) | Pattern::Prefix(literal) | Pattern::Suffix(literal)) = &pattern else {
        return Some(pattern);
    };
    if literal.bytes().all(fits) {
        return Some(pattern);
    }
    place.expected(what, text);
    None
}

fn has_no_star(text: &str) -> bool {
    !text.contains('*')
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 253 && text.bytes().all(is_of_name)
}

fn is_of_name(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.')
}

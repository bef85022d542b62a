//! What a request must be like for a rule to be its own.

use std::borrow::Cow;

use http::header::COOKIE;
use http::{HeaderMap, HeaderName, Method};
use regex::{Regex, RegexBuilder};

use crate::model::Name;

/// What a request is routed by.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// Its method.
    pub method: &'a Method,
    /// The host that it is for, without a port.
    pub host: &'a str,
    /// Its path as it was sent, without the query.
    pub path: &'a str,
    /// What comes after the `?`, if there is one.
    pub query: Option<&'a str>,
    /// Its headers.
    pub headers: &'a HeaderMap,
}

/// One way to a rule: a request that fulfils all of it goes by the rule. The default is fulfilled by every request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Match {
    /// What the path must be.
    pub path: PathMatch,
    /// What the method must be, if it matters.
    pub method: Option<Method>,
    /// What headers there must be, each name once.
    pub headers: Vec<HeaderMatch>,
    /// What parameters the query must have, each name once.
    pub query: Vec<QueryMatch>,
}

/// What a path must be. It is compared as it was sent: nothing is decoded, and no `..` is resolved.
#[derive(Clone, Debug, PartialEq)]
pub enum PathMatch {
    /// This path alone.
    Exact(Name),
    /// Every path that begins with these segments. Without a `/` at its end, hence empty for all paths: see
    /// [`PathMatch::prefix`].
    Prefix(Name),
    /// Every path whose last segment of exactly two is this: a method of gRPC, whichever service has it.
    GrpcMethod(Name),
    /// Every path that the pattern describes as a whole.
    Regex(Pattern),
}

/// What a header must be. Several lines of one header are one value, joined by commas (RFC 9110, section 5.3), those of `Cookie` as
/// cookies are (RFC 6265, section 4.2.1).
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderMatch {
    /// The header's name.
    pub name: HeaderName,
    /// What its value must be.
    pub value: ValueMatch,
}

/// What a parameter of the query must be. Of several with one name the first counts. Names and values are compared
/// percent-decoded (RFC 3986, section 2.4); a `+` is a `+`.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryMatch {
    /// The parameter's name.
    pub name: Name,
    /// What its value must be.
    pub value: ValueMatch,
}

/// What a value must be.
#[derive(Clone, Debug, PartialEq)]
pub enum ValueMatch {
    /// This.
    Exact(Name),
    /// Whatever the pattern describes as a whole.
    Regex(Pattern),
}

/// A regular expression in the syntax of Rust's `regex`, which needs linear time whatever it is and whatever it is asked.
/// It describes a whole text, not a part.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// As it was written.
    text: Name,
    regex: Regex,
}

/// A pattern that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a regular expression that can be used: {0}")]
pub struct PatternError(String);

/// A compiled pattern may take so much memory: enough for what people write, and a bound for what they should not.
const PATTERN_BYTES: usize = 1 << 20;

impl Match {
    /// Whether the request fulfils it.
    pub fn matches(&self, request: &RequestHead<'_>) -> bool {
        self.path.matches(request.path) && self.matches_beside_path(request)
    }

    /// Whether the request fulfils all but what is said of the path.
    pub(super) fn matches_beside_path(&self, request: &RequestHead<'_>) -> bool {
        self.method.as_ref().is_none_or(|method| method == request.method)
            && self.headers.iter().all(|header| header.matches(request.headers))
            && self.query.iter().all(|param| param.matches(request.query.unwrap_or_default()))
    }
}

impl PathMatch {
    /// Every path that begins with these segments; a `/` at the end does not count.
    pub fn prefix(segments: &str) -> Self {
        Self::Prefix(segments.strip_suffix('/').unwrap_or(segments).into())
    }

    /// Whether the path is one of these.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Prefix(prefix) => path.starts_with(&**prefix) && ends_segment(path, prefix.len()),
            Self::GrpcMethod(method) => grpc_method(path) == Some(&**method),
            Self::Regex(pattern) => pattern.matches(path),
        }
    }
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("".into())
    }
}

/// Whether a prefix of this length ends where a segment of the path does. The empty prefix is every path's, also of those
/// that do not begin with a `/` (`OPTIONS *`).
pub(super) fn ends_segment(path: &str, length: usize) -> bool {
    length == 0 || matches!(path.as_bytes().get(length), None | Some(b'/'))
}

/// The method of the path of a gRPC request, `/service/method`.
pub(super) fn grpc_method(path: &str) -> Option<&str> {
    let (_, method) = path.strip_prefix('/')?.split_once('/')?;
    (!method.contains('/')).then_some(method)
}

impl HeaderMatch {
    fn matches(&self, headers: &HeaderMap) -> bool {
        let mut lines = headers.get_all(&self.name).iter();
        let Some(first) = lines.next() else { return false };
        let mut value = Cow::Borrowed(first.as_bytes());
        let separator = if self.name == COOKIE { "; " } else { "," };
        for line in lines {
            value.to_mut().extend_from_slice(separator.as_bytes());
            value.to_mut().extend_from_slice(line.as_bytes());
        }
        str::from_utf8(&value).is_ok_and(|value| self.value.matches(value))
    }
}

impl QueryMatch {
    fn matches(&self, query: &str) -> bool {
        let mut params = query.split('&').map(|param| param.split_once('=').unwrap_or((param, "")));
        let found = params.find(|(name, _)| decoded(name).is_some_and(|name| *name == *self.name));
        found.and_then(|(_, value)| decoded(value)).is_some_and(|value| self.value.matches(&value))
    }
}

impl ValueMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *value,
            Self::Regex(pattern) => pattern.matches(value),
        }
    }
}

impl Pattern {
    /// Compiles a pattern.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        let compile = |text: &str| {
            RegexBuilder::new(text).size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES).build()
        };
        // On its own first: what is put around it must neither close its parentheses nor be closed by them.
        let whole = |_| compile(&format!(r"\A(?:{text})\z"));
        let regex = compile(text).and_then(whole).map_err(|error| PatternError(sentence(&error)))?;
        Ok(Self { text: text.into(), regex })
    }

    /// The paths of the methods of gRPC that these describe; an empty pattern is any.
    pub fn grpc(service: &str, method: &str) -> Result<Self, PatternError> {
        let part = |pattern: &str| match pattern {
            "" => Ok("[^/]+".to_owned()),
            _ => Self::new(pattern).map(|_| format!("(?:{pattern})")),
        };
        Self::new(&format!("/{}/{}", part(service)?, part(method)?))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it describes the whole of the text.
    pub fn matches(&self, text: &str) -> bool {
        self.regex.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// The last line of what `regex` says is the reason; above it stands the pattern with a mark below.
fn sentence(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(limit) => format!("it takes more than {limit} bytes when compiled"),
        other => {
            let text = other.to_string();
            let last = text.lines().last().unwrap_or_default();
            last.strip_prefix("error: ").unwrap_or(last).to_owned()
        }
    }
}

/// The text with its percent-encodings undone; None where that is no UTF-8. A `%` that begins none stays.
fn decoded(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(&byte) = bytes.get(at) {
        match (digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (Some(high), Some(low)) if byte == b'%' => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn paths() {
        let check = |pattern: &PathMatch, path: &str, expected: bool| {
            assert_eq!(pattern.matches(path), expected, "{pattern:?} {path}");
        };
        let exact = PathMatch::Exact("/abc".into());
        for (path, expected) in [("/abc", true), ("/abc/", false), ("/Abc", false), ("/abcd", false)] {
            check(&exact, path, expected);
        }
        for prefix in ["/abc", "/abc/"] {
            let prefix = PathMatch::prefix(prefix);
            for (path, expected) in [
                ("/abc", true),
                ("/abc/", true),
                ("/abc/d", true),
                ("/abcd", false),
                ("/ab", false),
                ("/", false),
                ("/ABC", false),
                ("/x/abc", false),
            ] {
                check(&prefix, path, expected);
            }
        }
        for path in ["/", "/a", "*", ""] {
            check(&PathMatch::prefix("/"), path, true);
            check(&PathMatch::default(), path, true);
        }
        let regex = PathMatch::Regex(Pattern::new("/v[0-9]+|/latest").unwrap());
        for (path, expected) in [
            ("/v1", true),
            ("/v12", true),
            ("/latest", true),
            ("/v1/a", false),
            ("/a/v1", false),
            ("/latest\n", false),
        ] {
            check(&regex, path, expected);
        }
        let method = PathMatch::GrpcMethod("Get".into());
        for (path, expected) in [
            ("/a.B/Get", true),
            ("/Get", false),
            ("/a/b/Get", false),
            ("/a.B/get", false),
            ("/a.B/Get/", false),
        ] {
            check(&method, path, expected);
        }
    }

    #[test]
    fn headers() {
        let check_of = |name: &'static str, value: ValueMatch, lines: &[&str], expected: bool| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(name, HeaderValue::from_str(line).unwrap());
            }
            let header = HeaderMatch { name: HeaderName::from_static(name), value };
            assert_eq!(header.matches(&headers), expected, "{header:?} {lines:?}");
        };
        let check = |value, lines: &[&str], expected| check_of("version", value, lines, expected);
        let exact = |text: &str| ValueMatch::Exact(text.into());
        let regex = |text: &str| ValueMatch::Regex(Pattern::new(text).unwrap());
        check(exact("two"), &["two"], true);
        check(exact("two"), &["Two"], false);
        check(exact("two"), &[], false);
        check(exact(""), &[], false);
        check(exact("one,two"), &["one", "two"], true);
        check(exact("one"), &["one", "two"], false);
        check(regex("t.o"), &["two"], true);
        check(regex("t.o"), &["two "], false);
        check(regex("one,.*"), &["one", "two"], true);
        check_of("cookie", exact("a=b; c=d"), &["a=b", "c=d"], true);
        check_of("cookie", exact("a=b,c=d"), &["a=b", "c=d"], false);
    }

    #[test]
    fn query_parameters() {
        let check = |name: &str, value: &str, query: &str, expected: bool| {
            let value = ValueMatch::Exact(value.into());
            let param = QueryMatch { name: name.into(), value };
            assert_eq!(param.matches(query), expected, "{param:?} {query}");
        };
        check("animal", "whale", "animal=whale", true);
        check("animal", "whale", "a=b&animal=whale&c", true);
        check("animal", "whale", "animal=whale&animal=dolphin", true);
        check("animal", "whale", "animal=dolphin&animal=whale", false);
        check("animal", "whale", "Animal=whale", false);
        check("animal", "whale", "animal=Whale", false);
        check("animal", "whale", "", false);
        check("animal", "", "animal", true);
        check("animal", "a=b", "animal=a=b", true);
        check("animal", "blue whale", "animal=blue%20whale", true);
        check("animal", "blue+whale", "animal=blue+whale", true);
        check("animal", "50%", "animal=50%", true);
        check("animal", "50%25", "animal=50%25", false);
        check("tier", "\u{e4}", "t%69er=%C3%A4", true);
        check("tier", "x", "tier=%ff", false);
    }

    #[test]
    fn patterns_are_bounded_and_whole() {
        let check = |text: &str, expected: &str| {
            let error = Pattern::new(text).unwrap_err().to_string();
            assert_eq!(error, format!("not a regular expression that can be used: {expected}"), "{text}");
        };
        check("a(", "unclosed group");
        // Neither of these may get out of what is put around it.
        check("a)|(b", "unopened group");
        check(r"\w{500}", "it takes more than 1048576 bytes when compiled");
        check("(?<=a)b", "look-around, including look-ahead and look-behind, is not supported");
        assert!(Pattern::new("a|b").unwrap().matches("b"));
        assert!(!Pattern::new("a|b").unwrap().matches("bb"));
        assert!(Pattern::new("(?i)get").unwrap().matches("GET"));
    }

    #[test]
    fn grpc_methods_by_pattern() {
        let check = |service: &str, method: &str, path: &str, expected: bool| {
            let pattern = Pattern::grpc(service, method).unwrap();
            assert_eq!(pattern.matches(path), expected, "{service} {method} {path}");
        };
        check("shop\\..*", "", "/shop.Cart/Add", true);
        check("shop\\..*", "", "/bank.Cart/Add", false);
        check("", "Get.*|List", "/a.B/List", true);
        check("", "Get.*|List", "/a.B/ListAll", false);
        check("a", "b", "/a/b", true);
        check("a|x", "b|y", "/x/y", true);
        assert!(Pattern::grpc("a)", "(b").is_err());
    }
}

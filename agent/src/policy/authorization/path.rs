//! Paths of requests in the one form that policies are written for.
//!
//! Servers read `/a/%61dmin`, `/a//admin` and `/a/./admin` as one path, and policies that told them apart could be walked around. What
//! servers read differently from each other is refused: whoever asks so means no good. The query is not looked at, and what is sent on
//! is what came.

use std::borrow::Cow;

/// How paths are read, as far as that is a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PathNormalisation {
    /// Whether `//` is `/`.
    pub merge_slashes: bool,
    /// Whether all is in lower case: for servers that do not tell paths apart by case. What rules say of paths is compared so, too.
    pub case_insensitive: bool,
    /// What becomes of `%2F`, `%5C` and `\`.
    pub escaped_slashes: EscapedSlashes,
}

/// What becomes of `%2F`, `%5C` and `\`, which some servers take for slashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EscapedSlashes {
    /// They are refused.
    #[default]
    Refuse,
    /// They are no slashes: they stay within their segment, `\` as `%5C`.
    Keep,
    /// They are slashes.
    Decode,
}

/// Why a path is refused. The answer is 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It begins with something else than a slash.
    #[error("the path does not begin with /")]
    NotAbsolute,
    /// A `%` without two hexadecimal digits behind it.
    #[error("the path has a % that escapes nothing")]
    InvalidEscape,
    /// A zero byte, which ends a path for some.
    #[error("the path has a zero byte")]
    Zero,
    /// UTF-8 that is longer than it must be: another way to write `/` or `.`, for some.
    #[error("the path has a character that is escaped in more bytes than it takes")]
    Overlong,
    /// `%2F`, `%5C` or `\`.
    #[error("the path has an escaped slash or a backslash")]
    EscapedSlash,
    /// `.` or `..` followed by parameters, which some servers leave out first: `/..;x/`.
    #[error("the path has a dot segment with parameters")]
    DotWithParameters,
    /// `//..`: whether a slash or a segment is removed differs from server to server.
    #[error("the path has a dot segment behind an empty one")]
    DotAfterEmpty,
}

impl Default for PathNormalisation {
    fn default() -> Self {
        Self { merge_slashes: true, case_insensitive: false, escaped_slashes: EscapedSlashes::default() }
    }
}

/// The path that a request asks for: without query and fragment; what needs no escape is not escaped, what does is, in upper case; and
/// dot segments are removed (RFC 3986, sections 6.2.2 and 5.2.4). Decoded once: `%252e` is `%252e`. `*`, which asks for the server itself,
/// stays.
pub fn normalise<'p>(raw: &'p str, settings: &PathNormalisation) -> Result<Cow<'p, str>, Refused> {
    let path = raw.find(['?', '#']).map_or(raw, |end| &raw[..end]);
    match path {
        "" => return Ok(Cow::Borrowed("/")),
        "*" => return Ok(Cow::Borrowed("*")),
        _ if !path.starts_with(['/', '\\']) => return Err(Refused::NotAbsolute),
        _ => {}
    }
    let mut path = decoded(path, settings)?;
    if path.contains("//") || path.contains("/.") {
        path = Cow::Owned(without_dots(&path, settings)?);
    }
    if settings.case_insensitive && path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        path = Cow::Owned(path.to_ascii_lowercase());
    }
    Ok(path)
}

/// Every byte as it is written best.
fn decoded<'p>(path: &'p str, settings: &PathNormalisation) -> Result<Cow<'p, str>, Refused> {
    let bytes = path.as_bytes();
    let Some(first) = bytes.iter().position(|byte| !is_plain(*byte)) else { return Ok(Cow::Borrowed(path)) };
    let mut text = String::with_capacity(path.len() + 16);
    text.push_str(&path[..first]);
    let mut rest = &bytes[first..];
    let mut last = None;
    while let Some((&byte, behind)) = rest.split_first() {
        let (byte, is_escaped) = if byte == b'%' {
            let (high, low) = (digit(behind.first())?, digit(behind.get(1))?);
            rest = &behind[2..];
            (high << 4 | low, true)
        } else {
            rest = behind;
            (byte, false)
        };
        check_length(last.replace(byte), byte)?;
        match byte {
            0 => return Err(Refused::Zero),
            b'\\' | b'/' if is_escaped || byte == b'\\' => match settings.escaped_slashes {
                EscapedSlashes::Refuse => return Err(Refused::EscapedSlash),
                EscapedSlashes::Keep => escape(byte, &mut text),
                EscapedSlashes::Decode => text.push('/'),
            },
            // It would begin parameters where none are.
            b';' if is_escaped => escape(byte, &mut text),
            _ if is_plain(byte) => text.push(char::from(byte)),
            _ => escape(byte, &mut text),
        }
    }
    if !text.starts_with('/') {
        return Err(Refused::NotAbsolute);
    }
    Ok(Cow::Owned(text))
}

/// What a path may have in it unescaped (RFC 3986, section 3.3), slashes among it.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&byte)
}

fn digit(byte: Option<&u8>) -> Result<u8, Refused> {
    let digit = byte.and_then(|byte| char::from(*byte).to_digit(16)).ok_or(Refused::InvalidEscape)?;
    Ok(digit as u8)
}

fn escape(byte: u8, text: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.push('%');
    for digit in [byte >> 4, byte & 15] {
        text.push(char::from(DIGITS[usize::from(digit)]));
    }
}

/// Refuses what is UTF-8 of nothing but characters that are written too long.
fn check_length(last: Option<u8>, byte: u8) -> Result<(), Refused> {
    match (last, byte) {
        (_, 0xc0 | 0xc1 | 0xf5..) => Err(Refused::Overlong),
        (Some(0xe0), 0x80..=0x9f) | (Some(0xf0), 0x80..=0x8f) => Err(Refused::Overlong),
        _ => Ok(()),
    }
}

fn without_dots(path: &str, settings: &PathNormalisation) -> Result<String, Refused> {
    let mut segments: Vec<&str> = Vec::new();
    let mut ends_with_slash = false;
    let mut was_empty = false;
    for segment in path.split('/').skip(1) {
        ends_with_slash = matches!(segment, "" | "." | "..");
        match segment {
            ".." if was_empty => return Err(Refused::DotAfterEmpty),
            ".." => _ = segments.pop(),
            _ if has_dot_with_parameters(segment) => return Err(Refused::DotWithParameters),
            _ => {}
        }
        was_empty = segment.is_empty() || was_empty && segment == ".";
        if !matches!(segment, "." | "..") && (!segment.is_empty() || !settings.merge_slashes) {
            segments.push(segment);
        }
    }
    // What is left of `/a/.`, `/a/..` and `/a/` ends with a slash.
    let mut clean: String = segments.iter().flat_map(|segment| ["/", segment]).collect();
    let last_is_kept = !settings.merge_slashes && path.ends_with('/');
    if clean.is_empty() || ends_with_slash && !last_is_kept {
        clean.push('/');
    }
    Ok(clean)
}

fn has_dot_with_parameters(segment: &str) -> bool {
    let behind = segment.strip_prefix("..").or_else(|| segment.strip_prefix('.'));
    behind.is_some_and(|behind| behind.starts_with(';') || behind.starts_with("%3B"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_that_servers_read_as_others() {
        use Refused::*;
        let check = |raw: &str, expected: Result<&str, Refused>| {
            let normalised = normalise(raw, &PathNormalisation::default());
            assert_eq!(normalised.as_deref().map_err(|refused| *refused), expected, "{raw:?}");
        };
        // What nobody needs to touch.
        check("/", Ok("/"));
        check("", Ok("/"));
        check("*", Ok("*"));
        check("/a/b-c_d.e~f", Ok("/a/b-c_d.e~f"));
        check("/a/", Ok("/a/"));
        check("/a:b@c!$&'()*+,=", Ok("/a:b@c!$&'()*+,="));
        check("/.well-known/x", Ok("/.well-known/x"));
        check("/a/...", Ok("/a/..."));
        check("/a/..b/c..", Ok("/a/..b/c.."));
        check("/shop.v1.Orders/List", Ok("/shop.v1.Orders/List"));
        // The query and the fragment.
        check("/a?b=/../c", Ok("/a"));
        check("/a#/../b", Ok("/a"));
        check("?x", Ok("/"));
        check("/a%3Fb", Ok("/a%3Fb"));
        check("/a%23b", Ok("/a%23b"));
        // What begins otherwise.
        check("a", Err(NotAbsolute));
        check("http://a/b", Err(NotAbsolute));
        check("%2Fa", Err(NotAbsolute));
        check("../a", Err(NotAbsolute));
        // Letters that are escaped.
        check("/%61dmin", Ok("/admin"));
        check("/adm%69n", Ok("/admin"));
        check("/%41", Ok("/A"));
        check("/a%2Db%5Fc%7Ed%2ee", Ok("/a-b_c~d.e"));
        check("/v1/orders%3Adelete", Ok("/v1/orders:delete"));
        check("/c%2b%2B", Ok("/c++"));
        check("/a%20b", Ok("/a%20b"));
        check("/a%c3%a9", Ok("/a%C3%A9"));
        check("/aé", Ok("/a%C3%A9"));
        check("/a{b}|c^\"<>`", Ok("/a%7Bb%7D%7Cc%5E%22%3C%3E%60"));
        check("/a%7bb", Ok("/a%7Bb"));
        check("/a%0d%0ab", Ok("/a%0D%0Ab"));
        // Once, and not again.
        check("/%2561dmin", Ok("/%2561dmin"));
        check("/%252e%252e/a", Ok("/%252e%252e/a"));
        check("/%25%32%65", Ok("/%252e"));
        // Escapes of nothing.
        check("/%", Err(InvalidEscape));
        check("/%a", Err(InvalidEscape));
        check("/%zz", Err(InvalidEscape));
        check("/%-1", Err(InvalidEscape));
        check("/%+1", Err(InvalidEscape));
        check("/%u002f", Err(InvalidEscape));
        check("/% 2f", Err(InvalidEscape));
        check("/100%", Err(InvalidEscape));
        check("/%%32%65", Err(InvalidEscape));
        check("/a?%", Ok("/a"));
        // Zero bytes.
        check("/a%00", Err(Zero));
        check("/admin%00.png", Err(Zero));
        // Slashes that are escaped, and backslashes.
        check("/a%2Fb", Err(EscapedSlash));
        check("/a%2fb", Err(EscapedSlash));
        check("/public/..%2fadmin", Err(EscapedSlash));
        check("/a%5Cb", Err(EscapedSlash));
        check("/a\\b", Err(EscapedSlash));
        check("/public/..\\admin", Err(EscapedSlash));
        check("\\admin", Err(EscapedSlash));
        check("/a%252fb", Ok("/a%252fb"));
        // Characters that are written too long: `/` and `.` in two, three and four bytes.
        check("/..%c0%af", Err(Overlong));
        check("/%c0%ae%c0%ae/a", Err(Overlong));
        check("/%C1%9C", Err(Overlong));
        check("/%e0%80%af", Err(Overlong));
        check("/%f0%80%80%af", Err(Overlong));
        check("/%ff", Err(Overlong));
        check("/%e0%a4%85", Ok("/%E0%A4%85"));
        check("/%e9", Ok("/%E9"));
        // Dot segments.
        check("/a/./b", Ok("/a/b"));
        check("/a/../b", Ok("/b"));
        check("/a/b/../../c", Ok("/c"));
        check("/..", Ok("/"));
        check("/../../a", Ok("/a"));
        check("/.", Ok("/"));
        check("/a/.", Ok("/a/"));
        check("/a/..", Ok("/"));
        check("/a/b/..", Ok("/a/"));
        check("/public/../admin", Ok("/admin"));
        check("/public/%2e%2e/admin", Ok("/admin"));
        check("/public/%2E./admin", Ok("/admin"));
        check("/public/.%2e/admin", Ok("/admin"));
        check("/admin/%2e", Ok("/admin/"));
        check("/admin/%2e/x", Ok("/admin/x"));
        check("/a/.../b", Ok("/a/.../b"));
        // Slashes.
        check("//admin", Ok("/admin"));
        check("///admin//x", Ok("/admin/x"));
        check("/admin//", Ok("/admin/"));
        check("//", Ok("/"));
        check("/a//./b", Ok("/a/b"));
        check("/a//../b", Err(DotAfterEmpty));
        check("/a//./../b", Err(DotAfterEmpty));
        check("//..", Err(DotAfterEmpty));
        check("/a/../b//c", Ok("/b/c"));
        // Parameters.
        check("/admin;x=1", Ok("/admin;x=1"));
        check("/admin;x=1/y", Ok("/admin;x=1/y"));
        check("/;/admin", Ok("/;/admin"));
        check("/a%3Bb", Ok("/a%3Bb"));
        check("/public/..;/admin", Err(DotWithParameters));
        check("/public/..;x=1/admin", Err(DotWithParameters));
        check("/public/.;/admin", Err(DotWithParameters));
        check("/public/..%3B/admin", Err(DotWithParameters));
        check("/public/%2e%2e%3b/admin", Err(DotWithParameters));
        check("/public/...;/admin", Ok("/public/...;/admin"));
    }

    #[test]
    fn what_is_a_choice() {
        let kept = PathNormalisation { escaped_slashes: EscapedSlashes::Keep, ..Default::default() };
        let taken = PathNormalisation { escaped_slashes: EscapedSlashes::Decode, ..Default::default() };
        let apart = PathNormalisation { merge_slashes: false, ..Default::default() };
        let lower = PathNormalisation { case_insensitive: true, ..Default::default() };
        let check = |settings: &PathNormalisation, raw: &str, expected: Result<&str, Refused>| {
            let normalised = normalise(raw, settings);
            assert_eq!(normalised.as_deref().map_err(|refused| *refused), expected, "{raw:?} {settings:?}");
        };
        check(&kept, "/a%2fb\\c%5cd", Ok("/a%2Fb%5Cc%5Cd"));
        check(&kept, "/a/..%2fb", Ok("/a/..%2Fb"));
        check(&kept, "\\a", Err(Refused::NotAbsolute));
        check(&taken, "/a%2fb\\c%5cd", Ok("/a/b/c/d"));
        check(&taken, "/a/..%2fb", Ok("/b"));
        check(&taken, "/a%2F%2Fb", Ok("/a/b"));
        check(&taken, "/a%2F%2F..\\b", Err(Refused::DotAfterEmpty));
        check(&taken, "\\a", Ok("/a"));
        check(&apart, "//a//b/", Ok("//a//b/"));
        check(&apart, "/a//", Ok("/a//"));
        check(&apart, "/a/./b/../c//", Ok("/a/c//"));
        check(&apart, "/a/..", Ok("/"));
        check(&apart, "/a/b/.", Ok("/a/b/"));
        check(&apart, "/a//../b", Err(Refused::DotAfterEmpty));
        check(&lower, "/Admin/%4AX%c3%a9", Ok("/admin/jx%c3%a9"));
        check(&lower, "/admin", Ok("/admin"));
    }

    #[test]
    fn what_needs_nothing_is_lent() {
        let settings = PathNormalisation::default();
        let is_lent = |path| matches!(normalise(path, &settings), Ok(Cow::Borrowed(_)));
        assert!(is_lent("/shop/orders/17?x=%2F"));
        assert!(!is_lent("/shop/%6frders"));
    }

    proptest! {
        #[test]
        fn what_is_normal_stays_as_it_is(
            raw in "(/|\\.|%2[eEfF5]|%5[cC]|\\\\|;|%3[bB]|[aAé%?#{]|%[0-9a-f]{2}|\\PC){0,12}",
            merge_slashes: bool,
            case_insensitive: bool,
            slashes in 0..3_usize,
        ) {
            let escaped_slashes =
                [EscapedSlashes::Refuse, EscapedSlashes::Keep, EscapedSlashes::Decode][slashes];
            let settings = PathNormalisation { merge_slashes, case_insensitive, escaped_slashes };
            for raw in [raw.clone(), format!("/{raw}")] {
                let Ok(path) = normalise(&raw, &settings) else { continue };
                let again = normalise(&path, &settings);
                prop_assert_eq!(again.as_deref(), Ok(&*path), "{}", raw);
                prop_assert!(path == "*" || path.starts_with('/'), "{}", raw);
                prop_assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")), "{}", raw);
                prop_assert!(path.bytes().all(|byte| is_plain(byte) || byte == b'%'), "{}", raw);
                prop_assert!(!settings.merge_slashes || !path.contains("//"), "{}", raw);
            }
        }
    }
}

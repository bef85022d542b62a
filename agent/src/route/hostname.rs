//! The hostnames of a route: exact ones and wildcards.

use std::fmt;

use crate::model::Name;

/// One of a route's `hostnames`, in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Hostname {
    /// This host alone.
    Exact(Name),
    /// Every host below it, at any depth; the name begins with the dot: `.example.com`.
    Wildcard(Name),
}

/// A text that is no hostname.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a host name such as shop.example.com or *.example.com, without a port and not an address")]
pub struct HostnameError;

impl Hostname {
    /// Reads a hostname as the Gateway API writes it.
    pub fn parse(text: &str) -> Result<Self, HostnameError> {
        let (name, is_wildcard) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let is_address = name.parse::<std::net::IpAddr>().is_ok();
        if is_address || text.len() > 253 || !name.split('.').all(label) {
            return Err(HostnameError);
        }
        let name = name.to_ascii_lowercase();
        Ok(if is_wildcard { Self::Wildcard(format!(".{name}").into()) } else { Self::Exact(name.into()) })
    }

    /// Whether the host is one of these. `host` is in lower case and has no port; see [`comparable`].
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => **name == *host,
            Self::Wildcard(suffix) => host.len() > suffix.len() && host.ends_with(&**suffix),
        }
    }

    /// The more specific of two hostnames that match one host is the smaller by this: exact before wildcards, and of these
    /// the longer.
    pub(super) fn rank(&self) -> (u8, std::cmp::Reverse<usize>) {
        match self {
            Self::Exact(name) => (0, std::cmp::Reverse(name.len())),
            Self::Wildcard(suffix) => (1, std::cmp::Reverse(suffix.len())),
        }
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(suffix) => write!(f, "*{suffix}"),
        }
    }
}

/// The host as hostnames are compared: in lower case, and without the dot that ends a full name.
pub(super) fn comparable(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_hostname() {
        for text in ["a", "shop.example.com", "*.example.com", "A-1.example.com", "*.a", "1.a"] {
            assert_eq!(Hostname::parse(text).unwrap().to_string(), text.to_ascii_lowercase());
        }
        for text in [
            "", "*", "*.", "a..b", "a.", ".a", "a:80", "10.0.0.1", "-a", "a-", "a.*.b", "*a.b", "a_b",
            "[::1]",
        ] {
            assert!(Hostname::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_wildcard_is_any_host_below() {
        let check = |pattern: &str, host: &str, expected: bool| {
            let matches = Hostname::parse(pattern).unwrap().matches(&comparable(host));
            assert_eq!(matches, expected, "{pattern} {host}");
        };
        check("example.com", "example.com", true);
        check("example.com", "EXAMPLE.com.", true);
        check("example.com", "a.example.com", false);
        check("*.example.com", "a.example.com", true);
        check("*.example.com", "b.a.example.com", true);
        check("*.example.com", "example.com", false);
        check("*.example.com", ".example.com", false);
        check("*.example.com", "aexample.com", false);
    }
}

//! Who somebody is: SPIFFE ids of the form that Istio's mesh gives to service accounts.
//!
//! The parser takes what the SPIFFE-ID specification lets one *make*, not what it lets one tolerate: no upper case in
//! scheme or trust domain, no escapes, no empty or dot segments. Two ids are equal exactly if their texts are.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Name;

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID, section 2.3.
const MAX_LENGTH: usize = 2048;
/// SPIFFE-ID, section 2.1.
const MAX_TRUST_DOMAIN: usize = 255;

/// A trust domain: everything that one certificate authority vouches for.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct TrustDomain(Arc<str>);

/// The identity of a service account: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where in the text each part ends; private, for they must fit it.
    trust_domain_end: u16,
    namespace_end: u16,
}

/// What keeps a text from being a SPIFFE id or a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// Another scheme, or one in upper case.
    #[error("it does not begin with spiffe://")]
    Scheme,
    /// There is nothing between `spiffe://` and the next slash.
    #[error("the trust domain is empty")]
    NoTrustDomain,
    /// More than 255 bytes of trust domain, or 2048 in all.
    #[error("it is too long")]
    TooLong,
    /// Trust domains consist of `a-z`, `0-9`, `.`, `-` and `_`.
    #[error("the trust domain has a character other than a-z, 0-9, '.', '-' and '_'")]
    TrustDomainCharacter,
    /// Segments consist of letters, digits, `.`, `-` and `_`.
    #[error("a path segment has a character other than letters, digits, '.', '-' and '_'")]
    PathCharacter,
    /// `//` or a slash at the end.
    #[error("a path segment is empty")]
    EmptySegment,
    /// `.` or `..`.
    #[error("a path segment is '.' or '..'")]
    DotSegment,
    /// A valid SPIFFE id perhaps, but not that of a service account.
    #[error("the path is not /ns/<namespace>/sa/<service account>")]
    NotAServiceAccount,
}

impl SpiffeId {
    /// The identity of a service account.
    ///
    /// # Errors
    /// When a name does not fit into a SPIFFE id; names of Kubernetes objects do.
    pub fn new(domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeError> {
        // Slashes would make other segments of them.
        for segment in [namespace, service_account] {
            check_segment(segment)?;
        }
        format!("{SCHEME}{domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The same, to keep: it costs a reference count.
    pub fn to_name(&self) -> Name {
        self.text.clone()
    }

    /// The name of its trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.trust_domain_end.into()]
    }

    /// The namespace of the service account.
    pub fn namespace(&self) -> &str {
        &self.text[usize::from(self.trust_domain_end) + "/ns/".len()..self.namespace_end.into()]
    }

    /// The name of the service account.
    pub fn service_account(&self) -> &str {
        &self.text[usize::from(self.namespace_end) + "/sa/".len()..]
    }

    /// True if it belongs to the trust domain.
    pub fn is_of(&self, domain: &TrustDomain) -> bool {
        self.trust_domain() == domain.as_str()
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_LENGTH {
            return Err(SpiffeError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeError::Scheme)?;
        let (domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        check_trust_domain(domain)?;
        if domain.len() == rest.len() {
            return Err(SpiffeError::NotAServiceAccount);
        }
        path.split('/').try_for_each(check_segment)?;
        let segments: Vec<_> = path.split('/').collect();
        let ["ns", namespace, "sa", _] = segments[..] else {
            return Err(SpiffeError::NotAServiceAccount);
        };
        let trust_domain_end = SCHEME.len() + domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        // Both fit: they are below the greatest length.
        Ok(Self {
            text: text.into(),
            trust_domain_end: trust_domain_end as u16,
            namespace_end: namespace_end as u16,
        })
    }
}

impl TrustDomain {
    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE id of the trust domain itself: what the certificates of its authorities carry.
    pub fn id(&self) -> String {
        format!("{SCHEME}{self}")
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = SpiffeError;

    fn try_from(text: String) -> Result<Self, SpiffeError> {
        text.parse()
    }
}

impl Default for TrustDomain {
    /// `cluster.local`, as everywhere in the field.
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeError> {
    let fits = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    match name {
        "" => Err(SpiffeError::NoTrustDomain),
        _ if name.len() > MAX_TRUST_DOMAIN => Err(SpiffeError::TooLong),
        _ if !name.bytes().all(fits) => Err(SpiffeError::TrustDomainCharacter),
        _ => Ok(()),
    }
}

fn check_segment(segment: &str) -> Result<(), SpiffeError> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    match segment {
        "" => Err(SpiffeError::EmptySegment),
        "." | ".." => Err(SpiffeError::DotSegment),
        _ if !segment.bytes().all(fits) => Err(SpiffeError::PathCharacter),
        _ => Ok(()),
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_and_what_only_looks_like_them() {
        use SpiffeError::*;
        let check = |text: &str, expected: Result<(&str, &str, &str), SpiffeError>| {
            let parsed = text.parse::<SpiffeId>();
            let parts = parsed.as_ref().map(|id| (id.trust_domain(), id.namespace(), id.service_account()));
            assert_eq!(parts, expected.as_ref().map(|p| *p), "{text:?}");
            if let Ok(id) = parsed {
                assert_eq!(id.to_string(), text);
            }
        };
        check("spiffe://cluster.local/ns/shop/sa/web", Ok(("cluster.local", "shop", "web")));
        check("spiffe://a_b-c.9/ns/N.s/sa/W_e-b..", Ok(("a_b-c.9", "N.s", "W_e-b..")));
        check("spiffe://td/ns/ns/sa/sa", Ok(("td", "ns", "sa")));
        check("", Err(Scheme));
        check("SPIFFE://td/ns/a/sa/b", Err(Scheme));
        check("https://td/ns/a/sa/b", Err(Scheme));
        check("spiffe:/td/ns/a/sa/b", Err(Scheme));
        check("spiffe:///ns/a/sa/b", Err(NoTrustDomain));
        check("spiffe://", Err(NoTrustDomain));
        check("spiffe://Cluster.local/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://td:8080/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://me@td/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://t%64/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://tä/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://td?x/ns/a/sa/b", Err(TrustDomainCharacter));
        check("spiffe://td", Err(NotAServiceAccount));
        check("spiffe://td/", Err(EmptySegment));
        check("spiffe://td/ns/a/sa/", Err(EmptySegment));
        check("spiffe://td/ns/a/sa/b/", Err(EmptySegment));
        check("spiffe://td//ns/a/sa/b", Err(EmptySegment));
        check("spiffe://td/ns/./sa/b", Err(DotSegment));
        check("spiffe://td/ns/a/sa/..", Err(DotSegment));
        check("spiffe://td/ns/a/sa/b/../c", Err(DotSegment));
        check("spiffe://td/ns/a/sa/b%2e", Err(PathCharacter));
        check("spiffe://td/ns/a/sa/b#c", Err(PathCharacter));
        check("spiffe://td/ns/a/sa/b?c", Err(PathCharacter));
        check("spiffe://td/ns/a/sa/b c", Err(PathCharacter));
        check("spiffe://td/ns/a/sa/b\n", Err(PathCharacter));
        check("spiffe://td/ns/a\0/sa/b", Err(PathCharacter));
        check("spiffe://td/ns/a/sa/ü", Err(PathCharacter));
        check("spiffe://td/workload", Err(NotAServiceAccount));
        check("spiffe://td/ns/a/sa/b/c", Err(NotAServiceAccount));
        check("spiffe://td/NS/a/SA/b", Err(NotAServiceAccount));
        check(&format!("spiffe://{}/ns/a/sa/b", "t".repeat(255)), Ok((&"t".repeat(255), "a", "b")));
        check(&format!("spiffe://{}/ns/a/sa/b", "t".repeat(256)), Err(TooLong));
        let longest = "b".repeat(2048 - "spiffe://td/ns/a/sa/".len());
        check(&format!("spiffe://td/ns/a/sa/{longest}"), Ok(("td", "a", &longest)));
        check(&format!("spiffe://td/ns/a/sa/{longest}b"), Err(TooLong));
    }

    #[test]
    fn no_name_can_reach_into_another_segment() {
        let domain = TrustDomain::default();
        let id = |namespace, account| SpiffeId::new(&domain, namespace, account).map(|id| id.to_string());
        assert_eq!(id("shop", "web"), Ok("spiffe://cluster.local/ns/shop/sa/web".into()));
        assert_eq!(id("shop/sa/admin", "web"), Err(SpiffeError::PathCharacter));
        assert_eq!(id("shop", ""), Err(SpiffeError::EmptySegment));
        assert_eq!(id("shop", ".."), Err(SpiffeError::DotSegment));
        assert_eq!(domain.id(), "spiffe://cluster.local");
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_printed_back(text in "(spiffe://)?[a-z.:/%A-Z]{0,12}(/ns/[a-z./]{0,9}/sa/[a-z./%]{0,9})?") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), &text);
                let domain: TrustDomain = id.trust_domain().parse().unwrap();
                prop_assert!(id.is_of(&domain));
                prop_assert_eq!(SpiffeId::new(&domain, id.namespace(), id.service_account()), Ok(id));
            }
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            _ = text.parse::<SpiffeId>();
            _ = format!("spiffe://{text}").parse::<SpiffeId>();
            _ = format!("spiffe://td/ns/{text}/sa/{text}").parse::<SpiffeId>();
        }
    }
}

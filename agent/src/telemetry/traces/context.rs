//! W3C Trace Context: the header `traceparent`, read and written (<https://www.w3.org/TR/trace-context-2/>).
//!
//! It knows nothing of who records what; `tracestate` belongs to others and is never looked into.

use std::fmt::{self, Display};
use std::num::{NonZeroU64, NonZeroU128};

use ::http::header::{HeaderMap, HeaderName};

/// Where a request stands in a trace.
pub(super) static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What others add to it for themselves.
pub(super) static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The caller has recorded a span, and wants it to be so further on.
pub(super) const SAMPLED: u8 = 0x01;
/// The right half of the trace's id is random (level 2).
pub(super) const RANDOM: u8 = 0x02;

/// The id of a trace: what all requests have in common that one request led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub(super) NonZeroU128);

/// The id of one span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpanId(pub(super) NonZeroU64);

/// What a `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TraceContext {
    pub(super) trace: TraceId,
    /// The span that the receiver's is a child of.
    pub(super) parent: SpanId,
    pub(super) flags: u8,
}

impl TraceContext {
    /// What the headers say; none where there is no `traceparent`, more than one, or one that makes no sense.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(&TRACEPARENT).iter();
        let (first, another) = (all.next()?, all.next());
        if another.is_some() { None } else { Self::parse(first.as_bytes()) }
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes.trim_ascii()).ok()?;
        let (known, more) = text.split_at_checked(Self::LENGTH)?;
        let mut fields = known.split('-');
        let mut field = |length| fields.next().filter(|field| field.len() == length && is_hex(field));
        let (version, trace, parent, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        // Later versions may say more behind what is known of them.
        let is_whole = match version {
            "ff" => false,
            "00" => more.is_empty(),
            _ => more.is_empty() || more.starts_with('-'),
        };
        if !is_whole {
            return None;
        }
        Some(Self {
            trace: TraceId(NonZeroU128::new(u128::from_str_radix(trace, 16).ok()?)?),
            parent: SpanId(NonZeroU64::new(u64::from_str_radix(parent, 16).ok()?)?),
            flags: u8::from_str_radix(flags, 16).ok()?,
        })
    }

    pub(super) fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// `00-` and three fields, with a `-` between them.
    const LENGTH: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;
}

/// Upper case is none (section 3.2.2).
fn is_hex(field: &str) -> bool {
    field.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

impl Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{:016x}-{:02x}", self.trace, self.parent.0, self.flags)
    }
}

impl Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use ::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    #[test]
    fn what_a_traceparent_says_and_which_say_nothing() {
        let check = |text: &str, expected: Option<&str>| {
            let read = TraceContext::parse(text.as_bytes()).map(|read| read.to_string());
            assert_eq!(read.as_deref(), expected, "{text:?}");
        };
        let plain = format!("00-{TRACE}-{PARENT}-01");
        check(&plain, Some(&plain));
        let unsampled = format!("00-{TRACE}-{PARENT}-00");
        check(&unsampled, Some(&unsampled));
        let random = format!("00-{TRACE}-{PARENT}-03");
        check(&random, Some(&random));
        // Blanks around are not part of a header's value (RFC 9110, section 5.5).
        check(&format!(" {plain}\t"), Some(&plain));
        // A later version says at least as much, and is answered with ours.
        check(&format!("01-{TRACE}-{PARENT}-01"), Some(&plain));
        check(&format!("cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"), Some(&plain));
        check(&format!("cc-{TRACE}-{PARENT}-01."), None);
        check(&format!("cc-{TRACE}-{PARENT}-01what"), None);
        check(&format!("fe-{TRACE}-{PARENT}-01-"), Some(&plain));

        check(&format!("ff-{TRACE}-{PARENT}-01"), None);
        check(&format!("00-{TRACE}-{PARENT}-01-more"), None);
        check(&format!("00-{TRACE}-{PARENT}-01-"), None);
        check(&format!("00-{TRACE}-{PARENT}-011"), None);
        check(&format!("00-{TRACE}-{PARENT}-1"), None);
        check(&format!("00-{TRACE}-{PARENT}"), None);
        check(&format!("00-{TRACE}-{PARENT}-.0"), None);
        check(&format!("00-{TRACE}-{PARENT}-+1"), None);
        check(&format!("0-{TRACE}-{PARENT}-01"), None);
        check(&format!("000-{TRACE}-{PARENT}-01"), None);
        check(&format!(".0-{TRACE}-{PARENT}-01"), None);
        check(&format!("0x-{TRACE}-{PARENT}-01"), None);
        check(&format!("00-{}-{PARENT}-01", TRACE.to_uppercase()), None);
        check(&format!("00-{TRACE}-{}-01", PARENT.to_uppercase()), None);
        check(&format!("00-{TRACE}-{PARENT}-0A"), None);
        check(&format!("00-{}-{PARENT}-01", "0".repeat(32)), None);
        check(&format!("00-{TRACE}-{}-01", "0".repeat(16)), None);
        check(&format!("00-{}-{PARENT}-01", &TRACE[1..]), None);
        check(&format!("00-{TRACE}0-{PARENT}-01"), None);
        check(&format!("00-{TRACE}-{}-01", &PARENT[1..]), None);
        check(&format!("00-{TRACE}-{PARENT}0-01"), None);
        check(&format!("00-.{}-{PARENT}-01", &TRACE[1..]), None);
        check(&format!("00-{TRACE}-.{}-01", &PARENT[1..]), None);
        check(&format!("00_{TRACE}_{PARENT}_01"), None);
        check(&format!("00-{TRACE}-{PARENT}-01,{plain}"), None);
        check(&format!("00-{TRACE}-{PARENT}-0ü"), None);
        check("", None);
        check("-", None);
        check("00", None);
    }

    #[test]
    fn two_of_them_say_nothing() {
        let value = HeaderValue::try_from(format!("00-{TRACE}-{PARENT}-01")).unwrap();
        let mut headers = HeaderMap::new();
        assert_eq!(TraceContext::of(&headers), None);
        headers.append(&TRACEPARENT, value.clone());
        assert!(TraceContext::of(&headers).is_some());
        headers.append(&TRACEPARENT, value);
        assert_eq!(TraceContext::of(&headers), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_it_was(trace in 1..=u128::MAX, parent in 1..=u64::MAX, flags: u8) {
            let (trace, parent) = (NonZeroU128::new(trace).unwrap(), NonZeroU64::new(parent).unwrap());
            let context = TraceContext { trace: TraceId(trace), parent: SpanId(parent), flags };
            prop_assert_eq!(TraceContext::parse(context.to_string().as_bytes()), Some(context));
        }

        #[test]
        fn what_is_no_text_of_ours_says_nothing(bytes: Vec<u8>) {
            prop_assert_eq!(TraceContext::parse(&bytes), None);
        }

        #[test]
        fn what_looks_like_one_is_read_exactly_where_it_is_one(
            text in "(00|ff|[0-9a-fA-F]{2})-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}(-[a-z]{0,3})?"
        ) {
            if let Some(read) = TraceContext::parse(text.as_bytes()) {
                prop_assert_eq!(&read.to_string()[2..], &text[2..55]);
                prop_assert!(text.len() == 55 || !text.starts_with("00"));
            }
        }
    }
}

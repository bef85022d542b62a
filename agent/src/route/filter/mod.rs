//! The filters of a rule or of a backend: what is done to a request on its way, and to the answer on its way back.

mod cors;
mod path;

pub use cors::{AllowedHeaders, AllowedMethods, Cors, Origin};
pub use path::{PathModifier, Redirect, UrlRewrite};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::Target;

/// The filters of a rule or of a backend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filters {
    /// What is done to the headers of the request.
    pub request_headers: Option<HeaderModifier>,
    /// What is done to the headers of the answer.
    pub response_headers: Option<HeaderModifier>,
    /// The request is answered with a redirect, and goes nowhere.
    pub redirect: Option<Redirect>,
    /// What is done to the URL of the request.
    pub rewrite: Option<UrlRewrite>,
    /// Who gets a copy of the request.
    pub mirrors: Vec<Mirror>,
    /// What other origins' pages may do.
    pub cors: Option<Cors>,
}

/// Changes headers. It names each header at most once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderModifier {
    /// Headers that have this value alone afterwards.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Headers that have this value too.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Headers that are gone afterwards.
    pub remove: Vec<HeaderName>,
}

/// Sends copies of requests elsewhere, whose answers nobody reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    /// Where the copies go. A copy that can go nowhere is not made, and its request is none the worse for it.
    pub target: Target,
    /// How many of the requests are copied: so many, out of so many. The second is never 0.
    pub fraction: (u32, u32),
}

impl Filters {
    /// Changes the headers of an answer to a request of this origin.
    pub fn respond(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        if let Some(modifier) = &self.response_headers {
            modifier.apply(headers);
        }
        if let Some(cors) = &self.cors {
            cors.respond(origin, headers);
        }
    }
}

impl HeaderModifier {
    /// Changes the headers.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

impl Mirror {
    /// Whether the request is copied, by 64 fresh random bits.
    pub fn takes(&self, random: u64) -> bool {
        let (numerator, denominator) = self.fraction;
        (u128::from(random) * u128::from(denominator)) >> 64 < u128::from(numerator)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{InvalidBackend, Target};
    use super::*;
    use crate::model::ObjectRef;

    #[test]
    fn headers_are_set_added_and_removed() {
        let name = |name: &str| HeaderName::from_bytes(name.as_bytes()).unwrap();
        let value = HeaderValue::from_static;
        let modifier = HeaderModifier {
            set: vec![(name("X-Set"), value("new")), (name("x-new"), value("set"))],
            add: vec![(name("X-Add"), value("b,c")), (name("x-more"), value("added"))],
            remove: vec![name("X-Remove"), name("x-absent")],
        };
        let mut headers = HeaderMap::new();
        for (header, value) in [
            ("x-set", "old"),
            ("x-set", "older"),
            ("x-add", "a"),
            ("x-remove", "x"),
            ("x-remove", "y"),
            ("x", "z"),
        ] {
            headers.append(header, HeaderValue::from_static(value));
        }
        modifier.apply(&mut headers);
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        assert_eq!(lines, ["x-add: a", "x-add: b,c", "x-more: added", "x-new: set", "x-set: new", "x: z"]);
    }

    #[test]
    fn mirrors_take_their_fraction() {
        let check = |fraction: (u32, u32), random: u64, expected: bool| {
            let target = Target::Invalid(InvalidBackend::NoSuchService(ObjectRef::new("a", "b")));
            assert_eq!(Mirror { target, fraction }.takes(random), expected, "{fraction:?} {random}");
        };
        for random in [0, u64::MAX / 2, u64::MAX] {
            check((0, 100), random, false);
            check((100, 100), random, true);
        }
        check((1, 4), u64::MAX / 4, true);
        check((1, 4), u64::MAX / 4 + 2, false);
    }

    proptest! {
        /// Beside a plain account of each header's values, whatever names come in whatever case.
        #[test]
        fn headers_are_changed_as_a_list_of_their_values_would_be(
            before in prop::collection::vec(("[abcABC]", "[x-z]{1,2}"), 0..8),
            fates in prop::collection::vec((0..4, "[x-z]{1,2}"), 3),
        ) {
            let header = |name: &str| HeaderName::from_bytes(name.as_bytes()).unwrap();
            let value = |text: &str| HeaderValue::from_str(text).unwrap();
            let mut headers = HeaderMap::new();
            for (name, text) in &before {
                headers.append(header(name), value(text));
            }
            let mut modifier = HeaderModifier::default();
            for (name, (fate, text)) in ["a", "b", "c"].into_iter().zip(&fates) {
                match fate {
                    0 => modifier.set.push((header(name), value(text))),
                    1 => modifier.add.push((header(name), value(text))),
                    2 => modifier.remove.push(header(name)),
                    _ => {}
                }
            }
            modifier.apply(&mut headers);
            for (name, (fate, text)) in ["a", "b", "c"].into_iter().zip(&fates) {
                let had = before.iter().filter(|(it, _)| it.eq_ignore_ascii_case(name)).map(|(_, text)| text);
                let expected: Vec<&String> = match fate {
                    0 => vec![text],
                    1 => had.chain([text]).collect(),
                    2 => vec![],
                    _ => had.collect(),
                };
                let found: Vec<_> = headers.get_all(name).iter().map(|it| it.to_str().unwrap()).collect();
                prop_assert_eq!(found, expected, "{}", name);
            }
        }
    }
}

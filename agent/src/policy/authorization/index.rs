//! Which rules of many could match: those that share a key with the facts, and the few that have none.
//!
//! Each rule is kept by one of its clauses, and of each of its entries by the one choice that the fewest other rules are found by. What
//! many are found by even so is an index itself, by what is left. So what a look costs is a matter of how many rules resemble the
//! request, and of how many different lengths of prefixes, suffixes and networks there are; never of how many rules there are.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;

use http::HeaderName;

use super::facts::{Facts, host_and_port};
use super::keys::{Choice, Clause, Dimension, Key, Part, begin, hash, of_header_line, of_network};

/// So many rules are looked at one after the other.
const FEW: usize = 4;

/// What is found by more keys than this is not divided further: each of these would be divided on its own.
const MOST_KEYS_WITHIN: usize = 8;

/// More headers than this are not looked for.
const MOST_HEADERS: usize = 16;

/// The numbers of rules, by keys.
#[derive(Debug, Default)]
pub(super) struct Index {
    buckets: HashMap<u64, Bucket, BuildHasherDefault<AsItIs>>,
    lookups: Lookups,
    /// What has no key. Ascending.
    rest: Box<[u32]>,
}

#[derive(Debug)]
enum Bucket {
    /// One after the other, ascending.
    Few(Box<[u32]>),
    Many(Box<Index>),
}

/// What has to be looked for.
#[derive(Debug, Default)]
struct Lookups {
    texts: Vec<TextLookup>,
    headers: Vec<HeaderName>,
    /// By the bits of networks.
    v4: Vec<usize>,
    v6: Vec<usize>,
    accounts: bool,
    ports: bool,
}

/// How a text is looked for.
#[derive(Debug)]
struct TextLookup {
    dimension: Dimension,
    /// The longest of those that are known as a whole, if any is.
    whole: Option<usize>,
    /// The lengths of those whose beginnings are known. Ascending.
    starts: Vec<usize>,
    /// The lengths of those whose ends are. Ascending.
    ends: Vec<usize>,
}

impl Index {
    /// Indexes rules by these clauses, which belong to the numbers from 0 on.
    pub(super) fn new(rules: &[(u32, Vec<Clause>)]) -> Self {
        let rules: Vec<_> = rules.iter().map(|(number, clauses)| (*number, &**clauses)).collect();
        Self::of(&rules, &[])
    }

    /// Leaves out what has been looked at: the rules are those that were found by it.
    fn of(rules: &[(u32, &[Clause])], done: &[Dimension]) -> Self {
        let is_usable = |choice: &&Choice| {
            let is_new = choice.iter().all(|key| !done.contains(&key.dimension));
            is_new && (done.is_empty() || choice.len() <= MOST_KEYS_WITHIN)
        };
        let mut found_by: HashMap<u64, u32, BuildHasherDefault<AsItIs>> = HashMap::default();
        for (_, clauses) in rules {
            let choices = clauses.iter().flatten().flatten().filter(is_usable);
            choices.flatten().for_each(|key| *found_by.entry(key.hash).or_default() += 1);
        }
        let cost = |choice: &Choice| {
            let most = choice.iter().map(|key| found_by.get(&key.hash).copied().unwrap_or_default()).max();
            (most, choice.first().map(|key| key.dimension))
        };
        let mut index = Self::default();
        let mut buckets: HashMap<u64, Members<'_>, BuildHasherDefault<AsItIs>> = HashMap::default();
        let mut rest = Vec::new();
        for &(number, clauses) in rules {
            let keyed = clauses.iter().filter_map(|clause| {
                let choices = clause.iter().map(|entry| entry.iter().filter(is_usable));
                let best = choices.map(|choices| choices.min_by_key(|choice| cost(choice)));
                best.collect::<Option<Vec<&Choice>>>()
            });
            let best = keyed.min_by_key(|choices| choices.iter().map(|choice| cost(choice)).max());
            let keys: Option<Vec<&Key>> = best.map(|choices| choices.into_iter().flatten().collect());
            let Some(keys) = keys.filter(|keys| keys.iter().all(|key| index.lookups.takes(key))) else {
                rest.push(number);
                continue;
            };
            for key in keys {
                index.lookups.add(key);
                let members = buckets.entry(key.hash).or_default();
                if members.last().is_none_or(|last| last.0 != number) {
                    members.push((number, clauses, key.dimension));
                }
            }
        }
        index.rest = rest.into();
        index.buckets =
            buckets.into_iter().map(|(hash, members)| (hash, Bucket::of(members, done))).collect();
        index.lookups.sort();
        index
    }

    /// Shows the numbers of all rules that could match, some of them more than once: list by list, each in ascending order, the rest
    /// of one of its lists left out where `goes_on` says no.
    pub(super) fn visit(&self, facts: &Facts<'_>, goes_on: &mut impl FnMut(u32) -> bool) {
        if !self.buckets.is_empty() {
            self.lookups.each(facts, &mut |hash| match self.buckets.get(&hash) {
                Some(Bucket::Few(numbers)) => visit_list(numbers, goes_on),
                Some(Bucket::Many(index)) => index.visit(facts, goes_on),
                None => {}
            });
        }
        visit_list(&self.rest, goes_on);
    }
}

/// What is found by one key: numbers and clauses of rules, and what the key is of.
type Members<'r> = Vec<(u32, &'r [Clause], Dimension)>;

fn visit_list(numbers: &[u32], goes_on: &mut impl FnMut(u32) -> bool) {
    _ = numbers.iter().all(|number| goes_on(*number));
}

impl Bucket {
    fn of(members: Members<'_>, done: &[Dimension]) -> Self {
        let numbers = || members.iter().map(|(number, ..)| *number).collect();
        if members.len() <= FEW {
            return Self::Few(numbers());
        }
        let mut done = done.to_vec();
        // Nearly always one: two dimensions have one hash by chance.
        done.extend(members.iter().map(|(.., dimension)| *dimension));
        done.sort_unstable();
        done.dedup();
        let rules: Vec<_> = members.iter().map(|(number, clauses, _)| (*number, *clauses)).collect();
        let index = Index::of(&rules, &done);
        let most = index.buckets.values().map(Self::len).max().unwrap_or_default();
        let is_divided = index.rest.len() + most <= rules.len() / 2;
        if is_divided { Self::Many(Box::new(index)) } else { Self::Few(numbers()) }
    }

    /// How many rules are found by it.
    fn len(&self) -> usize {
        match self {
            Self::Few(numbers) => numbers.len(),
            Self::Many(index) => index.buckets.values().map(Self::len).sum::<usize>() + index.rest.len(),
        }
    }
}

impl Lookups {
    /// Whether a key can be looked for.
    fn takes(&self, key: &Key) -> bool {
        let header = key.header.as_ref();
        header.is_none_or(|name| self.headers.len() < MOST_HEADERS || self.headers.contains(name))
    }

    fn add(&mut self, key: &Key) {
        match (key.dimension, key.part) {
            (Dimension::ServiceAccount, _) => self.accounts = true,
            (Dimension::Port, _) => self.ports = true,
            // Of which family it is is not worth knowing.
            (Dimension::Address, Part::Start(bits)) => {
                insert(&mut self.v6, bits);
                if bits <= 32 {
                    insert(&mut self.v4, bits);
                }
            }
            (Dimension::Header, _) => {
                let new = key.header.as_ref().filter(|name| !self.headers.contains(name));
                self.headers.extend(new.cloned());
            }
            (dimension, part) => {
                let place = self.texts.iter().position(|text| text.dimension == dimension);
                let place = place.unwrap_or_else(|| {
                    self.texts.push(TextLookup {
                        dimension,
                        whole: None,
                        starts: Vec::new(),
                        ends: Vec::new(),
                    });
                    self.texts.len() - 1
                });
                self.texts[place].add(part);
            }
        }
    }

    fn sort(&mut self) {
        self.texts.sort_by_key(|text| text.dimension);
    }

    /// The keys that the facts have.
    fn each(&self, facts: &Facts<'_>, found: &mut impl FnMut(u64)) {
        let connection = &facts.connection;
        if self.accounts
            && let Some(identity) = connection.identity
        {
            let (namespace, name) = (identity.namespace().bytes(), identity.service_account().bytes());
            found(hash(Dimension::ServiceAccount, namespace.chain([b'/']).chain(name)));
        }
        let address = connection.address.to_canonical();
        let lengths = if matches!(address, IpAddr::V4(_)) { &self.v4 } else { &self.v6 };
        lengths.iter().for_each(|bits| found(of_network(address, *bits)));
        if self.ports {
            found(hash(Dimension::Port, connection.port.to_be_bytes()));
        }
        for text in &self.texts {
            if let Some(value) = text.dimension.text_of(facts) {
                text.each(value, found);
            }
        }
        let Some(request) = &facts.request else { return };
        for name in &self.headers {
            for line in request.headers.get_all(name) {
                found(of_header_line(name, line.as_bytes()));
            }
        }
    }
}

impl Dimension {
    /// The text of the facts that is looked at, if it is one.
    fn text_of<'f>(self, facts: &Facts<'f>) -> Option<&'f str> {
        let (identity, request) = (facts.connection.identity, facts.request);
        match self {
            Self::Identity => identity.map(|identity| identity.as_str()),
            Self::Namespace => identity.map(|identity| identity.namespace()),
            Self::TrustDomain => identity.map(|identity| identity.trust_domain()),
            Self::Path => request.map(|request| request.path),
            Self::Method => request.map(|request| request.method.as_str()),
            Self::Host => request.and_then(|request| request.host).map(|host| host_and_port(host).0),
            Self::ServiceAccount | Self::Address | Self::Header | Self::Port => None,
        }
    }
}

impl TextLookup {
    fn add(&mut self, part: Part) {
        match part {
            Part::Whole(length) => self.whole = self.whole.max(Some(length)),
            Part::Start(length) => insert(&mut self.starts, length),
            Part::End(length) => insert(&mut self.ends, length),
        }
    }

    fn each(&self, text: &str, found: &mut impl FnMut(u64)) {
        // Rules have hosts in lower case; of what else is looked for, case tells it apart.
        let ignores_case = self.dimension == Dimension::Host;
        let byte = |byte: &u8| if ignores_case { byte.to_ascii_lowercase() } else { *byte };
        let whole = self.whole.is_some_and(|longest| text.len() <= longest);
        let mut lengths = self.starts.iter().filter(|length| **length <= text.len()).peekable();
        if whole || lengths.peek().is_some() {
            let mut hasher = begin(self.dimension);
            for (length, own) in (1..).zip(text.as_bytes()) {
                hasher.write_u8(byte(own));
                if lengths.next_if_eq(&&length).is_some() {
                    found(hasher.finish());
                } else if !whole && lengths.peek().is_none() {
                    break;
                }
            }
            if whole {
                found(hasher.finish());
            }
        }
        let mut lengths = self.ends.iter().filter(|length| **length <= text.len()).peekable();
        let mut hasher = begin(self.dimension);
        for (length, own) in (1..).zip(text.as_bytes().iter().rev()) {
            if lengths.peek().is_none() {
                break;
            }
            hasher.write_u8(byte(own));
            if lengths.next_if_eq(&&length).is_some() {
                found(hasher.finish());
            }
        }
    }
}

fn insert(lengths: &mut Vec<usize>, length: usize) {
    if let Err(place) = lengths.binary_search(&length) {
        lengths.insert(place, length);
    }
}

/// What is hashed is a hash.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }
}

//! Which rules of many could match: those that share a key with the facts, and the few that have none.
//!
//! Each rule is kept by one of its clauses, and of each of its entries by the one choice that the fewest other rules are found by. What
//! many are found by even so is an index itself, by what is left. So what a look costs is a matter of how many rules resemble the
//! request, and of how many different lengths of prefixes, suffixes and networks there are; never of how many rules there are.
//!
//! A copy shares all that is not changed in it, so that one of many rules that comes or goes costs no more than one of few.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderName;
use imbl::GenericHashMap;
use imbl::shared_ptr::DefaultSharedPtr;

use super::facts::{Facts, host_and_port};
use super::keys::{Choice, Clause, Dimension, Key, Part, begin, hash, of_header_line, of_network};
use super::members::{Members, Place};

/// So many rules are looked at one after the other.
const FEW: usize = 4;

/// What is found by more keys than this is not divided further: each of these would be divided on its own.
const MOST_KEYS_WITHIN: usize = 8;

/// More headers than this are not looked for.
const MOST_HEADERS: usize = 16;

/// The places of rules, by keys.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    buckets: ByHash<Bucket>,
    /// How many rules could be found by each key.
    found_by: ByHash<usize>,
    lookups: Lookups,
    /// What has no key. Ascending.
    rest: List,
    /// What has been looked at before: all of its rules are found by that.
    done: Vec<Dimension>,
    /// How many places are in all of its lists.
    len: usize,
}

type ByHash<T> = GenericHashMap<u64, T, BuildHasherDefault<AsItIs>, DefaultSharedPtr>;

/// Places of rules, ascending.
type List = Arc<[Place]>;

#[derive(Clone, Debug)]
enum Bucket {
    /// One after the other.
    Few(List),
    Many(Arc<Index>),
}

/// The rules that are in an index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Indexed<'m> {
    pub(super) members: &'m Members,
    /// Whether what is known of requests counts.
    pub(super) has_requests: bool,
}

/// What has to be looked for. Whatever goes leaves what was looked for on its account.
#[derive(Clone, Debug, Default)]
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
#[derive(Clone, Debug)]
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
    /// Indexes rules by these clauses; they come in order.
    pub(super) fn new(rules: Vec<(Place, Vec<Clause>)>) -> Self {
        let rules: Vec<_> = rules.iter().map(|(place, clauses)| (*place, &**clauses)).collect();
        Self::of(&rules, Vec::new())
    }

    /// Leaves out what has been looked at: the rules are those that were found by it.
    fn of(rules: &[(Place, &[Clause])], done: Vec<Dimension>) -> Self {
        let mut index = Self { done, ..Self::default() };
        let mut found_by: HashMap<u64, usize, BuildHasherDefault<AsItIs>> = HashMap::default();
        for key in rules.iter().flat_map(|(_, clauses)| index.usable(clauses)) {
            *found_by.entry(key.hash).or_default() += 1;
        }
        index.found_by = found_by.into_iter().collect();
        let mut buckets: HashMap<u64, Vec<Member<'_>>, BuildHasherDefault<AsItIs>> = HashMap::default();
        let mut rest = Vec::new();
        for &(place, clauses) in rules {
            let Some(keys) = index.keys(clauses) else {
                rest.push(place);
                continue;
            };
            for key in keys {
                index.lookups.add(key);
                let members = buckets.entry(key.hash).or_default();
                if members.last().is_none_or(|last| last.place != place) {
                    members.push(Member { place, clauses, dimension: key.dimension });
                }
            }
        }
        index.lookups.sort();
        index.rest = rest.into();
        let buckets = buckets.into_iter().map(|(hash, members)| (hash, Bucket::of(&members, &index.done)));
        index.buckets = buckets.collect();
        index.len = index.rest.len() + index.buckets.values().map(Bucket::len).sum::<usize>();
        index
    }

    /// Adds a rule that has these clauses to the others.
    pub(super) fn add(&mut self, place: Place, clauses: &[Clause], others: &Indexed<'_>) {
        let usable: Vec<u64> = self.usable(clauses).map(|key| key.hash).collect();
        usable.into_iter().for_each(|hash| *self.found_by.entry(hash).or_default() += 1);
        let Some(keys) = self.keys(clauses) else {
            self.len += insert_into(&mut self.rest, place, others);
            return;
        };
        for key in keys {
            self.lookups.add(key);
            let bucket = self.buckets.entry(key.hash).or_insert_with(|| Bucket::Few(List::default()));
            let before = bucket.len();
            bucket.add((place, clauses), (key.dimension, &self.done), others);
            self.len = self.len + bucket.len() - before;
        }
        self.lookups.sort();
    }

    /// Takes the rule out, which is there and has these clauses.
    pub(super) fn take_out(&mut self, place: Place, clauses: &[Clause]) {
        let usable: Vec<u64> = self.usable(clauses).map(|key| key.hash).collect();
        for hash in usable {
            match self.found_by.get_mut(&hash) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.found_by.remove(&hash)),
            }
        }
        self.len -= take_out_of(&mut self.rest, place);
        // By which of its keys it is found depends on what else there was when it came.
        for key in clauses.iter().flatten().flatten().flatten() {
            let Some(bucket) = self.buckets.get(&key.hash).filter(|bucket| bucket.has(place, clauses)) else {
                continue;
            };
            let mut bucket = bucket.clone();
            self.len -= bucket.len();
            bucket.take_out(place, clauses);
            self.len += bucket.len();
            match bucket.len() {
                0 => drop(self.buckets.remove(&key.hash)),
                _ => drop(self.buckets.insert(key.hash, bucket)),
            }
        }
    }

    fn has(&self, place: Place, clauses: &[Clause]) -> bool {
        let mut keys = clauses.iter().flatten().flatten().flatten();
        let is_in = |key: &Key| self.buckets.get(&key.hash).is_some_and(|bucket| bucket.has(place, clauses));
        self.rest.contains(&place) || keys.any(is_in)
    }

    /// The keys by which the rule is to be found: those of the clause that the fewest are found by. None where it has none.
    fn keys<'c>(&self, clauses: &'c [Clause]) -> Option<Vec<&'c Key>> {
        let cost = |choice: &Choice| {
            let most = choice.iter().map(|key| self.found_by.get(&key.hash)).max();
            (most, choice.first().map(|key| key.dimension))
        };
        let keyed = clauses.iter().filter_map(|clause| {
            let choices = clause.iter().map(|entry| entry.iter().filter(|choice| self.is_usable(choice)));
            let best = choices.map(|choices| choices.min_by_key(|choice| cost(choice)));
            best.collect::<Option<Vec<&Choice>>>()
        });
        let best = keyed.min_by_key(|choices| choices.iter().map(|choice| cost(choice)).max());
        let keys: Vec<&Key> = best?.into_iter().flatten().collect();
        keys.iter().all(|key| self.lookups.takes(key)).then_some(keys)
    }

    /// All keys by which it could be found.
    fn usable<'c>(&self, clauses: &'c [Clause]) -> impl Iterator<Item = &'c Key> {
        clauses.iter().flatten().flatten().filter(|choice| self.is_usable(choice)).flatten()
    }

    fn is_usable(&self, choice: &Choice) -> bool {
        let is_new = choice.iter().all(|key| !self.done.contains(&key.dimension));
        is_new && (self.done.is_empty() || choice.len() <= MOST_KEYS_WITHIN)
    }

    /// Shows the places of all rules that could match, some of them more than once: list by list, each in ascending order, the rest
    /// of one of its lists left out where `goes_on` says no.
    pub(super) fn visit(&self, facts: &Facts<'_>, goes_on: &mut impl FnMut(Place) -> bool) {
        if !self.buckets.is_empty() {
            self.lookups.each(facts, &mut |hash| match self.buckets.get(&hash) {
                Some(Bucket::Few(places)) => visit_list(places, goes_on),
                Some(Bucket::Many(index)) => index.visit(facts, goes_on),
                None => {}
            });
        }
        visit_list(&self.rest, goes_on);
    }
}

/// What is found by one key: a rule with its clauses, and what the key is of.
#[derive(Clone, Copy)]
struct Member<'r> {
    place: Place,
    clauses: &'r [Clause],
    dimension: Dimension,
}

fn visit_list(places: &[Place], goes_on: &mut impl FnMut(Place) -> bool) {
    _ = places.iter().all(|place| goes_on(*place));
}

/// How many that makes more.
fn insert_into(list: &mut List, place: Place, others: &Indexed<'_>) -> usize {
    let order = |place: &Place| others.members.order(*place);
    let Err(at) = list.binary_search_by_key(&order(&place), order) else { return 0 };
    *list = list[..at].iter().copied().chain([place]).chain(list[at..].iter().copied()).collect();
    1
}

/// How many that makes less.
fn take_out_of(list: &mut List, place: Place) -> usize {
    let Some(at) = list.iter().position(|own| *own == place) else { return 0 };
    *list = list[..at].iter().chain(&list[at + 1..]).copied().collect();
    1
}

impl Bucket {
    fn of(members: &[Member<'_>], done: &[Dimension]) -> Self {
        let places = || members.iter().map(|member| member.place).collect();
        if members.len() <= FEW {
            return Self::Few(places());
        }
        let mut done = done.to_vec();
        // Nearly always one: two dimensions have one hash by chance.
        done.extend(members.iter().map(|member| member.dimension));
        done.sort_unstable();
        done.dedup();
        let rules: Vec<_> = members.iter().map(|member| (member.place, member.clauses)).collect();
        let index = Index::of(&rules, done);
        let most = index.buckets.values().map(Self::len).max().unwrap_or_default();
        let is_divided = index.rest.len() + most <= rules.len() / 2;
        if is_divided { Self::Many(Arc::new(index)) } else { Self::Few(places()) }
    }

    /// Adds a rule that is found by a key of this dimension, as the others are.
    fn add(
        &mut self,
        (place, clauses): (Place, &[Clause]),
        (dimension, done): (Dimension, &[Dimension]),
        others: &Indexed<'_>,
    ) {
        match self {
            Self::Many(index) => Arc::make_mut(index).add(place, clauses, others),
            Self::Few(list) => {
                let added = insert_into(list, place, others);
                // Whether they can be told apart is found out by all of them.
                if added == 1 && list.len() > FEW && list.len().is_power_of_two() {
                    let rules: Vec<_> = list.iter().map(|place| (*place, others.clauses(*place))).collect();
                    let members: Vec<_> = rules
                        .iter()
                        .map(|(place, clauses)| Member { place: *place, clauses, dimension })
                        .collect();
                    *self = Self::of(&members, done);
                }
            }
        }
    }

    fn take_out(&mut self, place: Place, clauses: &[Clause]) {
        match self {
            Self::Many(index) => Arc::make_mut(index).take_out(place, clauses),
            Self::Few(list) => _ = take_out_of(list, place),
        }
    }

    fn has(&self, place: Place, clauses: &[Clause]) -> bool {
        match self {
            Self::Many(index) => index.has(place, clauses),
            Self::Few(list) => list.contains(&place),
        }
    }

    /// How many rules are found by it.
    fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many(index) => index.len,
        }
    }
}

impl Indexed<'_> {
    fn clauses(&self, place: Place) -> Vec<Clause> {
        self.members.get(place).map(|entry| entry.clauses(self.has_requests)).unwrap_or_default()
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
        let whole = self.whole.is_some_and(|longest| text.len() <= longest);
        let mut lengths = self.starts.iter().filter(|length| **length <= text.len()).peekable();
        if whole || lengths.peek().is_some() {
            let mut hasher = begin(self.dimension);
            for (length, own) in (1..).zip(text.as_bytes()) {
                hasher.write_u8(self.dimension.folded(*own));
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
            hasher.write_u8(self.dimension.folded(*own));
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

//! Rules in the order of their precedence, and an index that finds the first that fits without asking them all.

mod hidden;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;

use super::hostname::{Hostname, comparable};
use super::matching::{Match, PathMatch, RequestHead, ends_segment, grpc_method};
use super::{RouteRef, Rule};
use crate::model::Name;

/// The rules of one port for one audience, indexed.
///
/// The first of several that fit is the one with, each deciding where those before it leave a tie:
///
/// 1. the more specific hostname: the longest exact one, then the longest wildcard, then none;
/// 2. the more specific path: an exact one, then a pattern (the longer first; the Gateway API leaves this place open), then
///    the longest prefix. The method of gRPC without its service comes before the prefix of all paths;
/// 3. a method;
/// 4. more headers;
/// 5. more parameters of the query;
/// 6. the older route;
/// 7. the route whose `namespace/name` is first in the alphabet;
/// 8. the place of its rule in the route, and of the match in the rule.
///
/// For gRPC this is the order that GRPCRoute asks for: services and methods are the segments of a path.
///
/// Rules with one path are tried one after the other, and so are patterns; beyond that the cost depends on how many
/// different *lengths* of prefixes and wildcards there are, not on how many rules.
#[derive(Clone, Debug)]
pub struct HttpTable {
    /// In the order of precedence.
    entries: Vec<Entry>,
    exact_hosts: HashMap<Name, Paths>,
    wildcard_hosts: ByLength<Paths>,
    any_host: Paths,
}

/// A route, as the table takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteRules {
    /// The hosts that it is for; empty for all.
    pub hostnames: Vec<Hostname>,
    /// When it was made. One that does not say is younger than all that do.
    pub created: Option<Timestamp>,
    /// The rules, each with the ways that lead to it: any of them does. A rule without one is reached by nobody.
    pub rules: Vec<(Vec<Match>, Arc<Rule>)>,
}

/// What [`HttpTable::find`] found.
#[derive(Clone, Copy, Debug)]
pub struct Matched<'t> {
    /// The rule that the request goes by.
    pub rule: &'t Arc<Rule>,
    /// The prefix that the path matched, without a `/` at its end (`/` where it is the prefix of all paths); None where it
    /// matched something else than a prefix.
    pub prefix: Option<&'t str>,
}

/// One way to a rule.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    hostname: Option<Hostname>,
    matches: Match,
    created: Option<Timestamp>,
    rule: Arc<Rule>,
}

/// The entries of one hostname by their paths. Numbers are places in [`HttpTable::entries`], ascending, hence in the order of
/// precedence.
#[derive(Clone, Debug, Default)]
struct Paths {
    exact: HashMap<Name, Vec<u32>>,
    patterns: Vec<u32>,
    /// All but the empty prefix.
    prefixes: ByLength<Vec<u32>>,
    grpc_methods: HashMap<Name, Vec<u32>>,
    /// With the empty prefix.
    every: Vec<u32>,
}

/// Values by texts that are found as parts of another text, and the lengths that these have: a part of another length need
/// not be looked for. So a path of a thousand segments costs no more than it must.
#[derive(Clone, Debug)]
struct ByLength<T> {
    values: HashMap<Name, T>,
    /// Descending.
    lengths: Vec<usize>,
}

impl HttpTable {
    /// Indexes the rules of these routes, whatever order they come in.
    pub fn new(routes: impl IntoIterator<Item = RouteRules>) -> Self {
        let mut entries: Vec<Entry> = routes.into_iter().flat_map(entries_of).collect();
        // Stable: what is equal by rank stays in the order of the matches.
        entries.sort_by(|a, b| {
            let by_route = || name_of(a).cmp(name_of(b)).then(a.rule.route.kind.cmp(&b.rule.route.kind));
            a.rank().cmp(&b.rank()).then_with(by_route).then(a.rule.index.cmp(&b.rule.index))
        });
        let mut table = Self {
            exact_hosts: HashMap::new(),
            wildcard_hosts: ByLength::default(),
            any_host: Paths::default(),
            entries: Vec::new(),
        };
        for (place, entry) in (0..).zip(&entries) {
            let paths = match &entry.hostname {
                Some(Hostname::Exact(name)) => table.exact_hosts.entry(name.clone()).or_default(),
                Some(Hostname::Wildcard(suffix)) => table.wildcard_hosts.entry(suffix),
                None => &mut table.any_host,
            };
            paths.add(&entry.matches.path, place);
        }
        table.entries = entries;
        table
    }

    /// The rule that the request goes by. None where none fits, which is answered with 404.
    pub fn find(&self, request: &RequestHead<'_>) -> Option<Matched<'_>> {
        self.search(request, &mut 0)
    }

    /// How many ways lead to its rules.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no request finds anything.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The rules in the order of precedence; one that several ways lead to comes several times.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.entries.iter().map(|entry| &entry.rule)
    }

    /// The routes that the rules are of.
    pub fn routes(&self) -> impl Iterator<Item = &RouteRef> {
        self.rules().map(|rule| &rule.route)
    }

    /// Adds to `steps` how often something was looked up or compared.
    fn search(&self, request: &RequestHead<'_>, steps: &mut usize) -> Option<Matched<'_>> {
        let mut fits = |entries: &Paths| self.first_of(entries, request, steps);
        if !self.exact_hosts.is_empty() || !self.wildcard_hosts.values.is_empty() {
            let host = comparable(request.host);
            if let Some(found) = self.exact_hosts.get(&*host).and_then(&mut fits) {
                return Some(found);
            }
            for &length in &self.wildcard_hosts.lengths {
                // Of the host itself, which has something before the suffix.
                let start = host.len().checked_sub(length).filter(|&start| start > 0);
                let suffix = start.and_then(|start| host.get(start..));
                let paths = suffix.and_then(|suffix| self.wildcard_hosts.values.get(suffix));
                if let Some(found) = paths.and_then(&mut fits) {
                    return Some(found);
                }
            }
        }
        fits(&self.any_host)
    }

    fn first_of(&self, paths: &Paths, request: &RequestHead<'_>, steps: &mut usize) -> Option<Matched<'_>> {
        let path = request.path;
        let of_path = |places: &[u32], steps: &mut usize| {
            *steps += 1;
            places.iter().map(|&place| &self.entries[place as usize]).find(|entry| {
                *steps += 1;
                entry.matches.matches_beside_path(request)
            })
        };
        if let Some(entry) = paths.exact.get(path).and_then(|places| of_path(places, steps)) {
            return Some(entry.matched());
        }
        let by_pattern = paths.patterns.iter().map(|&place| &self.entries[place as usize]).find(|entry| {
            *steps += 1;
            entry.matches.matches(request)
        });
        if let Some(entry) = by_pattern {
            return Some(entry.matched());
        }
        for &length in &paths.prefixes.lengths {
            *steps += 1;
            let prefix = path.get(..length).filter(|_| ends_segment(path, length));
            let places = prefix.and_then(|prefix| paths.prefixes.values.get(prefix));
            if let Some(entry) = places.and_then(|places| of_path(places, steps)) {
                return Some(entry.matched());
            }
        }
        let method = grpc_method(path).filter(|_| !paths.grpc_methods.is_empty());
        let by_method = method.and_then(|method| paths.grpc_methods.get(method));
        by_method
            .and_then(|places| of_path(places, steps))
            .or_else(|| of_path(&paths.every, steps))
            .map(Entry::matched)
    }
}

/// The index follows from the entries.
impl PartialEq for HttpTable {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

fn entries_of(route: RouteRules) -> impl Iterator<Item = Entry> {
    let RouteRules { hostnames, created, rules } = route;
    let hostnames: Vec<Option<Hostname>> =
        if hostnames.is_empty() { vec![None] } else { hostnames.into_iter().map(Some).collect() };
    rules.into_iter().flat_map(move |(matches, rule)| {
        let hostnames = hostnames.clone();
        matches.into_iter().flat_map(move |matches| {
            let rule = rule.clone();
            hostnames.clone().into_iter().map(move |hostname| Entry {
                hostname,
                matches: matches.clone(),
                created,
                rule: rule.clone(),
            })
        })
    })
}

/// `namespace/name` as one text, in which `a-b/c` comes before `a/c`.
fn name_of(entry: &Entry) -> impl Iterator<Item = u8> + '_ {
    let id = &entry.rule.route.id;
    id.namespace.bytes().chain([b'/']).chain(id.name.bytes())
}

impl Entry {
    /// The order of precedence up to the route's age, see [`HttpTable`].
    fn rank(&self) -> impl Ord + '_ {
        let Match { path, method, headers, query } = &self.matches;
        let hostname = self.hostname.as_ref().map_or((u8::MAX, Reverse(0)), Hostname::rank);
        let path = match path {
            PathMatch::Exact(path) => (0, Reverse(path.len())),
            PathMatch::Regex(pattern) => (1, Reverse(pattern.as_str().len())),
            PathMatch::Prefix(prefix) if !prefix.is_empty() => (2, Reverse(prefix.len())),
            PathMatch::GrpcMethod(method) => (3, Reverse(method.len())),
            PathMatch::Prefix(_) => (4, Reverse(0)),
        };
        let age = (self.created.is_none(), self.created);
        let counts = (method.is_none(), Reverse(headers.len()), Reverse(query.len()));
        (hostname, path, counts, age)
    }

    fn matched(&self) -> Matched<'_> {
        let prefix = match &self.matches.path {
            PathMatch::Prefix(prefix) if prefix.is_empty() => Some("/"),
            PathMatch::Prefix(prefix) => Some(&**prefix),
            _ => None,
        };
        Matched { rule: &self.rule, prefix }
    }
}

impl Paths {
    fn add(&mut self, path: &PathMatch, place: u32) {
        let places = match path {
            PathMatch::Exact(path) => self.exact.entry(path.clone()).or_default(),
            PathMatch::Regex(_) => &mut self.patterns,
            PathMatch::Prefix(prefix) if prefix.is_empty() => &mut self.every,
            PathMatch::Prefix(prefix) => self.prefixes.entry(prefix),
            PathMatch::GrpcMethod(method) => self.grpc_methods.entry(method.clone()).or_default(),
        };
        places.push(place);
    }
}

impl<T> Default for ByLength<T> {
    fn default() -> Self {
        Self { values: HashMap::new(), lengths: Vec::new() }
    }
}

impl<T: Default> ByLength<T> {
    fn entry(&mut self, text: &Name) -> &mut T {
        if let Err(place) = self.lengths.binary_search_by(|length| text.len().cmp(length)) {
            self.lengths.insert(place, text.len());
        }
        self.values.entry(text.clone()).or_default()
    }
}

//! Rules that no request gets to, for an earlier one takes all that they match.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::{Hostname, PathMatch, Rule};
use super::{Entry, HttpTable};

impl HttpTable {
    /// Rules that are never found, each with the first of those that are found instead. Patterns are not looked into.
    pub fn hidden(&self) -> Vec<(&Arc<Rule>, &Arc<Rule>)> {
        // What comes earlier is no less specific, so only the same host and path can take all of another.
        let mut earlier: HashMap<_, Vec<&Entry>> = HashMap::new();
        let mut rules: Vec<(&Arc<Rule>, Option<&Arc<Rule>>)> = Vec::new();
        let mut places: HashMap<*const Rule, usize> = HashMap::new();
        for entry in &self.entries {
            let alike = earlier.entry(entry.host_and_path()).or_default();
            let hider = alike.iter().find(|it| !Arc::ptr_eq(&it.rule, &entry.rule) && it.takes_all_of(entry));
            let hider = hider.map(|it| &it.rule);
            match places.get(&Arc::as_ptr(&entry.rule)) {
                // One way that is open is enough.
                Some(&place) if hider.is_none() => rules[place].1 = None,
                Some(_) => {}
                None => {
                    places.insert(Arc::as_ptr(&entry.rule), rules.len());
                    rules.push((&entry.rule, hider));
                }
            }
            alike.push(entry);
        }
        rules.into_iter().filter_map(|(rule, hider)| Some((rule, hider?))).collect()
    }
}

impl Entry {
    fn host_and_path(&self) -> (Option<&Hostname>, u8, &str) {
        let (kind, path) = match &self.matches.path {
            PathMatch::Exact(path) => (0, &**path),
            PathMatch::Prefix(prefix) => (1, &**prefix),
            PathMatch::GrpcMethod(method) => (2, &**method),
            PathMatch::Regex(pattern) => (3, pattern.as_str()),
        };
        (self.hostname.as_ref(), kind, path)
    }

    /// Whether it matches whatever the other one does, where host and path are the same.
    fn takes_all_of(&self, other: &Self) -> bool {
        let (own, others) = (&self.matches, &other.matches);
        (own.method.is_none() || own.method == others.method)
            && own.headers.iter().all(|header| others.headers.contains(header))
            && own.query.iter().all(|parameter| others.query.contains(parameter))
    }
}

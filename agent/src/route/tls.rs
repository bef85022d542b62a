//! The rules for connections of TLS that nobody opens: by the name that the client asks for.

use std::sync::Arc;

use http::{HeaderMap, Method};

use super::{HttpTable, RequestHead, RouteRules, Rule};

/// The rules of one port for one audience, by the server name of a ClientHello (SNI). Names have the precedence that hosts have
/// in an [`HttpTable`], and are found as there.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsTable(HttpTable);

impl TlsTable {
    /// Indexes the rules of these routes, whatever order they come in. Matches beside the hostnames are not looked at.
    pub fn new(routes: impl IntoIterator<Item = RouteRules>) -> Self {
        Self(HttpTable::new(routes))
    }

    /// The rule for the server that the client asks for, if it says so. None where there is none: the connection is closed.
    pub fn find(&self, server_name: Option<&str>) -> Option<&Arc<Rule>> {
        let (method, host, path) = (&Method::CONNECT, server_name.unwrap_or_default(), "/");
        let request = RequestHead { method, host, path, query: None, headers: &HeaderMap::new() };
        self.0.find(&request).map(|found| found.rule)
    }

    /// The rules in the order of precedence; one for several names comes several times.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.0.rules()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Filters, Hostname, Match, RouteKind, RouteRef, Timeouts};
    use super::*;
    use crate::model::ObjectRef;

    #[test]
    fn by_server_name() {
        let route = |name: &str, hostnames: &[&str]| RouteRules {
            hostnames: hostnames.iter().map(|text| Hostname::parse(text).unwrap()).collect(),
            created: None,
            rules: vec![(
                vec![Match::default()],
                Arc::new(Rule {
                    route: RouteRef { kind: RouteKind::Tls, id: ObjectRef::new("shop", name) },
                    name: None,
                    index: 0,
                    filters: Filters::default(),
                    backends: Vec::new(),
                    timeouts: Timeouts::default(),
                    retry: None,
                    session: None,
                }),
            )],
        };
        let check = |table: &TlsTable, name: Option<&str>, expected: Option<&str>| {
            let found = table.find(name).map(|rule| &*rule.route.id.name);
            assert_eq!(found, expected, "{name:?}");
        };
        let named = [route("wild", &["*.shop.test"]), route("exact", &["a.shop.test", "b.test"])];
        let table = TlsTable::new(named.clone());
        check(&table, Some("A.shop.test"), Some("exact"));
        check(&table, Some("b.test"), Some("exact"));
        check(&table, Some("c.shop.test"), Some("wild"));
        check(&table, Some("shop.test"), None);
        check(&table, None, None);
        let table = TlsTable::new(named.into_iter().chain([route("any", &[])]));
        check(&table, Some("shop.test"), Some("any"));
        check(&table, None, Some("any"));
    }
}

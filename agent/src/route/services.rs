//! The routes of one Service: by port, and by who calls.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::{HttpTable, RouteKind, RouteRef, Rule, TlsTable};
use crate::model::Name;

/// All routes of one Service, by port and by who calls. Lives in the snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceRoutes {
    /// What is in force, by port and audience.
    pub ports: BTreeMap<(u16, Audience), PortRoutes>,
}

/// Whose requests a route is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Audience {
    /// Everybody's: the routes of the Service's own namespace (producer routes).
    Everybody,
    /// Those of the clients in this namespace, whose routes they are (consumer routes).
    Namespace(Name),
}

/// What one port has for one audience.
#[derive(Clone, Debug, PartialEq)]
pub struct PortRoutes {
    /// The kind of all of them.
    pub kind: RouteKind,
    /// Their rules.
    pub table: Table,
}

/// The rules of one port for one audience.
#[derive(Clone, Debug, PartialEq)]
pub enum Table {
    /// For the requests of HTTP and gRPC.
    Http(Arc<HttpTable>),
    /// For connections of TLS, by the name that the client asks for.
    Tls(Arc<TlsTable>),
    /// For every connection.
    Tcp(Arc<Rule>),
}

impl Audience {
    /// The namespace of the clients, where not all are meant.
    pub fn namespace(&self) -> Option<&Name> {
        match self {
            Self::Everybody => None,
            Self::Namespace(namespace) => Some(namespace),
        }
    }
}

impl ServiceRoutes {
    /// The rules for requests of this namespace to this port, None where no route of HTTP or gRPC says anything: then, unless
    /// one of the other kinds does, a request goes to the Service's own endpoints. Consumer routes of the client's namespace
    /// take the place of all producer routes: what none of their rules fits is answered with 404 and does not go on to those of
    /// the producer (GEP-1294).
    pub fn http(&self, port: u16, client_namespace: &str) -> Option<&Arc<HttpTable>> {
        match &self.of_port(port, client_namespace)?.table {
            Table::Http(table) => Some(table),
            _ => None,
        }
    }

    /// The rules for connections of TLS, likewise.
    pub fn tls(&self, port: u16, client_namespace: &str) -> Option<&Arc<TlsTable>> {
        match &self.of_port(port, client_namespace)?.table {
            Table::Tls(table) => Some(table),
            _ => None,
        }
    }

    /// The rule for all connections, likewise.
    pub fn tcp(&self, port: u16, client_namespace: &str) -> Option<&Arc<Rule>> {
        match &self.of_port(port, client_namespace)?.table {
            Table::Tcp(rule) => Some(rule),
            _ => None,
        }
    }

    /// What is in force for this namespace on this port. One kind of route at most: a consumer's TCPRoute takes the place of a
    /// producer's HTTPRoute, too.
    pub fn of_port(&self, port: u16, client_namespace: &str) -> Option<&PortRoutes> {
        // Most Services have producer routes alone, and these need no key to be made.
        let of_consumer = || {
            let after = (Bound::Excluded((port, Audience::Everybody)), Bound::Unbounded);
            let ((next, _), _) = self.ports.range(after).next()?;
            let key = (*next == port).then(|| (port, Audience::Namespace(client_namespace.into())))?;
            self.ports.get(&key)
        };
        of_consumer().or_else(|| self.ports.get(&(port, Audience::Everybody)))
    }

    /// The routes that are in force somewhere in it, each once.
    pub fn routes(&self) -> Vec<&RouteRef> {
        let rules = self.ports.values().flat_map(|port| port.table.rules());
        let mut routes: Vec<_> = rules.map(|rule| &rule.route).collect();
        routes.sort();
        routes.dedup();
        routes
    }
}

impl Table {
    /// The rules in the order of precedence; one that several ways lead to comes several times.
    pub fn rules(&self) -> Vec<&Arc<Rule>> {
        match self {
            Self::Http(table) => table.rules().collect(),
            Self::Tls(table) => table.rules().collect(),
            Self::Tcp(rule) => vec![rule],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumer_routes_take_the_place_of_producer_routes_for_their_namespace() {
        let mut routes = ServiceRoutes::default();
        let mut put = |port: u16, audience: Audience| {
            let table = Arc::new(HttpTable::new([]));
            let of_port = PortRoutes { kind: RouteKind::Http, table: Table::Http(table.clone()) };
            routes.ports.insert((port, audience), of_port);
            table
        };
        let everybody = put(80, Audience::Everybody);
        let bank = put(80, Audience::Namespace("bank".into()));
        let of_bank_alone = put(81, Audience::Namespace("bank".into()));
        let plain = put(79, Audience::Everybody);
        let check = |port: u16, namespace: &str, expected: Option<&Arc<HttpTable>>| {
            let found = routes.http(port, namespace);
            assert_eq!(found.map(Arc::as_ptr), expected.map(Arc::as_ptr), "{port} {namespace}");
        };
        check(80, "bank", Some(&bank));
        check(80, "shop", Some(&everybody));
        check(80, "", Some(&everybody));
        check(81, "bank", Some(&of_bank_alone));
        check(81, "shop", None);
        check(79, "bank", Some(&plain));
        check(82, "bank", None);
        assert!(routes.tls(80, "bank").is_none() && routes.tcp(80, "bank").is_none());
    }
}

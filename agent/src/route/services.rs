//! The routes of one Service: by port, and by who calls.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::{HttpTable, RouteKind, RouteRef};
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
    pub table: Arc<HttpTable>,
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
    /// The rules for requests of this namespace to this port, None where no route says anything: then a request goes to the
    /// Service's own endpoints. Consumer routes of the client's namespace take the place of all producer routes: what none
    /// of their rules fits is answered with 404 and does not go on to those of the producer (GEP-1294).
    pub fn http(&self, port: u16, client_namespace: &str) -> Option<&Arc<HttpTable>> {
        // Most Services have producer routes alone, and these need no key to be made.
        let of_consumer = || {
            let after = (Bound::Excluded((port, Audience::Everybody)), Bound::Unbounded);
            let ((next, _), _) = self.ports.range(after).next()?;
            let key = (*next == port).then(|| (port, Audience::Namespace(client_namespace.into())))?;
            self.ports.get(&key)
        };
        let routes = of_consumer().or_else(|| self.ports.get(&(port, Audience::Everybody)))?;
        Some(&routes.table)
    }

    /// The routes that are in force somewhere in it, each once.
    pub fn routes(&self) -> Vec<&RouteRef> {
        let mut routes: Vec<_> = self.ports.values().flat_map(|port| port.table.routes()).collect();
        routes.sort();
        routes.dedup();
        routes
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
            routes.ports.insert((port, audience), PortRoutes { kind: RouteKind::Http, table: table.clone() });
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
    }
}

//! ReferenceGrants: what the routes of other namespaces may refer to.

use std::cell::RefCell;

use serde::Deserialize;
use serde_json::Value;

use super::super::Problem;
use super::place::Place;
use super::{object_id, route};
use crate::model::{Name, ObjectRef};
use crate::route::RouteKind;

/// A ReferenceGrant, as far as it is of routes to Services.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceGrant {
    /// Namespace and name. What it grants is in its own namespace.
    pub id: ObjectRef,
    /// Who may refer: routes of this kind in this namespace.
    pub from: Vec<(RouteKind, Name)>,
    /// To what: the Service of this name, or all of them.
    pub to: Vec<Option<Name>>,
}

#[derive(Deserialize)]
struct Spec {
    from: Option<Vec<From>>,
    to: Option<Vec<To>>,
}

#[derive(Deserialize)]
struct From {
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Deserialize)]
struct To {
    group: String,
    kind: String,
    name: Option<String>,
}

impl ReferenceGrant {
    /// One that is written badly grants nothing: a grant that its author has tried to narrow must not stay as wide as it was.
    pub(super) fn read(object: &Value, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        let id = object_id(&route::metadata(object)?)?;
        let found = RefCell::new(Vec::new());
        let spec: Option<Spec> =
            Place::root(&found).key("spec").typed(object.get("spec").unwrap_or(&Value::Null));
        let mut found = found.into_inner();
        let is_good = found.is_empty();
        for problem in &mut found {
            problem.message.push_str("; the grant grants nothing until then");
        }
        problems.extend(found);
        let spec = spec.filter(|_| is_good).unwrap_or(Spec { from: None, to: None });
        let from = spec.from.into_iter().flatten().filter_map(|from| {
            let mut kinds = RouteKind::ALL.into_iter();
            let kind = kinds.find(|kind| from.group == route::GROUP && from.kind == kind.as_str());
            Some((kind?, from.namespace.into()))
        });
        let to = spec.to.into_iter().flatten().filter(|to| to.group.is_empty() && to.kind == "Service");
        let name = |to: To| to.name.filter(|name| !name.is_empty()).map(Name::from);
        Ok(Self { id, from: from.collect(), to: to.map(name).collect() })
    }

    /// Whether it lets routes of this kind and namespace refer to the Service of this name.
    pub fn allows(&self, kind: RouteKind, namespace: &str, service: &str) -> bool {
        let is_from = self.from.iter().any(|(from, of)| *from == kind && **of == *namespace);
        is_from && self.to.iter().any(|name| name.as_deref().is_none_or(|name| name == service))
    }
}

//! Namespaces: the marks that their pods inherit.

use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use super::super::Problem;
use super::{Marks, object_name};
use crate::model::Name;

/// A Namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: Name,
    /// What holds for its pods unless they say otherwise.
    pub marks: Marks,
}

impl Namespace {
    pub(super) fn read(object: &core::Namespace, problems: &mut Vec<Problem>) -> Result<Self, Problem> {
        Ok(Self { name: object_name(&object.metadata)?, marks: Marks::read(&object.metadata, problems) })
    }
}

//! Label selectors, as Kubernetes has them: `matchLabels` and `matchExpressions`, all of which must hold.

use std::collections::BTreeMap;

#[cfg(test)]
use schemars::JsonSchema;
use serde::Deserialize;

use super::place::Place;

/// The most labels, expressions and values of one.
pub(super) const MOST: usize = 64;

/// Which pods are meant, by their labels. Without requirements all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq)]
enum Requirement {
    /// `In`, and what `matchLabels` asks for.
    In(String, Vec<String>),
    /// `NotIn`, which holds without the label as well.
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

/// Pods by their labels: those with all of matchLabels and for which all of matchExpressions hold. At least one of the two.
#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Wire {
    /// Labels with their values.
    pub(super) match_labels: Option<BTreeMap<String, String>>,
    /// What else must hold of the labels.
    pub(super) match_expressions: Option<Vec<Expression>>,
}

#[derive(Clone, Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Expression {
    /// The label.
    pub(super) key: String,
    /// In: its value is one of these. NotIn: it is none of these, or there is no such label. Exists: there is such a label.
    /// DoesNotExist: there is none.
    pub(super) operator: String,
    /// For In and NotIn, and for nothing else.
    pub(super) values: Option<Vec<String>>,
}

impl Selector {
    /// Whether it means pods with these labels.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }

    /// A label that every pod that is meant has, with its value, if there is such a one: pods are looked up by it.
    pub fn label(&self) -> Option<(&str, &str)> {
        self.0.iter().find_map(|requirement| match requirement {
            Requirement::In(key, values) if values.len() == 1 => Some((key.as_str(), values[0].as_str())),
            _ => None,
        })
    }
}

impl Wire {
    /// What it selects; what is wrong with it goes to the place.
    pub(super) fn read(&self, place: &Place<'_>) -> Selector {
        let (labels, expressions) = (&self.match_labels, &self.match_expressions);
        let is_empty = |count: Option<usize>| count.is_none_or(|count| count == 0);
        if is_empty(labels.as_ref().map(BTreeMap::len)) && is_empty(expressions.as_ref().map(Vec::len)) {
            place.refuse("expected matchLabels or matchExpressions; without a selector all pods are meant");
        }
        let found = labels.as_ref().map_or(0, BTreeMap::len);
        if found > MOST {
            place.key("matchLabels").refuse(format!("expected {MOST} at most, found {found}"));
        }
        let labels = labels.iter().flatten();
        let of_labels = labels.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()]));
        let of_expressions = place.few("matchExpressions", expressions, MOST);
        let of_expressions = of_expressions.filter_map(|(place, expression)| requirement(expression, &place));
        Selector(of_labels.chain(of_expressions).collect())
    }
}

fn requirement(wire: &Expression, place: &Place<'_>) -> Option<Requirement> {
    let Expression { key, operator, values } = wire;
    _ = place.few("values", values, MOST);
    let (key, values) = (key.clone(), values.clone().unwrap_or_default());
    match (operator.as_str(), values.is_empty()) {
        ("In", false) => return Some(Requirement::In(key, values)),
        ("NotIn", false) => return Some(Requirement::NotIn(key, values)),
        ("Exists", true) => return Some(Requirement::Exists(key)),
        ("DoesNotExist", true) => return Some(Requirement::DoesNotExist(key)),
        ("In" | "NotIn", true) => place.key("values").refuse("expected values, which In and NotIn are about"),
        ("Exists" | "DoesNotExist", false) => {
            place.key("values").refuse("expected none but with In and NotIn")
        }
        (other, _) => place.key("operator").expected("In, NotIn, Exists or DoesNotExist", other),
    }
    None
}

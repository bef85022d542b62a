//! What the CustomResourceDefinitions of our own kinds have in common. For tests alone, for nothing of it is needed at run time: each
//! kind has a test that writes its file (`cargo xtask crds`), and without that fails where the file is another.
//!
//! What the API server refuses by them the readers refuse, too, for the directory has no API server.

use expect_test::ExpectFile;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::policy::GROUP;
use super::{Kind, selector};

/// RFC 9110, section 5.6.2.
pub(super) const HEADER: &str = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$";

/// What differs between our kinds.
pub(super) struct Definition {
    pub(super) kind: Kind,
    pub(super) plural: &'static str,
    pub(super) short: &'static str,
    /// Direct or Inherited: tools find policies by it (GEP-713).
    pub(super) policy: &'static str,
    pub(super) spec: Value,
    pub(super) status: Value,
    /// Name, type and path of each column but the age.
    pub(super) columns: &'static [(&'static str, &'static str, &'static str)],
}

/// The schema of a spec, as its type tells it.
pub(super) fn spec_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut spec = settings.into_generator().into_root_schema_for::<T>().to_value();
    make_structural(&mut spec);
    spec
}

/// What API servers want, which know no null beside a type, no title and no defaults that they should not fill in.
fn make_structural(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    for unwanted in ["title", "nullable", "default", "format"] {
        map.remove(unwanted);
    }
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(make_structural);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(items) = map.get_mut(key) {
            make_structural(items);
        }
    }
}

/// Adds to the schema of a field what its type does not tell; of the spec itself without a name.
pub(super) fn add(spec: &mut Value, field: &str, extra: Value) {
    let Value::Object(extra) = extra else { panic!("{extra}") };
    let schema = schema_of(spec, field).unwrap_or_else(|| panic!("there is no field {field}"));
    for (key, value) in extra {
        assert!(schema.insert(key.clone(), value).is_none(), "{field} has {key} already");
    }
}

fn schema_of<'a>(spec: &'a mut Value, field: &str) -> Option<&'a mut Map<String, Value>> {
    let mut schema = spec;
    for part in field.split('.').filter(|part| !part.is_empty()) {
        let name = part.trim_end_matches("[]");
        schema = schema.get_mut("properties")?.get_mut(name)?;
        if name != part {
            schema = schema.get_mut("items")?;
        }
    }
    schema.as_object_mut()
}

/// Has the API server keep what it does not know instead of dropping it: a rule that has lost a field matches more than it should.
/// Readers refuse it, and what cannot be read denies.
pub(super) fn keep_unknown(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(keep_unknown);
        map.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
    }
    if let Some(items) = map.get_mut("items") {
        keep_unknown(items);
    }
}

/// What must hold of a field beside its type, in CEL.
pub(super) fn rule(rule: &str, message: &str) -> Value {
    json!({ "x-kubernetes-validations": [{ "rule": rule, "message": message }] })
}

/// A text with something in it.
pub(super) fn name(most: usize) -> Value {
    json!({ "minLength": 1, "maxLength": most })
}

/// A list that is written as a whole.
pub(super) fn list(least: usize, most: usize) -> Value {
    match least {
        0 => json!({ "maxItems": most, "x-kubernetes-list-type": "atomic" }),
        _ => json!({ "minItems": least, "maxItems": most, "x-kubernetes-list-type": "atomic" }),
    }
}

/// Adds what the type of a label selector does not tell.
pub(super) fn add_selector(spec: &mut Value, field: &str) {
    let label = json!({ "type": "string", "maxLength": 63 });
    add(spec, field, json!({ "minProperties": 1 }));
    let labels = json!({ "maxProperties": selector::MOST, "additionalProperties": label });
    let matching = format!("{field}.matchLabels");
    schema_of(spec, &matching).unwrap_or_else(|| panic!("no {matching}")).remove("additionalProperties");
    add(spec, &matching, labels);
    let expressions = format!("{field}.matchExpressions");
    add(spec, &expressions, list(0, selector::MOST));
    let takes_values = "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)";
    add(
        spec,
        &format!("{expressions}[]"),
        rule(takes_values, "values are for In and NotIn, which need them"),
    );
    add(spec, &format!("{expressions}[].key"), name(317));
    let operators = json!({ "enum": ["In", "NotIn", "Exists", "DoesNotExist"] });
    add(spec, &format!("{expressions}[].operator"), operators);
    add(spec, &format!("{expressions}[].values"), list(0, selector::MOST));
    add(spec, &format!("{expressions}[].values[]"), json!({ "maxLength": 63 }));
}

/// The conditions of a status.
pub(super) fn conditions(most: u32) -> Value {
    let text = |most: u32| json!({ "type": "string", "maxLength": most });
    let condition = json!({
        "type": "object",
        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        "properties": {
            "type": text(316),
            "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
            "reason": text(1024),
            "message": text(32768),
            "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
            "lastTransitionTime": { "type": "string", "format": "date-time" },
        },
    });
    json!({
        "type": "array", "maxItems": most, "items": condition,
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
    })
}

/// A status of conditions alone.
pub(super) fn status_of_conditions(description: &str) -> Value {
    let mut conditions = conditions(16);
    conditions["description"] = description.into();
    json!({
        "type": "object",
        "description": "What becomes of the policy, written by the controller that leads.",
        "properties": { "conditions": conditions },
    })
}

impl Definition {
    /// All of it.
    pub(super) fn crd(&self) -> Value {
        let Self { kind, plural, short, policy, spec, status, columns } = self;
        let (name, text) = (
            kind.as_str(),
            |name: &str| json!({ "type": "string", "description": format!("As of every object: {name}.") }),
        );
        let schema = json!({
            "type": "object",
            "description": spec["description"],
            "required": ["spec"],
            "properties": {
                "apiVersion": text("the version of its form"), "kind": text("its kind"), "metadata": { "type": "object" },
                "spec": spec, "status": status,
            },
        });
        let age = [("Age", "date", ".metadata.creationTimestamp")];
        let column =
            |(name, kind, path): &(&str, &str, &str)| json!({ "name": name, "type": kind, "jsonPath": path });
        let columns: Vec<Value> = columns.iter().chain(&age).map(column).collect();
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": format!("{plural}.{GROUP}"),
                // GEP-713: tools find policies by it.
                "labels": { "gateway.networking.k8s.io/policy": policy },
            },
            "spec": {
                "group": GROUP,
                "scope": "Namespaced",
                "names": {
                    "kind": name, "listKind": format!("{name}List"), "plural": plural, "singular": name.to_lowercase(),
                    "shortNames": [short], "categories": ["undermesh"],
                },
                "versions": [{
                    "name": kind.versions()[0], "served": true, "storage": true,
                    "subresources": { "status": {} },
                    "schema": { "openAPIV3Schema": schema },
                    "additionalPrinterColumns": columns,
                }],
            },
        })
    }

    /// Whether the file is what the types say, or has it written.
    pub(super) fn check_file(&self, folder: &str, file: &ExpectFile) {
        let yaml = serde_saphyr::to_string(&self.crd()).unwrap();
        let generated = format!(
            "# Generated from agent/src/config/document/{folder} by `cargo xtask crds`; a test fails when it is another.\n"
        );
        file.assert_eq(&format!("{generated}{yaml}"));
        let read: Value = serde_saphyr::from_str(&yaml).unwrap();
        assert_eq!(read, self.crd());
    }

    /// Whether every field says what it is, has its bounds and is known to the page of the documentation.
    pub(super) fn check_fields(&self, page: &str) {
        check_field(page, &self.spec, "spec");
    }
}

fn check_field(page: &str, schema: &Value, field: &str) {
    let has = |key: &str| schema.get(key).is_some();
    let is_element = field.ends_with("[]");
    assert!(is_element || has("description"), "{field} has no description");
    let kind = schema["type"].as_str().unwrap_or_else(|| panic!("{field}: {schema}"));
    let is_bounded = match kind {
        "integer" | "number" => has("minimum") && has("maximum"),
        "string" => has("enum") || has("maxLength"),
        "array" => has("maxItems"),
        "object" => has("properties") || has("maxProperties") || field.ends_with("sourceAddress"),
        "boolean" => true,
        other => panic!("{field} is of the type {other}"),
    };
    assert!(is_bounded, "{field} has no bounds: {schema}");
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        assert!(page.contains(name), "the documentation does not know {field}.{name}");
        check_field(page, schema, &format!("{field}.{name}"));
    }
    if let Some(items) = schema.get("items") {
        check_field(page, items, &format!("{field}[]"));
    }
}

/// The field's value; of lists, the first element that has it.
pub(super) fn place_of<'a>(spec: &'a mut Value, field: &str) -> &'a mut Value {
    let (first, rest) = field.split_once('.').map_or((field, None), |(first, rest)| (first, Some(rest)));
    let value = &mut spec[first.trim_end_matches("[]")];
    match (value.as_array().is_some(), rest) {
        (false, None) => value,
        (false, Some(rest)) => place_of(value, rest),
        (true, None) => &mut value[0],
        (true, Some(rest)) => {
            let key = rest.split('.').next().unwrap_or_default().trim_end_matches("[]");
            let elements = value.as_array_mut().unwrap();
            let element = elements.iter_mut().find(|element| element.get(key).is_some());
            place_of(element.unwrap_or_else(|| panic!("no {field}")), rest)
        }
    }
}

//! The CustomResourceDefinition of TrafficPolicy: the types that it is read by, with what they do not tell. A test, for nothing of it
//! is needed at run time: `cargo xtask crds` writes the file, and without that the test fails where it is another.
//!
//! What the API server refuses by it the reader refuses, too, for the directory has no API server. That they agree on what is too
//! little and too much is tested here.

use expect_test::expect_file;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{GROUP, Kind, Policy, wire};

const DURATION: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";
/// RFC 9110, section 5.6.2.
const HEADER: &str = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$";

/// Whole numbers, the least and the most.
const NUMBERS: [(&str, i64, i64); 20] = [
    ("loadBalancing.spillOverBelow", 0, 100),
    ("outlierDetection.consecutiveErrors", 0, MOST),
    ("outlierDetection.consecutiveGatewayFailures", 0, MOST),
    ("outlierDetection.successRate.minRequests", 1, MOST),
    ("outlierDetection.successRate.minEndpoints", 2, MOST),
    ("outlierDetection.maxEjectedPercent", 0, 100),
    ("outlierDetection.panicPercent", 0, 100),
    ("limits.maxConnections", 1, MOST),
    ("limits.maxRequests", 1, MOST),
    ("limits.maxPendingRequests", 1, MOST),
    ("limits.maxRetries", 1, MOST),
    ("retry.attempts", 0, 100),
    ("retry.codes[]", 400, 599),
    ("retry.budget.percent", 0, 100),
    ("retry.budget.perSecond", 0, MOST),
    ("rateLimits[].requests", 1, MOST),
    ("rateLimits[].connections", 1, MOST),
    ("rateLimits[].burst", 1, MOST),
    ("faults[].percent", 0, 100),
    ("faults[].abort.status", 400, 599),
];
const MOST: i64 = 1_000_000;

/// Durations, the shortest and the longest.
const DURATIONS: [(&str, &str, &str); 11] = [
    ("loadBalancing.slowStart", "0s", "1h"),
    ("outlierDetection.successRate.interval", "1s", "1h"),
    ("outlierDetection.baseEjection", "1s", "24h"),
    ("outlierDetection.maxEjection", "1s", "24h"),
    ("retry.backoff", "1ms", "1h"),
    ("timeouts.request", "0s", "99999h"),
    ("timeouts.perTry", "0s", "99999h"),
    ("timeouts.idle", "0s", "99999h"),
    ("timeouts.connect", "1ms", "1h"),
    ("rateLimits[].per", "1s", "24h"),
    ("faults[].delay", "1ms", "1h"),
];

/// Everything else that a type does not tell.
fn others() -> Vec<(&'static str, Value)> {
    let rule = |rule: &str, message: &str| json!({ "x-kubernetes-validations": [{ "rule": rule, "message": message }] });
    let name = |most: u32| json!({ "minLength": 1, "maxLength": most });
    let header = json!({ "minLength": 1, "maxLength": 256, "pattern": HEADER });
    let list = |most: u32| json!({ "maxItems": most, "x-kubernetes-list-type": "atomic" });
    vec![
        ("targetRefs", json!({ "minItems": 1, "maxItems": 16, "x-kubernetes-list-type": "atomic" })),
        (
            "targetRefs",
            rule(
                "self.all(a, self.exists_one(b, a.name == b.name && has(a.sectionName) == has(b.sectionName) \
                 && (!has(a.sectionName) || a.sectionName == b.sectionName)))",
                "each target may be named once",
            ),
        ),
        ("targetRefs[].group", json!({ "enum": [""] })),
        ("targetRefs[].kind", json!({ "enum": ["Service"] })),
        ("targetRefs[].name", name(63)),
        ("targetRefs[].sectionName", name(63)),
        (
            "loadBalancing",
            rule(
                "(has(self.algorithm) && self.algorithm == 'ConsistentHash') == has(self.hashOn)",
                "hashOn is for the algorithm ConsistentHash, which needs it",
            ),
        ),
        (
            "loadBalancing.algorithm",
            json!({ "enum": ["PeakEWMA", "LeastRequest", "RoundRobin", "Random", "ConsistentHash"] }),
        ),
        ("loadBalancing.hashOn", json!({ "minItems": 1, "maxItems": 8, "x-kubernetes-list-type": "atomic" })),
        ("loadBalancing.hashOn[]", json!({ "minProperties": 1, "maxProperties": 1 })),
        ("loadBalancing.hashOn[].header", header.clone()),
        ("loadBalancing.hashOn[].cookie", name(256)),
        ("loadBalancing.hashOn[].query", name(256)),
        (
            "outlierDetection",
            rule(
                "!has(self.maxEjection) || \
                 duration(self.maxEjection) >= duration(has(self.baseEjection) ? self.baseEjection : '10s')",
                "maxEjection may be no less than baseEjection, which is 10s unless given",
            ),
        ),
        (
            "outlierDetection.successRate.deviations",
            json!({ "pattern": "^[0-9]{1,2}([.][0-9]{1,3})?$", "maxLength": 6 }),
        ),
        (
            "outlierDetection.successRate.deviations",
            rule("double(self) > 0.0 && double(self) <= 10.0", "expected a number above 0 and up to 10"),
        ),
        (
            "retry",
            rule(
                "has(self.attempts) || !(has(self.codes) || has(self.anyMethod) || has(self.backoff))",
                "without attempts nothing is sent again",
            ),
        ),
        ("retry.codes", list(32)),
        (
            "timeouts",
            rule(
                "!(has(self.request) && has(self.perTry)) || duration(self.request) == duration('0s') \
                 || duration(self.perTry) <= duration(self.request)",
                "perTry may be no longer than request",
            ),
        ),
        ("rateLimits", list(16)),
        (
            "rateLimits[]",
            rule("has(self.requests) != has(self.connections)", "expected either requests or connections"),
        ),
        ("rateLimits[].by", json!({ "enum": ["Everyone", "Source"] })),
        ("faults", list(16)),
        ("faults[]", rule("has(self.delay) || has(self.abort)", "expected a delay, an abort or both")),
        ("faults[].match.headers", list(16)),
        ("faults[].match.headers[].name", header),
        ("faults[].match.headers[].value", json!({ "maxLength": 4096 })),
    ]
}

fn spec() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut spec = settings.into_generator().into_root_schema_for::<wire::Spec>().to_value();
    make_structural(&mut spec);
    for (field, least, most) in NUMBERS {
        add(&mut spec, field, json!({ "minimum": least, "maximum": most }));
    }
    for (field, least, most) in DURATIONS {
        let rule = format!("duration(self) >= duration('{least}') && duration(self) <= duration('{most}')");
        let message = format!("expected a duration from {least} to {most}");
        let mut extra = json!({ "pattern": DURATION, "maxLength": 24 });
        if !field.starts_with("timeouts.") || field == "timeouts.connect" {
            extra["x-kubernetes-validations"] = json!([{ "rule": rule, "message": message }]);
        }
        add(&mut spec, field, extra);
    }
    for (field, extra) in others() {
        add(&mut spec, field, extra);
    }
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
    if let Some(items) = map.get_mut("items") {
        make_structural(items);
    }
}

fn add(spec: &mut Value, field: &str, extra: Value) {
    let Value::Object(extra) = extra else { panic!("{extra}") };
    let schema = schema_of(spec, field).unwrap_or_else(|| panic!("there is no field {field}"));
    for (key, value) in extra {
        assert!(schema.insert(key.clone(), value).is_none(), "{field} has {key} already");
    }
}

fn schema_of<'a>(spec: &'a mut Value, field: &str) -> Option<&'a mut Map<String, Value>> {
    let mut schema = spec;
    for part in field.split('.') {
        let name = part.trim_end_matches("[]");
        schema = schema.get_mut("properties")?.get_mut(name)?;
        if name != part {
            schema = schema.get_mut("items")?;
        }
    }
    schema.as_object_mut()
}

/// As GEP-713 has the status of every policy.
fn status() -> Value {
    let text = |most: u32| json!({ "type": "string", "maxLength": most });
    let number = |least: i64, most: i64| json!({ "type": "integer", "minimum": least, "maximum": most });
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
    let reference = json!({
        "type": "object",
        "description": "What the policy is for, as it stands in targetRefs.",
        "required": ["name"],
        "properties": {
            "group": text(253), "kind": text(63), "namespace": text(63), "name": text(253), "sectionName": text(253),
            "port": number(1, 65535),
        },
    });
    let ancestor = json!({
        "type": "object",
        "required": ["ancestorRef", "controllerName", "conditions"],
        "properties": {
            "ancestorRef": reference,
            "controllerName": text(253),
            "conditions": {
                "type": "array", "maxItems": 8, "items": condition,
                "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
            },
        },
    });
    json!({
        "type": "object",
        "description": "What becomes of the policy, written by the controllers that know it.",
        "properties": {
            "ancestors": {
                "type": "array", "maxItems": 16, "items": ancestor, "x-kubernetes-list-type": "atomic",
                "description": "One entry for each target. Of those by undermesh.io/mesh, Accepted says whether the policy is in force \
                    there, and else why not: Invalid, Conflicted or TargetNotFound.",
            },
        },
    })
}

fn crd() -> Value {
    let spec = spec();
    let text =
        |name: &str| json!({ "type": "string", "description": format!("As of every object: {name}.") });
    let accepted = "{.status.ancestors[0].conditions[?(@.type==\"Accepted\")]";
    let schema = json!({
        "type": "object",
        "description": spec["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": text("the version of its form"), "kind": text("its kind"), "metadata": { "type": "object" },
            "spec": spec, "status": status(),
        },
    });
    let column = |name: &str, kind: &str, path: &str| json!({ "name": name, "type": kind, "jsonPath": path });
    let accepted = |field: &str| format!("{}.{field}", accepted.trim_start_matches('{'));
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("trafficpolicies.{GROUP}"),
            // GEP-713: tools find policies by it.
            "labels": { "gateway.networking.k8s.io/policy": "Direct" },
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "TrafficPolicy", "listKind": "TrafficPolicyList", "plural": "trafficpolicies", "singular": "trafficpolicy",
                "shortNames": ["tpol"], "categories": ["undermesh"],
            },
            "versions": [{
                "name": Kind::TrafficPolicy.versions()[0], "served": true, "storage": true,
                "subresources": { "status": {} },
                "schema": { "openAPIV3Schema": schema },
                "additionalPrinterColumns": [
                    column("Service", "string", ".spec.targetRefs[*].name"),
                    column("Accepted", "string", &accepted("status")),
                    column("Reason", "string", &accepted("reason")),
                    column("Age", "date", ".metadata.creationTimestamp"),
                ],
            }],
        },
    })
}

#[test]
fn the_file_is_what_the_types_say() {
    let yaml = serde_saphyr::to_string(&crd()).unwrap();
    let generated = "# Generated from agent/src/config/document/policy by `cargo xtask crds`; a test fails when it is another.\n";
    let file = expect_file!["../../../../../deploy/helm/undermesh/crds/trafficpolicies.yaml"];
    file.assert_eq(&format!("{generated}{yaml}"));
    let read: Value = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(read, crd());
}

#[test]
fn every_field_says_what_it_is_and_has_its_bounds() {
    let page = include_str!("../../../../../docs/traffic-policy.md");
    fn check(page: &str, schema: &Value, field: &str) {
        let has = |key: &str| schema.get(key).is_some();
        let is_element = field.ends_with("[]");
        assert!(is_element || has("description"), "{field} has no description");
        let kind = schema["type"].as_str().unwrap_or_else(|| panic!("{field}: {schema}"));
        let is_bounded = match kind {
            "integer" | "number" => has("minimum") && has("maximum"),
            "string" => has("enum") || has("maxLength"),
            "array" => has("maxItems"),
            "object" => has("properties") || field.ends_with("sourceAddress"),
            "boolean" => true,
            other => panic!("{field} is of the type {other}"),
        };
        assert!(is_bounded, "{field} has no bounds: {schema}");
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            assert!(page.contains(name), "docs/traffic-policy.md does not know {field}.{name}");
            check(page, schema, &format!("{field}.{name}"));
        }
        if let Some(items) = schema.get("items") {
            check(page, items, &format!("{field}[]"));
        }
    }
    check(page, &spec(), "spec");
}

/// A policy that says all there is, with what may be at either end of its bounds without being at odds with something else.
const WHOLE: &str = "
metadata: {name: a, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  loadBalancing: {slowStart: 1s, spillOverBelow: 1}
  outlierDetection:
    {consecutiveErrors: 1, consecutiveGatewayFailures: 1, baseEjection: 1s, maxEjection: 24h, maxEjectedPercent: 1, panicPercent: 1,
     successRate: {interval: 1s, minRequests: 1, minEndpoints: 2}}
  limits: {maxConnections: 1, maxRequests: 1, maxPendingRequests: 1, maxRetries: 1}
  retry: {attempts: 1, codes: [503], backoff: 1s, budget: {percent: 1, perSecond: 1}}
  timeouts: {request: 0s, perTry: 0s, idle: 1s, connect: 1s}
  rateLimits: [{requests: 1, per: 1s, burst: 1}, {connections: 1, per: 1s}]
  faults: [{percent: 1, delay: 1s, abort: {status: 503}}]
";

#[test]
fn the_reader_has_the_same_bounds() {
    let is_read = |field: &str, value: Value| {
        let mut object: Value = serde_saphyr::from_str(WHOLE).unwrap();
        *place_of(&mut object["spec"], field) = value;
        Policy::read(Kind::TrafficPolicy, &object, &mut Vec::new()).unwrap().spec.is_some()
    };
    for (field, least, most) in NUMBERS {
        let read = [least, most, least - 1, most + 1].map(|number| is_read(field, number.into()));
        assert_eq!(read, [true, true, false, false], "{field}");
    }
    for (field, least, most) in DURATIONS {
        assert!(is_read(field, least.into()) && is_read(field, most.into()), "{field}");
        let (less, more) = match least {
            "1s" => ("999ms", format!("{most}1ms")),
            _ => (if least == "1ms" { "0s" } else { "-1s" }, format!("{most}1ms1s1ms1s")),
        };
        let more = if most == "1h" { "1h1ms".into() } else { more };
        assert!(!is_read(field, less.into()) && !is_read(field, more.into()), "{field}");
    }
}

/// The field's value; of lists, the first element that has it.
fn place_of<'a>(spec: &'a mut Value, field: &str) -> &'a mut Value {
    let (first, rest) = field.split_once('.').map_or((field, None), |(first, rest)| (first, Some(rest)));
    let value = &mut spec[first.trim_end_matches("[]")];
    match (value.as_array().is_some(), rest) {
        (false, None) => value,
        (false, Some(rest)) => place_of(value, rest),
        (true, None) => &mut value[0],
        (true, Some(rest)) => {
            let key = rest.split('.').next().unwrap_or_default();
            let elements = value.as_array_mut().unwrap();
            let element = elements.iter_mut().find(|element| element.get(key).is_some());
            place_of(element.unwrap_or_else(|| panic!("no {field}")), rest)
        }
    }
}

//! The CustomResourceDefinition of TrafficPolicy: the types that it is read by, with what they do not tell. That the reader agrees
//! with it on what is too little and too much is tested here.

use expect_test::expect_file;
use serde_json::{Value, json};

use super::super::crd::{Definition, HEADER, add, conditions, list, name, place_of, rule, spec_of};
use super::{Kind, Policy, wire};

const DURATION: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";

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
    let header = json!({ "minLength": 1, "maxLength": 256, "pattern": HEADER });
    vec![
        ("targetRefs", list(1, 16)),
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
        ("loadBalancing.hashOn", list(1, 8)),
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
        ("retry.codes", list(0, 32)),
        (
            "timeouts",
            rule(
                "!(has(self.request) && has(self.perTry)) || duration(self.request) == duration('0s') \
                 || duration(self.perTry) <= duration(self.request)",
                "perTry may be no longer than request",
            ),
        ),
        ("rateLimits", list(0, 16)),
        (
            "rateLimits[]",
            rule("has(self.requests) != has(self.connections)", "expected either requests or connections"),
        ),
        ("rateLimits[].by", json!({ "enum": ["Everyone", "Source"] })),
        ("faults", list(0, 16)),
        ("faults[]", rule("has(self.delay) || has(self.abort)", "expected a delay, an abort or both")),
        ("faults[].match.headers", list(0, 16)),
        ("faults[].match.headers[].name", header),
        ("faults[].match.headers[].value", json!({ "maxLength": 4096 })),
    ]
}

fn spec() -> Value {
    let mut spec = spec_of::<wire::Spec>();
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

/// As GEP-713 has the status of every policy.
fn status() -> Value {
    let text = |most: u32| json!({ "type": "string", "maxLength": most });
    let number = |least: i64, most: i64| json!({ "type": "integer", "minimum": least, "maximum": most });
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
            "conditions": conditions(8),
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

fn definition() -> Definition {
    Definition {
        kind: Kind::TrafficPolicy,
        plural: "trafficpolicies",
        short: "tpol",
        policy: "Direct",
        spec: spec(),
        status: status(),
        columns: &[
            ("Service", "string", ".spec.targetRefs[*].name"),
            ("Accepted", "string", ".status.ancestors[0].conditions[?(@.type==\"Accepted\")].status"),
            ("Reason", "string", ".status.ancestors[0].conditions[?(@.type==\"Accepted\")].reason"),
        ],
    }
}

#[test]
fn the_file_is_what_the_types_say() {
    let file = expect_file!["../../../../../deploy/helm/undermesh/crds/trafficpolicies.yaml"];
    definition().check_file("policy", &file);
}

#[test]
fn every_field_says_what_it_is_and_has_its_bounds() {
    definition().check_fields(include_str!("../../../../../docs/traffic-policy.md"));
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

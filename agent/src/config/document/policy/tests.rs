//! What policies say, and what is wrong with how they say it.

use std::time::Duration;

use expect_test::{Expect, expect};

use super::*;
use crate::model::{
    Algorithm, AltName, Fault, HashKey, Limited, RateLimit, SessionKind, SharedBy, SuccessRate,
    TrafficTimeouts,
};

/// The rest of the spec of a policy for the Service `web`.
fn read(kind: Kind, rest: &str) -> (Option<PolicySpec>, String) {
    read_spec(kind, &format!("targetRefs: [{{group: '', kind: Service, name: web}}], {rest}"))
}

fn read_spec(kind: Kind, spec: &str) -> (Option<PolicySpec>, String) {
    let yaml = format!("{{metadata: {{name: a, namespace: shop}}, spec: {{{spec}}}}}");
    let object: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
    let mut problems = Vec::new();
    let policy = Policy::read(kind, &object, &mut problems).unwrap();
    assert_eq!(policy.spec.is_some(), problems.is_empty(), "{yaml}: {problems:?}");
    let lines = problems.iter().map(|it| format!("{}: {}\n", it.field, it.message)).collect();
    (policy.spec, lines)
}

fn settings(rest: &str) -> TrafficSettings {
    match read(Kind::TrafficPolicy, rest) {
        (Some(PolicySpec { says: Says::Traffic { settings, .. }, .. }), _) => *settings,
        other => panic!("{rest}: {other:?}"),
    }
}

fn refused(rest: &str, expected: Expect) {
    expected.assert_eq(&read(Kind::TrafficPolicy, rest).1);
}

fn seconds(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

#[test]
fn what_is_not_said_is_as_without_a_policy() {
    assert_eq!(settings(""), TrafficSettings::default());
    let empty = "loadBalancing: {}, outlierDetection: {}, limits: {}, retry: {}, timeouts: {}, rateLimits: [], faults: []";
    assert_eq!(settings(empty), TrafficSettings::default());
    let rates = settings("outlierDetection: {successRate: {}}").outliers.success_rate;
    assert_eq!(rates, Some(SuccessRate::default()));
}

#[test]
fn all_that_can_be_said() {
    let said = settings(
        "loadBalancing: {algorithm: ConsistentHash, slowStart: 0s, spillOverBelow: 70,
           hashOn: [{header: X-User}, {cookie: id}, {query: q}, {sourceAddress: {}}]},
         outlierDetection: {consecutiveErrors: 0, consecutiveGatewayFailures: 3, baseEjection: 30s, maxEjection: 1h,
           maxEjectedPercent: 10, panicPercent: 100,
           successRate: {interval: 30s, minRequests: 50, minEndpoints: 3, deviations: '2.05'}},
         limits: {maxConnections: 1, maxRequests: 2, maxPendingRequests: 3, maxRetries: 4},
         retry: {attempts: 2, codes: [500, 503], anyMethod: true, backoff: 25ms, budget: {percent: 10, perSecond: 1}},
         timeouts: {request: 10s, perTry: 2s, idle: 0s, connect: 500ms},
         rateLimits: [{requests: 100, per: 1s}, {connections: 10, per: 1m, burst: 20, by: Source}],
         faults: [{match: {headers: [{name: X-Fail, value: 'yes'}]}, percent: 0.5, delay: 2s}, {abort: {status: 503}}]",
    );
    let (balancing, outliers) = (said.balancing, said.outliers);
    let keys = vec![
        HashKey::Header(http::HeaderName::from_static("x-user")),
        HashKey::Cookie("id".into()),
        HashKey::Query("q".into()),
        HashKey::SourceAddress,
    ];
    assert_eq!(balancing.algorithm, Algorithm::ConsistentHash(keys));
    assert_eq!((balancing.slow_start, balancing.spill_over_below), (Duration::ZERO, 70));
    assert_eq!((outliers.consecutive_errors, outliers.consecutive_gateway_failures), (0, 3));
    assert_eq!((Some(outliers.base_ejection), Some(outliers.longest_ejection)), (seconds(30), seconds(3600)));
    assert_eq!((outliers.most_ejected, outliers.panic_above), (10, 100));
    let rates = SuccessRate {
        interval: Duration::from_secs(30),
        least_requests: 50,
        least_endpoints: 3,
        deviations: 2_050,
    };
    assert_eq!(outliers.success_rate, Some(rates));
    let caps = said.caps;
    let caps = [caps.connections, caps.requests, caps.pending, caps.retries];
    assert_eq!(caps, [Some(1), Some(2), Some(3), Some(4)]);
    let retries = said.retries;
    assert_eq!((retries.attempts, retries.any_method), (2, true));
    assert_eq!(retries.codes, [500, 503]);
    assert_eq!(retries.backoff, Some(Duration::from_millis(25)));
    assert_eq!(retries.budget, RetryBudget { percent: 10, per_second: 1.0, ..RetryBudget::default() });
    let timeouts = TrafficTimeouts {
        request: seconds(10),
        per_try: seconds(2),
        idle: None,
        connect: Some(Duration::from_millis(500)),
    };
    assert_eq!(said.timeouts, timeouts);
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    let limits = [
        RateLimit { of: Limited::Requests, count: 100, per: second, burst: 100, by: SharedBy::Everyone },
        RateLimit { of: Limited::Connections, count: 10, per: minute, burst: 20, by: SharedBy::Source },
    ];
    assert_eq!(said.rate_limits, limits);
    let header = (http::HeaderName::from_static("x-fail"), http::HeaderValue::from_static("yes"));
    let abort = Some(http::StatusCode::SERVICE_UNAVAILABLE);
    let faults = [
        Fault { headers: vec![header], percent: 0.5, delay: seconds(2), abort: None },
        Fault { headers: Vec::new(), percent: 100.0, delay: None, abort },
    ];
    assert_eq!(said.faults, faults);
}

#[test]
fn what_is_wrong_with_targets() {
    let refused = |kind: Kind, spec: &str, expected: Expect| expected.assert_eq(&read_spec(kind, spec).1);
    refused(
        Kind::TrafficPolicy,
        "",
        expect![[r#"
        spec: missing field `targetRefs`
    "#]],
    );
    refused(
        Kind::TrafficPolicy,
        "targetRefs: []",
        expect![[r#"
        spec.targetRefs: expected 1 to 16 Services, found 0
    "#]],
    );
    refused(
        Kind::TrafficPolicy,
        "targetRefs: [{name: a}]",
        expect![[r#"
        spec.targetRefs[0]: missing field `group`
    "#]],
    );
    refused(
        Kind::TrafficPolicy,
        "targetRefs: [{group: apps, kind: Deployment, name: a}, {group: '', kind: Service, name: a}, {group: '', kind: Service, name: a},
           {group: '', kind: Service, name: a, sectionName: http, namespace: b}], balancing: {}",
        expect![[r#"
            spec.balancing: there is no such field, or this version of Undermesh does not know it
            spec.targetRefs[3].namespace: there is no such field, or this version of Undermesh does not know it
            spec.targetRefs[0]: expected a Service (group ""), found the kind "Deployment" of the group "apps"
            spec.targetRefs[2]: expected each target once
        "#]],
    );
    // What is for others is theirs to read.
    refused(
        Kind::BackendTrafficPolicy,
        "targetRefs: [{group: multicluster.x-k8s.io, kind: ServiceImport, name: a}], fancy: true",
        expect![[""]],
    );
    refused(
        Kind::BackendTrafficPolicy,
        "targetRefs: [{group: '', kind: Service, name: a, sectionName: b}], fancy: true",
        expect![[r#"
            spec.fancy: there is no such field, or this version of Undermesh does not know it
            spec.targetRefs[0].sectionName: XBackendTrafficPolicies have no such field
        "#]],
    );
}

#[test]
fn what_is_wrong_with_balancing_and_ejection() {
    refused(
        "loadBalancing: {algorithm: Maglev, slowStart: 2h, spillOverBelow: 101}",
        expect![[r#"
        spec.loadBalancing.algorithm: expected PeakEWMA, LeastRequest, RoundRobin, Random or ConsistentHash, found "Maglev"
        spec.loadBalancing.slowStart: expected a duration such as 500ms, 10s or 1h30m, from 0s to 1h, found "2h"
        spec.loadBalancing.spillOverBelow: expected 0 to 100, found 101
    "#]],
    );
    refused(
        "loadBalancing: {algorithm: ConsistentHash}",
        expect![[r#"
        spec.loadBalancing.hashOn: expected what is hashed, which ConsistentHash needs
    "#]],
    );
    refused(
        "loadBalancing: {hashOn: [{header: a}]}",
        expect![[r#"
        spec.loadBalancing.hashOn: expected nothing to hash, which only ConsistentHash does and not PeakEWMA
    "#]],
    );
    refused(
        "loadBalancing: {algorithm: ConsistentHash, hashOn: [{}, {header: 'a b'}, {cookie: ''}, {header: a, query: b}, {sourceAddress: {mask: 24}}]}",
        expect![[r#"
            spec.loadBalancing.hashOn[4].sourceAddress.mask: there is no such field, or this version of Undermesh does not know it
            spec.loadBalancing.hashOn[0]: expected one of header, cookie, query and sourceAddress
            spec.loadBalancing.hashOn[1].header: expected the name of a header, found "a b"
            spec.loadBalancing.hashOn[2].cookie: expected a name, found none
            spec.loadBalancing.hashOn[3]: expected one of header, cookie, query and sourceAddress
        "#]],
    );
    refused(
        "outlierDetection: {consecutiveErrors: -1, baseEjection: 0s, maxEjectedPercent: 101, panicPercent: -1,
           successRate: {interval: 10ms, minRequests: 0, minEndpoints: 1, deviations: '0'}}",
        expect![[r#"
            spec.outlierDetection.baseEjection: expected a duration such as 500ms, 10s or 1h30m, from 1s to 24h, found "0s"
            spec.outlierDetection.consecutiveErrors: expected 0 to 1000000, found -1
            spec.outlierDetection.successRate.deviations: expected a decimal number above 0 and up to 10, such as "1.9", found "0"
            spec.outlierDetection.successRate.interval: expected a duration such as 500ms, 10s or 1h30m, from 1s to 1h, found "10ms"
            spec.outlierDetection.successRate.minRequests: expected 1 to 1000000, found 0
            spec.outlierDetection.successRate.minEndpoints: expected 2 to 1000000, found 1
            spec.outlierDetection.maxEjectedPercent: expected 0 to 100, found 101
            spec.outlierDetection.panicPercent: expected 0 to 100, found -1
        "#]],
    );
    refused(
        "outlierDetection: {baseEjection: 10m, maxEjection: 5m}",
        expect![[r#"
        spec.outlierDetection.maxEjection: expected no less than baseEjection, which is 10s unless given
    "#]],
    );
    refused(
        "outlierDetection: {successRate: {deviations: 1.9}}",
        expect![[r#"
        spec.outlierDetection.successRate.deviations: expected a string, found floating point `1.9`
    "#]],
    );
    for text in ["", "1.", ".5", "-1", "1.2345", "100", "0.000", "11", "1,9"] {
        let (spec, _) = read(
            Kind::TrafficPolicy,
            &format!("outlierDetection: {{successRate: {{deviations: '{text}'}}}}"),
        );
        assert_eq!(spec, None, "{text}");
    }
    assert_eq!(
        settings("outlierDetection: {baseEjection: 10m}").outliers.longest_ejection,
        Duration::from_secs(600)
    );
}

#[test]
fn what_is_wrong_with_the_rest() {
    refused(
        "limits: {maxConnections: 0, maxRequests: 0, maxPendingRequests: 0, maxRetries: 0, minReplicas: 1}",
        expect![[r#"
            spec.limits.minReplicas: there is no such field, or this version of Undermesh does not know it
            spec.limits.maxConnections: expected 1 to 1000000, found 0
            spec.limits.maxRequests: expected 1 to 1000000, found 0
            spec.limits.maxPendingRequests: expected 1 to 1000000, found 0
            spec.limits.maxRetries: expected 1 to 1000000, found 0
        "#]],
    );
    refused(
        "retry: {codes: [503]}",
        expect![[r#"
        spec.retry.attempts: expected how often, without which nothing is sent again
    "#]],
    );
    refused(
        "retry: {attempts: 101, codes: [200, 600], backoff: 2h, budget: {percent: 101, perSecond: -1}}",
        expect![[r#"
            spec.retry.attempts: expected 0 to 100, found 101
            spec.retry.codes[0]: expected 400 to 599, found 200
            spec.retry.codes[1]: expected 400 to 599, found 600
            spec.retry.backoff: expected a duration such as 500ms, 10s or 1h30m, from 1ms to 1h, found "2h"
            spec.retry.budget.percent: expected 0 to 100, found 101
            spec.retry.budget.perSecond: expected 0 to 1000000, found -1
        "#]],
    );
    refused(
        "timeouts: {request: 1s, perTry: 2s, idle: 1 s, connect: 0s}",
        expect![[r#"
        spec.timeouts.perTry: expected no longer than the timeout of the whole request
        spec.timeouts.idle: expected a duration such as 500ms, 10s or 1h30m, found "1 s"
        spec.timeouts.connect: expected a duration such as 500ms, 10s or 1h30m, from 1ms to 1h, found "0s"
    "#]],
    );
    refused(
        "rateLimits: [{per: 1s}, {requests: 1, connections: 1, per: 1s}, {requests: 0, per: 0s, burst: 0}, {requests: 1, per: 1s, by: Path}, {requests: 1}]",
        expect![[r#"
            spec.rateLimits[4]: missing field `per`
        "#]],
    );
    refused(
        "rateLimits: [{per: 1s}, {requests: 1, connections: 1, per: 1s}, {requests: 0, per: 0s, burst: 0}, {requests: 1, per: 1s, by: Path}]",
        expect![[r#"
            spec.rateLimits[0]: expected either requests or connections
            spec.rateLimits[1]: expected either requests or connections
            spec.rateLimits[2].requests: expected 1 to 1000000, found 0
            spec.rateLimits[2].per: expected a duration such as 500ms, 10s or 1h30m, from 1s to 24h, found "0s"
            spec.rateLimits[2].burst: expected 1 to 1000000, found 0
            spec.rateLimits[3].by: expected Everyone or Source, found "Path"
        "#]],
    );
    refused(
        "faults: [{}, {delay: 0s, percent: 100.1}, {abort: {status: 200}, match: {headers: [{name: ' ', value: \"\\n\"}]}}]",
        expect![[r#"
            spec.faults[0]: expected a delay, an abort or both
            spec.faults[1].percent: expected 0 to 100, found 100.1
            spec.faults[1].delay: expected a duration such as 500ms, 10s or 1h30m, from 1ms to 1h, found "0s"
            spec.faults[2].abort.status: expected 400 to 599, found 200
            spec.faults[2].match.headers[0].name: expected the name of a header, found " "
            spec.faults[2].match.headers[0].value: expected a value that a header may have
        "#]],
    );
}

#[test]
fn a_policy_of_the_gateway_api_is_a_budget_and_a_session() {
    let check = |rest: &str, expected: Option<RetryBudget>| {
        let (spec, problems) = read(Kind::BackendTrafficPolicy, rest);
        match spec.unwrap_or_else(|| panic!("{problems}")).says {
            Says::Backend { budget, .. } => assert_eq!(budget, expected, "{rest}"),
            other => panic!("{other:?}"),
        }
    };
    check("", None);
    let seconds = std::time::Duration::from_secs;
    check("retryConstraint: {}", Some(RetryBudget { percent: 20, per_second: 10.0, interval: seconds(10) }));
    check(
        "retryConstraint: {budget: {percent: 0, interval: 1h}, minRetryRate: {count: 3, interval: 2s}}",
        Some(RetryBudget { percent: 0, per_second: 1.5, interval: seconds(3600) }),
    );
    let (spec, _) = read(Kind::BackendTrafficPolicy, "sessionPersistence: {}");
    match spec.map(|spec| spec.says) {
        Some(Says::Backend { session: Some(session), .. }) => {
            assert_eq!((&*session.name, session.kind), ("undermesh-shop-a", SessionKind::Cookie));
        }
        other => panic!("{other:?}"),
    }
    let refused =
        |rest: &str, expected: Expect| expected.assert_eq(&read(Kind::BackendTrafficPolicy, rest).1);
    refused(
        "retryConstraint: {budget: {percent: 101, interval: 2h}, minRetryRate: {count: 0, interval: 0s}}, sessionPersistence: {type: Query}",
        expect![[r#"
            spec.retryConstraint.budget.percent: expected 0 to 100, found 101
            spec.retryConstraint.budget.interval: expected a duration such as 500ms, 10s or 1h30m, from 1s to 1h, found "2h"
            spec.retryConstraint.minRetryRate.count: expected 1 to 1000000, found 0
            spec.retryConstraint.minRetryRate.interval: expected a duration such as 500ms, 10s or 1h30m, from 1ms to 1h, found "0s"
            spec.sessionPersistence.type: expected Cookie or Header, found "Query"
        "#]],
    );
}

#[test]
fn what_the_documentation_shows_is_read() {
    let page = include_str!("../../../../../docs/traffic-policy.md");
    let examples: Vec<&str> =
        page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(examples.len() > 5, "{examples:?}");
    for example in examples {
        let (kind, object) = match example.starts_with("apiVersion:") {
            true => {
                let object: Value = serde_saphyr::from_str(example).unwrap();
                let kind = Kind::ALL.into_iter().find(|kind| object["kind"] == kind.as_str());
                (kind.unwrap_or_else(|| panic!("{example}")), object)
            }
            false => {
                let mut spec: Value = serde_saphyr::from_str(example).unwrap();
                spec["targetRefs"] = serde_json::json!([{ "group": "", "kind": "Service", "name": "web" }]);
                let metadata = serde_json::json!({ "name": "a", "namespace": "shop" });
                (Kind::TrafficPolicy, serde_json::json!({ "metadata": metadata, "spec": spec }))
            }
        };
        let mut problems = Vec::new();
        Policy::read(kind, &object, &mut problems).unwrap();
        assert_eq!(problems, [], "{example}");
    }
}

#[test]
fn a_policy_of_tls_says_whom_to_believe() {
    let read = |rest: &str| {
        let yaml = format!(
            "{{metadata: {{name: a, namespace: shop}}, spec: {{targetRefs: [{{group: '', kind: Service, name: web}}], {rest}}}}}"
        );
        let object: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
        let mut problems = Vec::new();
        let policy = Policy::read(Kind::BackendTlsPolicy, &object, &mut problems).unwrap();
        let spec = policy.spec.expect("it is known whom it is for");
        assert_eq!(spec.targets.len(), 1, "{yaml}");
        let Says::Tls(validation) = spec.says else { panic!("{:?}", spec.says) };
        assert_eq!(validation.is_some(), problems.is_empty(), "{yaml}: {problems:?}");
        let lines: String = problems.iter().map(|it| format!("{}: {}\n", it.field, it.message)).collect();
        (validation, lines)
    };
    let (said, _) = read(
        "validation: {hostname: Pay.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}, {group: '', kind: Secret, name: ca}],
           subjectAltNames: [{type: Hostname, hostname: '*.Shop.test'}, {type: URI, uri: 'spiffe://a/b'}]}",
    );
    let ca = ObjectRef::new("shop", "ca");
    assert_eq!(
        said,
        Some(TlsValidation {
            authorities: AuthorityRefs::Objects(vec![
                Ok(ca),
                Err("the kind \"Secret\" of the group \"\"".into())
            ]),
            hostname: "pay.test".into(),
            alt_names: vec![AltName::Hostname("*.shop.test".into()), AltName::Uri("spiffe://a/b".into())],
        })
    );
    let (said, _) =
        read("validation: {hostname: pay.test, wellKnownCACertificates: System, caCertificateRefs: []}");
    assert_eq!(said.unwrap().authorities, AuthorityRefs::System);
    let refused = |rest: &str, expected: Expect| expected.assert_eq(&read(rest).1);
    refused(
        "validation: {hostname: 10.0.0.1, wellKnownCACertificates: Ours}",
        expect![[r#"
        spec.validation.wellKnownCACertificates: expected System, found "Ours"
    "#]],
    );
    refused(
        "validation: {hostname: '*.test', wellKnownCACertificates: System}, options: {tls-min: '1.3'}, more: 1",
        expect![[r#"
            spec.more: there is no such field, or this version of Undermesh does not know it
            spec.options.tls-min: there is no such option
            spec.validation.hostname: expected a host name without a wildcard and a port, and not an address, found "*.test"
        "#]],
    );
    refused(
        "validation: {hostname: a.test}",
        expect![[r#"
        spec.validation: expected caCertificateRefs or wellKnownCACertificates, found neither
    "#]],
    );
    refused(
        "validation: {hostname: a.test, wellKnownCACertificates: System, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]}",
        expect![[r#"
            spec.validation: expected either caCertificateRefs or wellKnownCACertificates, found both
        "#]],
    );
    refused(
        "validation: {hostname: a.test, wellKnownCACertificates: System,
           subjectAltNames: [{type: URI, uri: path}, {type: Hostname, uri: 'a:b'}, {type: IP}, {type: Hostname, hostname: '*'}]}",
        expect![[r#"
            spec.validation.subjectAltNames[0].uri: expected a URI with its scheme, such as spiffe://mesh/ns/a/sa/b, found "path"
            spec.validation.subjectAltNames[1]: expected hostname alone for the type Hostname, uri alone for the type URI
            spec.validation.subjectAltNames[2].type: expected Hostname or URI, found "IP"
            spec.validation.subjectAltNames[3].hostname: expected a host name without a wildcard and a port, and not an address, found "*"
        "#]],
    );
    refused(
        "validation: {hostname: [1], more: 2}",
        expect![[r#"
        spec.validation.hostname: expected a string, found sequence
    "#]],
    );
    refused(
        "valid: {}",
        expect![[r#"
        spec.valid: there is no such field, or this version of Undermesh does not know it
        spec.validation: expected a map, found null
    "#]],
    );
}

//! What a scraper insists on.

use std::collections::{BTreeMap, HashSet};

use super::*;

/// The rules of both formats that a scraper insists on.
#[test]
fn both_formats_are_well_formed() {
    let telemetry = telemetry(TelemetrySettings::default());
    let odd = ConnectionFacts { service: Some(ObjectRef::new("a\"}\n", "b\\ # {")), ..facts("web -> db") };
    telemetry.connection_opened(odd.clone()).close(CloseReason::ClientTimeout);
    telemetry.connection_refused(odd.clone(), RefuseReason::Limit);
    let route = Some(RouteLabel { rule: "a\"}\n".into(), ..http::route("b\\ # {", "0") });
    let counters = [telemetry.http_counters(&odd)];
    telemetry.request_finished(&counters, HttpRequest { route, ..http::request("GET 200") });
    telemetry.request_finished(&counters, HttpRequest { route: None, ..http::request("POST -") });
    let open = telemetry.connection_opened(facts("web -> ?"));
    open.add_sent(1);

    let openmetrics = telemetry.scrape(MetricsFormat::OpenMetrics);
    assert!(openmetrics.ends_with("\n# EOF\n"));
    let text = telemetry.scrape(MetricsFormat::PrometheusText);
    assert!(!text.contains("# EOF") && !text.contains("# UNIT") && !text.contains("_created"));
    assert_well_formed(openmetrics.strip_suffix("# EOF\n").unwrap(), |family, kind, sample| match kind {
        "counter" => sample == format!("{family}_total"),
        _ => is_sample_of(family, kind, sample),
    });
    assert_well_formed(&text, |family, kind, sample| match kind {
        "counter" => family.ends_with("_total") && sample == family,
        _ => is_sample_of(family, kind, sample),
    });
    // For a check by hand with a scraper's own parser.
    if let Some(dir) = std::env::var_os("UNDERMESH_EXPOSITION_DIR") {
        let dir = std::path::PathBuf::from(dir);
        std::fs::write(dir.join("openmetrics.txt"), openmetrics).unwrap();
        std::fs::write(dir.join("prometheus.txt"), text).unwrap();
    }
}

fn is_sample_of(family: &str, kind: &str, sample: &str) -> bool {
    match kind {
        "gauge" => sample == family,
        "histogram" => ["_bucket", "_sum", "_count"].iter().any(|s| sample == format!("{family}{s}")),
        _ => false,
    }
}

fn assert_well_formed(page: &str, belongs: impl Fn(&str, &str, &str) -> bool) {
    let (mut helped, mut typed, mut seen) = (HashSet::new(), BTreeMap::new(), HashSet::new());
    let mut current = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("help has a text");
            assert!(!help.is_empty() && helped.insert(name), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert!(helped.contains(name), "no help: {line}");
            assert!(typed.insert(name, kind).is_none(), "twice: {line}");
            current = Some((name, kind));
        } else {
            let (family, kind) = current.expect("a type before the samples");
            let name = &line[..line.find(['{', ' ']).expect("a name")];
            assert!(belongs(family, kind, name), "{line} is not in {kind} {family}");
            let (series, value) = line.rsplit_once(' ').expect("a value");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(series), "twice: {line}");
            assert_labels_well_formed(&series[name.len()..]);
        }
    }
    assert!(typed.len() > 10);
}

fn assert_labels_well_formed(labels: &str) {
    let Some(mut rest) = labels.strip_prefix('{').map(|l| l.strip_suffix('}').expect("a closing brace"))
    else {
        return assert!(labels.is_empty(), "{labels}");
    };
    while !rest.is_empty() {
        let (name, quoted) = rest.split_once("=\"").expect("name=\"");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        let mut escaped = false;
        let end = quoted
            .char_indices()
            .find(|(_, c)| {
                let closes = *c == '"' && !escaped;
                assert!(!escaped || matches!(c, '"' | '\\' | 'n'), "{quoted}");
                escaped = *c == '\\' && !escaped;
                closes
            })
            .expect("a closing quote")
            .0;
        rest = &quoted[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

#[test]
fn every_metric_and_reason_is_documented() {
    let docs = include_str!("../../../../docs/metrics.md");
    let telemetry = telemetry(TelemetrySettings::default());
    telemetry.status().set_probers(Probers::Kubelet);
    let page = telemetry.scrape(MetricsFormat::PrometheusText);
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let reasons = CloseReason::ALL.map(CloseReason::as_str).into_iter();
    let reasons = reasons.chain(RefuseReason::ALL.map(RefuseReason::as_str));
    for name in families.chain(reasons).chain(Probers::NAMES) {
        assert!(docs.contains(&format!("`{name}`")), "docs/metrics.md does not mention `{name}`");
    }
    // Many of these are reasons of connections too.
    let requests = docs.split("\n## ").find(|part| part.starts_with("HTTP requests\n")).unwrap();
    for end in RequestEnd::ALL.map(RequestEnd::as_str) {
        assert!(
            requests.contains(&format!("`{end}`")),
            "docs/metrics.md does not mention `{end}` of requests"
        );
    }
}

//! Which format of the metrics a scraper gets: its `Accept` header, weighed as RFC 9110, section 12.5.1 has it.

use axum::http::{HeaderMap, header};

use crate::telemetry::MetricsFormat;

/// The format the client weighs highest; the older one where it says nothing, or nothing that is to be had: a page
/// that a person can read is better than a 406.
pub(super) fn metrics_format(headers: &HeaderMap) -> MetricsFormat {
    let (mut openmetrics, mut text) = (None, None);
    for value in headers.get_all(header::ACCEPT) {
        for range in value.to_str().unwrap_or_default().split(',').filter_map(Range::parse) {
            // A range that names more outweighs one that names less, whatever their order.
            if let Some(fit) = range.fits("application", "openmetrics-text", &["0.0.1", "1.0.0"]) {
                openmetrics = openmetrics.max(Some((fit, range.weight)));
            }
            if let Some(fit) = range.fits("text", "plain", &["0.0.4"]) {
                text = text.max(Some((fit, range.weight)));
            }
        }
    }
    // A wildcard alone does not ask for the newer format.
    let asked =
        |best: Option<(Fit, u16)>| best.filter(|(fit, _)| *fit == Fit::Exact).map_or(0, |(_, weight)| weight);
    let weight = |best: Option<(Fit, u16)>| best.map_or(0, |(_, weight)| weight);
    match asked(openmetrics) {
        0 => MetricsFormat::PrometheusText,
        wish if wish >= weight(text) => MetricsFormat::OpenMetrics,
        _ => MetricsFormat::PrometheusText,
    }
}

/// How precisely a range names a format; later ones more so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Anything,
    Type,
    Exact,
}

struct Range<'a> {
    kind: &'a str,
    subtype: &'a str,
    version: Option<&'a str>,
    /// Thousandths.
    weight: u16,
}

impl<'a> Range<'a> {
    /// `None` for what is no media range: it is passed over.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subtype) = parts.next()?.split_once('/')?;
        let mut range = Self { kind, subtype, version: None, weight: 1000 };
        for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
            let value = value.trim().trim_matches('"');
            if name.trim().eq_ignore_ascii_case("q") {
                range.weight = weight(value)?;
            } else if name.trim().eq_ignore_ascii_case("version") {
                range.version = Some(value);
            }
        }
        Some(range)
    }

    fn fits(&self, kind: &str, subtype: &str, versions: &[&str]) -> Option<Fit> {
        let is = |range: &str, name: &str| range.eq_ignore_ascii_case(name);
        match (self.kind, self.subtype) {
            ("*", "*") => Some(Fit::Anything),
            (k, "*") if is(k, kind) => Some(Fit::Type),
            (k, s) if is(k, kind) && is(s, subtype) => {
                self.version.is_none_or(|version| versions.contains(&version)).then_some(Fit::Exact)
            }
            _ => None,
        }
    }
}

/// `0.123` as 123.
fn weight(text: &str) -> Option<u16> {
    let weight: f32 = text.parse().ok()?;
    (0.0..=1.0).contains(&weight).then_some((weight * 1000.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(accept: &[&str], expected: MetricsFormat) {
        let headers = accept.iter().map(|value| (header::ACCEPT, value.parse().unwrap())).collect();
        assert_eq!(metrics_format(&headers), expected, "{accept:?}");
    }

    #[test]
    fn the_highest_weight_wins_and_silence_means_text() {
        use MetricsFormat::{OpenMetrics, PrometheusText};
        check(&[], PrometheusText);
        check(&["*/*"], PrometheusText);
        check(&["text/html, application/xhtml+xml, */*;q=0.8"], PrometheusText);
        check(&["application/openmetrics-text"], OpenMetrics);
        check(&["application/*"], PrometheusText);
        check(&["application/openmetrics-text;q=0.5, text/plain;q=0.6"], PrometheusText);
        check(&["application/openmetrics-text;q=0.5", "text/plain;q=0.4"], OpenMetrics);
        check(&["Application/OpenMetrics-Text; Version=\"1.0.0\"; Q=0.5, text/*;q=0.1"], OpenMetrics);
        check(&["application/openmetrics-text;version=2.0.0, text/plain;q=0.1"], PrometheusText);
        check(&["application/openmetrics-text;q=0"], PrometheusText);
        check(&["application/openmetrics-text;q=0.2, */*"], PrometheusText);
        check(&["image/png"], PrometheusText);
        check(&["application/openmetrics-text;q=2, ;;=,/,q"], PrometheusText);
        // What Prometheus 3 sends.
        check(
            &["application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
               application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
               text/plain;version=0.0.4;q=0.3,*/*;q=0.2"],
            OpenMetrics,
        );
        // What it sends to a target that is to be scraped as text.
        check(
            &["text/plain;version=0.0.4;q=0.6,application/openmetrics-text;q=0.5,*/*;q=0.2"],
            PrometheusText,
        );
    }
}

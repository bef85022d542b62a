//! The older Prometheus text format (0.0.4), made from OpenMetrics text, for scrapers that do not ask for the newer.
//!
//! What differs between the two: counters are declared by the name of their samples (`_total`), there are no units, no
//! `# EOF`, no exemplars and no `_created` samples, some types do not exist, and quotes in HELP are not escaped.
//! Time stamps, whose unit differs too, are left out: the agent writes none.

use std::fmt::Write;

/// Converts a whole exposition. Lines that are no OpenMetrics are passed on as they are.
pub(super) fn from_openmetrics(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    let mut family = Family::default();
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // The type that follows decides under which name it goes.
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            family = Family { name, kind };
            family.declare(help.take(), &mut text);
        } else if !line.starts_with('#') && !family.is_creation_time(line) {
            text.push_str(sample_of(line));
            text.push('\n');
        }
    }
    text
}

#[derive(Default)]
struct Family<'a> {
    name: &'a str,
    kind: &'a str,
}

impl Family<'_> {
    fn declare(&self, help: Option<(&str, &str)>, text: &mut String) {
        let (suffix, kind) = match self.kind {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            "stateset" => ("", "gauge"),
            "gauge" | "histogram" | "summary" => ("", self.kind),
            // `unknown`, `gaugehistogram` and whatever may come.
            _ => ("", "untyped"),
        };
        let name = self.name;
        if let Some((_, help)) = help.filter(|(helped, _)| *helped == name) {
            let _ = writeln!(text, "# HELP {name}{suffix} {}", help.replace("\\\"", "\""));
        }
        let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
    }

    fn is_creation_time(&self, line: &str) -> bool {
        matches!(self.kind, "counter" | "histogram" | "summary" | "gaugehistogram")
            && line
                .strip_prefix(self.name)
                .and_then(|rest| rest.strip_prefix("_created"))
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
    }
}

/// The sample's name, labels and value, without time stamp and exemplar.
fn sample_of(line: &str) -> &str {
    let labels = end_of_labels(line);
    // After the labels come ` VALUE[ TIMESTAMP][ # EXEMPLAR]`.
    let value = line[labels..].strip_prefix(' ').map_or(labels, |_| labels + 1);
    let end = line[value..].find(' ').map_or(line.len(), |space| value + space);
    &line[..end]
}

/// Where the labels end, or the name where there are none. A brace within a quoted value ends nothing.
fn end_of_labels(line: &str) -> usize {
    let open = match line.find(['{', ' ']) {
        Some(at) if line.as_bytes()[at] == b'{' => at,
        Some(at) => return at,
        None => return line.len(),
    };
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in line.bytes().enumerate().skip(open + 1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return at + 1,
            _ => {}
        }
    }
    line.len()
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(openmetrics: &str, expect: Expect) {
        expect.assert_eq(&from_openmetrics(openmetrics));
    }

    #[test]
    fn counters_are_declared_by_the_name_of_their_samples() {
        check(
            "# HELP a_bytes Bytes, \\\"all\\\" of\\nthem.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\n\
             a_bytes_total{x=\"1\"} 5\na_bytes_created{x=\"1\"} 1.5e9\n# EOF\n",
            expect![[r#"
                # HELP a_bytes_total Bytes, "all" of\nthem.
                # TYPE a_bytes_total counter
                a_bytes_total{x="1"} 5
            "#]],
        );
    }

    #[test]
    fn exemplars_and_time_stamps_go_and_braces_in_values_stay() {
        check(
            "# TYPE h histogram\nh_bucket{p=\"a} # {\\\"\",le=\"+Inf\"} 3 # {trace=\"x\"} 0.5 1.0\nh_count{} 3 1700000000.5\nh_sum 2.5\nh_created 1\n",
            expect![[r#"
                # TYPE h histogram
                h_bucket{p="a} # {\"",le="+Inf"} 3
                h_count{} 3
                h_sum 2.5
            "#]],
        );
    }

    #[test]
    fn types_that_do_not_exist_become_gauges_or_untyped() {
        check(
            "# TYPE a info\na_info{v=\"1\"} 1\n# TYPE b stateset\nb{b=\"x\"} 1\n# TYPE c unknown\nc 1\n# TYPE d gauge\nd_created 1\n",
            expect![[r#"
                # TYPE a_info gauge
                a_info{v="1"} 1
                # TYPE b gauge
                b{b="x"} 1
                # TYPE c untyped
                c 1
                # TYPE d gauge
                d_created 1
            "#]],
        );
    }

    #[test]
    fn broken_lines_do_no_harm() {
        check(
            "a{b=\"c\nd\n\n# x\ne{f=\"é\"} ",
            expect![[r#"
            a{b="c
            d

            e{f="é"} 
        "#]],
        );
    }
}

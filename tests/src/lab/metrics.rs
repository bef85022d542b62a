//! Samples in the Prometheus text format.

use std::collections::BTreeMap;

/// One sample: a name, its labels, a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// The samples, in the order of the page.
    pub samples: Vec<Sample>,
    /// The page itself.
    pub text: String,
}

impl Metrics {
    /// Reads a page; lines that are no samples are left out.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect();
        Self { samples, text: text.to_owned() }
    }

    /// The samples of this name that have all of these labels.
    pub fn select<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            let has = |(key, value): &(&str, &str)| sample.labels.get(*key).is_some_and(|v| v == value);
            sample.name == name && labels.iter().all(has)
        })
    }

    /// Their sum; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.select(name, labels).map(|sample| sample.value).sum()
    }
}

/// `name{key="value",...} number`, with an optional timestamp or exemplar after it.
fn sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (key, after) = rest.trim_start_matches([',', ' ']).split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(key.to_owned(), value);
            rest = after.trim_start_matches(',');
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Reads up to the closing quote and takes escapes back.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_samples_with_and_without_labels() {
        let page = Metrics::parse(
            "# HELP up Whether\n# TYPE up gauge\nup 1\n\
             opened_total{source=\"shop/web\",odd=\"a \\\"b\\\", {c}\"} 12 # {id=\"x\"} 1\nopened_total{} 3e1\n",
        );
        assert_eq!(page.samples.len(), 3);
        assert_eq!(page.sum("up", &[]), 1.0);
        assert_eq!(page.sum("opened_total", &[]), 42.0);
        assert_eq!(page.sum("opened_total", &[("source", "shop/web"), ("odd", "a \"b\", {c}")]), 12.0);
        assert_eq!(page.sum("opened_total", &[("source", "shop/db")]), 0.0);
    }
}

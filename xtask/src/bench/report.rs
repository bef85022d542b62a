//! Medians, minima and maxima, as a table and as JSON.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::{Value, json};

use super::case::{Case, Figure, Span};
use super::footprint::Footprint;
use crate::say;

/// All figures of a run.
pub struct Report {
    columns: Vec<String>,
    rounds: usize,
    length: Duration,
    rows: Vec<Row>,
    footprints: Vec<Footprint>,
}

/// One figure of one case, with the samples of each column.
struct Row {
    span: Span,
    case: String,
    figure: &'static str,
    samples: Vec<Vec<f64>>,
}

impl Report {
    /// An empty report.
    pub fn new(columns: Vec<String>, rounds: usize, length: Duration) -> Self {
        Self { columns, rounds, length, rows: Vec::new(), footprints: Vec::new() }
    }

    /// Adds one round's figures of one case in one column.
    pub fn add(&mut self, case: &Case, column: usize, figures: Vec<Figure>) {
        for Figure { name, value } in figures {
            let title = case.title();
            let known = |row: &Row| row.span == case.span && row.case == title && row.figure == name;
            let at = self.rows.iter().position(known).unwrap_or_else(|| {
                let samples = vec![Vec::new(); self.columns.len()];
                self.rows.push(Row { span: case.span, case: title.clone(), figure: name, samples });
                self.rows.len() - 1
            });
            self.rows[at].samples[column].push(value);
        }
    }

    /// Adds what one column's mesh costs at rest; none where there is no mesh.
    pub fn add_footprint(&mut self, footprint: Footprint) {
        self.footprints.push(footprint);
    }

    /// `median [min..max]` of each column, and how the others compare with the first.
    pub fn table(&self) -> String {
        let mut text = format!("Medians of {} rounds of {:?} each, [min..max].\n", self.rounds, self.length);
        for span in [Span::AcrossNodes, Span::SameNode] {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.span == span).collect();
            if rows.is_empty() {
                continue;
            }
            let mut cells = vec![self.header(span)];
            let mut last = "";
            for row in rows {
                let title = if row.case == last { "" } else { &row.case };
                last = &row.case;
                cells.push(self.cells(title, row));
            }
            text.push_str(&format!("\n{}", say::table(&cells)));
        }
        for Footprint { column, figures } in &self.footprints {
            let mut cells = vec![vec![format!("AT REST: {column}")]];
            cells.extend(
                figures.iter().map(|Figure { name, value }| vec![(*name).to_owned(), figure(*value)]),
            );
            text.push_str(&format!("\n{}", say::table(&cells)));
        }
        text
    }

    /// Everything, every sample included.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let report = json!({
            "unix_time": since.as_secs(),
            "kernel": read("/proc/sys/kernel/osrelease"),
            "cores": std::thread::available_parallelism()?.get(),
            "rounds": self.rounds,
            "seconds": self.length.as_secs(),
            "at_rest": self.footprints.iter().map(Footprint::json).collect::<serde_json::Map<_, _>>(),
            "results": self.rows.iter().map(|row| self.row_json(row)).collect::<Vec<_>>(),
        });
        Ok(fs::write(path, serde_json::to_string_pretty(&report)?)?)
    }

    fn header(&self, span: Span) -> Vec<String> {
        let mut header = vec![span.name().to_uppercase(), String::new()];
        header.extend(self.columns.iter().cloned());
        header.extend(self.columns.iter().skip(1).map(|column| format!("{column}/{}", self.columns[0])));
        header
    }

    fn cells(&self, title: &str, row: &Row) -> Vec<String> {
        let mut cells = vec![title.to_owned(), row.figure.to_owned()];
        cells.extend(row.samples.iter().map(|samples| {
            if samples.is_empty() {
                return "-".to_owned();
            }
            let [median, min, max] = summary(samples);
            format!("{} [{}..{}]", figure(median), figure(min), figure(max))
        }));
        let base = summary(&row.samples[0])[0];
        cells.extend(row.samples.iter().skip(1).map(|samples| match base {
            _ if samples.is_empty() => "-".to_owned(),
            0.0 => "-".to_owned(),
            base => format!("{:.2}", summary(samples)[0] / base),
        }));
        cells
    }

    fn row_json(&self, row: &Row) -> Value {
        let columns = self.columns.iter().zip(&row.samples).map(|(column, samples)| {
            let [median, min, max] = summary(samples);
            (column.clone(), json!({ "median": median, "min": min, "max": max, "samples": samples }))
        });
        json!({
            "span": row.span.name(), "case": row.case, "figure": row.figure,
            "columns": columns.collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// One measurement in a line.
pub fn brief(figures: &[Figure]) -> String {
    let shown = figures.iter().map(|Figure { name, value }| format!("{} {name}", figure(*value)));
    shown.collect::<Vec<_>>().join(", ")
}

/// Median, minimum, maximum.
pub fn summary(samples: &[f64]) -> [f64; 3] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted[..] {
        [] => [0.0; 3],
        [min, ..] => {
            let middle = sorted.len() / 2;
            let median = if sorted.len() % 2 == 1 {
                sorted[middle]
            } else {
                (sorted[middle - 1] + sorted[middle]) / 2.0
            };
            [median, min, sorted[sorted.len() - 1]]
        }
    }
}

/// Three digits that mean something.
fn figure(value: f64) -> String {
    match value.abs() {
        large if large >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        middle if middle >= 100.0 => format!("{value:.0}"),
        small if small >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(summary(&[3.0, 1.0, 2.0]), [2.0, 1.0, 3.0]);
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]), [2.5, 1.0, 4.0]);
        assert_eq!(summary(&[]), [0.0; 3]);
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!([26_912.0, 223.4, 22.51, 0.583].map(figure), ["26.9k", "223", "22.5", "0.58"]);
    }
}

//! Aligned columns for terminals.

use std::fmt::Write;

/// Lays out a heading and rows, two spaces between columns. Control characters are shown as `?`: what is printed came
/// over the network and must not drive the terminal.
pub fn table<'h>(heading: impl AsRef<[&'h str]>, rows: &[impl AsRef<[String]>]) -> String {
    let clean = |cell: &str| cell.replace(char::is_control, "?");
    let mut all: Vec<Vec<String>> = vec![heading.as_ref().iter().map(ToString::to_string).collect()];
    all.extend(rows.iter().map(|row| row.as_ref().iter().map(|cell| clean(cell)).collect()));
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..heading.as_ref().len()).map(width).collect();
    let mut text = String::new();
    for row in &all {
        let start = text.len();
        for (cell, &width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{cell:width$}  ");
        }
        text.truncate(start + text[start..].trim_end().len());
        text.push('\n');
    }
    text
}

/// `1.5 KiB`, `12 MiB`: three digits at most.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(value < 9.95);
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// `12s`, `3m04s`, `5h06m`, `2d03h`.
pub fn age(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m{:02}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h{:02}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn columns_are_aligned_and_control_characters_harmless() {
        let rows = [["a".to_owned(), "1".to_owned()], ["é\u{1b}[31m".to_owned(), String::new()]];
        expect![[r#"
            NAME    N
            a       1
            é?[31m
        "#]]
        .assert_eq(&table(["NAME", "N"], &rows));
    }

    #[test]
    fn figures_are_short() {
        let shown: Vec<_> = [0, 1023, 1024, 10_200, 1_023_999, 1 << 20, 5 << 30, u64::MAX].map(bytes).into();
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "10 KiB", "1.0 MiB", "1.0 MiB", "5.0 GiB", "16 EiB"]);
        let shown: Vec<_> = [-1.0, 59.9, 184.0, 18_360.0, 183_600.0, f64::MAX].map(age).into();
        assert_eq!(shown[..5], ["0s", "59s", "3m04s", "5h06m", "2d03h"]);
    }
}

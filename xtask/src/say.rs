//! What the tasks print.

/// Announces a step.
pub fn step(text: &str) {
    eprintln!("==> {text}");
}

/// A heading in the demo's output.
pub fn heading(text: &str) {
    println!("\n{text}\n{}", "─".repeat(text.chars().count()));
}

/// A command as one could paste it, and what it printed.
pub fn shown(command: &str, output: &str) {
    println!("$ {command}");
    for line in output.trim_end().lines() {
        println!("    {}", line.trim_end());
    }
    println!();
}

/// The first lines, and how many were left out.
pub fn head(text: &str, most: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut kept = lines[..lines.len().min(most)].join("\n");
    if lines.len() > most {
        kept.push_str(&format!("\n... {} more lines", lines.len() - most));
    }
    kept
}

/// Rows in columns as wide as they need be; the first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

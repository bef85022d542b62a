//! Cuts a file into its documents before any of them is parsed: a syntax error in one then leaves the others alone.

use super::decode::Syntax;
use crate::config::Position;

/// The text of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk<'a> {
    /// Lines of the file before it.
    pub(super) lines_before: u32,
    pub(super) text: &'a str,
}

impl Chunk<'_> {
    /// Where its first line with something in it is.
    pub(super) fn start(&self) -> Position {
        let blank = self.text.lines().take_while(|line| is_filler(line)).count() as u32;
        Position { line: self.lines_before + blank + 1, column: 1 }
    }
}

/// The documents of the file that have something in them.
pub(super) fn documents(text: &str, syntax: Syntax) -> Vec<Chunk<'_>> {
    if syntax == Syntax::Json {
        return json_documents(text);
    }
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut first_line = 0;
    let mut at = 0;
    // Whether the chunk at hand has content, and whether it has begun: without either there are only comments and
    // directives in it, which belong to what follows.
    let mut has_content = false;
    let mut has_begun = false;
    for (number, line) in (0u32..).zip(text.split_inclusive('\n')) {
        let content = line.trim_end();
        // At the start of a line these end a document in every context, block scalars and quotes included (YAML 1.2.2,
        // section 9.1.4).
        if is_marker(content, "---") {
            if has_content {
                chunks.push(Chunk { lines_before: first_line, text: &text[start..at] });
            }
            if has_content || has_begun {
                (start, first_line, has_content) = (at, number, false);
            }
            has_begun = true;
        }
        at += line.len();
        has_content |= !is_filler(content);
        if is_marker(content, "...") {
            if has_content {
                chunks.push(Chunk { lines_before: first_line, text: &text[start..at] });
            }
            (start, first_line, has_content, has_begun) = (at, number + 1, false, false);
        }
    }
    if has_content {
        chunks.push(Chunk { lines_before: first_line, text: &text[start..] });
    }
    chunks
}

/// JSON has no marker between documents: they follow each other, and what follows an error cannot be told apart.
fn json_documents(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    loop {
        let outcome = stream.next();
        let end = if matches!(outcome, Some(Ok(_))) { stream.byte_offset() } else { text.len() };
        let chunk = &text[start..end];
        if !chunk.trim().is_empty() {
            // From the start of a line, so that columns are those of the file.
            let lines_before = text[..start].matches('\n').count() as u32;
            chunks.push(Chunk { lines_before, text: chunk });
        }
        if !matches!(outcome, Some(Ok(_))) {
            return chunks;
        }
        start = end;
    }
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
}

fn is_filler(line: &str) -> bool {
    let line = line.trim();
    let line = line.strip_prefix("---").unwrap_or(line).trim_start();
    line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "..."
}

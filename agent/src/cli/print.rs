//! How a command ends: its output to stdout, its error to stderr, its exit code.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use super::connections::OutputFormat;

/// Prints what a command found, or why it found nothing.
pub fn outcome<E: Display>(outcome: Result<String, E>) -> ExitCode {
    match outcome {
        Ok(text) => and_exit(&text, 0),
        Err(error) => failed(&error),
    }
}

/// Prints what a command found, which its exit code says in short.
pub fn and_exit(text: &str, code: u8) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::from(code),
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(code),
        Err(error) => failed(&error),
    }
}

/// Prints a report in the form that is wanted, which its exit code says in short.
pub fn report<R: Serialize>(
    report: &R,
    output: OutputFormat,
    as_text: impl FnOnce(&R) -> String,
    code: u8,
) -> ExitCode {
    let text = match output {
        OutputFormat::Table => as_text(report),
        OutputFormat::Json => json(report),
    };
    and_exit(&text, code)
}

/// Indented JSON and a line end.
pub fn json(value: &impl Serialize) -> String {
    let json = serde_json::to_string_pretty(value).unwrap_or_else(|error| {
        // Nothing that is printed has a map with keys that are no strings.
        json!({ "error": error.to_string() }).to_string()
    });
    json + "\n"
}

fn failed(error: &impl Display) -> ExitCode {
    eprintln!("undermesh: {error}");
    ExitCode::FAILURE
}

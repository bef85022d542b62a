//! How a command ends: its output to stdout, its error to stderr, its exit code.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

/// Prints what a command found, or why it found nothing.
pub fn outcome<E: Display>(outcome: Result<String, E>) -> ExitCode {
    match outcome {
        Ok(text) => match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
            Ok(()) => ExitCode::SUCCESS,
            // The reader has seen enough (`| head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Err(error) => failed(&error),
    }
}

/// Indented JSON and a line end.
pub fn json(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn failed(error: &impl Display) -> ExitCode {
    eprintln!("undermesh: {error}");
    ExitCode::FAILURE
}

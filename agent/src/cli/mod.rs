//! The user's commands.

use std::process::ExitCode;

/// Entry point of the `undermesh` binary.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}

//! The user's commands.

mod admin_client;
pub mod connections;
mod print;
pub mod status;
mod table;

use std::process::ExitCode;

/// Entry point of the `undermesh` binary.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}

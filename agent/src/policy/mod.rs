//! What is let in: facts about who asks for what, and a verdict with its reason.
//!
//! Pure: the time is an argument, and whoever asks does what the verdict says.

pub mod authorization;
pub mod jwt;
mod rate;

pub use rate::{Admission, Limits, Standing, admit};

//! End-to-end tests: real programs in the lab's pods, on this machine's kernel.
//!
//! They need root, so plain `cargo test` skips them; `cargo xtask test` runs them.

mod crash;
mod enrolment;
mod kernel;
mod kit;
mod lab;
mod services;

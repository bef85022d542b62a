//! Documents in, [`Snapshot`](crate::snapshot::Snapshot) out, and what was rejected and why.
//!
//! This module knows the Kubernetes types, but not where a document came from (a directory, the API server): that
//! is `discovery`. It never reads a file, a socket or a clock.

mod compiler;
pub mod document;
mod referred;
mod rejection;
pub mod resolve;

pub(crate) use compiler::claims::{Claimant, Claims, Rank};
pub use compiler::{Change, Compiler, Defaults};
pub use document::{Custom, Document, Key, Kind};
pub use referred::Referred;
pub use rejection::{FieldPath, Position, Problem, Rejection, Segment};

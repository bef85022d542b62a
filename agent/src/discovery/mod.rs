//! Where documents come from.

pub mod directory;

//! `cargo xtask crds`: what API servers are told of our own kinds.
//!
//! They are made of the types that the agent reads the kinds by, which tests of the agent do: with another file they fail, and
//! told to update they write. From there they go where Kustomize finds them.

use anyhow::Result;

use crate::command::{cargo, run};
use crate::manifests;

/// Each of our kinds has one of this name.
const TESTS: &str = "crd::the_file_is_what_the_types_say";

/// Writes the CustomResourceDefinitions.
pub fn write() -> Result<()> {
    let mut test = cargo();
    test.args(["test", "--quiet", "--package", "undermesh", "--lib", "--", TESTS]);
    test.env("UPDATE_EXPECT", "1");
    run(test)?;
    manifests::write_crds()
}

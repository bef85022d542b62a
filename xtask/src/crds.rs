//! `cargo xtask crds`: what API servers are told of our own kinds.
//!
//! They are made of the types that the agent reads the kinds by, which a test of the agent does: with another file it fails, and
//! told to update it writes. From there they go where Kustomize finds them.

use anyhow::Result;

use crate::command::{cargo, run};
use crate::manifests;

const TEST: &str = "config::document::policy::crd::the_file_is_what_the_types_say";

/// Writes the CustomResourceDefinitions.
pub fn write() -> Result<()> {
    let mut test = cargo();
    test.args(["test", "--quiet", "--package", "undermesh", "--lib", "--", "--exact", TEST]);
    test.env("UPDATE_EXPECT", "1");
    run(test)?;
    manifests::write_crds()
}

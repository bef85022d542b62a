//! Tests on a real Kubernetes, which each makes for itself. They need root, Go and some minutes: `cargo xtask e2e` runs
//! them.

mod absence;
mod access;
mod attacker;
mod conformance;
mod endurance;
mod existing;
mod failures;
mod installed;
mod killed;
mod kinds;
mod kit;
mod kustomize;
mod mesh;
mod pods;
mod policies;
mod restarts;
mod scale;
mod security;
mod status;

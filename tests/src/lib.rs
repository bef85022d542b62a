//! What the tests, the demo and the benchmark share: a lab of nodes and pods on one machine, certificates, and the
//! rules by which a test that cannot run here skips.

pub mod cluster;
pub mod envoy;
pub mod issuer;
pub mod istiod;
pub mod lab;
pub mod pki;
pub mod require;

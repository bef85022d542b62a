//! End-to-end tests: real programs in the lab's pods, on this machine's kernel.
//!
//! They need root, so plain `cargo test` skips them; `cargo xtask test` runs them.

mod access;
mod attacker;
mod attacks;
mod backend_tls;
mod commands;
mod conformance;
mod crash;
mod endings;
mod enrolment;
mod envoy;
mod garbled;
mod grpc;
mod h2spec;
mod handshakes;
mod http;
mod informational;
mod inner;
mod intruders;
mod istiod;
mod kernel;
mod kit;
mod lab;
mod leaks;
mod limits;
mod mesh;
mod names;
mod network_policies;
mod own;
mod ports;
mod preflight;
mod probes;
mod programs;
mod rates;
mod refusals;
mod replaced;
mod requests;
mod resilience;
mod routes;
mod same_node;
mod services;
mod soak;
mod sockets;
mod telemetry;
mod tokens;
mod traces;
mod traffic;
mod transfers;
mod trust_domains;
mod tunnel;
mod tunnel_identity;
mod tunnel_life;
mod websocket;

use undermesh_tests::pki;

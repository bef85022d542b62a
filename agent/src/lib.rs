//! Undermesh: a service mesh that lives under the pods.
//!
//! One module per stage of a connection's way through the agent; `docs/architecture.md` has the map and the
//! arrows between the modules, which a test enforces.

pub mod admin;
pub mod agent;
pub mod balance;
pub mod capture;
pub mod cli;
pub mod config;
pub mod controller;
pub mod discovery;
mod folders;
pub mod identity;
pub mod jwks;
pub mod kubernetes;
pub mod model;
pub mod policy;
pub mod proxy;
mod replace;
pub mod route;
mod sentence;
pub mod snapshot;
pub mod telemetry;
mod web_roots;

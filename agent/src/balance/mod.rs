//! Which endpoint a connection or request goes to, and whether it may go there again.
//!
//! Pure: no clock, no socket and no log; time and randomness are arguments, and a refusal carries its reason.

mod affinity;
pub mod budget;
mod candidates;
pub mod caps;
mod hashing;
pub mod latency;
pub mod outlier;
mod select;
mod slow_start;
pub mod success_rate;
#[cfg(test)]
mod tests;

pub use affinity::AffinityTable;
pub use candidates::{Topology, candidates};
pub use hashing::{hash, hash_address};
pub use select::{Carries, NoEndpoint, NoEndpointReason, Request, kept, select};

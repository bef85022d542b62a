//! Which endpoint a connection or request goes to, and whether it may go there again.
//!
//! Pure: no clock, no socket and no log; time and randomness are arguments, and a refusal carries its reason.

mod affinity;
pub mod budget;
mod candidates;
pub mod latency;
pub mod outlier;
mod select;
#[cfg(test)]
mod tests;

pub use affinity::AffinityTable;
pub use candidates::candidates;
pub use select::{Carries, MOST_WAITING, NoEndpoint, NoEndpointReason, Request, kept, select};

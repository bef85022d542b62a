//! Who may do what with a workload: what AuthorizationPolicies say, in the terms of the decision.
//!
//! Where the policies come from, and which workload each is for, is not known here; nor is any header an identity.

mod considered;
mod decision;
mod expression;
mod facts;
mod index;
mod keys;
mod matching;
mod members;
mod nearest;
mod never;
mod path;
mod ports;
mod rule;
mod set;
#[cfg(test)]
mod tests;

pub use considered::{Considered, Found};
pub use decision::{Decision, NearMiss, OnConnection, Outcome, RuleRef, Verdict};
pub use expression::Expression;
pub use facts::{Connection, Request};
pub use never::{Never, NeverWhy};
pub use path::{EscapedSlashes, PathNormalisation, Refused, normalise};
pub use rule::{
    Action, Applied, Condition, GrpcMethod, Matcher, Operation, PathPattern, Pattern, Policy, Rule, Segment,
    ServiceAccount, Source,
};
pub use set::Set;

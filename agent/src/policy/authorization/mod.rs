//! Who may do what with a workload: what AuthorizationPolicies say, in the terms of the decision.
//!
//! Where the policies come from, and which workload each is for, is not known here; nor is any header an identity.

mod rule;

pub use rule::{
    Access, Action, Applied, Condition, GrpcMethod, Matcher, Operation, PathPattern, Pattern, Policy, Rule,
    Segment, ServiceAccount, Source,
};

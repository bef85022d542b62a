//! Which rule a request goes by, where that sends it, and what the rule's filters make of the request and its answer.
//!
//! Pure: no clock, no socket and no log; randomness is an argument. It does not know how a route was written (`config` does),
//! nor who asks and how a request is carried (`proxy` does).

mod filter;
mod hostname;
mod matching;
mod rule;
mod services;
mod table;
mod tls;

pub use filter::{
    AllowedHeaders, AllowedMethods, Cors, Filters, HeaderModifier, Mirror, Origin, PathModifier, Redirect,
    UrlRewrite,
};
pub use hostname::{Hostname, HostnameError};
pub use matching::{
    HeaderMatch, Match, PathMatch, Pattern, PatternError, QueryMatch, RequestHead, ValueMatch,
};
pub use rule::{Backend, InvalidBackend, Retry, RouteKind, RouteRef, Rule, Target, TimeLimit, Timeouts};
pub use services::{Audience, PortRoutes, ServiceRoutes, Table};
pub use table::{HttpTable, Matched, RouteRules};
pub use tls::TlsTable;

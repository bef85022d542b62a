//! How a Service port wants its connections and requests treated, and how they are where it says nothing.
//!
//! Values alone: what follows from them is for `balance`, `policy` and `proxy` to know.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};

use super::{BackendTls, Name, SessionPersistence};

/// What policies say of a Service port, and what holds where none does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrafficSettings {
    /// Which endpoint a request or connection goes to.
    pub balancing: Balancing,
    /// When an endpoint is left alone.
    pub outliers: Outliers,
    /// How much may be under way.
    pub caps: Caps,
    /// Whether and how often what failed is sent again.
    pub retries: RetrySettings,
    /// How long things may take.
    pub timeouts: TrafficTimeouts,
    /// How much each endpoint takes; enforced at its own node.
    pub rate_limits: Vec<RateLimit>,
    /// What goes wrong on purpose; the first that takes a request is the one.
    pub faults: Vec<Fault>,
    /// Whether the requests of one session go to one endpoint. A route's own `sessionPersistence` wins.
    pub session: Option<SessionPersistence>,
    /// How requests travel to the endpoints in TLS, where they do; an error is why none can be sent.
    pub tls: Option<Result<Arc<BackendTls>, Name>>,
    /// Who says so, for people: `TrafficPolicy shop/web`.
    pub policies: Vec<Name>,
}

/// Which endpoint a request or connection goes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Balancing {
    /// How one is chosen.
    pub algorithm: Algorithm,
    /// In this time an endpoint that is new comes to have its full share; zero: at once. Hashes take no notice of it.
    pub slow_start: Duration,
    /// Where the Service keeps to what is near: with less than this share of the near endpoints fit to be used, in percent, those
    /// that are further away are used too. 0: only when none is.
    pub spill_over_below: u8,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Of two at random, the one with the lower moving average of its answers' time, times what it has to do; connections by how many
    /// are open.
    PeakEwma,
    /// Of two at random, the one with fewer requests and connections open.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// By a hash of the request, so that alike requests go to one endpoint for as long as it is there (Maglev, NSDI 2016). The first of
    /// these that a request has is the one that counts; one that has none goes to any. Connections have an address alone.
    ConsistentHash(Vec<HashKey>),
}

/// What of a request is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// The value of this header.
    Header(HeaderName),
    /// The value of this cookie.
    Cookie(Name),
    /// The value of this parameter of the query.
    Query(Name),
    /// The client's address.
    SourceAddress,
}

/// When an endpoint is left alone for a while.
#[derive(Clone, Debug, PartialEq)]
pub struct Outliers {
    /// Answers of the kind 5xx in a row, gateway failures among them; 0: never for these.
    pub consecutive_errors: u32,
    /// Gateway errors and failed connections in a row; 0: never for these, nor for a connection that is refused.
    pub consecutive_gateway_failures: u32,
    /// By how the endpoint does beside the others; None: never for this.
    pub success_rate: Option<SuccessRate>,
    /// The first ejection; the second takes twice as long, the third three times.
    pub base_ejection: Duration,
    /// No ejection takes longer.
    pub longest_ejection: Duration,
    /// At most this share of the endpoints is ejected, in percent.
    pub most_ejected: u8,
    /// When more than this share is ejected nevertheless, in percent, all count. 100: never.
    pub panic_above: u8,
}

/// An endpoint is an outlier if it answers well less often than others of its port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuccessRate {
    /// Looked at this often.
    pub interval: Duration,
    /// Endpoints with fewer requests in the interval say nothing, and nothing is said of them.
    pub least_requests: u32,
    /// Nor is anything said with fewer endpoints than this.
    pub least_endpoints: u32,
    /// Below the mean by this many standard deviations, in thousandths, and by five of a hundred answers.
    pub deviations: u32,
}

/// How much may be under way from one node to one Service port. None: as much as comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Connections, whatever they carry; those that carry requests are the agent's own to the endpoints.
    pub connections: Option<u32>,
    /// Requests, from their head to the end of their answer.
    pub requests: Option<u32>,
    /// Requests that wait for their answer to begin, at each endpoint.
    pub pending: Option<u32>,
    /// Requests that are being sent again.
    pub retries: Option<u32>,
}

/// Whether and how often a request is sent again that failed. A route's own `retry` wins over all but the budget.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RetrySettings {
    /// At most so often; 0: not at all.
    pub attempts: u32,
    /// The answers that count as failures, beside a connection that fails or breaks off, which always does.
    pub codes: Vec<StatusCode>,
    /// Requests that are not idempotent are sent again, too (RFC 9110, section 9.2.2).
    pub any_method: bool,
    /// At least so long between two attempts.
    pub backoff: Option<Duration>,
    /// How many retries there may be in all.
    pub budget: RetryBudget,
}

/// How many requests may be sent again, of one node to one Service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// So many of 100 that were answered well.
    pub percent: u32,
    /// And so many a second, whatever happens.
    pub per_second: f64,
    /// What is not used of the share is saved up for so long.
    pub interval: Duration,
}

/// How long things may take. None: for ever, but where something else is said. A route's own `timeouts` win.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficTimeouts {
    /// From a request to the end of its answer, all attempts together; of gRPC to the answer's beginning, for streams last.
    pub request: Option<Duration>,
    /// One attempt.
    pub per_try: Option<Duration>,
    /// A connection on which nothing moves, in either direction; of one that carries requests, while none of them is under way.
    pub idle: Option<Duration>,
    /// The making of a connection; None: what the agent has for all.
    pub connect: Option<Duration>,
}

/// How much an endpoint takes, of all together or of each source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// What is counted.
    pub of: Limited,
    /// So many ...
    pub count: u32,
    /// ... in this time ...
    pub per: Duration,
    /// ... and at most so many at once.
    pub burst: u32,
    /// Who shares it.
    pub by: SharedBy,
}

/// What a rate limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited {
    /// HTTP requests.
    Requests,
    /// Connections, whatever they carry.
    Connections,
}

/// Who shares a rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedBy {
    /// All together, each source that asks with an equal share of it, and with what the others leave.
    Everyone,
    /// Each source has all of it for itself.
    Source,
}

/// What goes wrong on purpose.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Requests with all of these headers; any, if there are none.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// So many of 100 of these.
    pub percent: f64,
    /// Waits for so long first.
    pub delay: Option<Duration>,
    /// Answers with this, and asks nobody.
    pub abort: Option<StatusCode>,
}

impl Default for Balancing {
    fn default() -> Self {
        Self { algorithm: Algorithm::PeakEwma, slow_start: Duration::from_secs(10), spill_over_below: 0 }
    }
}

impl Default for Outliers {
    fn default() -> Self {
        Self {
            consecutive_errors: 5,
            consecutive_gateway_failures: 5,
            success_rate: None,
            base_ejection: Duration::from_secs(10),
            longest_ejection: Duration::from_secs(300),
            most_ejected: 50,
            panic_above: 50,
        }
    }
}

impl Default for SuccessRate {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), least_requests: 100, least_endpoints: 5, deviations: 1_900 }
    }
}

impl Default for Caps {
    fn default() -> Self {
        Self { connections: None, requests: None, pending: Some(1_024), retries: None }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: 20, per_second: 3.0, interval: Duration::from_millis(500) }
    }
}

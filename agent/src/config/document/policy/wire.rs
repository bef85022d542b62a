//! The spec of a TrafficPolicy as it is written. From these types comes its CustomResourceDefinition, and from their comments what
//! `kubectl explain` says; what a type does not tell stands in `crd`.
//!
//! What is one of a few words is text, and numbers are wide, as in routes: what is wrong gets a message of its own.

#[cfg(test)]
use schemars::JsonSchema;
use serde::Deserialize;

/// How the Services that are named, or single ports of them, want their connections and requests treated. What is not said stays as
/// it is without a policy.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    /// The Services, all of the policy's own namespace. Of two policies for a port, one with sectionName wins over one without,
    /// and else the older one.
    pub(super) target_refs: Vec<TargetRef>,
    /// Which endpoint a request or connection goes to.
    pub(super) load_balancing: Option<LoadBalancing>,
    /// When an endpoint is left alone for a while.
    pub(super) outlier_detection: Option<OutlierDetection>,
    /// How much may be under way from each node.
    pub(super) limits: Option<Limits>,
    /// Whether and how often what failed is sent again. A route's own `retry` wins over all of it but the budget.
    pub(super) retry: Option<Retry>,
    /// How long things may take. A route's own `timeouts` win.
    pub(super) timeouts: Option<Timeouts>,
    /// How much each endpoint takes; its own node holds callers to that. All of these hold at once.
    pub(super) rate_limits: Option<Vec<RateLimit>>,
    /// What goes wrong on purpose, to see how clients bear it. The first that takes a request is the one.
    pub(super) faults: Option<Vec<Fault>>,
}

/// A Service of the policy's own namespace.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct TargetRef {
    /// Empty, for Services are of the core group.
    pub(super) group: String,
    /// Service.
    pub(super) kind: String,
    /// The name of the Service.
    pub(super) name: String,
    /// The name of one of its ports. Without it all of them are meant.
    pub(super) section_name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct LoadBalancing {
    /// How an endpoint is chosen. PeakEWMA unless given: of two at random the one that answers sooner and has less to do.
    /// LeastRequest: of two at random the one with less to do. RoundRobin: one after the other. Random: any. ConsistentHash: by a
    /// hash of the request. `sessionAffinity: ClientIP` of the Service wins over all of them.
    pub(super) algorithm: Option<String>,
    /// In this time an endpoint that is new comes to have its full share. 10s unless given; 0s: at once.
    pub(super) slow_start: Option<String>,
    /// Where the Service's trafficDistribution prefers what is near: with less than this share of the near endpoints fit to be
    /// used, in percent, those further away are used too. 0 unless given: only when none is.
    pub(super) spill_over_below: Option<i64>,
    /// What of a request is hashed: the first of these that it has. A request that has none goes to any endpoint. For
    /// ConsistentHash, and for nothing else.
    pub(super) hash_on: Option<Vec<HashOn>>,
}

/// What is hashed: one of these.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct HashOn {
    /// The value of the header of this name.
    pub(super) header: Option<String>,
    /// The value of the cookie of this name.
    pub(super) cookie: Option<String>,
    /// The value of the parameter of the query of this name.
    pub(super) query: Option<String>,
    /// The client's address, which connections that are not HTTP have, too.
    pub(super) source_address: Option<SourceAddress>,
}

/// Nothing more to say.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct SourceAddress {}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct OutlierDetection {
    /// So many answers of the kind 5xx in a row, gateway errors among them. 5 unless given; 0: never for these.
    pub(super) consecutive_errors: Option<i64>,
    /// So many gateway errors (502, 503, 504) and failed connections in a row. 5 unless given; 0: never for these,
    /// nor for a single connection that is refused, which else is enough for a second.
    pub(super) consecutive_gateway_failures: Option<i64>,
    /// For answering well less often than the other endpoints do. Never for this unless given; `{}` takes the defaults.
    pub(super) success_rate: Option<SuccessRate>,
    /// How long the first ejection takes; the second takes twice as long, the third three times. 10s unless given.
    pub(super) base_ejection: Option<String>,
    /// No ejection takes longer. 5m unless given.
    pub(super) max_ejection: Option<String>,
    /// At most this share of the endpoints is ejected, in percent. 50 unless given.
    pub(super) max_ejected_percent: Option<i64>,
    /// When more than this share is ejected nevertheless, in percent, all of them are used. 50 unless given; 100: never.
    pub(super) panic_percent: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct SuccessRate {
    /// How often it is looked at. 10s unless given.
    pub(super) interval: Option<String>,
    /// Endpoints with fewer requests in the interval are not looked at. 100 unless given.
    pub(super) min_requests: Option<i64>,
    /// Nothing is said with fewer endpoints than this. 5 unless given.
    pub(super) min_endpoints: Option<i64>,
    /// An endpoint is an outlier so many standard deviations below the mean, as a decimal number. "1.9" unless given.
    pub(super) deviations: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Limits {
    /// Connections from one node to the port. As many as come unless given.
    pub(super) max_connections: Option<i64>,
    /// Requests under way from one node to the port. As many as come unless given.
    pub(super) max_requests: Option<i64>,
    /// Requests from one node that wait for their answer to begin, at each endpoint. 1024 unless given.
    pub(super) max_pending_requests: Option<i64>,
    /// Requests that one node is sending again. As many as the budget has unless given.
    pub(super) max_retries: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Retry {
    /// At most so many attempts after the first. Unless given nothing is sent again.
    pub(super) attempts: Option<i64>,
    /// The answers that count as failures, beside a connection that fails or breaks off, which always does.
    pub(super) codes: Option<Vec<i64>>,
    /// Whether requests that are not idempotent, such as POST, are sent again, too.
    pub(super) any_method: Option<bool>,
    /// At least so long between two attempts, and up to twice that. 25ms unless given.
    pub(super) backoff: Option<String>,
    /// How many retries there may be in all, of one node to the Service.
    pub(super) budget: Option<Budget>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Budget {
    /// So many of 100 requests that were answered well. 20 unless given.
    pub(super) percent: Option<i64>,
    /// And so many a second, whatever happens. 3 unless given.
    pub(super) per_second: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Timeouts {
    /// From a request to the beginning of its answer, all attempts together. For ever unless given, and with 0s.
    pub(super) request: Option<String>,
    /// One attempt. For ever unless given, and with 0s.
    pub(super) per_try: Option<String>,
    /// A connection on which nothing moves in either direction is closed after this. Never unless given, and with 0s.
    pub(super) idle: Option<String>,
    /// The making of a connection. What the agent has for all unless given.
    pub(super) connect: Option<String>,
}

/// Either requests or connections.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct RateLimit {
    /// So many HTTP requests in the time.
    pub(super) requests: Option<i64>,
    /// So many connections in the time, whatever they carry.
    pub(super) connections: Option<i64>,
    /// The time.
    pub(super) per: String,
    /// At most so many at once. As many as in the time unless given.
    pub(super) burst: Option<i64>,
    /// Who shares it. Everyone unless given: all together, each source with an equal share and with what others leave. Source:
    /// each source has all of it for itself.
    pub(super) by: Option<String>,
}

/// At least one of delay and abort.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Fault {
    /// Which requests. All unless given.
    #[serde(rename = "match")]
    pub(super) matching: Option<FaultMatch>,
    /// So many of 100 of these. All unless given.
    pub(super) percent: Option<f64>,
    /// They wait for so long first.
    pub(super) delay: Option<String>,
    /// They are answered with this, and reach nobody.
    pub(super) abort: Option<Abort>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct FaultMatch {
    /// Requests with all of these headers.
    pub(super) headers: Option<Vec<Header>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Header {
    /// Its name.
    pub(super) name: String,
    /// Its whole value.
    pub(super) value: String,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Abort {
    /// The status of the answer.
    pub(super) status: i64,
}

//! The specs of routes as they are written (Gateway API 1.6, experimental channel; of older bundles what has
//! been renamed since). What they mean, and whether they may, is not known here.
//!
//! Kinds such as the types of a match are text, and numbers are wide: what is not among those that there are gets a message of
//! its own, which a type could not give.

use serde::Deserialize;
use serde_json::Value;

use super::super::session;

/// `spec` of an HTTPRoute or a GRPCRoute, with matches of this kind.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec<M> {
    pub(super) parent_refs: Option<Vec<ParentRef>>,
    /// Of gateways.
    #[serde(rename = "useDefaultGateways")]
    pub(super) _use_default_gateways: Option<String>,
    pub(super) hostnames: Option<Vec<String>>,
    pub(super) rules: Option<Vec<Rule<M>>>,
}

/// `spec` of a TLSRoute or a TCPRoute.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PlainSpec {
    pub(super) parent_refs: Option<Vec<ParentRef>>,
    /// Of gateways.
    #[serde(rename = "useDefaultGateways")]
    pub(super) _use_default_gateways: Option<String>,
    /// Of TLSRoutes alone.
    pub(super) hostnames: Option<Vec<String>>,
    pub(super) rules: Option<Vec<PlainRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PlainRule {
    pub(super) name: Option<String>,
    pub(super) backend_refs: Option<Vec<BackendRef>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ParentRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) section_name: Option<String>,
    pub(super) port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rule<M> {
    pub(super) name: Option<String>,
    pub(super) matches: Option<Vec<M>>,
    pub(super) filters: Option<Vec<Filter>>,
    pub(super) backend_refs: Option<Vec<BackendRef>>,
    /// Of HTTPRoutes alone.
    pub(super) timeouts: Option<Timeouts>,
    /// Of HTTPRoutes alone.
    pub(super) retry: Option<Retry>,
    pub(super) session_persistence: Option<session::Wire>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HttpMatch {
    pub(super) path: Option<PathMatch>,
    pub(super) headers: Option<Vec<NamedMatch>>,
    pub(super) query_params: Option<Vec<NamedMatch>>,
    pub(super) method: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct PathMatch {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) value: Option<String>,
}

/// A match of a header or of a parameter of the query.
#[derive(Debug, Deserialize)]
pub(super) struct NamedMatch {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) value: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct GrpcMatch {
    pub(super) method: Option<GrpcMethodMatch>,
    pub(super) headers: Option<Vec<NamedMatch>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct GrpcMethodMatch {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) service: Option<String>,
    pub(super) method: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) request_header_modifier: Option<HeaderModifier>,
    pub(super) response_header_modifier: Option<HeaderModifier>,
    pub(super) request_mirror: Option<Mirror>,
    pub(super) request_redirect: Option<Redirect>,
    pub(super) url_rewrite: Option<UrlRewrite>,
    pub(super) cors: Option<Cors>,
    pub(super) external_auth: Option<Value>,
    pub(super) extension_ref: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct HeaderModifier {
    pub(super) set: Option<Vec<Header>>,
    pub(super) add: Option<Vec<Header>>,
    pub(super) remove: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    pub(super) name: String,
    pub(super) value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mirror {
    pub(super) backend_ref: ObjectReference,
    pub(super) percent: Option<i64>,
    pub(super) fraction: Option<Fraction>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Fraction {
    pub(super) numerator: i64,
    pub(super) denominator: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Redirect {
    pub(super) scheme: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
    pub(super) port: Option<i64>,
    pub(super) status_code: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct UrlRewrite {
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PathModifier {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) replace_full_path: Option<String>,
    pub(super) replace_prefix_match: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cors {
    pub(super) allow_origins: Option<Vec<String>>,
    pub(super) allow_credentials: Option<bool>,
    pub(super) allow_methods: Option<Vec<String>>,
    pub(super) allow_headers: Option<Vec<String>>,
    pub(super) expose_headers: Option<Vec<String>>,
    pub(super) max_age: Option<i64>,
}

/// Not [`ObjectReference`] with more fields: flattened ones hide from the report of unknown fields.
#[derive(Debug, Deserialize)]
pub(super) struct BackendRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) port: Option<i64>,
    pub(super) weight: Option<i64>,
    pub(super) filters: Option<Vec<Filter>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ObjectReference {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Timeouts {
    pub(super) request: Option<String>,
    pub(super) backend_request: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Retry {
    pub(super) codes: Option<Vec<i64>>,
    pub(super) attempts: Option<i64>,
    pub(super) backoff: Option<String>,
}

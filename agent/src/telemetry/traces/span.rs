//! What a request is as a span: its names and values are those of OpenTelemetry's conventions for HTTP, and our own beside them.
//!
//! `docs/traces.md` lists them. `url.full` is left out, and queries with it: they carry secrets.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use ::http::Version;
use ::http::uri::Authority;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};

use super::context::TraceContext;
use super::{Lineage, Part, RequestTrace};
use crate::telemetry::http::is_named;
use crate::telemetry::{HttpRequest, Peer, Reporter, RequestEnd};

/// OTLP: the flags say whether the parent is another process's, and it is.
const PARENT_IS_REMOTE: u32 = 0x100 | 0x200;

/// The span of a request that ended `at` this time, if one is recorded.
pub(super) fn of(request: &HttpRequest, at: SystemTime) -> Option<Span> {
    let RequestTrace { context, part: Part::Recorded(lineage) } = request.trace.as_ref()? else {
        return None;
    };
    let TraceContext { trace, parent: own, flags } = context;
    let Lineage { parent, state } = &**lineage;
    let error = error(request);
    Some(Span {
        trace_id: trace.0.get().to_be_bytes().to_vec(),
        span_id: own.0.get().to_be_bytes().to_vec(),
        trace_state: state.clone(),
        parent_span_id: parent.map(|parent| parent.0.get().to_be_bytes().to_vec()).unwrap_or_default(),
        flags: u32::from(*flags) | if parent.is_some() { PARENT_IS_REMOTE } else { 0x100 },
        name: name(request),
        kind: match request.facts.reporter {
            Reporter::Source => SpanKind::Client,
            Reporter::Destination => SpanKind::Server,
        }
        .into(),
        start_time_unix_nano: nanoseconds(at.checked_sub(request.duration).unwrap_or(at)),
        end_time_unix_nano: nanoseconds(at),
        attributes: attributes(request, error.as_deref()),
        status: error.map(|_| Status { code: StatusCode::Error.into(), message: String::new() }),
        ..Span::default()
    })
}

/// `GET shop/orders`: what was asked for, and the route that it fell under.
fn name(request: &HttpRequest) -> String {
    let method = if is_named(&request.method) { request.method.as_str() } else { "HTTP" };
    match &request.route {
        Some(route) => format!("{method} {}", route.id),
        None => method.to_owned(),
    }
}

/// What the span failed by, if it did: our reason, else the answer's status. What the client did wrong is no failure of the server.
fn error(request: &HttpRequest) -> Option<Cow<'static, str>> {
    let is_own = !matches!(request.end, RequestEnd::Done | RequestEnd::Redirected | RequestEnd::Preflight);
    let is_client = request.facts.reporter == Reporter::Source;
    // Of gRPC, what its own conventions call the server's failures.
    let is_servers = |code| matches!(code, 2 | 4 | 12..=15);
    match (request.status, request.grpc_status) {
        (Some(400..500), _) if !is_client => None,
        _ if is_own => Some(request.end.as_str().into()),
        (Some(status @ 500..), _) => Some(status.to_string().into()),
        (Some(status @ 400..), _) if is_client => Some(status.to_string().into()),
        (_, Some(code @ 1..)) if is_client || is_servers(code) => Some(format!("grpc_{code}").into()),
        _ => None,
    }
}

fn attributes(request: &HttpRequest, error: Option<&str>) -> Vec<KeyValue> {
    let facts = &request.facts;
    let mut out = Attributes(Vec::with_capacity(32));
    if is_named(&request.method) {
        out.text("http.request.method", request.method.as_str());
    } else {
        out.text("http.request.method", "_OTHER");
        out.text("http.request.method_original", request.method.as_str());
    }
    out.text("url.scheme", "http");
    out.text("url.path", &request.path);
    out.number("http.response.status_code", request.status);
    out.number("rpc.grpc.status_code", request.grpc_status);
    out.number("http.request.resend_count", request.attempts.checked_sub(1).filter(|again| *again > 0));
    out.text("network.protocol.name", "http");
    out.some("network.protocol.version", version(request.version));
    match request.authority.parse::<Authority>() {
        Ok(authority) => {
            out.text("server.address", authority.host());
            out.number("server.port", authority.port_u16().or(Some(facts.dialled.port())));
        }
        Err(_) => {
            out.text("server.address", facts.dialled.ip().to_string());
            out.number("server.port", Some(facts.dialled.port()));
        }
    }
    if let Some(upstream) = request.upstream {
        out.text("network.peer.address", upstream.ip().to_string());
        out.number("network.peer.port", Some(upstream.port()));
    }
    out.text("client.address", facts.source.address.ip().to_string());
    out.some("error.type", error);
    if let Some(route) = &request.route {
        out.text("undermesh.route", format!("{}/{}", route.kind, route.id));
        out.text("undermesh.rule", &*route.rule);
    }
    out.text("undermesh.reason", request.end.as_str());
    out.number("undermesh.attempts", Some(request.attempts));
    out.text("undermesh.security", facts.security.as_str());
    let names = ["workload", "namespace", "pod", "identity"].map(|name| format!("undermesh.source.{name}"));
    out.peer(names, &facts.source);
    let names =
        ["workload", "namespace", "pod", "identity"].map(|name| format!("undermesh.destination.{name}"));
    out.peer(names, &facts.destination);
    if let Some(service) = &facts.service {
        out.text("undermesh.destination.service", &*service.name);
        out.text("undermesh.destination.service.namespace", &*service.namespace);
    }
    out.0
}

fn version(version: Version) -> Option<&'static str> {
    match version {
        Version::HTTP_10 => Some("1.0"),
        Version::HTTP_11 => Some("1.1"),
        Version::HTTP_2 => Some("2"),
        _ => None,
    }
}

struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn push(&mut self, key: impl Into<String>, value: Value) {
        let value = Some(AnyValue { value: Some(value) });
        self.0.push(KeyValue { key: key.into(), value, ..KeyValue::default() });
    }

    fn text(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.push(key, Value::StringValue(value.into()));
    }

    fn some(&mut self, key: impl Into<String>, value: Option<&str>) {
        if let Some(value) = value {
            self.text(key, value);
        }
    }

    fn number(&mut self, key: &str, value: Option<impl Into<i64>>) {
        if let Some(value) = value {
            self.push(key, Value::IntValue(value.into()));
        }
    }

    fn peer(&mut self, [workload, namespace, pod, identity]: [String; 4], peer: &Peer) {
        if let Some(of) = &peer.workload {
            self.text(workload, &*of.workload);
            self.text(namespace, &*of.pod.namespace);
            self.text(pod, &*of.pod.name);
        }
        self.some(identity, peer.identity.as_deref());
    }
}

/// A text as an attribute of a resource.
pub(super) fn attribute(key: &str, value: &str) -> KeyValue {
    let mut one = Attributes(Vec::with_capacity(1));
    one.text(key, value);
    one.0.remove(0)
}

fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

//! The fields of a line. Their names are stable; `docs/metrics.md` lists them.

use std::fmt::{self, Display, Write};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;

use super::super::connection::{ConnectionFacts, Peer};
use super::super::http::{HttpRequest, RouteLabel};
use super::super::ruling::Ruling;
use super::{AccessLogFormat, AuditRecord, Message};

/// Appends the line and its end.
pub(super) fn write(message: &Message, format: AccessLogFormat, out: &mut String) {
    let line = match message {
        Message::Closed { connection, reason, duration, at } => Line {
            at: *at,
            outcome: "closed",
            reason: reason.as_str(),
            facts: &connection.facts,
            upstream: connection.facts.upstream,
            sent: connection.sent(),
            received: connection.received(),
            duration: *duration,
            ruling: connection.ruling(),
            request: None,
        },
        Message::Refused { facts, reason, at } => Line {
            at: *at,
            outcome: "refused",
            reason: reason.as_str(),
            facts,
            upstream: facts.upstream,
            sent: 0,
            received: 0,
            duration: Duration::ZERO,
            ruling: facts.ruling.as_deref(),
            request: None,
        },
        Message::Request { request, at } => Line {
            at: *at,
            outcome: "request",
            reason: request.end.as_str(),
            facts: &request.facts,
            upstream: request.upstream,
            sent: request.request_bytes,
            received: request.response_bytes,
            duration: request.duration,
            ruling: request.ruling.as_deref(),
            request: Some(request),
        },
        Message::Audit { record, at } => {
            let (facts, request) = match record {
                AuditRecord::Connection(facts) => (&**facts, None),
                AuditRecord::Request(request) => (&*request.facts, Some(&**request)),
            };
            let ruling = request.map_or(&facts.ruling, |request| &request.ruling).as_deref();
            let is_denied = ruling.is_some_and(|ruling| ruling.is_denied);
            Line {
                at: *at,
                outcome: if is_denied { "denied" } else { "allowed" },
                reason: "policy",
                facts,
                upstream: request.map_or(facts.upstream, |request| request.upstream),
                sent: request.map_or(0, |request| request.request_bytes),
                received: request.map_or(0, |request| request.response_bytes),
                duration: request.map_or(Duration::ZERO, |request| request.duration),
                ruling,
                request,
            }
        }
        Message::Flush(_) => return,
    };
    // Writing to a String cannot fail.
    let _ = match format {
        AccessLogFormat::Json => Json { out, first: true }.line(&line),
        AccessLogFormat::Text => Text { out, first: true }.line(&line),
    };
}

struct Line<'a> {
    at: SystemTime,
    outcome: &'static str,
    reason: &'static str,
    facts: &'a ConnectionFacts,
    upstream: Option<SocketAddr>,
    sent: u64,
    received: u64,
    duration: Duration,
    ruling: Option<&'a Ruling>,
    /// What a line has beside the fields of a connection's.
    request: Option<&'a HttpRequest>,
}

impl Line<'_> {
    fn visit(&self, fields: &mut impl Fields) -> fmt::Result {
        let facts = self.facts;
        match Timestamp::try_from(self.at) {
            Ok(at) => fields.text("time", Some(&format_args!("{at:.3}")))?,
            // A clock beyond the year 9999.
            Err(_) => fields.text("time", None::<&&str>)?,
        }
        fields.text("outcome", Some(&self.outcome))?;
        fields.text("reason", Some(&self.reason))?;
        fields.text("reporter", Some(&facts.reporter.as_str()))?;
        let names =
            ["source_workload", "source_namespace", "source_pod", "source_identity", "source_address"];
        peer(fields, names, &facts.source)?;
        let names = [
            "destination_workload",
            "destination_namespace",
            "destination_pod",
            "destination_identity",
            "destination_address",
        ];
        peer(fields, names, &facts.destination)?;
        fields.text("destination_service", facts.service.as_ref().map(|s| &s.name))?;
        fields.text("destination_service_namespace", facts.service.as_ref().map(|s| &s.namespace))?;
        fields.text("security", Some(&facts.security.as_str()))?;
        fields.text("dialled_address", Some(&facts.dialled))?;
        fields.text("client_address", Some(&facts.client))?;
        fields.text("upstream_address", self.upstream.as_ref())?;
        fields.number("sent_bytes", Some(&self.sent))?;
        fields.number("received_bytes", Some(&self.received))?;
        fields.number("duration_seconds", Some(&format_args!("{:.6}", self.duration.as_secs_f64())))?;
        ruling(fields, self.ruling)?;
        self.request.map_or(Ok(()), |of| request(fields, of))
    }
}

fn peer(fields: &mut impl Fields, names: [&'static str; 5], peer: &Peer) -> fmt::Result {
    let workload = peer.workload.as_ref();
    fields.text(names[0], workload.map(|w| &w.workload))?;
    fields.text(names[1], workload.map(|w| &w.pod.namespace))?;
    fields.text(names[2], workload.map(|w| &w.pod.name))?;
    fields.text(names[3], peer.identity.as_ref())?;
    fields.text(names[4], Some(&peer.address))
}

fn ruling(fields: &mut impl Fields, ruling: Option<&Ruling>) -> fmt::Result {
    let by = ruling.and_then(|ruling| ruling.by.as_ref());
    fields.text("policy", by.map(|(policy, _)| policy))?;
    fields.number("policy_rule", by.and_then(|(_, rule)| rule.as_ref()))?;
    fields.text("policy_detail", ruling.and_then(|ruling| ruling.detail.as_ref()))?;
    let audited = ruling.filter(|ruling| !ruling.audited.is_empty());
    fields.text("policy_audited", audited.map(|ruling| ruling.audited.join(", ")).as_ref())?;
    let tried = ruling.and_then(|ruling| ruling.tried.as_ref());
    let tried = tried.map(|(policy, tried)| format!("{} {policy}", tried.as_str()));
    fields.text("policy_dry_run", tried.as_ref())
}

fn request(fields: &mut impl Fields, request: &HttpRequest) -> fmt::Result {
    fields.text("method", Some(&request.method))?;
    fields.text("authority", Some(&request.authority))?;
    fields.text("path", Some(&request.path))?;
    fields.text("version", Some(&version(request.version)))?;
    fields.number("status", request.status.as_ref())?;
    fields.number("grpc_status", request.grpc_status.as_ref())?;
    let route = request.route.as_ref();
    match route {
        Some(RouteLabel { kind, id, .. }) => fields.text("route", Some(&format_args!("{kind}/{id}")))?,
        None => fields.text("route", None::<&&str>)?,
    }
    fields.text("rule", route.map(|route| &route.rule))?;
    match &request.backend {
        Some((service, port)) => fields.text("backend", Some(&format_args!("{service}:{port}")))?,
        None => fields.text("backend", None::<&&str>)?,
    }
    fields.text("detail", request.detail.as_ref())?;
    fields.number("attempts", Some(&request.attempts))?;
    fields.text("trace_id", request.trace.as_ref())
}

/// As people write it: HTTP/2 and 3 have no minor version.
fn version(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_09 => "HTTP/0.9",
        http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_11 => "HTTP/1.1",
        http::Version::HTTP_2 => "HTTP/2",
        http::Version::HTTP_3 => "HTTP/3",
        _ => "unknown",
    }
}

/// A form that a line can take.
trait Fields {
    fn text(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result;
    fn number(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result;
}

struct Json<'a> {
    out: &'a mut String,
    first: bool,
}

impl Json<'_> {
    fn line(mut self, line: &Line<'_>) -> fmt::Result {
        self.out.push('{');
        line.visit(&mut self)?;
        self.out.push_str("}\n");
        Ok(())
    }

    fn name(&mut self, name: &str) -> fmt::Result {
        let comma = if std::mem::take(&mut self.first) { "" } else { "," };
        write!(self.out, "{comma}\"{name}\":")
    }
}

impl Fields for Json<'_> {
    fn text(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result {
        self.name(name)?;
        match value {
            None => self.out.write_str("null"),
            Some(value) => {
                self.out.push('"');
                write!(JsonEscaped(self.out), "{value}")?;
                self.out.write_char('"')
            }
        }
    }

    fn number(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result {
        self.name(name)?;
        match value {
            None => self.out.write_str("null"),
            Some(value) => write!(self.out, "{value}"),
        }
    }
}

struct JsonEscaped<'a>(&'a mut String);

impl fmt::Write for JsonEscaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '"' | '\\' => self.0.extend(['\\', c]),
                // All control characters, those beyond ASCII too: terminals act on some of them.
                c if c.is_control() => write!(self.0, "\\u{:04x}", c as u32)?,
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

struct Text<'a> {
    out: &'a mut String,
    first: bool,
}

impl Text<'_> {
    fn line(mut self, line: &Line<'_>) -> fmt::Result {
        line.visit(&mut self)?;
        self.out.write_char('\n')
    }

    fn name(&mut self, name: &str) -> fmt::Result {
        let space = if std::mem::take(&mut self.first) { "" } else { " " };
        write!(self.out, "{space}{name}=")
    }
}

impl Fields for Text<'_> {
    fn text(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result {
        let Some(value) = value else { return Ok(()) };
        self.name(name)?;
        let start = self.out.len();
        write!(self.out, "{value}")?;
        let plain = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '"' | '=' | '\\');
        if self.out.len() == start || !self.out[start..].chars().all(plain) {
            let value = self.out.split_off(start);
            self.out.push('"');
            JsonEscaped(self.out).write_str(&value)?;
            self.out.push('"');
        }
        Ok(())
    }

    fn number(&mut self, name: &'static str, value: Option<&impl Display>) -> fmt::Result {
        let Some(value) = value else { return Ok(()) };
        self.name(name)?;
        write!(self.out, "{value}")
    }
}

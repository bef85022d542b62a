//! What the agent answers itself, where no upstream does: a status, why in RFC 9209's words, and for callers of gRPC in theirs.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};

use super::body::ResponseBody;
use crate::telemetry::{RefuseReason, RequestEnd};

static PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// A request that no upstream answers.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) end: RequestEnd,
    /// A sentence that names the culprit.
    pub(super) detail: String,
}

impl Refusal {
    pub(super) fn new(end: RequestEnd, detail: impl Into<String>) -> Self {
        Self { end, detail: detail.into() }
    }

    /// No endpoint could be reached.
    pub(super) fn unreached(reason: RefuseReason, towards: &dyn std::fmt::Display) -> Self {
        let end = match reason {
            RefuseReason::NoEndpoints | RefuseReason::UnknownPort | RefuseReason::UnknownDestination => {
                RequestEnd::NoEndpoints
            }
            RefuseReason::ConnectRefused | RefuseReason::AgentDown => RequestEnd::ConnectRefused,
            RefuseReason::ConnectTimeout => RequestEnd::ConnectTimeout,
            RefuseReason::Denied | RefuseReason::PlaintextRefused => RequestEnd::Denied,
            RefuseReason::ClientGone => RequestEnd::ClientGone,
            RefuseReason::Limit => RequestEnd::Limit,
            RefuseReason::Internal => RequestEnd::Internal,
            RefuseReason::ConnectUnreachable
            | RefuseReason::ConnectFailed
            | RefuseReason::HandshakeFailed
            | RefuseReason::NoCertificate
            | RefuseReason::ConnectReset => RequestEnd::ConnectFailed,
        };
        Self::new(end, format!("{towards}: {}", reason.as_str()))
    }

    /// The answer. Callers of gRPC read no status but their own (gRPC over HTTP/2, "Responses").
    pub(super) fn answer(&self, is_grpc: bool) -> Response<ResponseBody> {
        let words = Words::of(self.end);
        let mut response = Response::new(ResponseBody::Own(None));
        let headers = response.headers_mut();
        if let Some(value) = self.proxy_status(&words) {
            headers.insert(&PROXY_STATUS, value);
        }
        if is_grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(&GRPC_STATUS, HeaderValue::from(words.grpc));
            if let Ok(message) = HeaderValue::try_from(percent_encoded(&self.detail)) {
                headers.insert(&GRPC_MESSAGE, message);
            }
            return response;
        }
        let text = Bytes::from(format!("undermesh: {}\n", self.detail));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
        *response.status_mut() = words.status;
        *response.body_mut() = ResponseBody::Own(Some(text));
        response
    }

    fn proxy_status(&self, words: &Words) -> Option<HeaderValue> {
        // A string of RFC 8941 holds printable ASCII.
        let detail: String = self
            .detail
            .chars()
            .flat_map(|c| match c {
                '"' | '\\' => ['\\', c].into_iter().take(2),
                ' '..='~' => [c, ' '].into_iter().take(1),
                _ => ['?', ' '].into_iter().take(1),
            })
            .collect();
        HeaderValue::try_from(format!("undermesh; error={}; details=\"{detail}\"", words.error)).ok()
    }
}

/// How an end is told.
struct Words {
    status: StatusCode,
    /// RFC 9209, section 2.3.
    error: &'static str,
    /// https://grpc.github.io/grpc/core/md_doc_statuscodes.html
    grpc: u16,
}

impl Words {
    fn of(end: RequestEnd) -> Self {
        const UNKNOWN: u16 = 2;
        const DEADLINE_EXCEEDED: u16 = 4;
        const PERMISSION_DENIED: u16 = 7;
        const UNIMPLEMENTED: u16 = 12;
        const INTERNAL: u16 = 13;
        const UNAVAILABLE: u16 = 14;
        let (status, error, grpc) = match end {
            RequestEnd::NoRoute => (StatusCode::NOT_FOUND, "destination_not_found", UNIMPLEMENTED),
            RequestEnd::InvalidBackend | RequestEnd::NoBackend => {
                (StatusCode::INTERNAL_SERVER_ERROR, "proxy_configuration_error", UNAVAILABLE)
            }
            RequestEnd::NoEndpoints => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable", UNAVAILABLE)
            }
            RequestEnd::ConnectRefused => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_refused", UNAVAILABLE)
            }
            RequestEnd::ConnectTimeout => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_timeout", UNAVAILABLE)
            }
            RequestEnd::ConnectFailed => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_ip_unroutable", UNAVAILABLE)
            }
            RequestEnd::Limit | RequestEnd::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_limit_reached", UNAVAILABLE)
            }
            RequestEnd::UpstreamReset => (StatusCode::BAD_GATEWAY, "connection_terminated", UNAVAILABLE),
            RequestEnd::UpstreamTimeout | RequestEnd::RequestTimeout => {
                (StatusCode::GATEWAY_TIMEOUT, "http_response_timeout", DEADLINE_EXCEEDED)
            }
            RequestEnd::Denied => (StatusCode::FORBIDDEN, "http_request_denied", PERMISSION_DENIED),
            RequestEnd::BadRequest => (StatusCode::BAD_REQUEST, "http_request_error", INTERNAL),
            RequestEnd::Done
            | RequestEnd::Redirected
            | RequestEnd::Preflight
            | RequestEnd::ClientGone
            | RequestEnd::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "proxy_internal_error", UNKNOWN),
        };
        Self { status, error, grpc }
    }
}

/// `grpc-message` is percent-encoded (gRPC over HTTP/2, "Status-Message").
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Whether the caller speaks gRPC, by what it says its message is.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let rest = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    // `application/grpc-web` is another protocol.
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

//! What the agent answers itself, where no upstream does: a status, why in RFC 9209's words, and for callers of gRPC in theirs.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use http::{Response, StatusCode};

use super::body::ResponseBody;
use super::limit::TooSoon;
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
    /// Where it came too soon.
    pub(super) too_soon: Option<Box<TooSoon>>,
    /// Where it is not the usual one of its end.
    pub(super) status: Option<StatusCode>,
}

impl Refusal {
    pub(super) fn new(end: RequestEnd, detail: impl Into<String>) -> Self {
        Self { end, detail: detail.into(), too_soon: None, status: None }
    }

    /// No endpoint could be reached; `detail` is more than the reason says.
    pub(super) fn unreached(
        reason: RefuseReason,
        detail: Option<&str>,
        towards: &dyn std::fmt::Display,
    ) -> Self {
        let end = match reason {
            RefuseReason::NoEndpoints | RefuseReason::UnknownPort | RefuseReason::UnknownDestination => {
                RequestEnd::NoEndpoints
            }
            RefuseReason::ConnectRefused | RefuseReason::AgentDown => RequestEnd::ConnectRefused,
            RefuseReason::ConnectTimeout => RequestEnd::ConnectTimeout,
            RefuseReason::TlsFailed => RequestEnd::TlsFailed,
            RefuseReason::CertificateRefused => RequestEnd::CertificateRefused,
            RefuseReason::Denied | RefuseReason::PlaintextRefused => RequestEnd::Denied,
            RefuseReason::ClientGone => RequestEnd::ClientGone,
            RefuseReason::NoRoute => RequestEnd::NoRoute,
            RefuseReason::InvalidBackend => RequestEnd::InvalidBackend,
            RefuseReason::RateLimited => RequestEnd::RateLimited,
            RefuseReason::Overloaded => RequestEnd::Overloaded,
            RefuseReason::Limit => RequestEnd::Limit,
            RefuseReason::Internal => RequestEnd::Internal,
            RefuseReason::ConnectUnreachable
            | RefuseReason::ConnectFailed
            | RefuseReason::HandshakeFailed
            | RefuseReason::NoCertificate
            | RefuseReason::ConnectReset => RequestEnd::ConnectFailed,
        };
        Self::new(end, format!("{towards}: {}", detail.unwrap_or(reason.as_str())))
    }

    /// The answer. Callers of gRPC read no status but their own (gRPC over HTTP/2, "Responses").
    pub(super) fn answer(&self, is_grpc: bool) -> Response<ResponseBody> {
        let words = Words::of(self.end);
        let mut response = Response::new(ResponseBody::Own(None));
        let headers = response.headers_mut();
        if let Some(value) = self.proxy_status(&words) {
            headers.insert(&PROXY_STATUS, value);
        }
        if let Some(too_soon) = &self.too_soon {
            too_soon.tell(headers);
        }
        if self.end == RequestEnd::Unauthenticated {
            // RFC 6750, section 3.1.
            let challenge = HeaderValue::from_static("Bearer error=\"invalid_token\"");
            headers.insert(WWW_AUTHENTICATE, challenge);
        }
        if is_grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.extend(self.trailers());
            return response;
        }
        let text = Bytes::from(format!("undermesh: {}\n", self.detail));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
        *response.status_mut() = self.status.unwrap_or(words.status);
        *response.body_mut() = ResponseBody::Own(Some(text));
        response
    }

    /// What ends a call of gRPC.
    pub(super) fn trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        trailers.insert(&GRPC_STATUS, HeaderValue::from(Words::of(self.end).grpc));
        if let Ok(message) = HeaderValue::try_from(percent_encoded(&self.detail)) {
            trailers.insert(&GRPC_MESSAGE, message);
        }
        trailers
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
        const RESOURCE_EXHAUSTED: u16 = 8;
        const UNIMPLEMENTED: u16 = 12;
        const INTERNAL: u16 = 13;
        const UNAVAILABLE: u16 = 14;
        const UNAUTHENTICATED: u16 = 16;
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
            RequestEnd::TlsFailed => (StatusCode::BAD_GATEWAY, "tls_protocol_error", UNAVAILABLE),
            RequestEnd::CertificateRefused => (StatusCode::BAD_GATEWAY, "tls_certificate_error", UNAVAILABLE),
            RequestEnd::Limit | RequestEnd::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_limit_reached", UNAVAILABLE)
            }
            RequestEnd::RateLimited => {
                (StatusCode::TOO_MANY_REQUESTS, "http_request_denied", RESOURCE_EXHAUSTED)
            }
            RequestEnd::FaultInjected => {
                (StatusCode::SERVICE_UNAVAILABLE, "proxy_internal_response", UNAVAILABLE)
            }
            RequestEnd::UpstreamReset => (StatusCode::BAD_GATEWAY, "connection_terminated", UNAVAILABLE),
            RequestEnd::UpstreamTimeout | RequestEnd::RequestTimeout => {
                (StatusCode::GATEWAY_TIMEOUT, "http_response_timeout", DEADLINE_EXCEEDED)
            }
            RequestEnd::Denied => (StatusCode::FORBIDDEN, "http_request_denied", PERMISSION_DENIED),
            RequestEnd::Unauthenticated => (StatusCode::UNAUTHORIZED, "http_request_denied", UNAUTHENTICATED),
            RequestEnd::BadRequest => (StatusCode::BAD_REQUEST, "http_request_error", INTERNAL),
            RequestEnd::Done
            | RequestEnd::Redirected
            | RequestEnd::Preflight
            | RequestEnd::ClientGone
            | RequestEnd::Idle
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

#[cfg(test)]
mod tests {
    use super::*;

    fn header<'r>(response: &'r Response<ResponseBody>, name: &HeaderName) -> &'r str {
        response.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[test]
    fn a_refusal_tells_each_caller_in_its_own_words() {
        let check = |end, status: u16, error: &str, grpc: &str| {
            let refusal = Refusal::new(end, "shop/pay: why");
            let plain = refusal.answer(false);
            assert_eq!(plain.status(), status, "{end:?}");
            assert_eq!(
                header(&plain, &PROXY_STATUS),
                format!("undermesh; error={error}; details=\"shop/pay: why\"")
            );
            let called = refusal.answer(true);
            assert_eq!((called.status().as_u16(), header(&called, &GRPC_STATUS)), (200, grpc), "{end:?}");
            assert_eq!(header(&called, &GRPC_MESSAGE), "shop/pay: why");
        };
        check(RequestEnd::NoRoute, 404, "destination_not_found", "12");
        check(RequestEnd::InvalidBackend, 500, "proxy_configuration_error", "14");
        check(RequestEnd::NoEndpoints, 503, "destination_unavailable", "14");
        check(RequestEnd::TlsFailed, 502, "tls_protocol_error", "14");
        check(RequestEnd::CertificateRefused, 502, "tls_certificate_error", "14");
        check(RequestEnd::UpstreamReset, 502, "connection_terminated", "14");
        check(RequestEnd::RequestTimeout, 504, "http_response_timeout", "4");
        check(RequestEnd::Denied, 403, "http_request_denied", "7");
        check(RequestEnd::Unauthenticated, 401, "http_request_denied", "16");
        check(RequestEnd::BadRequest, 400, "http_request_error", "13");
    }

    #[test]
    fn whoever_shows_a_bad_token_is_asked_for_another() {
        for is_grpc in [false, true] {
            let answer = |end| Refusal::new(end, "the token has expired").answer(is_grpc);
            let asked = answer(RequestEnd::Unauthenticated);
            assert_eq!(header(&asked, &WWW_AUTHENTICATE), "Bearer error=\"invalid_token\"");
            assert!(!answer(RequestEnd::Denied).headers().contains_key(WWW_AUTHENTICATE));
        }
    }

    #[test]
    fn details_are_strings_of_structured_fields_whatever_is_in_them() {
        let refusal = Refusal::new(RequestEnd::NoRoute, "a \"b\" \\ c\r\nd: ä");
        let response = refusal.answer(true);
        assert!(
            header(&response, &PROXY_STATUS).ends_with(r#"details="a \"b\" \\ c??d: ?""#),
            "{response:?}"
        );
        assert_eq!(header(&response, &GRPC_MESSAGE), "a \"b\" \\ c%0D%0Ad: %C3%A4");
    }

    #[test]
    fn callers_of_grpc_say_so_by_the_type_of_their_message() {
        for (text, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(text))]);
            assert_eq!(is_grpc(&headers), expected, "{text}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}

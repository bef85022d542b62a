//! How one end of a tunnel tells the other why a CONNECT led nowhere: the `Proxy-Status` field of RFC 9209.
//!
//! An end that does not send it, or says what is not known here, has said no more than its status code does.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use crate::telemetry::RefuseReason;

// Made once: as a text it would be checked and copied for each answer.
static PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// The reasons for which a dial fails, and their proxy error types (RFC 9209, 2.3).
const TYPES: [(RefuseReason, &str); 8] = [
    (RefuseReason::ConnectRefused, "connection_refused"),
    (RefuseReason::ConnectReset, "connection_terminated"),
    (RefuseReason::ConnectTimeout, "connection_timeout"),
    (RefuseReason::ConnectUnreachable, "destination_ip_unroutable"),
    (RefuseReason::ConnectFailed, "destination_unavailable"),
    (RefuseReason::Limit, "connection_limit_reached"),
    (RefuseReason::RateLimited, "http_request_denied"),
    (RefuseReason::Internal, "proxy_internal_error"),
];

/// Says in an answer why it is no success.
pub(super) fn tell(headers: &mut HeaderMap, reason: RefuseReason) {
    if let Some((_, error)) = TYPES.iter().find(|(told, _)| *told == reason)
        && let Ok(value) = HeaderValue::try_from(format!("undermesh; error={error}"))
    {
        headers.insert(&PROXY_STATUS, value);
    }
}

/// Why an answer is no success, as its sender says. The sender's limits and errors are not ours: to us its dial failed.
pub(super) fn told(headers: &HeaderMap) -> Option<RefuseReason> {
    // The last of the list is of the proxy nearest to us, the one that was asked.
    let last = headers.get_all(&PROXY_STATUS).iter().next_back()?.to_str().ok()?.rsplit(',').next()?;
    let mut parameters = last.split(';').skip(1).filter_map(|parameter| parameter.trim().split_once('='));
    let (_, error) = parameters.find(|(key, _)| *key == "error")?;
    match TYPES.iter().find(|(_, name)| *name == error)?.0 {
        RefuseReason::Limit | RefuseReason::Internal => Some(RefuseReason::ConnectFailed),
        reason => Some(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Option<&'static str> {
        let headers = HeaderMap::from_iter([(PROXY_STATUS.clone(), HeaderValue::try_from(value).unwrap())]);
        told(&headers).map(RefuseReason::as_str)
    }

    #[test]
    fn what_one_end_tells_the_other_hears() {
        for reason in RefuseReason::ALL {
            let mut headers = HeaderMap::new();
            tell(&mut headers, reason);
            let expected = match reason {
                RefuseReason::Limit | RefuseReason::Internal => Some(RefuseReason::ConnectFailed),
                _ => TYPES.iter().any(|(told, _)| *told == reason).then_some(reason),
            };
            assert_eq!(told(&headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn what_others_send_is_read_as_far_as_it_is_known() {
        let check = |value: &str, expected| assert_eq!(read(value), expected, "{value}");
        check("ztunnel; error=connection_timeout; details=\"no answer\"", Some("connect_timeout"));
        check("far; error=connection_timeout, near;error=connection_refused", Some("connect_refused"));
        check("near; received-status=503", None);
        check("near; error=tls_alert_received", None);
        check("near; error", None);
        check("", None);
    }
}

//! Faults on purpose: requests that wait or fail because a policy wants some to, so that a user sees what becomes of that.

use http::HeaderMap;

use super::answer::Refusal;
use super::mirror::MIRRORED;
use crate::model::{Fault, Service};
use crate::telemetry::RequestEnd;

/// Has a request that is about to be sent to the Service wait or fail, if it is one of those that are to. Copies of requests are none
/// of them: nobody would see it.
pub(super) async fn inject(service: &Service, faults: &[Fault], headers: &HeaderMap) -> Result<(), Refusal> {
    if faults.is_empty() || headers.contains_key(MIRRORED) {
        return Ok(());
    }
    let Some(fault) = meant(faults, headers, || fastrand::f64() * 100.0) else { return Ok(()) };
    if let Some(delay) = fault.delay {
        tokio::time::sleep(delay).await;
    }
    let Some(status) = fault.abort else { return Ok(()) };
    let detail = format!("{}: a policy has this request fail on purpose", service.id);
    let mut refusal = Refusal::new(RequestEnd::FaultInjected, detail);
    refusal.status = Some(status);
    Err(refusal)
}

/// The first fault that takes the request; `roll` gives a number from 0 to 100.
fn meant<'f>(faults: &'f [Fault], headers: &HeaderMap, roll: impl Fn() -> f64) -> Option<&'f Fault> {
    let has = |(name, value): &(_, _)| headers.get_all(name).iter().any(|it| it == value);
    faults.iter().find(|fault| fault.headers.iter().all(has) && roll() < fault.percent)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue, StatusCode};

    use super::*;

    #[test]
    fn faults_take_their_share_of_the_requests_that_they_are_about() {
        let fault = |header: Option<(&'static str, &'static str)>, percent, status| Fault {
            headers: header
                .into_iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect(),
            percent,
            delay: None,
            abort: Some(StatusCode::from_u16(status).unwrap()),
        };
        let faults = [fault(Some(("x-chaos", "yes")), 100.0, 500), fault(None, 10.0, 503)];
        let check = |header: Option<(&'static str, &'static str)>, roll: f64, expected: Option<u16>| {
            let mut headers = HeaderMap::new();
            if let Some((name, value)) = header {
                headers.insert(name, HeaderValue::from_static(value));
            }
            let found = meant(&faults, &headers, || roll).and_then(|fault| fault.abort);
            assert_eq!(found.map(|status| status.as_u16()), expected, "{header:?} {roll}");
        };
        check(Some(("x-chaos", "yes")), 99.9, Some(500));
        check(Some(("x-chaos", "no")), 99.9, None);
        check(None, 9.9, Some(503));
        check(None, 10.0, None);
        assert!(meant(&[fault(None, 0.0, 503)], &HeaderMap::new(), || 0.0).is_none());
    }
}

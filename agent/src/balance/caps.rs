//! How much may be under way to a Service port from this node, and what is beyond that.

use crate::model::{PortGuard, ServicePort, UnderWay};

/// As much is under way as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{most} {} are under way, as many as may be", match what {
    UnderWay::Connections => "connections",
    UnderWay::Requests => "requests",
    UnderWay::Retries => "retries",
})]
pub struct Full {
    /// Of what.
    pub what: UnderWay,
    /// The cap.
    pub most: u32,
}

/// A place among those that the port allows; None where it sets no cap, and nothing is counted.
///
/// # Errors
/// When there is none left.
pub fn enter(port: &ServicePort, what: UnderWay) -> Result<Option<PortGuard>, Full> {
    let caps = &port.traffic.caps;
    let most = match what {
        UnderWay::Connections => caps.connections,
        UnderWay::Requests => caps.requests,
        UnderWay::Retries => caps.retries,
    };
    let Some(most) = most else { return Ok(None) };
    port.load.enter(what, most).map(Some).ok_or(Full { what, most })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::tests::ready_with;
    use crate::model::{Caps, TrafficSettings};

    #[test]
    fn what_has_a_cap_is_counted_and_refused_beyond() {
        let caps = Caps { connections: Some(1), requests: Some(2), ..Caps::default() };
        let service = ready_with(TrafficSettings { caps, ..TrafficSettings::default() }, 1);
        let port = &service.ports[0];
        for (what, most, refusal) in [
            (UnderWay::Connections, 1, "1 connections are under way, as many as may be"),
            (UnderWay::Requests, 2, "2 requests are under way, as many as may be"),
        ] {
            let places: Vec<_> = (0..most).map(|_| enter(port, what).unwrap().unwrap()).collect();
            assert_eq!(enter(port, what).unwrap_err().to_string(), refusal);
            drop(places);
            assert_eq!(port.load.under_way(what), 0);
        }
        assert!((0..10_000).all(|_| enter(port, UnderWay::Retries).unwrap().is_none()));
    }
}

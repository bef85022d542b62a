//! How much of its share an endpoint is to have that is new to this node.

use std::time::{Duration, Instant};

use crate::model::{Endpoint, EndpointLoad};

/// What it begins with.
const LEAST_WEIGHT: f64 = 0.1;

/// Endpoints whose weights differ by less came together.
const ALIKE: f64 = 0.9;

/// From [`LEAST_WEIGHT`] to 1, which it reaches in the time of its slow start.
pub(super) fn weight(load: &EndpointLoad, slow_start: Duration, now: Instant) -> f64 {
    if slow_start.is_zero() {
        return 1.0;
    }
    (age(load, now).as_secs_f64() / slow_start.as_secs_f64()).clamp(LEAST_WEIGHT, 1.0)
}

/// Whether the first endpoint leaves to the second one what would be its, for it is newer; `random` are fresh bits. By their
/// weights, so that endpoints which are all new take turns like old ones.
pub(super) fn gives_way(
    first: &Endpoint,
    second: &Endpoint,
    slow_start: Duration,
    now: Instant,
    random: u32,
) -> bool {
    if slow_start.is_zero() {
        return false;
    }
    let share = weight(&first.load, slow_start, now) / weight(&second.load, slow_start, now);
    share < ALIKE && f64::from(random) >= share * f64::from(u32::MAX)
}

/// Since it was thought of first.
pub(super) fn age(load: &EndpointLoad, now: Instant) -> Duration {
    now.saturating_duration_since(load.first_seen(now))
}

//! How something is distributed: counts by bucket, which threads may feed without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long connections were open. A decade each: from a health check's millisecond to the pooled connection of a day.
pub(super) const CONNECTION_DURATIONS: Bounds = Bounds {
    upper: &[
        1_000,
        10_000,
        100_000,
        1_000_000,
        10_000_000,
        60_000_000,
        600_000_000,
        3_600_000_000,
        86_400_000_000,
    ],
    scale: MICROS,
};

/// How long requests took: by doubling from 0.5 ms to 16.4 s.
pub(super) const REQUEST_DURATIONS: Bounds = Bounds { upper: &exponential::<16>(500, 2), scale: MICROS };

/// How large bodies were: a power of four each, from 256 B to 64 MiB.
pub(super) const BODY_SIZES: Bounds = Bounds { upper: &exponential::<10>(256, 4), scale: 1.0 };

/// Durations are counted in microseconds and shown in seconds.
const MICROS: f64 = 1e6;

/// The buckets of a histogram.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Ascending, each with the values that are equal to it, in the unit that is counted.
    upper: &'static [u64],
    /// How many of the counted units make one of those that are shown.
    scale: f64,
}

/// Counts of values by bucket, the last of which has no upper bound.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: Bounds,
    buckets: Box<[AtomicU64]>,
    /// In microseconds enough for 580,000 years of open connections.
    sum: AtomicU64,
}

/// A histogram at one moment, in the unit that is shown.
#[derive(Debug, PartialEq)]
pub(super) struct HistogramFigures {
    pub(super) sum: f64,
    pub(super) count: u64,
    /// Of each bucket its upper bound and its own count, which is not cumulative.
    pub(super) buckets: Vec<(f64, u64)>,
}

impl Histogram {
    pub(super) fn new(bounds: Bounds) -> Self {
        let buckets = (0..=bounds.upper.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    /// Counts a value, of bytes say.
    pub(super) fn observe(&self, value: u64) {
        let bucket = self.bounds.upper.partition_point(|upper| *upper < value);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Counts a duration. What is begun of a microsecond counts as a whole one: it is beyond the bound before it.
    pub(super) fn observe_duration(&self, duration: Duration) {
        let begun = u64::from(duration.subsec_nanos().div_ceil(1_000));
        self.observe(duration.as_secs().saturating_mul(1_000_000).saturating_add(begun));
    }

    pub(super) fn read(&self) -> HistogramFigures {
        let Bounds { upper, scale } = self.bounds;
        let bounds = upper.iter().map(|upper| *upper as f64 / scale).chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        HistogramFigures {
            sum: self.sum.load(Ordering::Relaxed) as f64 / scale,
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }
}

const fn exponential<const N: usize>(first: u64, factor: u64) -> [u64; N] {
    let mut bounds = [first; N];
    let mut i = 1;
    while i < N {
        bounds[i] = bounds[i - 1] * factor;
        i += 1;
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        let histogram = Histogram::new(CONNECTION_DURATIONS);
        for nanos in [0, 1_000_000, 1_000_001, 2_000_000] {
            histogram.observe_duration(Duration::from_nanos(nanos));
        }
        histogram.observe_duration(Duration::from_secs(86_400));
        histogram.observe_duration(Duration::from_secs(86_401));
        let HistogramFigures { sum, count, buckets } = histogram.read();
        assert_eq!(buckets[..2], [(0.001, 2), (0.01, 2)]);
        assert_eq!(buckets[8..], [(86_400.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(count, 6);
        assert!((sum - 172_801.004).abs() < 0.001, "{sum}");
    }

    #[test]
    fn bounds_are_what_the_documentation_says() {
        let shown = |bounds| {
            let buckets = Histogram::new(bounds).read().buckets;
            (buckets[0].0, buckets[1].0, buckets[buckets.len() - 2].0, buckets.len())
        };
        assert_eq!(shown(REQUEST_DURATIONS), (0.0005, 0.001, 16.384, 17));
        assert_eq!(shown(BODY_SIZES), (256.0, 1024.0, 64.0 * 1024.0 * 1024.0, 11));
    }
}

//! What workers count. A worker adds under a lock of its own; the driver takes an interval away.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hdrhistogram::Histogram;

/// Latencies are kept in microseconds with two significant digits, up to ten minutes.
const MAX_LATENCY_US: u64 = 600_000_000;
const SIGNIFICANT_DIGITS: u8 = 2;

/// Complaints beyond these are counted, not kept.
const MAX_COMPLAINTS: usize = 20;

/// A histogram of latencies in microseconds. Allocated when the first value comes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Latency(Option<Histogram<u64>>);

impl Latency {
    pub(crate) fn record(&mut self, us: u64) {
        if self.0.is_none() {
            // The bounds are constants that the library accepts.
            self.0 = Histogram::new_with_bounds(1, MAX_LATENCY_US, SIGNIFICANT_DIGITS).ok();
        }
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(us.max(1));
        }
    }

    pub(crate) fn merge(&mut self, other: &Latency) {
        match (&mut self.0, &other.0) {
            (Some(mine), Some(theirs)) => {
                // Same bounds: cannot fail.
                let _ = mine.add(theirs);
            }
            (mine @ None, Some(theirs)) => *mine = Some(theirs.clone()),
            (_, None) => {}
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// The value in milliseconds below which the share `quantile` lies; none without values.
    pub(crate) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        let histogram = self.0.as_ref().filter(|h| !h.is_empty())?;
        Some(histogram.value_at_quantile(quantile) as f64 / 1000.0)
    }

    pub(crate) fn max_ms(&self) -> Option<f64> {
        let histogram = self.0.as_ref().filter(|h| !h.is_empty())?;
        Some(histogram.max() as f64 / 1000.0)
    }

    /// (quantile, milliseconds) from the median to the maximum, for drawing a distribution.
    pub(crate) fn curve(&self) -> Vec<(f64, f64)> {
        const QUANTILES: [f64; 14] =
            [0.0, 0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0];
        QUANTILES.iter().filter_map(|&q| Some((q, self.quantile_ms(q)?))).collect()
    }
}

/// What happened since the driver last looked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interval {
    /// From the intended start of the connect until all queries were there.
    pub(crate) hydrate: Latency,
    /// The same for clients that came back with a cookie.
    pub(crate) reconnect: Latency,
    /// From asking for another query until it was there.
    pub(crate) change: Latency,
    /// From a write's intended time until the row was there.
    pub(crate) write: Latency,
    /// From a mutation's intended time until the server confirmed it to its client.
    pub(crate) mutation: Latency,
    pub(crate) pokes: u64,
    pub(crate) row_ops: u64,
    pub(crate) bytes: u64,
    /// Connections that ended without being asked to.
    pub(crate) disconnects: u64,
    /// Violations of the protocol: any of them voids the run.
    pub(crate) violations: u64,
    /// The first few texts of violations and errors.
    pub(crate) complaints: Vec<String>,
}

impl Interval {
    pub(crate) fn complain(&mut self, text: String) {
        if self.complaints.len() < MAX_COMPLAINTS {
            self.complaints.push(text);
        }
    }

    pub(crate) fn merge(&mut self, other: Interval) {
        self.hydrate.merge(&other.hydrate);
        self.reconnect.merge(&other.reconnect);
        self.change.merge(&other.change);
        self.write.merge(&other.write);
        self.mutation.merge(&other.mutation);
        self.pokes += other.pokes;
        self.row_ops += other.row_ops;
        self.bytes += other.bytes;
        self.disconnects += other.disconnects;
        self.violations += other.violations;
        for text in other.complaints {
            self.complain(text);
        }
    }
}

/// Shared by one worker and the driver.
#[derive(Default)]
pub(crate) struct WorkerStats {
    interval: Mutex<Interval>,
    /// Clients with an open socket after `connected`.
    pub(crate) connected: AtomicUsize,
    /// Clients that have everything that they asked for.
    pub(crate) complete: AtomicUsize,
    /// When a client last came to have everything.
    completed_at: Mutex<Option<Instant>>,
}

impl WorkerStats {
    /// For adding to the current interval.
    pub(crate) fn now(&self) -> MutexGuard<'_, Interval> {
        self.interval.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the current interval away and begins another.
    pub(crate) fn take(&self) -> Interval {
        std::mem::take(&mut *self.now())
    }

    /// Another client has, or has no longer, everything that it asked for.
    pub(crate) fn set_complete(&self, flag: &std::cell::Cell<bool>, to: bool) {
        if to && !flag.get() {
            let mut at = self.completed_at.lock().unwrap_or_else(PoisonError::into_inner);
            *at = Some(Instant::now());
        }
        WorkerStats::flip(&self.complete, flag, to);
    }

    /// When a client last came to have everything.
    pub(crate) fn completed_at(&self) -> Option<Instant> {
        *self.completed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a gauge in step with a client's flag.
    pub(crate) fn flip(gauge: &AtomicUsize, flag: &std::cell::Cell<bool>, to: bool) {
        if flag.replace(to) != to {
            if to {
                gauge.fetch_add(1, Ordering::Relaxed);
            } else {
                gauge.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_back_within_two_digits_after_merging() {
        let (mut a, mut b) = (Latency::default(), Latency::default());
        for us in 1..=50_000 {
            a.record(us);
            b.record(us + 50_000);
        }
        let mut all = Latency::default();
        all.merge(&a);
        all.merge(&b);
        assert_eq!(all.count(), 100_000);
        let p99 = all.quantile_ms(0.99).unwrap();
        assert!((98.0..=100.0).contains(&p99), "{p99}");
        assert_eq!(Latency::default().quantile_ms(0.5), None);
    }
}

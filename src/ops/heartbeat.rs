//! Drain when the load balancer has stopped asking (spec: operations §5.7).
//!
//! Arrivals are stamped where the request is read; the main thread looks at the stamp. Nothing
//! happens before the first `/keepalive`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When `/keepalive` was last called. Shared by all executors.
#[derive(Debug)]
pub struct Heartbeat {
    origin: Instant,
    /// Milliseconds after `origin`, plus 1; 0 before the first call.
    last: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Heartbeat { origin: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Heartbeat {
    /// Notes a call that arrived at `at`. True for the first one.
    pub fn beat(&self, at: Instant) -> bool {
        let ms = at.saturating_duration_since(self.origin).as_millis() as u64 + 1;
        self.last.fetch_max(ms, Ordering::AcqRel) == 0
    }

    /// How long there was no call, as of `now`; `None` before the first.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        let last = self.last.load(Ordering::Acquire).checked_sub(1)?;
        let now = now.saturating_duration_since(self.origin).as_millis() as u64;
        Some(Duration::from_millis(now.saturating_sub(last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_last_call_only_after_a_first() {
        let heartbeat = Heartbeat::default();
        let at = |ms| heartbeat.origin + Duration::from_millis(ms);
        assert_eq!(heartbeat.silence(at(90_000)), None);
        assert!(heartbeat.beat(at(100)));
        assert!(!heartbeat.beat(at(2_000)));
        // A stamp that arrives late does not turn the clock back.
        assert!(!heartbeat.beat(at(1_500)));
        assert_eq!(heartbeat.silence(at(2_500)), Some(Duration::from_millis(500)));
    }
}

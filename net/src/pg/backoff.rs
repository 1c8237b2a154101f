//! Exponential back-off for reconnecting.

use std::time::Duration;

/// Doubles its delay from attempt to attempt.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// From `first`, doubling up to `max`.
    pub fn new(first: Duration, max: Duration) -> Backoff {
        Backoff { first, max, next: first }
    }

    /// The replication stream's: 25 ms … 10 s (spec: replication §5.3).
    pub fn replication() -> Backoff {
        Backoff::new(Duration::from_millis(25), Duration::from_secs(10))
    }

    /// How long to wait before the next attempt.
    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (self.next * 2).min(self.max);
        delay
    }

    /// Progress was made: start over. (Being connected is not progress: a message that cannot
    /// be handled would be retried without rest.)
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_its_maximum_and_starts_over() {
        let mut backoff = Backoff::replication();
        let delays: Vec<u128> = (0..11).map(|_| backoff.delay().as_millis()).collect();
        assert_eq!(delays, [25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000]);
        backoff.reset();
        assert_eq!(backoff.delay().as_millis(), 25);
    }
}

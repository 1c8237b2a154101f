//! When inactive client view records are purged: the schedule of spec view-syncer-cvr §2.10. The
//! work itself is the store's.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use zeroring_core::cvr::store::{CvrStoreError, Purged};
use zeroring_storage::cvr_store::{CvrStore, PurgeLimits};

use crate::options::config::PurgeOptions;

/// Longest pause between two rounds.
const MAX_INTERVAL: Duration = Duration::from_secs(16 * 60);
/// Pause after a failed round; doubles up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(25);
/// Longest pause after a failed round.
const MAX_RETRY: Duration = Duration::from_secs(10);

/// Asks the store for a round now and then. Driven by [`Purger::tick`] from the main thread.
pub struct Purger {
    store: Arc<dyn CvrStore>,
    schedule: Schedule,
    next: Instant,
    answers: Receiver<Result<Purged, CvrStoreError>>,
    answer: Sender<Result<Purged, CvrStoreError>>,
    asked: bool,
}

impl Purger {
    /// A purger, unless the batch size is 0.
    pub fn new(store: Arc<dyn CvrStore>, options: PurgeOptions) -> Option<Purger> {
        let (answer, answers) = channel();
        let next = Instant::now() + options.interval;
        (options.batch > 0).then(|| Purger {
            store,
            schedule: Schedule::new(options),
            next,
            answers,
            answer,
            asked: false,
        })
    }

    /// Takes the store's answer, if there is one, and asks for a round if one is due.
    pub fn tick(&mut self, now: Instant) {
        if let Ok(round) = self.answers.try_recv() {
            self.asked = false;
            self.next = now + self.schedule.after(round);
        }
        if self.asked || now < self.next {
            return;
        }
        self.asked = true;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let limits = PurgeLimits {
            now_ms: wall.as_secs_f64() * 1000.0,
            inactive_ms: self.schedule.options.inactive.as_secs_f64() * 1000.0,
            batch: self.schedule.batch,
        };
        let answer = self.answer.clone();
        // The main thread is gone only when the process ends.
        self.store.purge(limits, Box::new(move |round| drop(answer.send(round))));
    }
}

/// How much and how often, from what the last round found.
struct Schedule {
    options: PurgeOptions,
    batch: usize,
    interval: Duration,
    retry: Duration,
    remaining: usize,
}

impl Schedule {
    fn new(options: PurgeOptions) -> Schedule {
        Schedule {
            batch: options.batch,
            interval: options.interval,
            retry: FIRST_RETRY,
            remaining: 0,
            options,
        }
    }

    /// The pause before the next round.
    fn after(&mut self, round: Result<Purged, CvrStoreError>) -> Duration {
        let purged = match round {
            Ok(purged) => purged,
            Err(error) => {
                tracing::warn!(%error, "purging inactive client groups failed");
                let pause = self.retry;
                self.retry = (self.retry * 2).min(MAX_RETRY);
                return pause;
            }
        };
        self.retry = FIRST_RETRY;
        if purged.groups > 0 || purged.tombstones > 0 {
            tracing::info!(
                groups = purged.groups,
                tombstones = purged.tombstones,
                remaining = purged.remaining,
                "purged inactive client groups"
            );
        }
        if purged.remaining > self.remaining {
            self.batch += self.options.batch;
        }
        self.remaining = purged.remaining;
        self.interval = if purged.remaining > 0 {
            self.options.interval
        } else {
            (self.interval * 2).min(MAX_INTERVAL)
        };
        self.interval
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> Schedule {
        Schedule::new(PurgeOptions {
            inactive: Duration::from_secs(48 * 3600),
            interval: Duration::from_secs(60),
            batch: 25,
        })
    }

    fn found(remaining: usize) -> Result<Purged, CvrStoreError> {
        Ok(Purged { groups: 1, tombstones: 0, remaining })
    }

    #[test]
    fn idle_rounds_grow_rare_and_a_backlog_brings_them_back() {
        let mut s = schedule();
        let pauses: Vec<u64> = (0..6).map(|_| s.after(found(0)).as_secs()).collect();
        assert_eq!(pauses, [120, 240, 480, 960, 960, 960]);
        assert_eq!(s.after(found(7)).as_secs(), 60);
    }

    #[test]
    fn batches_grow_while_the_backlog_does() {
        let mut s = schedule();
        for (remaining, batch) in [(10, 50), (10, 50), (30, 75), (5, 75)] {
            s.after(found(remaining));
            assert_eq!(s.batch, batch);
        }
    }

    #[test]
    fn failures_back_off_up_to_ten_seconds() {
        let mut s = schedule();
        let pauses: Vec<u128> =
            (0..11).map(|_| s.after(Err(CvrStoreError::Closed)).as_millis()).collect();
        assert_eq!(pauses[..3], [25, 50, 100]);
        assert_eq!(pauses[10], 10_000);
        s.after(found(0));
        assert_eq!(s.after(Err(CvrStoreError::Closed)).as_millis(), 25);
    }
}

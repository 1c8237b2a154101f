//! Where time goes: a clock for each stage that a change passes, for `/statz`.
//!
//! A clock has one writer (its thread) and any number of readers. Writing is a relaxed load and
//! store: no lock, no shared cache line on the data path.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Replication core: messages of the stream into the replica, its commit included.
    Apply,
    /// Replication core: handing a commit to the executors.
    Publish,
    /// Executor: the engine leads commits to queries.
    Advance,
    /// Executor: handing an advance to the groups that it concerns.
    Fanout,
    /// Executor: groups' events: messages of clients, patches, encoding pokes, sending frames.
    Events,
    /// Executor: reading and evaluating new queries.
    Hydrate,
    /// From handing a batch to the CVR store until it is durable. The executor does not wait.
    Flush,
}

impl Stage {
    /// All, in the order in which a commit passes them.
    pub const ALL: [Stage; 7] = [
        Stage::Apply,
        Stage::Publish,
        Stage::Advance,
        Stage::Fanout,
        Stage::Events,
        Stage::Hydrate,
        Stage::Flush,
    ];

    /// Name in `/statz`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Apply => "apply",
            Stage::Publish => "publish",
            Stage::Advance => "advance",
            Stage::Fanout => "fanout",
            Stage::Events => "events",
            Stage::Hydrate => "hydrate",
            Stage::Flush => "flush",
        }
    }
}

#[derive(Debug, Default)]
struct Clock {
    nanos: AtomicU64,
    count: AtomicU64,
}

/// The clocks of one thread.
#[derive(Debug, Default)]
pub struct StageClocks {
    clocks: [Clock; Stage::ALL.len()],
}

/// What a clock shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTime {
    /// All together.
    pub total: Duration,
    /// How often.
    pub count: u64,
}

impl StageClocks {
    /// Adds one passage. Only the thread that the clocks belong to may call this.
    pub fn add(&self, stage: Stage, time: Duration) {
        let clock = &self.clocks[stage as usize];
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bump = |to: &AtomicU64, by: u64| {
            to.store(to.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        bump(&clock.nanos, nanos);
        bump(&clock.count, 1);
    }

    /// What the clock of a stage shows now.
    pub fn time(&self, stage: Stage) -> StageTime {
        let clock = &self.clocks[stage as usize];
        StageTime {
            total: Duration::from_nanos(clock.nanos.load(Ordering::Relaxed)),
            count: clock.count.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_add_up_and_stages_do_not_mix() {
        let clocks = StageClocks::default();
        clocks.add(Stage::Apply, Duration::from_micros(3));
        clocks.add(Stage::Apply, Duration::from_micros(4));
        clocks.add(Stage::Flush, Duration::from_millis(1));
        let apply = clocks.time(Stage::Apply);
        assert_eq!((apply.total, apply.count), (Duration::from_micros(7), 2));
        assert_eq!(clocks.time(Stage::Flush).count, 1);
        assert_eq!(clocks.time(Stage::Events), StageTime::default());
        for (index, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage as usize, index);
        }
    }
}

//! Queries on their way into the engine: who is hydrated when.
//!
//! First come, first served, a slice per turn of the executor. Who takes longer than most steps
//! aside: a few such run at once, in turns, and get every second slice while others wait, so that
//! a query of a million rows delays a small one by a slice, and is not kept from ending by many
//! small ones. Rows of a large query go to the first group that asked while the rest is read.

use std::collections::VecDeque;
use std::time::Duration;

use zeroring_core::cvr::QueryHash;
use zeroring_core::group::{Event, Hydrate};
use zeroring_core::ivm::engine::{Budget, InstanceId, Progress};
use zeroring_core::ivm::error::EngineError;
use zeroring_net::rt::now;

use super::groups::{GroupKey, State};

/// Slices after which a job steps aside.
const LONG_SLICES: u32 = 8;
/// Long jobs that run at once: each has part of its rows in memory.
const MAX_LONG: usize = 4;

/// Rows of a query that go to its group before the others are there: as many as the original
/// hands to its clients at a time (spec: view-syncer-cvr §5.8).
const EARLY_ROWS: usize = 10_000;
/// Rows that a group takes at once: about a millisecond.
const EARLY_SLICE: usize = 1_000;

/// Queries of a group on their way into the engine.
pub(super) struct Hydration {
    group: GroupKey,
    queries: VecDeque<(QueryHash, Result<InstanceId, String>)>,
    /// Instances whose rows the group takes early, with the number of them that are worth it.
    early: Vec<(InstanceId, usize)>,
    done: Vec<(QueryHash, Result<InstanceId, String>)>,
    /// Time spent on the first of `queries`.
    spent: Duration,
}

/// What waits for its slices; see the [module](self).
#[derive(Default)]
pub(super) struct Hydrations {
    jobs: Fair<Hydration>,
}

/// Jobs in the order of their slices.
struct Fair<J> {
    /// With the number of slices that they had.
    fresh: VecDeque<(J, u32)>,
    long: VecDeque<J>,
    long_is_next: bool,
}

impl<J> Default for Fair<J> {
    fn default() -> Fair<J> {
        Fair { fresh: VecDeque::new(), long: VecDeque::new(), long_is_next: false }
    }
}

/// A job that has its slice.
struct Turn<J> {
    job: J,
    slices: u32,
    at: usize,
}

impl<J> Fair<J> {
    fn len(&self) -> usize {
        self.fresh.len() + self.long.len()
    }

    fn push(&mut self, job: J) {
        self.fresh.push_back((job, 0));
    }

    /// Whose slice it is.
    fn next(&mut self) -> Option<Turn<J>> {
        let long = self.fresh.is_empty() || std::mem::take(&mut self.long_is_next);
        if long && let Some(job) = self.long.pop_front() {
            let at = self.long.len().min(MAX_LONG - 1);
            return Some(Turn { job, slices: LONG_SLICES, at });
        }
        let (job, slices) = self.fresh.pop_front()?;
        self.long_is_next = true;
        Some(Turn { job, slices, at: 0 })
    }

    /// It had its slice, and is not done.
    fn put_back(&mut self, turn: Turn<J>) {
        let Turn { job, slices, at } = turn;
        if slices >= LONG_SLICES {
            self.long.insert(at, job);
        } else if slices + 1 < LONG_SLICES {
            self.fresh.push_front((job, slices + 1));
        } else {
            self.long.push_back(job);
        }
    }

    /// Takes out the jobs that `is` names.
    fn take(&mut self, is: impl Fn(&J) -> bool) -> Vec<J> {
        let (gone, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.fresh).into_iter().partition(|(job, _)| is(job));
        self.fresh = kept;
        let (long, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.long).into_iter().partition(&is);
        self.long = kept;
        gone.into_iter().map(|(job, _)| job).chain(long).collect()
    }
}

impl Hydrations {
    /// Groups with queries that are not hydrated yet.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.len() == 0
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.jobs = Fair::default();
    }

    /// Takes a group out; the instances that it is subscribed to.
    pub(super) fn forget(&mut self, group: GroupKey) -> Vec<InstanceId> {
        let gone = self.jobs.take(|job| job.group == group).into_iter();
        gone.flat_map(|job| job.queries.into_iter().chain(job.done))
            .filter_map(|(_, result)| result.ok())
            .collect()
    }
}

impl State {
    /// Subscribes a group to the instances of these queries; they are hydrated by and by.
    pub(super) fn start_hydration(&mut self, group: GroupKey, wanted: &[Hydrate]) {
        let mut early = Vec::new();
        let mut subscribe = |w: &Hydrate| {
            let id = self.subscribe(group, w);
            if let Ok(id) = &id
                && w.early
                && self.world.engine.watch(*id)
            {
                early.push((*id, EARLY_ROWS));
            }
            (w.query.clone(), id)
        };
        let queries = wanted.iter().map(&mut subscribe).collect();
        let job = Hydration { group, queries, early, done: Vec::new(), spent: Duration::ZERO };
        self.hydrations.jobs.push(job);
    }

    /// Goes on hydrating for one slice; true if there is more to do.
    pub(super) fn hydrate(&mut self, budget: &mut Budget) -> bool {
        while !budget.is_spent()
            && let Some(mut turn) = self.hydrations.jobs.next()
        {
            let ended = self.hydrate_job(&mut turn.job, budget);
            if ended {
                let Hydration { group, done, .. } = turn.job;
                self.inbox.push_back((group, Event::Hydrated(done)));
            } else {
                self.hydrations.jobs.put_back(turn);
                break;
            }
        }
        !self.hydrations.is_empty()
    }

    /// One job; false if it needs another slice.
    fn hydrate_job(&mut self, job: &mut Hydration, budget: &mut Budget) -> bool {
        let mut failed = Vec::new();
        let started = now();
        while let Some((query, instance)) = job.queries.pop_front() {
            let Ok(id) = instance else {
                job.done.push((query, instance));
                continue;
            };
            let step = self.world.hydrate(id, &query, &mut job.spent, budget);
            self.pass_on(job, &query, id, matches!(step, Ok(Progress::More | Progress::Blocked)));
            match step {
                Ok(Progress::Done) => job.done.push((query, Ok(id))),
                Ok(Progress::More | Progress::Blocked)
                | Err(EngineError::SnapshotMismatch { .. }) => {
                    job.queries.push_front((query, Ok(id)));
                    break;
                }
                Err(error) => {
                    failed.push(id);
                    job.done.push((query, Err(error.to_string())));
                }
            }
        }
        for id in failed {
            self.unsubscribe(job.group, id);
        }
        self.hydrated_for(job.group, now().duration_since(started));
        job.queries.is_empty()
    }
}

impl State {
    /// Passes rows that were read on to the group, if it wants them.
    fn pass_on(&mut self, job: &mut Hydration, query: &QueryHash, id: InstanceId, more: bool) {
        let Some(at) = job.early.iter().position(|(of, _)| *of == id) else { return };
        let rows = self.world.engine.take_watched(id, job.early[at].1);
        if !rows.is_empty() {
            job.early[at].1 = 1;
            self.counters.early_rows += rows.len() as u64;
        }
        let mut rows = rows.into_iter();
        while rows.len() > 0 {
            let slice = rows.by_ref().take(EARLY_SLICE).collect();
            self.inbox.push_back((job.group, Event::Early(query.clone(), slice)));
        }
        if !more {
            self.world.engine.unwatch(id);
            job.early.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs jobs that need so many slices each; the order in which they end, with the slice.
    fn run(needs: &[u32]) -> Vec<(usize, usize)> {
        let mut jobs = Fair::default();
        for (id, need) in needs.iter().enumerate() {
            jobs.push((id, *need));
        }
        let (mut ends, mut slices) = (Vec::new(), 0);
        while let Some(mut turn) = jobs.next() {
            slices += 1;
            turn.job.1 -= 1;
            match turn.job {
                (id, 0) => ends.push((id, slices)),
                _ => jobs.put_back(turn),
            }
            assert!(slices < 100_000);
        }
        ends
    }

    #[test]
    fn who_comes_first_is_hydrated_first() {
        let ends = run(&[3; 500]);
        assert!(ends.iter().map(|(id, _)| *id).eq(0..500));
        assert_eq!(ends[0].1, 3, "nobody else had a slice before");
    }

    #[test]
    fn a_giant_steps_aside_and_ends_all_the_same() {
        let mut needs = vec![2; 100];
        needs[0] = 1_000;
        let ends = run(&needs);
        assert_eq!(ends[0], (1, LONG_SLICES as usize + 2 * 2));
        assert_eq!(ends[98].0, 99);
        assert!(ends[98].1 <= LONG_SLICES as usize + 2 * 2 * 99, "{:?}", ends[98]);
        assert_eq!(ends[99], (0, 1_000 + 2 * 99));
        // While small ones come, it gets every second slice.
        let ends = run(&[&[1_000][..], &[1; 2_000]].concat());
        let giant = ends.iter().position(|(id, _)| *id == 0).unwrap();
        assert!(giant < 1_010, "it waited for {giant} others");
    }

    #[test]
    fn only_a_few_giants_run_at_once_and_the_first_come_first() {
        let ends = run(&[100; 12]);
        let order: Vec<usize> = ends.iter().map(|(id, _)| *id).collect();
        assert!(order.is_sorted(), "{order:?}");
        // The first four share the slices; the fifth begins when one of them has ended.
        assert!(ends[0].1 < 5 * 100 + 12 * LONG_SLICES as usize, "{ends:?}");
    }

    #[test]
    fn what_is_taken_out_is_gone() {
        let mut jobs = Fair::default();
        (0..5).for_each(|id| jobs.push(id));
        for _ in 0..LONG_SLICES {
            let turn = jobs.next().unwrap();
            assert_eq!(turn.job, 0);
            jobs.put_back(turn);
        }
        assert_eq!(jobs.take(|id| [0, 3].contains(id)), [3, 0]);
        let left: Vec<i32> = std::iter::from_fn(|| jobs.next().map(|turn| turn.job)).collect();
        assert_eq!((left, jobs.len()), (vec![1, 2, 4], 0));
    }
}

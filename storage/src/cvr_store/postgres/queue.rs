//! Requests that wait for a worker.
//!
//! Four lanes: flushes, which must never wait for long; those that wait for a lock, and side notes;
//! rows that follow; reads.
//! A worker serves some of the lanes, the first that has something; all workers of a lane serve the
//! same ones, so that one bell wakes one of them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests that may wait in a lane. A group has at most one in flight, so this is also the number
/// of groups that can be busy at once; beyond it they are refused.
pub(super) const MAX_WAITING: usize = 65_536;

/// Which workers a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Group commits.
    Flush = 0,
    /// What takes long, one after the other, in order.
    Slow = 1,
    /// Reads, in any order.
    Read = 2,
    /// Rows that follow, of several groups in any order.
    Rows = 3,
}

/// How many there are.
const LANES: usize = 4;

/// What a worker is to do next.
#[derive(Debug)]
pub(super) enum Taken<T> {
    /// Requests of one lane, oldest first.
    Jobs(Vec<T>),
    /// Nothing came for a while.
    Idle,
    /// Nothing is left, and nothing will come.
    Closed,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// [`MAX_WAITING`] wait.
    Full,
    /// The store shuts down.
    Closed,
}

#[derive(Debug)]
struct State<T> {
    lanes: [VecDeque<T>; LANES],
    /// Requests that are to wait.
    later: Vec<(Instant, Lane, T)>,
    closed: bool,
}

/// The lanes.
#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    bells: [Condvar; LANES],
    /// For each lane the first lane of its workers, whose bell they hear.
    first_lane: [Lane; LANES],
}

impl<T> Queue<T> {
    /// `workers`: the lanes of each kind of worker; each lane in one of them.
    pub(super) fn new(workers: &[&[Lane]]) -> Queue<T> {
        let lanes = std::array::from_fn(|_| VecDeque::new());
        let state = State { lanes, later: Vec::new(), closed: false };
        let mut first_lane = [Lane::Flush, Lane::Slow, Lane::Read, Lane::Rows];
        for lanes in workers {
            for lane in *lanes {
                first_lane[*lane as usize] = lanes[0];
            }
        }
        Queue { state: Mutex::new(state), bells: Default::default(), first_lane }
    }

    fn bell(&self, lane: Lane) -> &Condvar {
        &self.bells[self.first_lane[lane as usize] as usize]
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds requests that are to be taken together, or gives them back.
    pub(super) fn push_all(&self, lane: Lane, jobs: Vec<T>) -> Result<(), (Vec<T>, Refused)> {
        let mut state = self.lock();
        if state.closed {
            return Err((jobs, Refused::Closed));
        }
        let waiting = &mut state.lanes[lane as usize];
        if waiting.len() + jobs.len() > MAX_WAITING {
            return Err((jobs, Refused::Full));
        }
        waiting.extend(jobs);
        drop(state);
        self.bell(lane).notify_one();
        Ok(())
    }

    /// Adds a request after `delay`, or gives it back.
    pub(super) fn push_later(
        &self,
        lane: Lane,
        delay: Duration,
        job: T,
    ) -> Result<(), (T, Refused)> {
        let mut state = self.lock();
        if state.closed {
            return Err((job, Refused::Closed));
        }
        if state.later.len() >= MAX_WAITING {
            return Err((job, Refused::Full));
        }
        state.later.push((Instant::now() + delay, lane, job));
        drop(state);
        self.bell(lane).notify_one();
        Ok(())
    }

    /// Waits for requests of one of `lanes`, at most `max` of them and for `patience`.
    pub(super) fn take(&self, lanes: &[Lane], max: usize, patience: Duration) -> Taken<T> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            state.wake(lanes, now);
            for lane in lanes {
                let jobs = &mut state.lanes[*lane as usize];
                if !jobs.is_empty() {
                    let count = jobs.len().min(max);
                    let jobs = jobs.drain(..count).collect();
                    // Another worker has to look after what is left, and after what is to come.
                    if state.due(lanes).is_some() || lanes.iter().any(|lane| state.waits(*lane)) {
                        self.bell(lanes[0]).notify_one();
                    }
                    return Taken::Jobs(jobs);
                }
            }
            if state.closed {
                return Taken::Closed;
            }
            let due = state.due(lanes);
            let wait = due.map_or(until, |due| due.min(until)).saturating_duration_since(now);
            if now >= until {
                return Taken::Idle;
            }
            let woken = self.bell(lanes[0]).wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes no more; what waits is still to be done, delayed requests at once.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.bells.iter().for_each(Condvar::notify_all);
    }
}

impl<T> State<T> {
    /// Takes requests of these lanes in whose time has come.
    fn wake(&mut self, lanes: &[Lane], now: Instant) {
        let closed = self.closed;
        let due = |at: &Instant, lane: &Lane| lanes.contains(lane) && (closed || *at <= now);
        for (_, lane, job) in self.later.extract_if(.., |(at, lane, _)| due(at, lane)) {
            self.lanes[lane as usize].push_back(job);
        }
    }

    /// When the next request of these lanes has waited long enough.
    fn due(&self, lanes: &[Lane]) -> Option<Instant> {
        let later = self.later.iter().filter(|(_, lane, _)| lanes.contains(lane));
        later.map(|(at, ..)| *at).min()
    }

    fn waits(&self, lane: Lane) -> bool {
        !self.lanes[lane as usize].is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(5);

    fn taken(queue: &Queue<i32>, lanes: &[Lane], max: usize) -> Option<Vec<i32>> {
        match queue.take(lanes, max, SHORT) {
            Taken::Jobs(jobs) => Some(jobs),
            Taken::Idle | Taken::Closed => None,
        }
    }

    #[test]
    fn lanes_are_served_in_the_order_of_the_worker_and_batches_are_bounded() {
        let queue = Queue::new(&[&[Lane::Flush, Lane::Slow, Lane::Rows, Lane::Read]]);
        for n in 0..3 {
            queue.push_all(Lane::Read, vec![10 + n]).unwrap();
            queue.push_all(Lane::Flush, vec![n]).unwrap();
        }
        assert_eq!(taken(&queue, &[Lane::Slow], 9), None);
        assert_eq!(taken(&queue, &[Lane::Slow, Lane::Flush, Lane::Read], 2), Some(vec![0, 1]));
        assert_eq!(taken(&queue, &[Lane::Flush, Lane::Read], 2), Some(vec![2]));
        assert_eq!(taken(&queue, &[Lane::Flush, Lane::Read], 9), Some(vec![10, 11, 12]));
    }

    #[test]
    fn what_waits_is_done_after_closing() {
        let queue = Queue::new(&[&[Lane::Flush, Lane::Slow, Lane::Rows, Lane::Read]]);
        queue.push_later(Lane::Read, Duration::from_secs(3_600), 1).unwrap();
        queue.push_later(Lane::Rows, Duration::from_secs(3_600), 4).unwrap();
        queue.push_all(Lane::Flush, vec![2]).unwrap();
        assert_eq!(taken(&queue, &[Lane::Read], 9), None);
        queue.close();
        assert_eq!(queue.push_all(Lane::Read, vec![3]), Err((vec![3], Refused::Closed)));
        assert_eq!(taken(&queue, &[Lane::Read], 9), Some(vec![1]));
        assert_eq!(taken(&queue, &[Lane::Flush], 9), Some(vec![2]));
        assert_eq!(taken(&queue, &[Lane::Slow, Lane::Rows], 9), Some(vec![4]));
        assert!(matches!(queue.take(&[Lane::Read, Lane::Flush], 9, SHORT), Taken::Closed));
    }

    #[test]
    fn a_full_lane_refuses() {
        let queue = Queue::new(&[&[Lane::Flush, Lane::Slow, Lane::Rows, Lane::Read]]);
        for n in 0..MAX_WAITING {
            queue.push_all(Lane::Read, vec![n]).unwrap();
        }
        assert_eq!(queue.push_all(Lane::Read, vec![0]), Err((vec![0], Refused::Full)));
        queue.push_all(Lane::Flush, vec![0]).unwrap();
    }
}

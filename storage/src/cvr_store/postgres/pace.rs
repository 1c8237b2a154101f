//! When rows that follow are written: at once if somebody waits for them, otherwise when there is
//! room between flushes and reads, for they are what Postgres spends most of its time on.
//!
//! - Nothing was asked of the store for a moment ([`RowPace::quiet`]): now.
//! - Rows are [`RowPace::delay`] old: some, and then a pause of [`REST`] times as long as it took,
//!   so that at most a quarter of the time is spent on them.
//! - Rows are [`RowPace::limit`] old: without pauses.
//! - They are twice as old and others are being written; or too many are owed, or the server is
//!   about to go: on two connections.
//!
//! Whoever writes rows, or owes more of them, sets the *alarm*: a request to look here that comes
//! when something is due. There is one at a time; those that it has overtaken say nothing.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zeroring_core::cvr::ClientGroupId;

use super::super::RowPace;

/// Rest after writing rows, as a multiple of the time that it took.
const REST: u32 = 3;

/// Groups whose rows wait for their turn.
#[derive(Debug)]
pub(super) struct Pace {
    options: RowPace,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Somebody waits for these.
    awaited: VecDeque<ClientGroupId>,
    /// The others, and since when, the oldest first. Some may have been written meanwhile.
    turns: VecDeque<(Instant, ClientGroupId)>,
    /// Something else was asked of the store then.
    busy_at: Instant,
    rest_until: Instant,
    /// Connections on which rows are being written.
    writing: usize,
    alarm: Option<Instant>,
    hurry: bool,
}

/// A group's turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) group: ClientGroupId,
    /// There is to be no pause after it.
    pub(super) urgent: bool,
}

impl Pace {
    pub(super) fn new(options: RowPace, now: Instant) -> Pace {
        let state = State {
            awaited: VecDeque::new(),
            turns: VecDeque::new(),
            busy_at: now,
            rest_until: now,
            writing: 0,
            alarm: None,
            hurry: false,
        };
        Pace { options, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something else is being asked of the store.
    pub(super) fn busy(&self, now: Instant) {
        self.lock().busy_at = now;
    }

    /// Rows of a group are owed since now.
    pub(super) fn owe(&self, group: ClientGroupId, now: Instant) {
        self.lock().turns.push_back((now, group));
    }

    /// Somebody waits for a group's rows. True for the first one: somebody has to look.
    pub(super) fn awaited(&self, group: ClientGroupId) -> bool {
        let mut state = self.lock();
        state.awaited.push_back(group);
        state.awaited.len() == 1
    }

    /// From now on there are no pauses.
    pub(super) fn hurry(&self) {
        self.lock().hurry = true;
    }

    /// The server is about to go.
    pub(super) fn hurries(&self) -> bool {
        self.lock().hurry
    }

    /// Rows are being written from now on; [`Pace::wrote`] must follow.
    pub(super) fn write(&self) {
        self.lock().writing += 1;
    }

    /// It took so long to write them.
    pub(super) fn wrote(&self, took: Duration, now: Instant) {
        let mut state = self.lock();
        state.writing = state.writing.saturating_sub(1);
        state.rest_until = now + took * REST;
    }

    /// The group whose rows are to be written next, if it is time. `full`: too much is owed.
    pub(super) fn next(&self, full: bool, now: Instant) -> Option<Turn> {
        let mut state = self.lock();
        state.alarm.take_if(|at| *at <= now);
        if let Some(group) = state.awaited.pop_front() {
            return Some(Turn { group, urgent: true });
        }
        let (since, _) = state.turns.front()?;
        if state.due(&self.options, *since, full) > Some(now) {
            return None;
        }
        let urgent = full || state.hurry || now >= *since + self.options.limit;
        state.turns.pop_front().map(|(_, group)| Turn { group, urgent })
    }

    /// Sets the alarm: the time until somebody has to look, unless somebody will anyway.
    pub(super) fn set_alarm(&self, full: bool, now: Instant) -> Option<Duration> {
        let mut state = self.lock();
        let at = match state.turns.front() {
            _ if !state.awaited.is_empty() => now,
            Some((since, _)) => state.due(&self.options, *since, full).unwrap_or(now),
            None => return None,
        };
        if state.alarm.is_some_and(|alarm| alarm <= at) {
            return None;
        }
        state.alarm = Some(at);
        Some(at.saturating_duration_since(now))
    }
}

impl State {
    /// When rows that are owed since then are to be written; `None` at once.
    fn due(&self, options: &RowPace, since: Instant, full: bool) -> Option<Instant> {
        if full || self.hurry {
            return None;
        }
        if self.writing > 0 {
            return Some(since + 2 * options.limit);
        }
        let paced = (since + options.delay).max(self.rest_until);
        let quiet = self.busy_at + options.quiet;
        Some(paced.min(quiet).min(since + options.limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn turn(group: &str, urgent: bool) -> Option<Turn> {
        Some(Turn { group: group.into(), urgent })
    }

    #[test]
    fn rows_are_written_when_it_is_quiet_or_they_are_old() {
        let begin = Instant::now();
        let at = |ms: u32| begin + MS * ms;
        let pace = Pace::new(RowPace::default(), begin);
        assert_eq!(pace.set_alarm(false, begin), None, "nothing is owed");
        pace.owe("a".into(), begin);
        assert_eq!(pace.set_alarm(false, begin), Some(MS * 100), "if it stays quiet");
        assert_eq!(pace.set_alarm(false, begin), None, "it is set");
        for ms in (90..1_000).step_by(90) {
            pace.busy(at(ms));
            assert_eq!(pace.next(false, at(ms)), None);
        }
        pace.owe("b".into(), at(500));
        pace.owe("c".into(), at(900));
        pace.owe("d".into(), at(900));
        assert_eq!(pace.set_alarm(false, at(990)), Some(MS * 10));
        assert_eq!(pace.next(false, at(1_000)), turn("a", false));
        pace.wrote(MS * 200, at(1_200));
        pace.busy(at(1_790));
        assert_eq!(pace.next(false, at(1_799)), None, "rests three times as long");
        assert_eq!(pace.next(false, at(1_800)), turn("b", false));
        pace.wrote(MS * 5_000, at(2_800));
        pace.busy(at(2_899));
        assert_eq!(pace.next(false, at(2_899)), None);
        assert_eq!(pace.set_alarm(false, at(2_899)), Some(MS), "no older than two seconds");
        assert_eq!(pace.next(false, at(2_900)), turn("c", true));
        pace.owe("e".into(), at(2_950));
        assert_eq!(pace.next(false, at(2_950)), turn("d", true));
        assert_eq!(pace.next(false, at(2_950)), None);
        assert_eq!(pace.next(false, at(2_999)), turn("e", false), "quiet: no rest either");
        assert_eq!(pace.next(false, at(9_999)), None);
        // While others are being written on one connection, another one has more patience.
        pace.owe("f".into(), at(10_000));
        pace.write();
        assert_eq!(pace.set_alarm(false, at(10_000)), Some(MS * 4_000));
        assert_eq!(pace.next(false, at(13_999)), None);
        pace.owe("g".into(), at(13_000));
        assert_eq!(pace.next(false, at(14_000)), turn("f", true));
        assert_eq!(pace.next(false, at(16_999)), None);
        pace.wrote(MS, at(16_999));
        assert_eq!(pace.next(false, at(16_999)), turn("g", true));
    }

    #[test]
    fn who_waits_is_served_at_once_and_so_are_all_in_a_hurry() {
        let now = Instant::now();
        let pace = Pace::new(RowPace::default(), now);
        for group in ["a", "b", "c"] {
            pace.owe(group.into(), now);
        }
        assert!(pace.set_alarm(false, now).is_some());
        assert_eq!(pace.next(false, now), None);
        assert!(pace.awaited("b".into()));
        assert!(!pace.awaited("c".into()), "somebody is on the way");
        assert_eq!(pace.next(false, now), turn("b", true));
        assert_eq!(pace.set_alarm(false, now), Some(Duration::ZERO), "c is awaited, too");
        assert_eq!(pace.next(false, now), turn("c", true));
        assert_eq!(pace.next(false, now), None);
        assert_eq!(pace.next(true, now), turn("a", true), "too much is owed");
        assert_eq!(pace.next(false, now), None, "b was written meanwhile");
        pace.hurry();
        assert_eq!(pace.set_alarm(false, now), Some(Duration::ZERO));
        assert_eq!(pace.next(false, now), turn("b", true), "which finds nothing");
        assert_eq!(pace.next(false, now), turn("c", true));
        assert_eq!(pace.next(false, now), None);
    }
}

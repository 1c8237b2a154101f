//! Rows that follow: their metadata are durable, they are not (spec: view-syncer-cvr §2.7).
//!
//! Per group, in the order of their versions. Whoever writes takes all of a group at once; what
//! comes meanwhile is the next turn. Requests that need the rows wait here.
//!
//! Writing is unconditional: the metadata are committed, so this server has the right and the duty,
//! whoever owns the group by now. If it fails for good, everything that is owed of the group is
//! dropped: its rows stay behind its version, which nobody takes for good.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use zeroring_core::cvr::store::{CvrStoreError, RowWrite};
use zeroring_core::cvr::{ClientGroupId, GroupFlush};
use zeroring_core::version::CvrVersion;

use super::{Answer, Reply, RowOptions};

/// Row records that may be owed before further flushes with many rows have to wait: some 300 MB. A
/// single flush may be larger.
pub(super) const MAX_OWED_ROWS: usize = 1_000_000;

/// Flushes of one group that may be owed: a group that writes faster than its rows can be written
/// waits.
const MAX_OWED_PARTS: usize = 10_000;

/// What becomes of the rows of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowsPlan {
    /// They are written with the metadata; the stored ones must be of the expected version.
    Now,
    /// They follow, as the first ones.
    Follow,
    /// They follow others.
    FollowOwed,
}

impl RowsPlan {
    pub(super) fn follow(self) -> bool {
        self != RowsPlan::Now
    }
}

/// The rows of one flush.
#[derive(Debug)]
pub(super) struct Part {
    /// The version that they make the group's rows be of.
    pub(super) version: CvrVersion,
    pub(super) rows: Vec<RowWrite>,
}

impl Part {
    /// What a committed flush owes. Nothing if it moved neither rows nor the version: as soon as
    /// what is owed before it is written, somebody else may take the group over and write a later
    /// version, which must not be undone.
    pub(super) fn of(plan: RowsPlan, flush: &mut GroupFlush) -> Option<Part> {
        let rows = if plan.follow() { std::mem::take(&mut flush.rows) } else { return None };
        let version = flush.instance.version.clone();
        (!rows.is_empty() || version != flush.expected).then_some(Part { version, rows })
    }
}

/// What a store owes; `R` are requests that wait.
pub(super) struct Owed<R> {
    pub(super) options: RowOptions,
    state: Mutex<State<R>>,
}

struct State<R> {
    groups: HashMap<ClientGroupId, Debt<R>>,
    /// Of all groups.
    rows: usize,
    /// Flushes that wait until less is owed.
    blocked: VecDeque<R>,
}

impl<R> std::fmt::Debug for Owed<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        write!(f, "Owed({} rows of {} groups)", state.rows, state.groups.len())
    }
}

struct Debt<R> {
    parts: Vec<Part>,
    /// Others are being written.
    writing: bool,
    /// Rows of both.
    rows: usize,
    waiting: Vec<R>,
    told: Vec<Reply<Answer<()>>>,
}

/// What can go on.
#[derive(Debug)]
pub(super) struct Released<R> {
    /// More of the group is owed: it wants another turn.
    pub(super) more: bool,
    /// Requests that waited, and flushes that were blocked.
    pub(super) ready: Vec<R>,
    pub(super) unblocked: Vec<R>,
}

impl<R> Owed<R> {
    pub(super) fn new(options: RowOptions) -> Owed<R> {
        let (groups, blocked) = (HashMap::new(), VecDeque::new());
        Owed { options, state: Mutex::new(State { groups, rows: 0, blocked }) }
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What becomes of a flush of so many rows; `None`: too much is owed, it has to wait
    /// ([`Owed::block`]).
    pub(super) fn plan(&self, group: &ClientGroupId, rows: usize) -> Option<RowsPlan> {
        let state = self.lock();
        let debt = state.groups.get(group);
        let plan = match debt {
            Some(_) => RowsPlan::FollowOwed,
            None if rows > self.options.sync_rows => RowsPlan::Follow,
            None => return Some(RowsPlan::Now),
        };
        let many = debt.is_some_and(|d| d.parts.len() >= MAX_OWED_PARTS);
        (state.rows <= MAX_OWED_ROWS && !many).then_some(plan)
    }

    /// Keeps a flush until less is owed; gives it back if that is so already.
    pub(super) fn block(&self, flush: R) -> Option<R> {
        let mut state = self.lock();
        if state.groups.is_empty() {
            return Some(flush);
        }
        state.blocked.push_back(flush);
        None
    }

    /// So much is owed that flushes with many rows have to wait.
    pub(super) fn is_full(&self) -> bool {
        self.lock().rows > MAX_OWED_ROWS
    }

    /// Adds the rows of a flush that was committed; true if the group wants a turn of writing.
    pub(super) fn add(&self, group: &ClientGroupId, part: Part) -> bool {
        let mut state = self.lock();
        state.rows += part.rows.len();
        let debt = state.groups.entry(group.clone()).or_insert_with(|| Debt {
            parts: Vec::new(),
            writing: false,
            rows: 0,
            waiting: Vec::new(),
            told: Vec::new(),
        });
        debt.rows += part.rows.len();
        debt.parts.push(part);
        debt.parts.len() == 1 && !debt.writing
    }

    /// Takes what is owed of a group, to write it; [`Owed::done`] must follow.
    pub(super) fn take(&self, group: &ClientGroupId) -> Vec<Part> {
        let mut state = self.lock();
        match state.groups.get_mut(group).filter(|debt| !debt.writing) {
            Some(debt) => {
                debt.writing = true;
                std::mem::take(&mut debt.parts)
            }
            None => Vec::new(),
        }
    }

    /// What was taken is written, or never will be.
    pub(super) fn done(&self, group: &ClientGroupId, result: &Answer<()>) -> Released<R> {
        let mut state = self.lock();
        let mut released = Released { more: false, ready: Vec::new(), unblocked: Vec::new() };
        let mut told = Vec::new();
        if let Some(debt) = state.groups.get_mut(group) {
            debt.writing = false;
            let left = match result {
                Ok(()) => debt.parts.iter().map(|part| part.rows.len()).sum(),
                Err(_) => 0,
            };
            let paid = std::mem::replace(&mut debt.rows, left) - left;
            released.more = result.is_ok() && !debt.parts.is_empty();
            state.rows -= paid;
            if !released.more
                && let Some(debt) = state.groups.remove(group)
            {
                released.ready = debt.waiting;
                told = debt.told;
            }
            if state.rows <= MAX_OWED_ROWS {
                released.unblocked.extend(state.blocked.drain(..));
            }
        }
        drop(state);
        for reply in told {
            reply(result.clone());
        }
        released
    }

    /// Keeps a request until nothing of the group is owed; gives it back if nothing is.
    pub(super) fn wait(&self, group: &ClientGroupId, request: R) -> Option<R> {
        match self.lock().groups.get_mut(group) {
            Some(debt) => {
                debt.waiting.push(request);
                None
            }
            None => Some(request),
        }
    }

    /// Answers when nothing of the group is owed.
    pub(super) fn tell(&self, group: &ClientGroupId, reply: Reply<Answer<()>>) {
        if let Some(debt) = self.lock().groups.get_mut(group) {
            return debt.told.push(reply);
        }
        reply(Ok(()));
    }

    /// Nothing more will be written: everybody is told.
    pub(super) fn abandon(&self) -> Vec<R> {
        let mut state = self.lock();
        state.rows = 0;
        let debts: Vec<_> = state.groups.drain().map(|(_, debt)| debt).collect();
        let mut left: Vec<R> = state.blocked.drain(..).collect();
        drop(state);
        for debt in debts {
            left.extend(debt.waiting);
            debt.told.into_iter().for_each(|reply| reply(Err(CvrStoreError::Closed)));
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn part(state: u64) -> Part {
        let state = zeroring_core::version::StateVersion::from_lsn(state);
        Part { version: CvrVersion { state, config: 0 }, rows: Vec::new() }
    }

    #[test]
    fn more_than_a_hundred_rows_follow_and_then_all_of_the_group_until_none_is_owed() {
        let owed: Owed<()> = Owed::new(RowOptions::default());
        let (g, h) = (ClientGroupId::from("g"), ClientGroupId::from("h"));
        assert_eq!(owed.plan(&g, 100), Some(RowsPlan::Now));
        assert_eq!(owed.plan(&g, 101), Some(RowsPlan::Follow));
        assert!(owed.add(&g, part(1)), "wants a turn");
        assert_eq!(owed.plan(&g, 0), Some(RowsPlan::FollowOwed));
        assert_eq!(owed.plan(&h, 100), Some(RowsPlan::Now));
        let taken = owed.take(&g);
        assert_eq!(taken.len(), 1);
        assert!(!owed.add(&g, part(2)), "while others are being written");
        assert!(owed.take(&g).is_empty());
        assert_eq!(owed.plan(&g, 0), Some(RowsPlan::FollowOwed));
        assert!(owed.done(&g, &Ok(())).more);
        assert_eq!(owed.take(&g)[0].version, part(2).version);
        assert!(!owed.done(&g, &Ok(())).more);
        assert_eq!(owed.plan(&g, 100), Some(RowsPlan::Now));
        assert!(!owed.is_full());
    }

    #[test]
    fn who_needs_the_rows_waits_and_is_told_of_failures() {
        let owed: Owed<u8> = Owed::new(RowOptions::default());
        let g = ClientGroupId::from("g");
        assert_eq!(owed.wait(&g, 1), Some(1));
        owed.add(&g, part(1));
        assert_eq!(owed.wait(&g, 2), None);
        let (send, answer) = channel();
        owed.tell(&g, Box::new(move |told| send.send(told).unwrap()));
        owed.take(&g);
        owed.add(&g, part(2));
        let broken = Err(CvrStoreError::Storage("disk full".into()));
        let released = owed.done(&g, &broken);
        assert_eq!((released.more, released.ready), (false, vec![2]));
        assert_eq!(answer.try_recv().unwrap(), broken);
        assert_eq!(owed.plan(&g, 0), Some(RowsPlan::Now), "the later ones are gone, too");
        let (send, answer) = channel();
        owed.tell(&g, Box::new(move |told| send.send(told).unwrap()));
        assert_eq!(answer.try_recv().unwrap(), Ok(()));
    }

    #[test]
    fn what_is_owed_is_bounded() {
        let owed: Owed<u8> = Owed::new(RowOptions::default());
        let (g, h) = (ClientGroupId::from("g"), ClientGroupId::from("h"));
        assert_eq!(owed.block(1), Some(1), "nobody would wake it");
        for n in 0..MAX_OWED_PARTS as u64 {
            assert_eq!(owed.plan(&g, 0).map(RowsPlan::follow), Some(n > 0));
            owed.add(&g, part(n));
        }
        assert_eq!(owed.plan(&g, 0), None);
        assert_eq!(owed.block(7), None);
        assert!(owed.plan(&h, 101).is_some());
        owed.take(&g);
        assert_eq!(owed.done(&g, &Ok(())).unblocked, [7]);
    }
}

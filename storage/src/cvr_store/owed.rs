//! Rows that follow: their metadata are durable, they are not (spec: view-syncer-cvr §2.7).
//!
//! Per group, in the order of their versions. Whoever writes takes all of a group at once; what
//! comes meanwhile is the next turn. Requests that need the rows wait here.
//!
//! What waits *coalesces*: a later change of a row takes the place of an earlier one, so what is
//! owed grows with the rows that change, not with the flushes.
//!
//! Writing is unconditional: the metadata are committed, so this server has the right and the duty,
//! whoever owns the group by now. If it fails for good, everything that is owed of the group is
//! dropped: its rows stay behind its version, which nobody takes for good.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;
use zeroring_core::cvr::store::{CvrStoreError, RowChange, RowWrite};
use zeroring_core::cvr::{ClientGroupId, GroupFlush, QueryHash, RowIdentity};
use zeroring_core::version::CvrVersion;

use super::coalesce::coalesce;
use super::{Answer, Reply, RowOptions};

/// Row records that may be owed before further flushes with many rows have to wait: some 300 MB. A
/// single flush may be larger. Records of long keys and many references count as several
/// ([`weight`]).
pub(super) const MAX_OWED_ROWS: usize = 1_000_000;

/// Row records that may be owed before the rows of small flushes are written with their metadata
/// again, however many come together: what Postgres writes in some five seconds on one connection,
/// which is how long a server that takes a group over waits for its rows.
const MAX_OWED_BY_BATCHES: usize = 250_000;

/// Flushes of one group that may be owed without being coalesced.
const MAX_OWED_PARTS: usize = 10_000;

/// Bytes of a key that count as one record more.
const WEIGHT_BYTES: usize = 256;

/// How many ordinary records a record is as large as.
fn weight(row: &RowWrite) -> usize {
    let references = match &row.change {
        RowChange::Put { ref_counts: counts, .. } | RowChange::Adjust { counts, .. } => {
            counts.len()
        }
        RowChange::Tombstone { .. } | RowChange::Delete => 0,
    };
    1 + (row.id.key_json().len() + references * size_of::<(QueryHash, i64)>()) / WEIGHT_BYTES
}

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
    /// Of the rows, by [`weight`].
    weight: usize,
}

impl Part {
    /// What a committed flush owes. Nothing if it moved neither rows nor the version: as soon as
    /// what is owed before it is written, somebody else may take the group over and write a later
    /// version, which must not be undone.
    pub(super) fn of(plan: RowsPlan, flush: &mut GroupFlush) -> Option<Part> {
        let rows = if plan.follow() { std::mem::take(&mut flush.rows) } else { return None };
        let version = flush.instance.version.clone();
        (!rows.is_empty() || version != flush.expected).then(|| Part::new(version, rows))
    }

    fn new(version: CvrVersion, rows: Vec<RowWrite>) -> Part {
        let weight = rows.iter().map(weight).sum();
        Part { version, rows, weight }
    }
}

/// Parts that were put on top of each other. What no single change can say is a part more.
#[derive(Debug, Default)]
struct Coalesced {
    parts: Vec<Part>,
    /// Where the rows of the last part are; empty until another one comes.
    at: FxHashMap<Arc<RowIdentity>, usize>,
}

impl Coalesced {
    /// Adds a later part.
    fn add(&mut self, newer: Part) {
        let Some(last) = self.parts.last_mut() else { return self.parts.push(newer) };
        if self.at.is_empty() {
            let rows = last.rows.iter().enumerate();
            self.at.extend(rows.map(|(at, row)| (row.id.clone(), at)));
        }
        last.version = newer.version.clone();
        let mut left = Vec::new();
        for row in newer.rows {
            let Some(at) = self.at.get(&row.id) else {
                self.at.insert(row.id.clone(), last.rows.len());
                last.weight += weight(&row);
                last.rows.push(row);
                continue;
            };
            let older = &mut last.rows[*at];
            last.weight -= weight(older);
            let done = coalesce(&mut older.change, row.change);
            last.weight += weight(older);
            if let Err(change) = done {
                left.push(RowWrite { id: row.id, change });
            }
        }
        if !left.is_empty() {
            self.at.clear();
            self.parts.push(Part::new(newer.version, left));
        }
    }
}

/// What a store owes; `R` are requests that wait.
pub(super) struct Owed<R> {
    pub(super) options: RowOptions,
    state: Mutex<State<R>>,
}

struct State<R> {
    groups: HashMap<ClientGroupId, Debt<R>>,
    /// Of all groups, by [`weight`].
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
    /// The earlier ones, coalesced, and the later ones.
    coalesced: Coalesced,
    parts: Vec<Part>,
    /// Others are being written.
    writing: bool,
    /// Rows of all of them, by [`weight`].
    rows: usize,
    waiting: Vec<R>,
    told: Vec<Reply<Answer<()>>>,
}

impl<R> Debt<R> {
    fn new() -> Debt<R> {
        Debt {
            coalesced: Coalesced::default(),
            parts: Vec::new(),
            writing: false,
            rows: 0,
            waiting: Vec::new(),
            told: Vec::new(),
        }
    }

    /// Rows that are not being written.
    fn left(&self) -> usize {
        self.coalesced.parts.iter().chain(&self.parts).map(|part| part.weight).sum()
    }

    /// Puts later parts on top of the earlier ones; the weight before, and after.
    /// (References that are put together may weigh more than they did apart.)
    fn coalesce(&mut self) -> (usize, usize) {
        let before = self.left();
        for part in self.parts.drain(..) {
            self.coalesced.add(part);
        }
        let after = self.left();
        self.rows = self.rows + after - before;
        (before, after)
    }

    fn has_parts(&self) -> bool {
        !(self.coalesced.parts.is_empty() && self.parts.is_empty())
    }
}

/// What can go on.
#[derive(Debug)]
pub(super) struct Released<R> {
    /// More of the group is owed: it wants another turn.
    pub(super) more: bool,
    /// Requests wait for it.
    pub(super) awaited: bool,
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

    /// What becomes of a flush of so many rows, which comes with others of `together` rows in all;
    /// `None`: too much is owed, it has to wait ([`Owed::block`]).
    pub(super) fn plan(
        &self,
        group: &ClientGroupId,
        rows: usize,
        together: usize,
    ) -> Option<RowsPlan> {
        let state = self.lock();
        let debt = state.groups.get(group);
        let crowd = together > self.options.batch_sync_rows && rows > 0;
        let plan = match debt {
            Some(_) => RowsPlan::FollowOwed,
            None if rows > self.options.sync_rows => RowsPlan::Follow,
            None if crowd && state.rows <= MAX_OWED_BY_BATCHES => return Some(RowsPlan::Follow),
            None => return Some(RowsPlan::Now),
        };
        let parts = debt.map_or(0, |d| d.coalesced.parts.len() + d.parts.len());
        let many = parts >= MAX_OWED_PARTS;
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
        let rows = part.weight;
        let mut state = self.lock();
        state.rows += rows;
        let debt = state.groups.entry(group.clone()).or_insert_with(Debt::new);
        let first = !debt.has_parts() && !debt.writing;
        debt.rows += rows;
        debt.parts.push(part);
        first
    }

    /// Puts what was added on top of what waited already. Apart from [`Owed::add`], for verdicts
    /// need not wait for it.
    pub(super) fn coalesce(&self, group: &ClientGroupId) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(debt) = state.groups.get_mut(group) else { return };
        let (before, after) = debt.coalesce();
        state.rows = state.rows + after - before;
    }

    /// Takes what is owed of a group, to write it; [`Owed::done`] must follow.
    pub(super) fn take(&self, group: &ClientGroupId) -> Vec<Part> {
        let mut guard = self.lock();
        let state = &mut *guard;
        match state.groups.get_mut(group).filter(|debt| !debt.writing) {
            Some(debt) => {
                let (before, after) = debt.coalesce();
                state.rows = state.rows + after - before;
                debt.writing = true;
                std::mem::take(&mut debt.coalesced).parts
            }
            None => Vec::new(),
        }
    }

    /// What was taken is written, or never will be.
    pub(super) fn done(&self, group: &ClientGroupId, result: &Answer<()>) -> Released<R> {
        let mut state = self.lock();
        let (ready, unblocked) = (Vec::new(), Vec::new());
        let mut released = Released { more: false, awaited: false, ready, unblocked };
        let mut told = Vec::new();
        if let Some(debt) = state.groups.get_mut(group) {
            debt.writing = false;
            let left = if result.is_ok() { debt.left() } else { 0 };
            let paid = std::mem::replace(&mut debt.rows, left) - left;
            released.more = result.is_ok() && debt.has_parts();
            released.awaited = !debt.waiting.is_empty();
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

    use zeroring_core::version::StateVersion;

    use super::*;

    fn part(state: u64) -> Part {
        let state = StateVersion::from_lsn(state);
        Part::new(CvrVersion { state, config: 0 }, Vec::new())
    }

    #[test]
    fn more_than_a_hundred_rows_follow_and_then_all_of_the_group_until_none_is_owed() {
        let owed: Owed<()> = Owed::new(RowOptions::default());
        let (g, h) = (ClientGroupId::from("g"), ClientGroupId::from("h"));
        assert_eq!(owed.plan(&g, 100, 0), Some(RowsPlan::Now));
        assert_eq!(owed.plan(&g, 101, 0), Some(RowsPlan::Follow));
        assert!(owed.add(&g, part(1)), "wants a turn");
        assert_eq!(owed.plan(&g, 0, 0), Some(RowsPlan::FollowOwed));
        assert_eq!(owed.plan(&h, 100, 0), Some(RowsPlan::Now));
        let taken = owed.take(&g);
        assert_eq!(taken.len(), 1);
        assert!(!owed.add(&g, part(2)), "while others are being written");
        assert!(owed.take(&g).is_empty());
        assert_eq!(owed.plan(&g, 0, 0), Some(RowsPlan::FollowOwed));
        assert!(owed.done(&g, &Ok(())).more);
        assert_eq!(owed.take(&g)[0].version, part(2).version);
        assert!(!owed.done(&g, &Ok(())).more);
        assert_eq!(owed.plan(&g, 100, 0), Some(RowsPlan::Now));
        assert!(!owed.is_full());
    }

    fn put(id: i64, at: u64) -> RowWrite {
        let version = StateVersion::from_lsn(at);
        let key = vec![("id".into(), zeroring_core::value::Value::from_i64(id))];
        let change = RowChange::Put {
            row_version: version.clone(),
            patch_version: CvrVersion { state: version, config: 0 },
            ref_counts: zeroring_core::cvr::RefCounts::of("q".into(), 1),
        };
        RowWrite { id: Arc::new(RowIdentity::new("issue".into(), key)), change }
    }

    fn rows(at: u64, ids: std::ops::Range<i64>) -> Part {
        let version = CvrVersion { state: StateVersion::from_lsn(at), config: 0 };
        Part::new(version, ids.map(|id| put(id, at)).collect())
    }

    #[test]
    fn rows_of_small_flushes_follow_if_many_come_together() {
        let owed: Owed<()> = Owed::new(RowOptions::default());
        let g = ClientGroupId::from("g");
        assert_eq!(owed.plan(&g, 100, 1_000), Some(RowsPlan::Now));
        assert_eq!(owed.plan(&g, 1, 1_001), Some(RowsPlan::Follow));
        assert_eq!(owed.plan(&g, 0, 1_001), Some(RowsPlan::Now), "there is nothing to follow");
        let many = |n| Part::new(rows(1, 0..0).version, vec![put(0, 1); n]);
        owed.add(&"h".into(), many(MAX_OWED_BY_BATCHES));
        assert_eq!(owed.plan(&g, 1, 1_001), Some(RowsPlan::Follow));
        owed.add(&"h".into(), rows(2, 0..1));
        assert_eq!(owed.plan(&g, 1, 1_001), Some(RowsPlan::Now), "they would come too late");
        assert_eq!(owed.plan(&g, 101, 1_001), Some(RowsPlan::Follow));
        owed.coalesce(&"h".into());
        assert_eq!(owed.plan(&g, 1, 1_001), Some(RowsPlan::Follow));
        assert!(!owed.is_full());
        owed.add(&"h".into(), many(MAX_OWED_ROWS));
        assert!(owed.is_full());
        assert_eq!(owed.plan(&g, 101, 0), None);
        assert_eq!(owed.plan(&g, 1, 1_001), Some(RowsPlan::Now), "as if nothing could follow");
    }

    #[test]
    fn what_waits_is_one_record_per_row_of_the_last_version() {
        let owed: Owed<()> = Owed::new(RowOptions::default());
        let g = ClientGroupId::from("g");
        for at in 1..=50 {
            assert_eq!(owed.add(&g, rows(at, 0..100)), at == 1);
            owed.coalesce(&g);
            assert_eq!(owed.lock().rows, 100);
        }
        owed.add(&g, rows(51, 99..102));
        let taken = owed.take(&g);
        assert_eq!((taken.len(), taken[0].rows.len()), (1, 102));
        assert_eq!((&taken[0].rows[7], &taken[0].rows[99]), (&put(7, 50), &put(99, 51)));
        // What comes meanwhile is apart from what is being written.
        owed.add(&g, rows(52, 0..3));
        owed.coalesce(&g);
        assert!(owed.done(&g, &Ok(())).more);
        assert_eq!(owed.lock().rows, 3);
        let adjust = |at, row_version: Option<u64>, keep_patch_version| {
            let change = RowChange::Adjust {
                counts: zeroring_core::cvr::RefCounts::of("p".into(), 1),
                row_version: row_version.map(StateVersion::from_lsn),
                patch_version: rows(at, 0..0).version,
                keep_patch_version,
            };
            Part::new(rows(at, 0..0).version, vec![RowWrite { id: put(9, 0).id, change }])
        };
        // Only the store knows whether the last of these keeps the patch version.
        for part in [adjust(53, None, false), adjust(54, Some(3), true), rows(55, 8..9)] {
            owed.add(&g, part);
            owed.coalesce(&g);
        }
        let taken = owed.take(&g);
        assert_eq!(taken.iter().map(|part| part.rows.len()).collect::<Vec<_>>(), [4, 2]);
        assert_eq!(taken[1].version, rows(55, 0..0).version);
        assert!(!owed.done(&g, &Ok(())).more);
        assert_eq!(owed.lock().rows, 0);
    }

    #[test]
    fn records_of_long_keys_count_as_several() {
        let long =
            vec![("id".into(), zeroring_core::value::Value::String("x".repeat(2_000).into()))];
        let id = Arc::new(RowIdentity::new("issue".into(), long));
        assert_eq!(weight(&put(1, 1)), 1);
        assert_eq!(weight(&RowWrite { id, ..put(1, 1) }), 8);
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
        assert_eq!(owed.plan(&g, 0, 0), Some(RowsPlan::Now), "the later ones are gone, too");
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
            assert_eq!(owed.plan(&g, 0, 0).map(RowsPlan::follow), Some(n > 0));
            owed.add(&g, part(n));
        }
        assert_eq!(owed.plan(&g, 0, 0), None);
        assert_eq!(owed.block(7), None);
        assert!(owed.plan(&h, 101, 0).is_some());
        owed.take(&g);
        assert_eq!(owed.done(&g, &Ok(())).unblocked, [7]);
    }
}

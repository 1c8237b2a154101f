//! An update of results, computed in slices (spec: view-syncer-cvr §5.6).
//!
//! What it is made of is *taken at one version of the engine*, all at once and without looking
//! into it: references to the rows of queries that come and go, the deltas since the last update,
//! signatures. From then on the queries run, and later deltas belong to the next update. The rest
//! (naming rows, JSON, counting, comparing with records, encoding) is done [`SLICE_ROWS`] rows at
//! a time ([`Effect::Continue`]), so that a group with a million new rows delays nobody else on its
//! executor, and the engine goes on meanwhile.

use std::collections::{BTreeMap, BTreeSet, VecDeque, hash_map};
use std::sync::Arc;

use rustc_hash::FxHashMap;
use smallvec::{SmallVec, smallvec};

use super::config::bug;
use super::early::Sent;
use super::encode::{Encoding, Patches};
use super::held::{Basis, HeldQuery, Taking, discard_held};
use super::interface::{Effect, ResetReason};
use super::machine::{Cx, Group, Pipeline};
use super::op::{Failure, Stage, Step, StepResult, Sync};
use super::pending::{Pending, SharedDelta, Unmerged};
use super::sync::failed_query;
use crate::cvr::advance::{AdvancedRow, AdvancedRows, CountChange, RowDeltas};
use crate::cvr::{
    Cvr, Executed, Patch, QueryHash, QueryUpdater, ReceivedRow, RecordSlices, RefCounts,
    RowChanges, RowIdentity, VersionedPatch,
};
use crate::ivm::engine::InstanceId;
use crate::ivm::shards::ShardMap;
use crate::row::RowRef;
use crate::schema::{Schema, TableSpec};
use crate::version::{CvrVersion, StateVersion};
use crate::waste::Waste;

/// Rows of one slice: about a millisecond. Few in tests, so that every step can be interrupted.
pub(super) const SLICE_ROWS: usize = if cfg!(test) { 3 } else { 1_000 };

/// Slices in a row in which what gathers meanwhile is merged, before all of it is merged at once:
/// an update must come to its end.
const MOST_MERGES: u32 = 10_000;

/// An update under way.
#[derive(Debug)]
pub(super) struct Computing {
    sync: Box<Sync>,
    update: QueryUpdater,
    /// Of the version that everything was taken at.
    schema: Arc<Schema>,
    signatures: BTreeMap<QueryHash, u64>,
    /// Its queries run again with the rows that they had.
    as_it_was: bool,
    /// The version of the update before.
    since: StateVersion,
    /// What late clients missed, in slices.
    missed: Vec<Vec<VersionedPatch>>,
    /// Rows of it that are not there.
    lost: std::vec::IntoIter<(Arc<RowIdentity>, String)>,
    /// Rows that the update has patches for, while something was missed.
    rewritten: ShardMap<Arc<RowIdentity>, ()>,
    /// Queries with a row that cannot be delivered: they are removed.
    undeliverable: BTreeSet<QueryHash>,
    /// Slices: one vector of a million is as long in coming as in going.
    patches: Vec<Vec<VersionedPatch>>,
    /// For clients to whom rows went out early.
    end: Vec<Vec<VersionedPatch>>,
    /// Slices in a row that were not enough to merge what has gathered meanwhile.
    merges: u32,
    work: Work,
}

/// What a slice came to.
enum Slice {
    More,
    Done,
    /// What runs has changed under the update.
    Void,
}

/// What is being done, slice by slice.
#[derive(Debug)]
enum Work {
    /// Rows get names, and one entry each.
    Gather(Gather),
    /// What changed in the queries that go on joins the rows that will be compared with records.
    Mix(Received, AdvancedRows),
    /// Rows are counted, with what the records say.
    Receive(std::vec::IntoIter<ReceivedRow>, hash_map::IntoIter<Arc<RowIdentity>, usize>),
    /// Records are looked through for rows that did not come again.
    Bury(RecordSlices),
    /// What becomes of records is settled.
    Settle(RowChanges),
    /// Rows are counted, with what the instances say.
    Count(AdvancedRows),
    /// The same, of one query that merely advances: nothing is gathered before.
    CountOne(Unmerged),
    /// Rows that went out early, and were not found in the update, are taken back.
    TakeBack(Sent),
    /// Rows that late clients missed and that are not there: whether this update says why.
    Find,
}

/// Rows on their way to one entry each: deltas first, then whole queries.
#[derive(Debug, Default)]
struct Gather {
    deltas: Unmerged,
    merged: RowDeltas,
    held: VecDeque<HeldQuery>,
    rows: Rows,
}

/// What becomes of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Course {
    Comes,
    Goes,
    /// It runs again, with the same rows: those that changed are looked at.
    Stays,
}

/// Named rows of queries that come or go.
#[derive(Debug, Default)]
enum Rows {
    /// To be compared with records.
    Received(Received),
    /// Changes from and to nothing, among the deltas.
    #[default]
    Changes,
    /// Of queries that come and have no row in common: each row is there once.
    Whole(Vec<AdvancedRow>),
}

/// Rows of several queries.
#[derive(Debug, Default)]
struct Received(Vec<ReceivedRow>, FxHashMap<Arc<RowIdentity>, usize>);

impl Group {
    /// Everything that the update is made of was taken, at the engine's version: begins.
    pub(super) fn begin_compute(
        &mut self,
        mut sync: Box<Sync>,
        instances: &BTreeMap<QueryHash, InstanceId>,
        taking: Taking,
        mut update: QueryUpdater,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let (missed, lost) = std::mem::take(&mut sync.missed).into_patches();
        let as_it_was = taking.basis == Basis::Signatures;
        let since = match &self.cvr {
            Some(cvr) if as_it_was => cvr.version.state.clone(),
            _ => self.pending.since().clone(),
        };
        let work = self.work(&sync, taking.held, &mut update);
        self.install(&sync, instances, cx);
        self.pending = Pending::at(cx.world.version().clone());
        let signature = |p: &Pipeline| cx.world.signature(p.instance).ok();
        let signatures = self.pipelines.iter();
        let signatures = signatures.filter_map(|(id, p)| Some((id.clone(), signature(p)?)));
        let computing = Computing {
            update,
            schema: cx.world.schema().clone(),
            signatures: signatures.collect(),
            as_it_was,
            since,
            missed,
            lost: lost.into_iter(),
            rewritten: ShardMap::default(),
            undeliverable: BTreeSet::new(),
            patches: Vec::new(),
            end: Vec::new(),
            merges: 0,
            work,
            sync,
        };
        self.compute(Box::new(computing), cx)
    }

    /// What is to be done with these rows, and with the deltas since the update before.
    fn work(&mut self, sync: &Sync, held: VecDeque<HeldQuery>, update: &mut QueryUpdater) -> Work {
        let (merged, deltas) = self.pending.take();
        let whole: usize = held.iter().map(HeldQuery::len).sum();
        let changed = merged.len() + deltas.len();
        if sync.records_read {
            update.reserve(whole + changed, 0);
        } else {
            update.reserve(0, whole + changed);
        }
        let rows = if sync.records_read {
            let mut received = Received::default();
            received.reserve(whole + changed);
            Rows::Received(received)
        } else if held.is_empty() && merged.is_empty() && deltas.is_one() {
            return Work::CountOne(deltas);
        } else if changed == 0 && sync.removals.is_empty() && are_disjoint(&held) {
            Rows::Whole(Vec::with_capacity(whole))
        } else {
            Rows::Changes
        };
        Work::Gather(Gather { deltas, merged, held, rows })
    }

    /// Makes the added queries the running ones.
    fn install(
        &mut self,
        sync: &Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) {
        for id in &sync.removals {
            if let Some(old) = self.pipelines.remove(id) {
                cx.emit(Effect::Release(old.instance));
            }
        }
        for (id, transformed) in &sync.additions {
            let Some(instance) = instances.get(id) else { continue };
            let pipeline = Pipeline { instance: *instance, hash: transformed.hash.clone() };
            if let Some(old) = self.pipelines.insert(id.clone(), pipeline) {
                cx.info(format!("group {}: transformation of query {id} changed", self.id));
                cx.emit(Effect::Release(old.instance));
            }
        }
    }

    /// Goes on for a slice.
    pub(super) fn compute(&mut self, mut c: Box<Computing>, cx: &mut Cx<'_>) -> StepResult {
        if self.reset.is_some() || self.pending.has_failed() {
            return self.abandon(c, cx);
        }
        match self.compute_slice(&mut c, cx) {
            Ok(Slice::More) => {
                cx.emit(Effect::Continue);
                Ok(Step::Wait(Stage::Computing(c)))
            }
            Ok(Slice::Done) => self.computed(c, cx),
            Ok(Slice::Void) => self.abandon(c, cx),
            Err(failure) => Stage::Computing(c).failed(failure, cx),
        }
    }

    fn compute_slice(&mut self, c: &mut Computing, cx: &mut Cx<'_>) -> Result<Slice, Failure> {
        let mut budget = SLICE_ROWS;
        loop {
            if c.work.asks_for_others() && !self.merges_for(&mut c.merges) {
                return Ok(Slice::More);
            }
            let Computing { sync, update, as_it_was, since, undeliverable, work, .. } = &mut *c;
            let mut new = Vec::new();
            let done = match work {
                Work::Gather(gather) => {
                    let all = self.gather(gather, &mut budget, sync, undeliverable, cx);
                    if *as_it_was && !undeliverable.is_empty() {
                        // Only the records say which rows go with such a query.
                        return Ok(Slice::Void);
                    }
                    if all {
                        let gathered = std::mem::take(gather);
                        *work = self.gathered(gathered, sync, update, &mut new, cx)?;
                    }
                    false
                }
                Work::Mix(received, rows) => {
                    let now = rows.len().min(budget);
                    budget -= now;
                    let touched: BTreeSet<&QueryHash> =
                        sync.additions.iter().map(|(id, _)| id).chain(&sync.removals).collect();
                    for row in rows.by_ref().take(now) {
                        for c in row.counts.iter().filter(|c| !touched.contains(&c.query)) {
                            let change = c.after - c.before;
                            received.add(&row.id, row.row.as_ref(), &c.query, change);
                        }
                    }
                    if rows.len() == 0 {
                        let Received(rows, index) = std::mem::take(received);
                        *work = Work::Receive(rows.into_iter(), index.into_iter());
                    }
                    false
                }
                Work::Receive(rows, index) => {
                    let now = rows.len().min(budget);
                    budget -= now;
                    index.by_ref().take(now).for_each(drop);
                    let delivered = rows.by_ref().take(now).map(|mut row| {
                        undeliverable.iter().for_each(|query| row.counts.set(query, 0));
                        row
                    });
                    new.extend(update.received(delivered, &sync.records)?);
                    if rows.len() == 0 {
                        *work = Work::Bury(std::mem::take(&mut sync.records).into_slices());
                    }
                    false
                }
                Work::Bury(records) => {
                    let slice = records.take(budget);
                    budget = budget.saturating_sub(slice.len());
                    new.extend(update.delete_unreferenced_rows(&slice)?);
                    if records.is_empty() {
                        *work = Work::Settle(update.take_row_changes());
                    }
                    false
                }
                Work::Settle(changes) => {
                    let now = changes.len().min(budget);
                    budget -= now;
                    update.put_row_changes(changes.by_ref().take(now));
                    changes.len() == 0
                }
                Work::Count(_) | Work::CountOne(_) => {
                    let mut slice = Vec::new();
                    let done = match work {
                        Work::Count(rows) => {
                            slice.extend(rows.by_ref().take(budget));
                            rows.len() == 0
                        }
                        Work::CountOne(rows) => {
                            rows.take(budget, |query, row| slice.push(row.advanced(query)));
                            rows.is_empty()
                        }
                        _ => true,
                    };
                    budget -= slice.len();
                    if !undeliverable.is_empty() {
                        slice.retain_mut(|row| {
                            row.counts.retain(|c| !undeliverable.contains(&c.query));
                            !row.counts.is_empty()
                        });
                    }
                    if self.look_for_others(&mut slice, cx).is_err() {
                        return Ok(Slice::Void);
                    }
                    if !slice.is_empty() {
                        update.ensure_new_version();
                        new.extend(update.advanced(slice, since)?);
                    }
                    done
                }
                Work::TakeBack(sent) => {
                    let rows = sent.take_some(budget);
                    budget = budget.saturating_sub(rows.len());
                    let done = sent.is_empty();
                    match self.take_back(rows, update.version(), cx) {
                        Ok(gone) => c.end.push(gone),
                        Err(_) => return Ok(Slice::Void),
                    }
                    done
                }
                Work::Find => {
                    let mut lost = c.lost.by_ref().take(budget);
                    let lost = lost.find(|(id, _)| !c.rewritten.contains_key(id));
                    budget = 0;
                    if let Some(lost) = lost {
                        self.lost_rows(&lost, cx);
                        if !self.compare_all {
                            return Ok(Slice::Void);
                        }
                        cx.leave(|waste| waste.rows(std::mem::take(&mut c.lost)));
                    }
                    c.lost.len() == 0
                }
            };
            if !c.missed.is_empty() {
                let rows = new.iter().filter_map(|p| row_of(&p.patch));
                rows.for_each(|id| c.rewritten.insert(id.clone(), ()));
            }
            if let Some(open) = &mut self.open {
                c.end.push(open.sort(&mut new));
            }
            if !new.is_empty() {
                c.patches.push(new);
            }
            if let Some(open) = self.open.as_mut().filter(|_| done)
                && !matches!(c.work, Work::TakeBack(_) | Work::Find)
            {
                c.work = Work::TakeBack(open.take_unfound());
                continue;
            }
            if done && c.lost.len() == 0 {
                return Ok(Slice::Done);
            }
            if done {
                c.work = Work::Find;
            }
            if budget == 0 {
                return Ok(Slice::More);
            }
        }
    }

    /// Merges what has gathered meanwhile, which has to be known before rows are counted; false if
    /// there is more of it than a slice.
    fn merges_for(&mut self, slices: &mut u32) -> bool {
        if self.pending.merge_slice() {
            *slices = 0;
            return true;
        }
        *slices += 1;
        let is_overdue = *slices > MOST_MERGES;
        if is_overdue {
            self.pending.merge_all();
        }
        is_overdue
    }

    /// What runs has changed under the update: the bring-up that follows does it all.
    fn abandon(&mut self, mut c: Box<Computing>, cx: &mut Cx<'_>) -> StepResult {
        self.reset.get_or_insert(ResetReason::LostRow);
        let ack = c.sync.ack.take();
        self.acknowledge(ack, cx);
        Stage::Computing(c).discard(cx);
        Ok(Step::Done)
    }

    /// Gathers for a slice; true when all is there.
    fn gather(
        &mut self,
        gather: &mut Gather,
        budget: &mut usize,
        sync: &mut Sync,
        undeliverable: &mut BTreeSet<QueryHash>,
        cx: &mut Cx<'_>,
    ) -> bool {
        let Gather { deltas, merged, held, rows } = gather;
        deltas.take(*budget, |query, row| {
            *budget -= 1;
            merged.add(&row.id, row.change_of(query), row.row.as_ref());
        });
        while *budget > 0
            && let Some(of) = held.front_mut()
        {
            let Some(next) = of.pop() else {
                held.pop_front();
                continue;
            };
            *budget -= 1;
            let Some((table, row, count)) = next else { continue };
            let table = of.tables[table].clone();
            let held = Held { query: of.query.clone(), course: of.course, table, row, count };
            self.name(held, merged, rows, sync, undeliverable, cx);
        }
        deltas.is_empty() && held.is_empty()
    }

    fn name(
        &mut self,
        held: Held,
        merged: &mut RowDeltas,
        rows: &mut Rows,
        sync: &mut Sync,
        undeliverable: &mut BTreeSet<QueryHash>,
        cx: &mut Cx<'_>,
    ) {
        let Held { query, course, table, row, count } = held;
        if undeliverable.contains(&query) {
            return;
        }
        if course != Course::Goes
            && let Err(why) = SharedDelta::check(&self.settings.tables, &table, &row)
        {
            if course != Course::Stays {
                self.give_up(&query, why, sync, cx);
            }
            undeliverable.insert(query);
            return;
        }
        let id = Arc::new(RowIdentity::of(&table, &row));
        let (before, after) = match course {
            Course::Comes => (0, count),
            Course::Goes => (count, 0),
            Course::Stays => (count, count),
        };
        let change = CountChange { query, before, after };
        match rows {
            Rows::Received(rows) => rows.add(&id, Some(&row), &change.query, count),
            Rows::Changes => merged.add_whole(&id, change, &row),
            Rows::Whole(rows) => rows.push(AdvancedRow {
                id,
                row: Some(row),
                counts: smallvec![change],
                others: false,
                by_advance: false,
            }),
        }
    }

    /// A query has a row that cannot be delivered: it becomes a removed one.
    fn give_up(&mut self, query: &QueryHash, why: String, sync: &mut Sync, cx: &mut Cx<'_>) {
        if let Some(known) = self.cvr.as_ref().and_then(|cvr| cvr.query(query)) {
            let errored = failed_query(known, why);
            self.tell_errored(&[errored], cx);
        }
        self.cancel_open_poke(cx);
        sync.additions.retain(|(added, _)| added != query);
        sync.removals.push(query.clone());
        if let Some(pipeline) = self.pipelines.remove(query) {
            cx.emit(Effect::Release(pipeline.instance));
        }
        if self.pending.len() > SLICE_ROWS {
            // It is less work to compare everything than to look for what is void.
            self.reset.get_or_insert(ResetReason::LostRow);
        } else {
            self.pending.forget(query);
        }
    }

    /// All rows have names: the version is settled, and what becomes of the queries.
    fn gathered(
        &self,
        gathered: Gather,
        sync: &Sync,
        update: &mut QueryUpdater,
        patches: &mut Vec<VersionedPatch>,
        cx: &mut Cx<'_>,
    ) -> Result<Work, Failure> {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        if forced_bump(cvr, sync, update.version()) {
            update.ensure_new_version();
        }
        if !sync.additions.is_empty() || !sync.removals.is_empty() {
            let executed: Vec<Executed> = sync
                .additions
                .iter()
                .map(|(id, t)| Executed { id: id.clone(), transformation_hash: t.hash.clone() })
                .collect();
            patches.extend(update.track_queries(&executed, &sync.removals)?);
        }
        let merged = cx.leave(|waste| gathered.merged.into_rows_leaving(waste));
        Ok(match gathered.rows {
            Rows::Received(rows) => Work::Mix(rows, merged),
            Rows::Changes => Work::Count(merged),
            Rows::Whole(rows) => Work::Count(rows.into()),
        })
    }

    /// Everything is counted: what is written is settled, what is sent is still to be encoded.
    fn computed(&mut self, c: Box<Computing>, cx: &mut Cx<'_>) -> StepResult {
        let times = self.flush_times(cx.now_ms);
        let Computing { sync, update, schema, signatures, missed, rewritten, patches, end, .. } =
            *c;
        let signature = |id: &QueryHash| signatures.get(id).copied();
        let prepared = cx.leave(|waste| update.finish_leaving(times, signature, waste));
        let is_empty = prepared.is_none();
        let patches = Patches { missed, rewritten, patches, end };
        let mut encoding = Encoding::of(sync, schema, patches);
        encoding.prepared = prepared;
        if is_empty && self.open.is_some() {
            let bug = bug("rows went out, and the update that they belong to is empty");
            return Stage::Encoding(Box::new(encoding)).failed(bug, cx);
        }
        self.encode_slice(Box::new(encoding), cx)
    }
}

/// No two queries have rows of one table.
fn are_disjoint(held: &VecDeque<HeldQuery>) -> bool {
    let mut tables = held.iter().flat_map(|of| of.tables.iter().map(|table| &table.name));
    let mut seen: SmallVec<[&Arc<str>; 4]> = SmallVec::new();
    tables.all(|table| {
        let new = !seen.contains(&table);
        seen.push(table);
        new
    })
}

/// A row of a query that comes or goes.
struct Held {
    query: QueryHash,
    course: Course,
    table: Arc<TableSpec>,
    row: RowRef,
    count: i64,
}

impl Received {
    fn reserve(&mut self, rows: usize) {
        self.0.reserve(rows);
        self.1.reserve(rows);
    }

    fn add(&mut self, id: &Arc<RowIdentity>, row: Option<&RowRef>, query: &QueryHash, count: i64) {
        let at = *self.1.entry(id.clone()).or_insert_with(|| {
            self.0.push(ReceivedRow { id: id.clone(), row: None, counts: RefCounts::new() });
            self.0.len() - 1
        });
        let received = &mut self.0[at];
        if count != 0 {
            received.counts.add(query, count);
        }
        if let Some(row) = row
            && received.row.as_ref().is_none_or(|known| known.version <= row.version)
        {
            received.row = Some(row.clone());
        }
    }
}

impl Received {
    fn discard(self, waste: &mut Waste) {
        waste.rows(self.0);
        waste.rows(self.1);
    }
}

impl Computing {
    /// All of it is left behind.
    pub(super) fn discard(self: Box<Self>, waste: &mut Waste) {
        let Computing { sync, update, missed, lost, rewritten, patches, end, work, .. } = *self;
        sync.discard(waste);
        update.discard(waste);
        for slices in [missed, patches, end] {
            waste.pieces(slices, Vec::len);
        }
        waste.rows(lost);
        waste.rows(rewritten);
        work.discard(waste);
    }
}

impl Work {
    fn discard(self, waste: &mut Waste) {
        match self {
            Work::Gather(Gather { deltas, merged, held, rows }) => {
                deltas.discard(waste);
                merged.discard(waste);
                discard_held(held, waste);
                match rows {
                    Rows::Received(received) => received.discard(waste),
                    Rows::Changes => {}
                    Rows::Whole(rows) => waste.rows(rows),
                }
            }
            Work::Mix(received, rows) => {
                received.discard(waste);
                waste.rows(rows);
            }
            Work::Receive(rows, index) => {
                waste.rows(rows);
                waste.rows(index);
            }
            Work::Bury(records) => records.discard(waste),
            Work::Settle(changes) => waste.rows(changes),
            Work::Count(rows) => waste.rows(rows),
            Work::CountOne(rows) => rows.discard(waste),
            Work::TakeBack(sent) => sent.discard(waste),
            Work::Find => {}
        }
    }

    /// It asks what queries had that it is not about.
    fn asks_for_others(&self) -> bool {
        matches!(self, Work::Count(_) | Work::CountOne(_) | Work::TakeBack(_))
    }
}

/// The row that a patch is about.
pub(super) fn row_of(patch: &Patch) -> Option<&Arc<RowIdentity>> {
    match patch {
        Patch::RowPut(id, _) | Patch::RowDel(id) => Some(id),
        _ => None,
    }
}

/// A got query is executed again with the same hash, and nothing else moves the version.
fn forced_bump(cvr: &Cvr, sync: &Sync, version: &CvrVersion) -> bool {
    let hash = |id: &QueryHash| cvr.query(id).and_then(|q| q.transformation_hash.clone());
    *version == cvr.version
        && sync.removals.is_empty()
        && !sync.additions.is_empty()
        && sync.additions.iter().all(|(id, t)| hash(id).as_ref() == Some(&t.hash))
}

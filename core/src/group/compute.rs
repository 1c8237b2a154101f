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

use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::{SmallVec, smallvec};

use super::config::bug;
use super::early::Sent;
use super::held::{HeldQuery, Taking};
use super::interface::{Effect, ResetReason};
use super::machine::{Cx, Group, Pipeline};
use super::op::{Failure, Flushing, Stage, Step, StepResult, Sync, Trigger};
use super::pending::{Pending, SharedDelta, Unmerged};
use super::poke::{Encoder, Poke};
use super::sync::failed_query;
use crate::cvr::advance::{AdvancedRow, CountChange, RowDeltas};
use crate::cvr::{
    Cvr, Executed, Leftovers, Patch, PreparedFlush, QueryHash, QueryUpdater, ReceivedRow,
    RecordSlices, RefCounts, RowChanges, RowIdentity, VersionedPatch,
};
use crate::ivm::engine::InstanceId;
use crate::row::RowRef;
use crate::schema::{Schema, TableSpec};
use crate::version::{CvrVersion, StateVersion};

/// Rows of one slice: about a millisecond. Few in tests, so that every step can be interrupted.
pub(super) const SLICE_ROWS: usize = if cfg!(test) { 3 } else { 1_000 };

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
    /// What late clients missed.
    missed: Vec<VersionedPatch>,
    /// Rows of it that are not there.
    lost: Vec<(Arc<RowIdentity>, String)>,
    /// Rows that the update has patches for, while something was missed.
    rewritten: FxHashSet<Arc<RowIdentity>>,
    /// Queries with a row that cannot be delivered: they are removed.
    undeliverable: BTreeSet<QueryHash>,
    /// Slices: one vector of a million is as long in coming as in going.
    patches: Vec<Vec<VersionedPatch>>,
    /// For clients to whom rows went out early.
    end: Vec<Vec<VersionedPatch>>,
    work: Work,
}

/// What is being done, slice by slice.
#[derive(Debug)]
enum Work {
    /// Rows get names, and one entry each.
    Gather(Gather),
    /// What changed in the queries that go on joins the rows that will be compared with records.
    Mix(Received, std::vec::IntoIter<AdvancedRow>),
    /// Rows are counted, with what the records say.
    Receive(std::vec::IntoIter<ReceivedRow>, hash_map::IntoIter<Arc<RowIdentity>, usize>),
    /// Records are looked through for rows that did not come again.
    Bury(RecordSlices),
    /// What becomes of records is settled.
    Settle(RowChanges),
    /// Rows are counted, with what the instances say.
    Count(std::vec::IntoIter<AdvancedRow>),
    /// The same, of one query that merely advances: nothing is gathered before.
    CountOne(Unmerged),
    /// Rows that went out early, and were not found in the update, are taken back.
    TakeBack(Sent),
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

/// An update that is computed; its patches are being encoded.
#[derive(Debug)]
pub(super) struct Encoding {
    sync: Box<Sync>,
    schema: Arc<Schema>,
    /// Older than what happens now: they go first, but for rows that the update has patches for.
    missed: std::vec::IntoIter<VersionedPatch>,
    rewritten: FxHashSet<Arc<RowIdentity>>,
    patches: std::vec::IntoIter<Vec<VersionedPatch>>,
    poke: Poke,
    /// The end of the open poke.
    ends: std::vec::IntoIter<Vec<VersionedPatch>>,
    end: Poke,
    /// `None`: nothing is to be written.
    prepared: Option<PreparedFlush>,
    leftovers: Option<Leftovers>,
}

impl Group {
    /// Takes everything that the update is made of, at the engine's version, and begins.
    pub(super) fn sync_compute(
        &mut self,
        trigger: Trigger,
        sync: Box<Sync>,
        instances: BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let as_it_was = !sync.records_read && self.is_as_it_was(&sync, &instances, cx);
        let known_at = self.cvr.as_ref().filter(|_| as_it_was).map(|cvr| cvr.version.state.clone());
        let comes = if as_it_was { Course::Stays } else { Course::Comes };
        let coming = instances.iter().map(|(id, instance)| (id, *instance, comes));
        let going = sync.removals.iter().filter(|_| !sync.records_read);
        let going =
            going.filter_map(|id| Some((id, self.pipelines.get(id)?.instance, Course::Goes)));
        let taking = Taking::of(coming.chain(going), known_at);
        self.take(trigger, sync, instances, taking, cx)
    }

    /// Goes on taking; begins when all is there.
    pub(super) fn take(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        instances: BTreeMap<QueryHash, InstanceId>,
        mut taking: Taking,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if !self.needs_update(&sync) {
            return self.catch_up_only(sync, cx);
        }
        let as_it_was = !sync.records_read && self.is_as_it_was(&sync, &instances, cx);
        if !sync.records_read && !as_it_was && !self.knows_rows(&sync, cx) {
            // Other rows than before, or deltas arrived while the store was scanned, or something
            // failed: once more, with the records.
            self.cancel_open_poke(cx);
            instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
            return self.sync_read(trigger, sync, cx);
        }
        let update = match taking.step(cx.world) {
            Ok(false) => {
                cx.emit(Effect::Continue);
                let stage = Stage::Taking { sync, instances, taking: Box::new(taking) };
                return Ok(Step::Wait(stage));
            }
            Ok(true) => self.begin_update(cx),
            Err(why) => Err(bug(&why)),
        };
        let mut update = match update {
            Ok(update) => update,
            Err(failure) => {
                instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
                return Err(failure);
            }
        };
        let (missed, lost) = std::mem::take(&mut sync.missed).into_patches();
        let since = match &self.cvr {
            Some(cvr) if as_it_was => cvr.version.state.clone(),
            _ => self.pending.since().clone(),
        };
        let work = self.work(&sync, taking.held, &mut update);
        self.install(&sync, &instances, cx);
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
            lost,
            rewritten: FxHashSet::default(),
            undeliverable: BTreeSet::new(),
            patches: Vec::new(),
            end: Vec::new(),
            work,
            sync,
        };
        self.compute(Box::new(computing), cx)
    }

    fn begin_update(&self, cx: &Cx<'_>) -> Result<QueryUpdater, Failure> {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        Ok(QueryUpdater::new(cvr, cx.world.version(), cx.world.replica_version())?)
    }

    /// What is to be done with these rows, and with the deltas since the update before.
    fn work(&mut self, sync: &Sync, held: VecDeque<HeldQuery>, update: &mut QueryUpdater) -> Work {
        let (mut merged, deltas) = self.pending.take();
        let whole: usize = held.iter().map(|of| of.rows.len()).sum();
        let changed = merged.len() + deltas.len();
        if sync.records_read {
            update.reserve(whole + changed, 0);
        } else {
            update.reserve(0, whole + changed);
        }
        let rows = if sync.records_read {
            merged.reserve(deltas.len());
            let mut received = Received::default();
            received.reserve(whole + changed);
            Rows::Received(received)
        } else if held.is_empty() && merged.is_empty() && deltas.is_one() {
            return Work::CountOne(deltas);
        } else if changed == 0 && sync.removals.is_empty() && are_disjoint(&held) {
            Rows::Whole(Vec::with_capacity(whole))
        } else {
            merged.reserve(deltas.len() + whole);
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
        let mut budget = SLICE_ROWS;
        loop {
            let Computing { sync, update, as_it_was, since, undeliverable, work, .. } = &mut *c;
            let mut new = Vec::new();
            let done = match work {
                Work::Gather(gather) => {
                    let all = self.gather(gather, &mut budget, sync, undeliverable, cx);
                    if *as_it_was && !undeliverable.is_empty() {
                        // Only the records say which rows go with such a query.
                        return self.abandon(c, cx);
                    }
                    if all {
                        let gathered = std::mem::take(gather);
                        *work = self.gathered(gathered, sync, undeliverable, update, &mut new)?;
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
                    new.extend(update.received(rows.by_ref().take(now), &sync.records)?);
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
                            rows.len() == 0
                        }
                        _ => true,
                    };
                    budget -= slice.len();
                    if self.look_for_others(&mut slice, cx).is_err() {
                        return self.abandon(c, cx);
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
                        Err(_) => return self.abandon(c, cx),
                    }
                    done
                }
            };
            if !c.missed.is_empty() {
                c.rewritten.extend(new.iter().filter_map(|p| row_of(&p.patch)).cloned());
            }
            if let Some(open) = &mut self.open {
                c.end.push(open.sort(&mut new));
            }
            if !new.is_empty() {
                c.patches.push(new);
            }
            if let Some(open) = self.open.as_mut().filter(|_| done)
                && !matches!(c.work, Work::TakeBack(_))
            {
                c.work = Work::TakeBack(open.take_unfound());
                continue;
            }
            if done {
                return self.computed(c, cx);
            }
            if budget == 0 {
                cx.emit(Effect::Continue);
                return Ok(Step::Wait(Stage::Computing(c)));
            }
        }
    }

    /// What runs has changed under the update: the bring-up that follows does it all.
    fn abandon(&mut self, c: Box<Computing>, cx: &mut Cx<'_>) -> StepResult {
        self.reset.get_or_insert(ResetReason::LostRow);
        self.acknowledge(c.sync.ack, cx);
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
            let Some((table, row, count)) = of.rows.pop_front() else {
                held.pop_front();
                continue;
            };
            *budget -= 1;
            let table = of.tables[table].clone();
            let held = Held { query: of.query.clone(), course: of.course, table, row, count };
            self.name(held, merged, rows, sync, undeliverable, cx);
        }
        deltas.len() == 0 && held.is_empty()
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
        self.pending.forget(query);
    }

    /// All rows have names: the version is settled, and what becomes of the queries.
    fn gathered(
        &self,
        gathered: Gather,
        sync: &Sync,
        undeliverable: &BTreeSet<QueryHash>,
        update: &mut QueryUpdater,
        patches: &mut Vec<VersionedPatch>,
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
        let delivered = |row: &mut AdvancedRow| {
            row.counts.retain(|c| !undeliverable.contains(&c.query));
            !row.counts.is_empty()
        };
        Ok(match gathered.rows {
            Rows::Received(mut rows) => {
                if !undeliverable.is_empty() {
                    rows.forget(undeliverable);
                }
                Work::Mix(rows, gathered.merged.into_rows().into_iter())
            }
            Rows::Changes => {
                let mut rows = gathered.merged.into_rows();
                if !undeliverable.is_empty() {
                    rows.retain_mut(delivered);
                }
                Work::Count(rows.into_iter())
            }
            Rows::Whole(mut rows) => {
                if !undeliverable.is_empty() {
                    rows.retain_mut(delivered);
                }
                Work::Count(rows.into_iter())
            }
        })
    }

    /// Everything is counted: what is written is settled, what is sent is still to be encoded.
    fn computed(&mut self, c: Box<Computing>, cx: &mut Cx<'_>) -> StepResult {
        let lost = c.lost.iter().find(|(id, _)| !c.rewritten.contains(id)).cloned();
        self.lost_rows(lost.as_ref(), cx);
        if lost.is_some() && !self.compare_all {
            return self.abandon(c, cx);
        }
        let times = self.flush_times(cx.now_ms);
        let Computing { sync, update, schema, signatures, missed, rewritten, patches, end, .. } =
            *c;
        let (prepared, leftovers) = update.finish_in_parts(times, |id| signatures.get(id).copied());
        if prepared.is_none() && self.open.is_some() {
            return Err(bug("rows went out, and the update that they belong to is empty"));
        }
        let encoding = Encoding {
            sync,
            schema,
            missed: missed.into_iter(),
            rewritten,
            patches: patches.into_iter(),
            poke: Poke::default(),
            ends: end.into_iter(),
            end: Poke::default(),
            prepared,
            leftovers: Some(leftovers),
        };
        self.encode_slice(Box::new(encoding), cx)
    }

    /// Encodes what late clients missed; nothing is to be written.
    pub(super) fn encode_missed(
        &mut self,
        sync: Box<Sync>,
        missed: Vec<VersionedPatch>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let encoding = Encoding {
            sync,
            schema: cx.world.schema().clone(),
            missed: missed.into_iter(),
            rewritten: FxHashSet::default(),
            patches: Vec::new().into_iter(),
            poke: Poke::default(),
            ends: Vec::new().into_iter(),
            end: Poke::default(),
            prepared: None,
            leftovers: None,
        };
        self.encode_slice(Box::new(encoding), cx)
    }

    /// Encodes a slice of patches; after the last one the update is written.
    pub(super) fn encode_slice(&mut self, mut e: Box<Encoding>, cx: &mut Cx<'_>) -> StepResult {
        let older = e.missed.len().min(SLICE_ROWS);
        let rewritten = &e.rewritten;
        let stays = |p: &VersionedPatch| row_of(&p.patch).is_none_or(|id| !rewritten.contains(id));
        let mut slice: Vec<VersionedPatch> = e.missed.by_ref().take(older).filter(stays).collect();
        while slice.len() < SLICE_ROWS
            && e.missed.len() == 0
            && let Some(next) = e.patches.next()
        {
            slice.extend(next);
        }
        let mut ends = Vec::new();
        while slice.len() + ends.len() < SLICE_ROWS
            && let Some(next) = e.ends.next()
        {
            ends.extend(next);
        }
        if let Some(leftovers) = &mut e.leftovers {
            leftovers.shed(SLICE_ROWS);
        }
        let encoder =
            Encoder { tables: &self.settings.tables, group: self.id.as_str(), schema: &e.schema };
        e.poke.extend(&encoder, &slice).map_err(|error| bug(&error.to_string()))?;
        e.end.extend(&encoder, &ends).map_err(|error| bug(&error.to_string()))?;
        if e.patches.len() > 0 || e.missed.len() > 0 || e.ends.len() > 0 {
            cx.emit(Effect::Continue);
            return Ok(Step::Wait(Stage::Encoding(e)));
        }
        let Encoding { sync, poke, end, prepared, .. } = *e;
        let Sync { ack, bring_up, recipients, .. } = *sync;
        let flushing = |cvr| Flushing { cvr, poke, end, recipients, ack, bring_up };
        match prepared {
            Some(prepared) => {
                cx.emit(Effect::Flush(Box::new(prepared.flush)));
                Ok(Step::Wait(Stage::Flushing(Box::new(flushing(Some(prepared.cvr))))))
            }
            None => self.results_flushed(flushing(None), cx),
        }
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

    /// Takes the counts of these queries back.
    fn forget(&mut self, queries: &BTreeSet<QueryHash>) {
        for row in &mut self.0 {
            queries.iter().for_each(|query| row.counts.set(query, 0));
        }
    }
}

/// The row that a patch is about.
fn row_of(patch: &Patch) -> Option<&Arc<RowIdentity>> {
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

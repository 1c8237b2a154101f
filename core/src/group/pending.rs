//! Advances: deltas of shared instances, collected until the group's turn
//! (spec: view-syncer-cvr §5.7).
//!
//! However many advances pass while an operation is in flight, they become one update: per row
//! the counts before the first and after the last. They are merged where they gather, a slice at a
//! time ([`Effect::Merge`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::compute::SLICE_ROWS;
use super::config::bug;
use super::deliver::Missed;
use super::interface::Effect;
use super::machine::{Cx, Group, Pipeline};
use super::op::{Failure, Flushing, Mode, Recipients, Stage, Step, StepResult, Sync, Trigger};
use super::poke::Poke;
use super::sync::failed_query;
use crate::cvr::advance::{AdvancedRow, CountChange, RowDeltas};
use crate::cvr::internal::ShardTables;
use crate::cvr::{MAX_SORTED_ROWS, QueryHash, QueryUpdater, RowIdentity, RowRecords};
use crate::ivm::delta::{InstanceDelta, RowDelta};
use crate::ivm::engine::InstanceId;
use crate::json::row::wire_json;
use crate::row::{Row, RowRef};
use crate::schema::TableSpec;
use crate::version::StateVersion;
use crate::waste::Waste;

/// The row deltas of one instance in one advance, prepared once for all groups that subscribe.
#[derive(Debug)]
pub struct SharedDelta {
    /// The instance.
    pub instance: InstanceId,
    /// Changed rows, each once, by identity unless they are too many: groups then have nothing to
    /// sort. In parts, which are let go one by one: there may be a million rows.
    parts: Vec<Arc<[SharedRow]>>,
    /// Rows that are no part yet.
    open: Vec<SharedRow>,
}

/// One changed row of a [`SharedDelta`].
#[derive(Debug)]
pub struct SharedRow {
    /// The row.
    pub id: Arc<RowIdentity>,
    /// Occurrences before.
    pub before: i64,
    /// Occurrences after.
    pub after: i64,
    /// The row afterwards, if the query still has it.
    pub row: Option<RowRef>,
}

impl SharedDelta {
    /// Prepares a delta: identities, and the JSON of rows that clients will get.
    ///
    /// # Errors
    /// Why a row cannot be delivered: the instance has failed for its subscribers.
    pub fn of(delta: &InstanceDelta, tables: &ShardTables) -> Result<SharedDelta, String> {
        let mut made = SharedDelta::begin(delta);
        made.extend(&delta.rows, tables)?;
        Ok(made.end())
    }

    /// Begins to prepare a delta slice by slice.
    pub fn begin(delta: &InstanceDelta) -> SharedDelta {
        let open = Vec::with_capacity(delta.rows.len().min(MAX_SORTED_ROWS));
        SharedDelta { instance: delta.instance, parts: Vec::new(), open }
    }

    /// Adds a slice of the delta's rows.
    ///
    /// # Errors
    /// As [`SharedDelta::of`].
    pub fn extend(&mut self, rows: &[RowDelta], tables: &ShardTables) -> Result<(), String> {
        let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for d in rows {
            if let Some(row) = &d.row
                && (d.count_before == 0 || d.content_changed)
            {
                SharedDelta::check(tables, &d.table, row)?;
            }
            if self.open.len() >= MAX_SORTED_ROWS {
                self.parts.push(self.open.drain(..).collect());
            }
            self.open.push(SharedRow {
                id: Arc::new(RowIdentity::with_key(&d.table, &d.id.key)),
                before: count(d.count_before),
                after: count(d.count_after),
                row: d.row.clone(),
            });
        }
        Ok(())
    }

    /// All rows were added.
    pub fn end(mut self) -> SharedDelta {
        let mut last = std::mem::take(&mut self.open);
        if self.parts.is_empty() {
            last.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        }
        self.parts.push(last.into());
        self
    }

    /// Whoever was the last one to hold it leaves it behind.
    pub fn discard(self: Arc<Self>, waste: &mut Waste) {
        if let Some(delta) = Arc::into_inner(self) {
            waste.pieces(delta.parts, |part| part.len());
            waste.rows(delta.open);
        }
    }

    /// Its rows.
    pub fn rows(&self) -> impl Iterator<Item = &SharedRow> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    /// Nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes the JSON of a row, once; a row that cannot be delivered is an error.
    pub(super) fn check(tables: &ShardTables, table: &TableSpec, row: &Row) -> Result<(), String> {
        if table.name == tables.clients || table.name == tables.mutations {
            return Ok(());
        }
        wire_json(table, row).map(|_| ()).map_err(|e| e.to_string())
    }
}

/// Deltas that wait before they are merged: few, for each keeps all rows of its advance alive.
const MAX_UNMERGED: usize = 8;
/// Slices in which most of what waits is merged: of a million rows 2,000 at a time at first.
const MOST_SLICES: usize = 512;

/// What the group has not taken in yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The version up to which it has.
    since: StateVersion,
    /// Merged per row.
    rows: RowDeltas,
    /// Later ones, in order, on their way to be merged.
    merging: Unmerged,
    /// Still later ones, as the engine gave them: a group that keeps up never merges.
    deltas: SmallVec<[(QueryHash, Arc<SharedDelta>); 1]>,
    failed: Vec<(QueryHash, String)>,
}

impl Pending {
    /// Nothing, from this version on.
    pub(super) fn at(version: StateVersion) -> Pending {
        Pending { since: version, ..Pending::default() }
    }

    /// Forgets everything.
    pub(super) fn discard(&mut self, waste: &mut Waste) {
        let Pending { rows, merging, deltas, .. } = std::mem::take(self);
        rows.discard(waste);
        merging.discard(waste);
        deltas.into_iter().for_each(|(_, delta)| delta.discard(waste));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.is_merged() && self.failed.is_empty()
    }

    fn add(&mut self, query: QueryHash, delta: &Arc<SharedDelta>) {
        self.deltas.push((query, delta.clone()));
    }

    /// Too many deltas wait.
    fn is_to_be_merged(&self) -> bool {
        self.deltas.len() > MAX_UNMERGED || !self.merging.is_empty()
    }

    /// Everything is merged per row.
    pub(super) fn is_merged(&self) -> bool {
        self.deltas.is_empty() && self.merging.is_empty()
    }

    /// Merges a slice; true if everything is merged now. The more there is, the larger is the
    /// slice, so that it becomes less however much comes in between.
    pub(super) fn merge_slice(&mut self) -> bool {
        if !self.is_merged() {
            let waiting = self.len() - self.rows.len();
            self.merge(SLICE_ROWS.max(waiting / MOST_SLICES));
        }
        self.is_merged()
    }

    /// Merges so many rows at most.
    fn merge(&mut self, most: usize) {
        let mut left = most;
        while left > 0 && !self.is_merged() {
            if self.merging.is_empty() {
                self.merging = Unmerged::of(std::mem::take(&mut self.deltas));
            }
            let Pending { rows, merging, .. } = self;
            left -= merging.take(left, |query, row| {
                rows.add(&row.id, row.change_of(query), row.row.as_ref());
            });
        }
    }

    /// Merges all there is, at whatever cost.
    pub(super) fn merge_all(&mut self) {
        self.merge(usize::MAX);
    }

    /// Everything, one entry per row.
    pub(super) fn take_rows(&mut self) -> Vec<AdvancedRow> {
        if let ([(query, delta)], true, true) =
            (&*self.deltas, self.merging.is_empty(), self.rows.is_empty())
        {
            let rows = delta.rows().map(|row| row.advanced(query)).collect();
            self.deltas.clear();
            return rows;
        }
        self.merge_all();
        std::mem::take(&mut self.rows).into_rows().collect()
    }

    /// Everything: what is merged per row, and what is still to be.
    pub(super) fn take(&mut self) -> (RowDeltas, Unmerged) {
        let mut unmerged = std::mem::take(&mut self.merging);
        let deltas = Unmerged::of(std::mem::take(&mut self.deltas));
        if unmerged.is_empty() {
            unmerged = deltas;
        } else {
            unmerged.is_one = false;
            unmerged.parts.extend(deltas.parts);
        }
        (std::mem::take(&mut self.rows), unmerged)
    }

    /// About how many rows have changed.
    pub(super) fn len(&self) -> usize {
        let deltas = self.deltas.iter().map(|(_, delta)| delta.len()).sum::<usize>();
        self.rows.len() + self.merging.len() + deltas
    }

    /// The version up to which the group has everything.
    pub(super) fn since(&self) -> &StateVersion {
        &self.since
    }

    /// How often a row occurred in a query at [`Pending::since`], if that has changed. Whoever has
    /// many questions or deltas merges before, in slices.
    pub(super) fn before(&mut self, id: &RowIdentity, query: &QueryHash) -> Option<i64> {
        self.merge_all();
        let counts = &self.rows.get(id)?.counts;
        counts.iter().find(|c| c.query == *query).map(|c| c.before)
    }

    /// A query does not run any more. It looks at all rows.
    pub(super) fn forget(&mut self, query: &QueryHash) {
        self.deltas.retain(|(of, _)| of != query);
        self.merging.forget(query);
        self.rows.forget(query);
        self.failed.retain(|(of, _)| of != query);
    }

    /// Some instance failed.
    pub(super) fn has_failed(&self) -> bool {
        !self.failed.is_empty()
    }
}

/// Deltas in the order of their advances, on their way to be merged per row.
#[derive(Debug, Default)]
pub(super) struct Unmerged {
    parts: VecDeque<(QueryHash, Arc<[SharedRow]>)>,
    /// Rows of the first one that were taken.
    at: usize,
    /// They are of one delta.
    is_one: bool,
}

impl Unmerged {
    fn of(deltas: SmallVec<[(QueryHash, Arc<SharedDelta>); 1]>) -> Unmerged {
        let is_one = deltas.len() == 1;
        let parts = deltas.iter().flat_map(|(query, delta)| {
            delta.parts.iter().map(|part| (query.clone(), part.clone()))
        });
        Unmerged { parts: parts.collect(), at: 0, is_one }
    }

    fn forget(&mut self, query: &QueryHash) {
        if self.parts.front().is_some_and(|(of, _)| of == query) {
            self.at = 0;
        }
        self.parts.retain(|(of, _)| of != query);
    }

    pub(super) fn discard(self, waste: &mut Waste) {
        waste.pieces(self.parts, |(_, part)| part.len());
    }

    /// Rows that are left.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|(_, part)| part.len()).sum::<usize>() - self.at
    }

    /// All were taken.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Each row is there once: it needs no merging.
    pub(super) fn is_one(&self) -> bool {
        self.is_one
    }

    /// The next `count` rows at most, each with its query; how many.
    pub(super) fn take(
        &mut self,
        count: usize,
        mut take: impl FnMut(&QueryHash, &SharedRow),
    ) -> usize {
        let mut left = count;
        while left > 0
            && let Some((query, part)) = self.parts.front()
        {
            let rest = &part[self.at..];
            let now = rest.len().min(left);
            rest[..now].iter().for_each(|row| take(query, row));
            (self.at, left) = (self.at + now, left - now);
            if self.at == part.len() {
                self.parts.pop_front();
                self.at = 0;
            }
        }
        count - left
    }
}

impl SharedRow {
    /// The row as a change of this query alone.
    pub(super) fn advanced(&self, query: &QueryHash) -> AdvancedRow {
        AdvancedRow {
            id: self.id.clone(),
            row: self.row.clone(),
            counts: smallvec![self.change_of(query)],
            others: false,
            by_advance: true,
        }
    }

    pub(super) fn change_of(&self, query: &QueryHash) -> CountChange {
        CountChange { query: query.clone(), before: self.before, after: self.after }
    }
}

impl Group {
    fn queries_of(&self, instance: InstanceId) -> Vec<QueryHash> {
        self.pipelines
            .iter()
            .filter(|(_, p)| p.instance == instance)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Collects a delta.
    pub(super) fn delta(&mut self, delta: &Arc<SharedDelta>, cx: &mut Cx<'_>) {
        for (query, _) in self.pipelines.iter().filter(|(_, p)| p.instance == delta.instance) {
            self.pending.add(query.clone(), delta);
        }
        if !self.merges && self.pending.is_to_be_merged() {
            self.merge_pending(cx);
        }
    }

    /// Merges a slice of what has gathered; what is left waits for the next turn.
    pub(super) fn merge_pending(&mut self, cx: &mut Cx<'_>) {
        self.merges = !self.pending.merge_slice();
        if self.merges {
            cx.emit(Effect::Merge);
        }
    }

    /// Remembers that an instance failed.
    pub(super) fn instance_failed(&mut self, instance: InstanceId, why: &str) {
        for query in self.queries_of(instance) {
            self.pending.failed.push((query, why.to_owned()));
        }
    }

    pub(super) fn begin_advance(&mut self, cx: &mut Cx<'_>) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let failed = std::mem::take(&mut self.pending.failed);
        if !failed.is_empty() {
            return self.advance_without(failed, cx);
        }
        let unanswered = cvr
            .queries
            .values()
            .any(|q| q.transformation_hash.is_some() && !self.pipelines.contains_key(&q.id));
        if unanswered {
            // Only the records know what that query references.
            let sync = self.empty_sync();
            return self.sync_read(Trigger::Shared, Box::new(sync), cx);
        }
        if self.pending.len() > SLICE_ROWS {
            let sync = Sync { recipients: Recipients::AtHead, ..self.empty_sync() };
            return self.sync_compute(Trigger::Shared, Box::new(sync), BTreeMap::new(), cx);
        }
        self.advance_unread(cx)
    }

    /// Queries whose instance failed leave the group; the others go on.
    fn advance_without(&mut self, failed: Vec<(QueryHash, String)>, cx: &mut Cx<'_>) -> StepResult {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let mut sync = self.empty_sync();
        for (id, why) in failed {
            match cvr.query(&id) {
                Some(query) if query.is_internal() => {
                    return Err(bug(&format!("query {id}: {why}")));
                }
                Some(query) => sync.errored.push(failed_query(query, why)),
                None => {}
            }
        }
        self.sync_transform(Trigger::Shared, Box::new(sync), cx)
    }

    pub(super) fn empty_sync(&self) -> Sync {
        Sync {
            mode: Mode::Missing,
            ack: None,
            errored: Vec::new(),
            transformed: Vec::new(),
            additions: Vec::new(),
            removals: Vec::new(),
            missed: Missed::default(),
            records: RowRecords::default(),
            records_read: false,
            early: false,
            bring_up: !self.synced,
            recipients: Recipients::All,
        }
    }

    /// The common advance, at once: from deltas and instances alone.
    fn advance_unread(&mut self, cx: &mut Cx<'_>) -> StepResult {
        let times = self.flush_times(cx.now_ms);
        let mut rows = self.pending.take_rows();
        self.look_for_others(&mut rows, cx)?;
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        let version = cx.world.version().clone();
        let mut update = QueryUpdater::new(cvr, &version, cx.world.replica_version())?;
        // An instance that was re-hydrated and compared moves within a version.
        update.ensure_new_version();
        let patches = update.advanced(rows, &self.pending.since)?;
        self.pending.since = version;
        let pipelines = &self.pipelines;
        let world = &*cx.world;
        let prepared = update
            .finish(times, |id| pipelines.get(id).and_then(|p| world.signature(p.instance).ok()));
        let Some(prepared) = prepared else { return Ok(Step::Done) };
        let poke = self.encode(&patches, cx)?;
        cx.emit(Effect::Flush(Box::new(prepared.flush)));
        Ok(Step::Wait(Stage::Flushing(Box::new(Flushing {
            cvr: Some(prepared.cvr),
            poke,
            end: Poke::default(),
            recipients: Recipients::AtHead,
            ack: None,
            bring_up: false,
        }))))
    }

    /// Finds out which rows other queries of the group have too, where that matters.
    pub(super) fn look_for_others(
        &mut self,
        rows: &mut [AdvancedRow],
        cx: &mut Cx<'_>,
    ) -> Result<(), Failure> {
        // Rows of one table come together; the queries that may have one are few.
        let mut of: Option<Arc<str>> = None;
        let mut readers: SmallVec<[(QueryHash, InstanceId); 4]> = SmallVec::new();
        for row in rows.iter_mut().filter(|row| row.needs_others()) {
            let table = row.id.table();
            if of.as_ref() != Some(table) {
                let reads = |p: &Pipeline| cx.world.reads(p.instance, table);
                let those = self.pipelines.iter().filter(|(_, pipeline)| reads(pipeline));
                readers = those.map(|(id, p)| (id.clone(), p.instance)).collect();
                of = Some(table.clone());
            }
            row.others = self.referenced_elsewhere(row, &readers, cx)?;
        }
        Ok(())
    }

    /// Whether a query without a delta had the row at the version that the group has everything
    /// up to. The engine may be beyond that: where it went on, the deltas that wait say what was.
    /// `readers`: queries that may have rows of its table.
    fn referenced_elsewhere(
        &mut self,
        row: &AdvancedRow,
        readers: &[(QueryHash, InstanceId)],
        cx: &mut Cx<'_>,
    ) -> Result<bool, Failure> {
        let mut others: SmallVec<[(&QueryHash, InstanceId); 2]> = SmallVec::new();
        for (id, instance) in readers {
            if row.counts.iter().any(|c| c.query == *id) {
                continue;
            }
            match self.pending.before(&row.id, id) {
                Some(before) if before > 0 => return Ok(true),
                Some(_) => {}
                None => others.push((id, *instance)),
            }
        }
        if others.is_empty() {
            return Ok(false);
        }
        let here = row.row.clone().filter(|_| row.counts.iter().any(|c| c.after > 0));
        let now = match here {
            Some(row) => Some(row),
            None => cx.read_row(&row.id).map_err(|why| bug(&why))?,
        };
        // A row that is gone is in no result, and queries that lost it have said so.
        let Some(now) = now else { return Ok(false) };
        for (id, instance) in others {
            let count = cx
                .world
                .count(instance, &row.id, &now)
                .map_err(|why| bug(&format!("query {id}: {why}")))?;
            if count > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

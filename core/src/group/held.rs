//! The rows of queries that come or go, taken at one version of the engine: references, a slice at
//! a time. The engine may go on between two slices; what that does to rows that were taken is told
//! in the end.

use std::collections::{BTreeMap, VecDeque, btree_map};
use std::sync::Arc;

use super::compute::Course;
use super::config::bug;
use super::interface::{Effect, World};
use super::machine::{Cx, Group};
use super::op::{Failure, Stage, Step, StepResult, Sync, Trigger};
use super::sync::failed_query;
use crate::cvr::{QueryHash, QueryUpdater};
use crate::ivm::engine::{Budget, HeldRow, InstanceId};
use crate::ivm::reading::{ReadProgress, ReadRow, Reading};
use crate::row::{RowId, RowRef};
use crate::schema::TableSpec;
use crate::version::StateVersion;
use crate::waste::Waste;

/// Rows that are taken at once: about a millisecond.
const SLICE_REFS: u64 = if cfg!(test) { 4 } else { 10_000 };

/// Index of its table, row, count.
type TakenRow = (usize, RowRef, i64);

/// What an update of results may rely on. Decided when its queries are hydrated; it has to hold
/// until their rows are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Basis {
    /// The row records, which were read.
    Records,
    /// The instances: they know all that the records could tell ([`Group::knows_rows`]).
    ///
    /// [`Group::knows_rows`]: super::Group::knows_rows
    Instances,
    /// The signatures: queries have the rows that they had ([`super::unread`]).
    Signatures,
}

/// The rows of a query that comes or goes.
#[derive(Debug)]
pub(super) struct HeldQuery {
    pub(super) query: QueryHash,
    pub(super) course: Course,
    pub(super) tables: Vec<Arc<TableSpec>>,
    /// In slices.
    rows: VecDeque<std::vec::IntoIter<TakenRow>>,
    len: usize,
    /// What became of rows to which something happened meanwhile; `None`: they are gone.
    changed: BTreeMap<RowId, Option<TakenRow>>,
    /// Those, once all others are through.
    rest: Option<btree_map::IntoValues<RowId, Option<TakenRow>>>,
    /// Until all is taken: nobody has to remember what happens later.
    reading: Option<Reading>,
}

/// Rows on their way; see the [module](self).
#[derive(Debug)]
pub(super) struct Taking {
    pub(super) held: VecDeque<HeldQuery>,
    /// What the update may rely on.
    pub(super) basis: Basis,
    known_at: Option<StateVersion>,
}

impl Taking {
    /// Of these queries: which, their instances, and what becomes of them. With `known_at`: only
    /// rows that changed since.
    pub(super) fn of<'q>(
        basis: Basis,
        queries: impl Iterator<Item = (&'q QueryHash, InstanceId, Course)>,
        known_at: Option<StateVersion>,
    ) -> Taking {
        let held = queries.map(|(query, instance, course)| HeldQuery {
            query: query.clone(),
            course,
            tables: Vec::new(),
            rows: VecDeque::new(),
            len: 0,
            changed: BTreeMap::new(),
            rest: None,
            reading: Some(Reading::of(instance)),
        });
        Taking { held: held.collect(), basis, known_at }
    }

    /// A query of which no rows can be taken.
    pub(super) fn leave_out(&mut self, query: &QueryHash, waste: &mut Waste) {
        for of in self.held.iter_mut().filter(|of| of.query == *query) {
            of.leave(waste);
        }
        self.held.retain(|of| of.query != *query);
    }

    /// All of it is left behind.
    pub(super) fn discard(self, waste: &mut Waste) {
        discard_held(self.held, waste);
    }

    /// Takes a slice; true when all rows are taken, and are those of the world's version. Rows
    /// that were taken in vain are left behind.
    ///
    /// # Errors
    /// A query whose rows cannot be taken, and why.
    pub(super) fn step(
        &mut self,
        world: &mut dyn World,
        waste: &mut Waste,
    ) -> Result<bool, (QueryHash, String)> {
        let mut budget = Budget::units(SLICE_REFS);
        // Also of those that are through: perhaps something has happened.
        for of in &mut self.held {
            let progress = of.step(world, &mut budget, self.known_at.as_ref());
            match progress.map_err(|why| (of.query.clone(), why))? {
                ReadProgress::Done => {}
                ReadProgress::More | ReadProgress::Waits => return Ok(false),
                ReadProgress::Void => {
                    of.leave(waste);
                    of.tables.clear();
                    return Ok(false);
                }
            }
        }
        self.held.iter_mut().for_each(|of| of.reading = None);
        Ok(true)
    }
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
        if !self.needs_update(&sync) {
            return self.catch_up_only(sync, cx);
        }
        let Some(basis) = self.basis(&sync, &instances, cx) else {
            return self.read_instead(trigger, sync, instances, cx);
        };
        let as_it_was = basis == Basis::Signatures;
        let known_at = self.cvr.as_ref().filter(|_| as_it_was).map(|cvr| cvr.version.state.clone());
        let comes = if as_it_was { Course::Stays } else { Course::Comes };
        let coming = instances.iter().map(|(id, instance)| (id, *instance, comes));
        let going = sync.removals.iter().filter(|_| !sync.records_read);
        let going =
            going.filter_map(|id| Some((id, self.pipelines.get(id)?.instance, Course::Goes)));
        let taking = Taking::of(basis, coming.chain(going), known_at);
        self.take_slice(trigger, sync, instances, taking, cx)
    }

    /// What the update may rely on, as things are; `None`: the row records have to be read.
    fn basis(
        &self,
        sync: &Sync,
        instances: &BTreeMap<QueryHash, InstanceId>,
        cx: &Cx<'_>,
    ) -> Option<Basis> {
        if sync.records_read {
            Some(Basis::Records)
        } else if self.is_as_it_was(sync, instances, cx) {
            Some(Basis::Signatures)
        } else {
            self.knows_rows(sync, cx).then_some(Basis::Instances)
        }
    }

    /// Goes on taking, after others had a turn.
    pub(super) fn take(
        &mut self,
        trigger: Trigger,
        sync: Box<Sync>,
        instances: BTreeMap<QueryHash, InstanceId>,
        taking: Taking,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        if self.basis(&sync, &instances, cx) == Some(taking.basis) {
            return self.take_slice(trigger, sync, instances, taking, cx);
        }
        cx.leave(|waste| taking.discard(waste));
        self.read_instead(trigger, sync, instances, cx)
    }

    /// Other rows than before, or deltas arrived while the store was scanned, or something failed:
    /// once more, with the records.
    fn read_instead(
        &mut self,
        trigger: Trigger,
        sync: Box<Sync>,
        instances: BTreeMap<QueryHash, InstanceId>,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        self.cancel_open_poke(cx);
        instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
        self.sync_read(trigger, sync, cx)
    }

    /// Takes a slice; begins to compute when all is there.
    fn take_slice(
        &mut self,
        trigger: Trigger,
        mut sync: Box<Sync>,
        mut instances: BTreeMap<QueryHash, InstanceId>,
        mut taking: Taking,
        cx: &mut Cx<'_>,
    ) -> StepResult {
        let mut waste = Waste::default();
        let taken = taking.step(cx.world, &mut waste);
        cx.let_go(waste);
        let update = match taken {
            Ok(false) => {
                cx.emit(Effect::Continue);
                let stage = Stage::Taking { sync, instances, taking: Box::new(taking) };
                return Ok(Step::Wait(stage));
            }
            Ok(true) => self.begin_update(cx),
            Err((query, why)) => {
                match self.leave_out(&query, why, &mut sync, &mut instances, &mut taking, cx) {
                    Ok(()) => return self.take(trigger, sync, instances, taking, cx),
                    Err(failure) => Err(failure),
                }
            }
        };
        match update {
            Ok(update) => self.begin_compute(sync, &instances, taking, update, cx),
            Err(failure) => {
                let taking = Box::new(taking);
                Stage::Taking { sync, instances, taking }.failed(failure, cx)
            }
        }
    }

    /// A query that was hydrated failed before its rows were taken: it becomes a removed one.
    fn leave_out(
        &mut self,
        query: &QueryHash,
        why: String,
        sync: &mut Sync,
        instances: &mut BTreeMap<QueryHash, InstanceId>,
        taking: &mut Taking,
        cx: &mut Cx<'_>,
    ) -> Result<(), Failure> {
        let known = self.cvr.as_ref().and_then(|cvr| cvr.query(query));
        let Some(known) = known.filter(|q| !q.is_internal() && instances.contains_key(query))
        else {
            return Err(bug(&format!("query {query}: {why}")));
        };
        let errored = failed_query(known, why);
        self.tell_errored(&[errored], cx);
        self.cancel_open_poke(cx);
        if let Some(instance) = instances.remove(query) {
            cx.emit(Effect::Release(instance));
        }
        sync.additions.retain(|(added, _)| added != query);
        sync.removals.push(query.clone());
        cx.leave(|waste| taking.leave_out(query, waste));
        Ok(())
    }

    fn begin_update(&self, cx: &Cx<'_>) -> Result<QueryUpdater, Failure> {
        let cvr = self.cvr.as_ref().ok_or_else(|| bug("no CVR"))?;
        Ok(QueryUpdater::new(cvr, cx.world.version(), cx.world.replica_version())?)
    }
}

/// All of it is left behind.
pub(super) fn discard_held(held: VecDeque<HeldQuery>, waste: &mut Waste) {
    held.into_iter().for_each(|mut of| of.leave(waste));
}

impl HeldQuery {
    /// Rows that are left, and some that are none any more.
    pub(super) fn len(&self) -> usize {
        self.len + self.changed.len()
    }

    /// Takes the next row out; `Some(None)` if that is no row of the query any more.
    pub(super) fn pop(&mut self) -> Option<Option<TakenRow>> {
        while let Some(slice) = self.rows.front_mut() {
            if let Some((table, row, count)) = slice.next() {
                self.len -= 1;
                let id = || RowId::of(&self.tables[table], &row);
                let has_changed = !self.changed.is_empty() && self.changed.contains_key(&id());
                return Some((!has_changed).then_some((table, row, count)));
            }
            self.rows.pop_front();
        }
        let changed = &mut self.changed;
        self.rest.get_or_insert_with(|| std::mem::take(changed).into_values()).next()
    }

    fn leave(&mut self, waste: &mut Waste) {
        waste.pieces(std::mem::take(&mut self.rows), ExactSizeIterator::len);
        waste.rows(std::mem::take(&mut self.changed));
        waste.rows(self.rest.take().into_iter().flatten());
        self.len = 0;
    }

    fn step(
        &mut self,
        world: &mut dyn World,
        budget: &mut Budget,
        known_at: Option<&StateVersion>,
    ) -> Result<ReadProgress, String> {
        let HeldQuery { tables, rows, len, changed, reading, .. } = self;
        let Some(reading) = reading else { return Ok(ReadProgress::Done) };
        let mut taken = |table: &Arc<TableSpec>, row: &RowRef, count| {
            if known_at.is_some_and(|at| row.version <= *at) {
                return None;
            }
            // Few tables, and rows of one come together.
            let known = tables.iter().rposition(|known| Arc::ptr_eq(known, table));
            let table = known.unwrap_or_else(|| {
                tables.push(table.clone());
                tables.len() - 1
            });
            Some((table, row.clone(), i64::try_from(count).unwrap_or(i64::MAX)))
        };
        let mut slice = Vec::new();
        let progress = world.read(reading, budget, &mut |told| match told {
            ReadRow::Held(HeldRow { table, row, count }) => slice.extend(taken(table, row, count)),
            ReadRow::Changed { table, id, held } => {
                let now = held.and_then(|(row, count)| taken(table, row, count));
                changed.insert(id.clone(), now);
            }
        });
        *len += slice.len();
        if !slice.is_empty() {
            rows.push_back(slice.into_iter());
        }
        progress
    }
}

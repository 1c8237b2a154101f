//! The result of an instance, piece by piece, whatever happens to it meanwhile: for groups that
//! begin or end to run a query, and for what is noted of an instance that makes room
//! ([`super::parking`]).
//!
//! A reader has a place and a list of changed rows. The place goes through nodes, partitions and
//! rows in orders that do not depend on what else is there (partitions by the hash of their key,
//! rows by the node's order), so that a row to which nothing happens is met exactly once. A row
//! to which something happens in an advance is noted with what the advance made of it, is not
//! told where the place meets it, and is told in the end: what is told last of a row counts. Only
//! if the instance starts over all that was told is void.

use std::sync::{Arc, Weak};

use super::emit::Snapshot;
use super::engine::{Budget, Engine, HeldRow, InstanceId};
use super::error::EngineError;
use super::garbage::Garbage;
use super::instance::{Instance, Phase};
use super::partition::Partition;
use super::registry::Registry;
use super::shape::{NodeShape, Shape};
use super::shards::{self, ShardMap};
use super::source::Source;
use crate::row::{Key, RowId, RowRef};
use crate::schema::TableSpec;

/// A reading of an instance's result, by [`Engine::read`]: it begins with the first call, and ends
/// when this is dropped. Until then the instance keeps its rows, and remembers what changes.
#[derive(Debug)]
pub struct Reading {
    instance: InstanceId,
    reader: Arc<()>,
}

impl Reading {
    /// Of this instance.
    pub fn of(instance: InstanceId) -> Reading {
        Reading { instance, reader: Arc::new(()) }
    }

    /// What is read.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Names the reading for a stand-in of the engine, and tells whether it has ended.
    #[cfg(test)]
    pub(crate) fn reader(&self) -> Weak<()> {
        Arc::downgrade(&self.reader)
    }
}

/// What is told of a row.
#[derive(Debug)]
pub enum ReadRow<'a> {
    /// It is in the result, and was not told before.
    Held(HeldRow<'a>),
    /// Something happened to it: forget what was told of it, if anything was.
    Changed {
        /// Its table, with the identity key.
        table: &'a Arc<TableSpec>,
        /// The row.
        id: &'a RowId,
        /// The row as it is now, and its count; `None`: it is not in the result.
        held: Option<(&'a RowRef, u64)>,
    },
}

/// How far a reading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadProgress {
    /// Call again.
    More,
    /// There is nothing for now: the instance is not hydrated yet, or the engine advances.
    Waits,
    /// The instance started over: what was told before this call is void. Call again.
    Void,
    /// What was told last of each row is the result at [`Engine::version`]. What happens to it
    /// later is told by later calls.
    Done,
}

/// Rows that are told for the price of one that is read anew.
const READ_ANEW: u64 = 8;

impl Engine {
    /// Goes on reading: tells of the next rows, until the budget is spent (a unit per row that is
    /// looked at), or nothing is left. Rows that had to make room for others are read anew first.
    ///
    /// # Errors
    /// [`EngineError::UnknownInstance`], or why the instance failed or cannot be read anew.
    pub fn read(
        &mut self,
        reading: &Reading,
        source: &mut dyn Source,
        budget: &mut Budget,
        visit: &mut dyn FnMut(ReadRow<'_>),
    ) -> Result<ReadProgress, EngineError> {
        let advances = self.is_advancing();
        let id = reading.instance;
        if self.is_parked(id) && !advances {
            return self.read_anew(reading, source, budget);
        }
        if let Phase::Failed(error) =
            &self.registry.get(id).ok_or(EngineError::UnknownInstance)?.phase
        {
            return Err(error.clone());
        }
        let mut reader = self.registry.take_reader(reading)?;
        let mut progress = Ok(ReadProgress::Waits);
        if !advances && let Some(instance) = self.registry.get(id) {
            let plan = self.registry.plan(instance.plan).ok_or(EngineError::UnknownInstance);
            progress = plan.map(|plan| reader.step(instance, &plan.shape, budget, visit));
        }
        self.registry.put_reader(id, reader);
        progress
    }

    /// Readings that live, or did when somebody looked last.
    #[cfg(test)]
    pub(super) fn open_readings(&self) -> usize {
        self.registry.instances().map(|instance| instance.readers.0.len()).sum()
    }

    /// Goes on reading the rows of a parked instance anew; it is not parked again before they are
    /// told.
    fn read_anew(
        &mut self,
        reading: &Reading,
        source: &mut dyn Source,
        budget: &mut Budget,
    ) -> Result<ReadProgress, EngineError> {
        let id = reading.instance;
        let reader = self.registry.take_reader(reading)?;
        self.registry.put_reader(id, reader);
        let units = budget.0.div_ceil(READ_ANEW);
        let mut left = Budget::units(units);
        let progress = self.hydrate_step(id, source, &mut left);
        budget.spend((units - left.0).saturating_mul(READ_ANEW));
        match progress {
            Ok(_) => Ok(ReadProgress::More),
            Err(EngineError::SnapshotMismatch { .. }) => Ok(ReadProgress::Waits),
            Err(error) => Err(error),
        }
    }
}

/// How far a walk through the rows of an instance is.
#[derive(Debug)]
pub(super) struct Place {
    node: usize,
    /// The node's next table of partitions.
    table: Option<u64>,
    /// Partitions of the last table that are still to be visited.
    keys: Vec<Key>,
    /// The partition that is being visited, and its last row that was.
    partition: Option<(Key, Option<RowRef>)>,
}

impl Default for Place {
    fn default() -> Self {
        Place { node: 0, table: Some(0), keys: Vec::new(), partition: None }
    }
}

impl Place {
    /// Visits the rows that are in view, each with its node and what its partition counts, until
    /// the last one (true) or the budget is spent: a unit per row.
    pub(super) fn walk<'i>(
        &mut self,
        instance: &'i Instance,
        shape: &'i Shape,
        budget: &mut Budget,
        mut visit: impl FnMut(&'i NodeShape, &'i RowRef, u64),
    ) -> bool {
        while let Some(node) = shape.nodes.get(self.node) {
            if !node.is_held() || !self.enter(instance, budget) {
                *self = Place { node: self.node + 1, ..Place::default() };
                continue;
            }
            if !self.rows(instance, node, budget, &mut visit) {
                return false;
            }
            self.partition = None;
            if budget.is_spent() {
                return false;
            }
        }
        true
    }

    /// Goes into the next partition of the node, if it is in none; false behind the last one.
    fn enter(&mut self, instance: &Instance, budget: &mut Budget) -> bool {
        let partitions = &instance.nodes[self.node].partitions;
        while self.partition.is_none() {
            if let Some(key) = self.keys.pop() {
                // What is gone by now has changed.
                self.partition = partitions.contains_key(&key).then_some((key, None));
                continue;
            }
            let Some(at) = self.table else { return false };
            let (keys, next) = partitions.keys_at(at);
            self.keys.extend(keys.cloned());
            self.table = next;
            budget.spend(self.keys.len() as u64 / 8);
        }
        true
    }

    /// Visits the partition's rows. False if the budget ended before.
    fn rows<'i>(
        &mut self,
        instance: &'i Instance,
        node: &'i NodeShape,
        budget: &mut Budget,
        visit: &mut impl FnMut(&'i NodeShape, &'i RowRef, u64),
    ) -> bool {
        let Some((key, last)) = &mut self.partition else { return true };
        // An empty one takes time, too.
        budget.spend(1);
        let Some(partition) = instance.nodes[self.node].partitions.get(key) else { return true };
        let mult = u64::try_from(partition.mult).unwrap_or(0);
        if mult == 0 {
            return true;
        }
        for row in visible_behind(partition, node, last.as_ref()) {
            visit(node, row, mult);
            budget.spend(1);
            if budget.is_spent() {
                *last = Some(row.clone());
                return false;
            }
        }
        true
    }
}

/// The rows of a partition in view behind a row (which may be gone).
fn visible_behind<'p>(
    partition: &'p Partition,
    node: &NodeShape,
    last: Option<&RowRef>,
) -> impl Iterator<Item = &'p RowRef> + use<'p> {
    let rows = partition.rows();
    let rank = last.map_or(0, |last| match rows.find(&node.order, last) {
        Ok(at) => rows.rank(at) + 1,
        Err(at) => rows.rank(at),
    });
    rows.iter_from(rank).take(node.window.visible(rows.len()).saturating_sub(rank))
}

/// Who reads an instance, on the instance's side: see the module.
#[derive(Debug)]
pub(super) struct Reader {
    /// Dead once the reading has ended.
    of: Weak<()>,
    place: Place,
    /// Rows to which something happened since the reading began, and were not told since.
    changed: ShardMap<RowId, Changed>,
    /// Those that are being told.
    telling: Option<shards::IntoIter<(RowId, Changed)>>,
    /// Something was told.
    told: bool,
    /// It is void.
    void: bool,
}

/// What became of a row.
#[derive(Debug)]
struct Changed {
    table: Arc<TableSpec>,
    /// With its count; `None` if it is gone.
    held: Option<(RowRef, u64)>,
}

impl Reader {
    fn new(of: Weak<()>) -> Reader {
        Reader {
            of,
            place: Place::default(),
            changed: ShardMap::default(),
            telling: None,
            told: false,
            void: false,
        }
    }

    /// Tells until the budget is spent, or nothing is left.
    pub(super) fn step(
        &mut self,
        instance: &Instance,
        shape: &Shape,
        budget: &mut Budget,
        visit: &mut dyn FnMut(ReadRow<'_>),
    ) -> ReadProgress {
        if std::mem::take(&mut self.void) {
            return ReadProgress::Void;
        }
        if !matches!(instance.phase, Phase::Ready) || instance.parked.is_some() {
            return ReadProgress::Waits;
        }
        let Reader { place, changed, told, .. } = self;
        let all = place.walk(instance, shape, budget, |node, row, mult| {
            let table = &node.table;
            let is_known = !changed.is_empty() && changed.contains_key(&RowId::of(table, row));
            if !is_known && let Some(count) = instance.told_at(shape, node, row, mult) {
                *told = true;
                visit(ReadRow::Held(HeldRow { table, row, count }));
            }
        });
        if all && self.changes(budget, visit) { ReadProgress::Done } else { ReadProgress::More }
    }

    /// Tells of the changed rows. False if the budget ended before the last one.
    fn changes(&mut self, budget: &mut Budget, visit: &mut dyn FnMut(ReadRow<'_>)) -> bool {
        loop {
            if self.telling.is_none() {
                if self.changed.is_empty() {
                    return true;
                }
                self.telling = Some(std::mem::take(&mut self.changed).into_iter());
            }
            for (id, Changed { table, held }) in self.telling.iter_mut().flatten() {
                self.told = true;
                let held = held.as_ref().map(|(row, count)| (row, *count));
                visit(ReadRow::Changed { table: &table, id: &id, held });
                budget.spend(1);
                if budget.is_spent() {
                    return false;
                }
            }
            self.telling = None;
        }
    }

    fn is_over(&self) -> bool {
        self.of.strong_count() == 0
    }

    /// Leaves what it remembers to be given back piece by piece.
    pub(super) fn discard(self, garbage: &mut Garbage) {
        garbage.add_keys(self.changed);
        self.telling.into_iter().for_each(|telling| garbage.add(telling));
    }
}

/// The readers of an instance: mostly none.
#[derive(Debug, Default)]
pub(super) struct Readers(Vec<Reader>);

impl Readers {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drops the readers whose readings have ended; true if none is left.
    fn clean_up(&mut self, garbage: &mut Garbage) -> bool {
        for reader in self.0.extract_if(.., |reader| reader.is_over()) {
            reader.discard(garbage);
        }
        if self.0.is_empty() {
            self.0 = Vec::new();
        }
        self.0.is_empty()
    }

    /// Drops all.
    pub(super) fn discard(self, garbage: &mut Garbage) {
        self.0.into_iter().for_each(|reader| reader.discard(garbage));
    }

    /// An advance made this of a row: it is there so often, or gone.
    pub(super) fn note(
        &mut self,
        table: &Arc<TableSpec>,
        id: &RowId,
        held: Option<(&RowRef, u64)>,
    ) {
        for reader in self.0.iter_mut().filter(|reader| !reader.is_over()) {
            let held = held.map(|(row, count)| (row.clone(), count));
            reader.changed.insert(id.clone(), Changed { table: Arc::clone(table), held });
        }
    }

    /// The instance starts over.
    pub(super) fn start_over(&mut self, garbage: &mut Garbage) {
        for reader in &mut self.0 {
            let void = reader.void || reader.told;
            let new = Reader { void, ..Reader::new(reader.of.clone()) };
            std::mem::replace(reader, new).discard(garbage);
        }
    }
}

impl Registry {
    /// The reader of a reading, to be put back; a new one if it has none.
    pub(super) fn take_reader(&mut self, reading: &Reading) -> Result<Reader, EngineError> {
        let instance = self.get_mut(reading.instance).ok_or(EngineError::UnknownInstance)?;
        let Readers(readers) = &mut instance.readers;
        let of = Arc::as_ptr(&reading.reader);
        if let Some(at) = readers.iter().position(|reader| reader.of.as_ptr() == of) {
            return Ok(readers.swap_remove(at));
        }
        // One for each who has come and gone would be many.
        let mut garbage = Garbage::default();
        instance.readers.clean_up(&mut garbage);
        self.discard(garbage);
        Ok(Reader::new(Arc::downgrade(&reading.reader)))
    }

    /// Puts the reader of a reading back that goes on.
    pub(super) fn put_reader(&mut self, id: InstanceId, reader: Reader) {
        if let Some(instance) = self.get_mut(id) {
            instance.readers.0.push(reader);
            self.read.insert(id);
        }
    }

    /// Drops the readers of readings that have ended.
    pub(super) fn clean_up_readers(&mut self) {
        if self.read.is_empty() {
            return;
        }
        let mut garbage = Garbage::default();
        let mut read = std::mem::take(&mut self.read);
        read.retain(|&id| self.get_mut(id).is_some_and(|i| !i.readers.clean_up(&mut garbage)));
        self.read = read;
        self.discard(garbage);
    }
}

impl Snapshot {
    /// Notes what a reading tells.
    pub(super) fn take_note(&mut self, row: ReadRow<'_>) {
        match row {
            ReadRow::Held(HeldRow { table, row, count }) => self.set(table, row, count),
            ReadRow::Changed { table, held: Some((row, count)), .. } => self.set(table, row, count),
            ReadRow::Changed { id, held: None, .. } => self.remove(id),
        }
    }
}

//! The result of an instance, piece by piece: while it is hydrated, and while it advances.
//!
//! A reading has a place and a list of changed rows. The place goes through nodes, partitions and
//! rows in orders that do not depend on what else is there (partitions by the hash of their key,
//! rows by the node's order), so that a row to which nothing happens is met exactly once. A row
//! to which something happens in an advance is noted with what the advance made of it, is not
//! told where the place meets it, and is told in the end: what is told last of a row counts. Only
//! if the instance starts over all that was told is void.
//!
//! Of an instance that hydrates, the rows of the root are told as they come, if they have no
//! limit and their table is read by no other node: then a row that is there counts once, and
//! only changed rows leave or enter. All others wait.

use std::sync::Arc;

use super::engine::{Budget, HeldRow, InstanceId};
use super::instance::{Instance, Phase};
use super::mutant::{self, Mutant};
use super::partition::Partition;
use super::shape::{NodeShape, Shape};
use super::shards::{self, ShardMap};
use crate::row::{Key, RowId, RowRef};
use crate::schema::TableSpec;

/// Names a reading of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReadingId {
    pub(super) instance: InstanceId,
    pub(super) number: u64,
}

/// What is told of a row.
#[derive(Debug)]
pub enum ReadRow<'a> {
    /// It is in the result, as often as it says; perhaps it was told before, with other contents
    /// or another count.
    Held(HeldRow<'a>),
    /// It is not in the result (any more); perhaps it never was.
    Gone {
        /// Its table.
        table: &'a Arc<TableSpec>,
        /// The row.
        id: &'a RowId,
    },
}

/// How far a reading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadProgress {
    /// Call again.
    More,
    /// There is no more for now: the instance is hydrated, the engine advances, or the rows had
    /// to make room for others ([`super::engine::Engine::hydrate_step`] reads them anew).
    Waits,
    /// The instance started over: what was told before this call is void. Call again.
    Void,
    /// All is told, as of the engine's version. The reading has ended.
    Done,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Reading {
    number: u64,
    /// The node that is being read.
    node: usize,
    /// Its next table of partitions.
    table: Option<u64>,
    /// Partitions of the last table that are still to be read.
    keys: Vec<Key>,
    /// The partition that is being read, and its last row that was looked at.
    partition: Option<(Key, Option<RowRef>)>,
    /// Rows to which something happened since the reading began.
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

/// Who is told.
pub(super) type Visit<'v> = dyn FnMut(ReadRow<'_>) + 'v;

impl Reading {
    pub(super) fn new(number: u64) -> Reading {
        Reading {
            number,
            node: 0,
            table: Some(0),
            keys: Vec::new(),
            partition: None,
            changed: ShardMap::default(),
            telling: None,
            told: false,
            void: false,
        }
    }

    /// Tells until the budget is spent (a unit per row that is looked at), or nothing is left.
    pub(super) fn step(
        &mut self,
        instance: &Instance,
        shape: &Shape,
        budget: &mut Budget,
        visit: &mut Visit<'_>,
    ) -> ReadProgress {
        if self.void {
            self.void = false;
            return ReadProgress::Void;
        }
        let ready = match instance.phase {
            Phase::Ready if instance.parked.is_none() => true,
            Phase::Hydrating if streams(shape) => false,
            Phase::Ready | Phase::Hydrating | Phase::Failed(_) => return ReadProgress::Waits,
        };
        while let Some(node) = shape.nodes.get(self.node) {
            if !node.is_held() {
                self.next_node();
                continue;
            }
            if self.partition.is_none() && !self.next_partition(instance, budget) {
                self.next_node();
                continue;
            }
            if !self.rows(instance, shape, node, budget, visit) {
                return ReadProgress::More;
            }
            if !ready {
                return ReadProgress::Waits;
            }
            self.partition = None;
        }
        if self.changes(budget, visit) { ReadProgress::Done } else { ReadProgress::More }
    }

    fn next_node(&mut self) {
        self.node += 1;
        self.table = Some(0);
    }

    /// Moves on to the next partition of the node; false behind the last one.
    fn next_partition(&mut self, instance: &Instance, budget: &mut Budget) -> bool {
        let partitions = &instance.nodes[self.node].partitions;
        loop {
            while let Some(key) = self.keys.pop() {
                // What is gone by now has changed.
                if partitions.contains_key(&key) {
                    self.partition = Some((key, None));
                    return true;
                }
            }
            let Some(at) = self.table else { return false };
            let (keys, next) = partitions.keys_at(at);
            self.keys.extend(keys.cloned());
            self.table = next;
            budget.spend(self.keys.len() as u64 / 8);
        }
    }

    /// Tells of the partition's rows. False if the budget ended before the last one.
    fn rows(
        &mut self,
        instance: &Instance,
        shape: &Shape,
        node: &NodeShape,
        budget: &mut Budget,
        visit: &mut Visit<'_>,
    ) -> bool {
        let Some((key, last)) = &mut self.partition else { return true };
        budget.spend(1);
        let Some(partition) = instance.nodes[self.node].partitions.get(key) else { return true };
        let mult = u64::try_from(partition.mult).unwrap_or(0);
        if mult == 0 {
            return true;
        }
        for row in visible_behind(partition, node, last.take().as_ref()) {
            let is_known =
                !self.changed.is_empty() && self.changed.contains_key(&RowId::of(&node.table, row));
            if !is_known && let Some(count) = instance.told_at(shape, node, row, mult) {
                self.told = true;
                visit(ReadRow::Held(HeldRow { table: &node.table, row, count }));
            }
            budget.spend(1);
            *last = Some(row.clone());
            if budget.is_spent() {
                return false;
            }
        }
        *last = partition.rows().last().cloned();
        true
    }

    /// Tells of the changed rows. False if the budget ended before the last one.
    fn changes(&mut self, budget: &mut Budget, visit: &mut Visit<'_>) -> bool {
        loop {
            let changed = &mut self.changed;
            let telling = self.telling.get_or_insert_with(|| std::mem::take(changed).into_iter());
            for (id, Changed { table, held }) in telling {
                self.told = true;
                visit(match &held {
                    Some((row, count)) => {
                        ReadRow::Held(HeldRow { table: &table, row, count: *count })
                    }
                    None => ReadRow::Gone { table: &table, id: &id },
                });
                budget.spend(1);
                if budget.is_spent() {
                    return false;
                }
            }
            self.telling = None;
            if self.changed.is_empty() {
                return true;
            }
        }
    }
}

/// The rows of a partition in view behind a row (which may be gone).
fn visible_behind<'p>(
    partition: &'p Partition,
    node: &NodeShape,
    last: Option<&RowRef>,
) -> impl Iterator<Item = &'p RowRef> {
    let rows = partition.rows();
    let rank = last.map_or(0, |last| match rows.find(&node.order, last) {
        Ok(at) => rows.rank(at) + 1,
        Err(at) => rows.rank(at),
    });
    rows.iter_from(rank).take(node.window.visible(rows.len()).saturating_sub(rank))
}

/// Whether the rows of the root are told while the instance hydrates: see the module.
fn streams(shape: &Shape) -> bool {
    shape.nodes.first().is_some_and(|root| root.alone && root.window.limit.is_none())
}

/// The readings of an instance: mostly none.
#[derive(Debug, Default)]
pub(super) struct Readings(Vec<Reading>, u64);

impl Readings {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A number that no reading of the instance had.
    pub(super) fn next_number(&mut self) -> u64 {
        self.1 += 1;
        self.1
    }

    pub(super) fn push(&mut self, reading: Reading) {
        self.0.push(reading);
    }

    pub(super) fn take(&mut self, number: u64) -> Option<Reading> {
        let at = self.0.iter().position(|r| r.number == number)?;
        Some(self.0.swap_remove(at))
    }

    /// An advance made this of a row: it is there so often, or gone.
    pub(super) fn note(
        &mut self,
        table: &Arc<TableSpec>,
        id: &RowId,
        held: Option<(&RowRef, u64)>,
    ) {
        for reading in &mut self.0 {
            let held = held.map(|(row, count)| (row.clone(), count));
            reading.changed.insert(id.clone(), Changed { table: Arc::clone(table), held });
        }
    }

    /// The same of a row of the root of an instance that hydrates.
    pub(super) fn note_hydrating(&mut self, shape: &Shape, row: &RowRef, is_there: bool) {
        if self.is_empty() || mutant::is(Mutant::HydratingNotRead) {
            return;
        }
        if let Some(root) = shape.nodes.first().filter(|_| streams(shape)) {
            let id = RowId::of(&root.table, row);
            self.note(&root.table, &id, is_there.then_some((row, 1)));
        }
    }

    /// The instance starts over.
    pub(super) fn start_over(&mut self) {
        for reading in &mut self.0 {
            let void = reading.void || reading.told;
            *reading = Reading { void, ..Reading::new(reading.number) };
        }
    }
}

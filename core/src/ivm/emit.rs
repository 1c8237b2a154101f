//! From settled partitions to row deltas: sums what happened to a row in all nodes of its table,
//! and says it once.

use std::sync::Arc;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use super::change_set::NetTable;
use super::delta::RowDelta;
use super::engine::Budget;
use super::error::EngineError;
use super::instance::Instance;
use super::mutant::{self, Mutant};
use super::plan::NodeId;
use super::route::RouteTableId;
use super::shape::{NodeShape, Shape};
use super::shards::{self, ShardMap};
use crate::row::{Key, Row, RowId, RowRef};
use crate::schema::TableSpec;
use crate::version::StateVersion;

/// Net changes per (table, identity key) of an advance.
pub(super) type NetTables = HashMap<RouteTableId, NetTable, FxBuildHasher>;

/// Sums the changes of one instance.
#[derive(Debug, Default)]
pub(super) struct Emission {
    rows: ShardMap<RowId, Sum>,
}

#[derive(Debug)]
struct Sum {
    node: NodeId,
    delta: i64,
    /// As held; the version is looked up at the end.
    row: RowRef,
}

impl Emission {
    /// A row's count changes; 0 says that it was taken up in a new version.
    pub(super) fn add(&mut self, node: &NodeShape, row: &RowRef, delta: i64) {
        let make = || Sum { node: node.id, delta: 0, row: row.clone() };
        self.rows.get_or_insert_with(RowId::of(&node.table, row), make).delta += delta;
    }

    /// All changes are summed.
    pub(super) fn close(self) -> Telling {
        Telling { out: Vec::with_capacity(self.rows.len()), rows: self.rows.into_iter() }
    }

    /// An instance that started over is summed: to compare with what its subscribers know.
    pub(super) fn compare(self, known: Snapshot) -> Comparison {
        Comparison { now: self.rows.into_iter(), known, gone: None, out: Vec::new() }
    }
}

/// Turns the sums of a settled instance into deltas.
#[derive(Debug)]
pub(super) struct Telling {
    rows: shards::IntoIter<(RowId, Sum)>,
    out: Vec<RowDelta>,
}

impl Telling {
    /// Works until all deltas are made (`Some`) or the budget is spent. The instance must be
    /// settled: counts are asked from it. Updates the signature.
    ///
    /// # Errors
    /// [`EngineError::Invariant`] if a count would be below zero.
    pub(super) fn step(
        &mut self,
        instance: &mut Instance,
        shape: &Shape,
        tables: &[RouteTableId],
        changes: &NetTables,
        budget: &mut Budget,
    ) -> Result<Option<Vec<RowDelta>>, EngineError> {
        while let Some((id, sum)) = self.rows.next() {
            self.out.extend(sum.delta(id, instance, shape, tables, changes)?);
            budget.spend(1);
            if budget.is_spent() && self.rows.len() > 0 {
                return Ok(None);
            }
        }
        Ok(Some(std::mem::take(&mut self.out)))
    }
}

impl Sum {
    fn delta(
        self,
        id: RowId,
        instance: &mut Instance,
        shape: &Shape,
        tables: &[RouteTableId],
        changes: &NetTables,
    ) -> Result<Option<RowDelta>, EngineError> {
        let node = shape.node(self.node);
        let table = changes.get(&tables[usize::from(self.node.0)]);
        let change = table.and_then(|t| t.get(&id.key));
        // Who reads the instance must know of a row that moved, too.
        if change.is_none() && self.delta == 0 && instance.readers.is_empty() {
            return Ok(None);
        }
        let now = match change {
            Some(change) => change.new.clone(),
            None => Some(self.row),
        };
        let count_after = now.as_ref().map_or(0, |r| instance.count(shape, id.table, r));
        let before = i64::try_from(count_after).unwrap_or(i64::MAX) - self.delta;
        let Ok(count_before) = u64::try_from(before) else {
            return Err(EngineError::Invariant("a row's count would be below zero"));
        };
        if self.delta & 1 == 1 {
            // The key columns are the same in every version of the row.
            if let Some(row) = now.as_ref().or(change.and_then(|c| c.old.as_ref())) {
                instance.signature ^= node.row_name.hash(row);
            }
        }
        let is_moved = change.is_none() && self.delta == 0;
        let is_noted = !is_moved || !mutant::is(Mutant::MovedRowNotRead);
        if is_noted && !instance.readers.is_empty() {
            let held = now.as_ref().filter(|_| count_after > 0).map(|row| (row, count_after));
            instance.readers.note(&node.table, &id, held);
        }
        let content_changed = change.is_some() && count_before > 0 && count_after > 0;
        if count_before == count_after && !content_changed {
            return Ok(None);
        }
        Ok(Some(RowDelta {
            table: Arc::clone(&node.table),
            id,
            count_before,
            count_after,
            row: now.filter(|_| count_after > 0),
            content_changed,
        }))
    }
}

/// The whole result of an instance, to compare a re-hydration with.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    rows: ShardMap<RowId, Counted>,
}

/// A snapshot that nobody needs any more.
pub(super) type SnapshotRows = shards::IntoIter<(RowId, Counted)>;

#[derive(Debug)]
pub(super) struct Counted {
    table: Arc<TableSpec>,
    version: StateVersion,
    count: u64,
}

impl Snapshot {
    /// What is known of a row now.
    pub(super) fn set(&mut self, table: &Arc<TableSpec>, row: &Row, count: u64) {
        let (table, version) = (Arc::clone(table), row.version.clone());
        self.rows.insert(RowId::of(&table, row), Counted { table, version, count });
    }

    /// A row is not in the result.
    pub(super) fn remove(&mut self, id: &RowId) {
        self.rows.remove(id);
    }

    /// A row that is visible in a partition of this multiplicity.
    pub(super) fn add(&mut self, node: &NodeShape, row: &Row, mult: u64) {
        if mult == 0 {
            return;
        }
        let make =
            || Counted { table: Arc::clone(&node.table), version: row.version.clone(), count: 0 };
        self.rows.get_or_insert_with(RowId::of(&node.table, row), make).count += mult;
    }

    /// How often a row is counted.
    pub(super) fn count(&self, id: &RowId) -> u64 {
        self.rows.get(id).map_or(0, |c| c.count)
    }

    /// The rows, to be given back one by one.
    pub(super) fn into_rows(self) -> SnapshotRows {
        self.rows.into_iter()
    }
}

/// What to tell subscribers who know one result and shall know another.
#[derive(Debug)]
pub(super) struct Comparison {
    now: shards::IntoIter<(RowId, Sum)>,
    known: Snapshot,
    /// Known rows that are in the result no longer, once all others are through.
    gone: Option<SnapshotRows>,
    out: Vec<RowDelta>,
}

impl Comparison {
    /// Works until all rows are compared (`Some`) or the budget is spent. Updates the signature,
    /// which must be that of no rows at the start.
    ///
    /// # Errors
    /// [`EngineError::Invariant`] if a count is below zero.
    pub(super) fn step(
        &mut self,
        instance: &mut Instance,
        shape: &Shape,
        budget: &mut Budget,
    ) -> Result<Option<Vec<RowDelta>>, EngineError> {
        while let Some((id, sum)) = self.now.next() {
            let Ok(count) = u64::try_from(sum.delta) else {
                return Err(EngineError::Invariant("a row's count would be below zero"));
            };
            if count > 0 {
                let node = shape.node(sum.node);
                if count & 1 == 1 {
                    instance.signature ^= node.row_name.hash(&sum.row);
                }
                self.row(id, node, count, sum.row);
            }
            budget.spend(1);
            if budget.is_spent() {
                return Ok(None);
            }
        }
        let gone = self.gone.get_or_insert_with(|| std::mem::take(&mut self.known).into_rows());
        for (id, old) in gone {
            self.out.push(old.left(id));
            budget.spend(1);
            if budget.is_spent() {
                return Ok(None);
            }
        }
        Ok(Some(std::mem::take(&mut self.out)))
    }

    fn row(&mut self, id: RowId, node: &NodeShape, count: u64, row: RowRef) {
        let mut old = self.known.rows.remove(&id);
        if let Some(o) = old.take_if(|o| key_names(&o.table).ne(key_names(&node.table))) {
            self.out.push(o.left(id.clone()));
        }
        let count_before = old.as_ref().map_or(0, |o| o.count);
        let content_changed = old.is_some_and(|o| o.version != row.version);
        if count_before != count || content_changed {
            self.out.push(RowDelta {
                table: Arc::clone(&node.table),
                id,
                count_before,
                count_after: count,
                row: Some(row),
                content_changed,
            });
        }
    }
}

impl Counted {
    fn left(self, id: RowId) -> RowDelta {
        RowDelta {
            table: self.table,
            id,
            count_before: self.count,
            count_after: 0,
            row: None,
            content_changed: false,
        }
    }
}

fn key_names(table: &TableSpec) -> impl Iterator<Item = Option<&str>> {
    table.primary_key.iter().map(|&c| table.columns.get(c).map(|c| &*c.name))
}

/// Key of a row in a node's partitions; `None` if a component is null and the row joins nothing.
pub(super) fn join_key(row: &Row, columns: &[usize]) -> Option<Key> {
    columns.iter().all(|&c| !row.values[c].is_null()).then(|| row.project(columns))
}

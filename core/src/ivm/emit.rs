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
use super::plan::NodeId;
use super::route::RouteTableId;
use super::shape::{NodeShape, Shape};
use crate::row::{Key, Row, RowId};
use crate::schema::TableSpec;
use crate::version::StateVersion;

/// Net changes per (table, identity key) of an advance.
pub(super) type NetTables = HashMap<RouteTableId, NetTable, FxBuildHasher>;

/// Sums the changes of one instance.
#[derive(Debug, Default)]
pub(super) struct Emission {
    rows: HashMap<RowId, Sum, FxBuildHasher>,
}

#[derive(Debug)]
struct Sum {
    node: NodeId,
    delta: i64,
    /// As held; the version is looked up at the end.
    row: Arc<Row>,
}

impl Emission {
    /// A row's count changes; 0 says that it was taken up in a new version.
    pub(super) fn add(&mut self, node: &NodeShape, row: &Arc<Row>, delta: i64) {
        let sum = self.rows.entry(RowId::of(&node.table, row)).or_insert_with(|| Sum {
            node: node.id,
            delta: 0,
            row: Arc::clone(row),
        });
        sum.delta += delta;
    }

    /// All changes are summed.
    pub(super) fn close(self) -> Telling {
        Telling { out: Vec::with_capacity(self.rows.len()), rows: self.rows.into_iter() }
    }
}

/// Turns the sums of a settled instance into deltas.
#[derive(Debug)]
pub(super) struct Telling {
    rows: hashbrown::hash_map::IntoIter<RowId, Sum>,
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
        if change.is_none() && self.delta == 0 {
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
    rows: HashMap<RowId, Counted, FxBuildHasher>,
}

#[derive(Debug)]
struct Counted {
    table: Arc<TableSpec>,
    version: StateVersion,
    /// `None` once [`Snapshot::compact`] gave it up.
    row: Option<Arc<Row>>,
    count: u64,
}

impl Snapshot {
    /// What the instance counts now.
    pub(super) fn of(instance: &Instance, shape: &Shape) -> Snapshot {
        let mut rows: HashMap<RowId, Counted, FxBuildHasher> = HashMap::default();
        instance.for_each_visible(shape, &mut |node, row, mult| {
            rows.entry(RowId::of(&node.table, row))
                .or_insert_with(|| Counted {
                    table: Arc::clone(&node.table),
                    version: row.version.clone(),
                    row: Some(Arc::clone(row)),
                    count: 0,
                })
                .count += mult;
        });
        rows.retain(|_, c| c.count > 0);
        Snapshot { rows }
    }

    /// Gives the contents up: which rows were known, in which version, is enough for a difference.
    pub(super) fn compact(&mut self) {
        self.rows.values_mut().for_each(|c| c.row = None);
        self.rows.shrink_to_fit();
    }

    /// How often a row is counted.
    pub(super) fn count(&self, id: &RowId) -> u64 {
        self.rows.get(id).map_or(0, |c| c.count)
    }

    /// What to tell subscribers who know `self` and shall know `now`.
    pub(super) fn difference(mut self, now: Snapshot) -> Vec<RowDelta> {
        let mut out = Vec::new();
        for (id, new) in now.rows {
            let mut old = self.rows.remove(&id);
            if let Some(o) = old.take_if(|o| key_names(&o.table).ne(key_names(&new.table))) {
                out.push(o.left(id.clone()));
            }
            let count_before = old.as_ref().map_or(0, |o| o.count);
            let content_changed = old.is_some_and(|o| o.version != new.version);
            if count_before != new.count || content_changed {
                out.push(RowDelta {
                    table: new.table,
                    id,
                    count_before,
                    count_after: new.count,
                    row: new.row,
                    content_changed,
                });
            }
        }
        out.extend(self.rows.into_iter().map(|(id, old)| old.left(id)));
        out
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

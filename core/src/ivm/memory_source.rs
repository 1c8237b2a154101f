//! A database of plain vectors, and a [`Source`] over it: for tests, simulation and oracles.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::brute;
use super::source::{Fetch, Filter, Source, SourceError};
use crate::change::{Commit, RowChange};
use crate::row::{Key, Row, RowRef};
use crate::schema::{TableId, TableSpec};
use crate::version::StateVersion;
use crate::zql::{order, predicate};

/// All rows of all tables, by replica key. Cloning is cheap enough to keep one per version.
#[derive(Debug, Clone, Default)]
pub struct Database {
    tables: BTreeMap<TableId, BTreeMap<Key, RowRef>>,
}

impl Database {
    /// Inserts or replaces a row; returns the one it replaced.
    pub fn put(&mut self, table: &TableSpec, row: RowRef) -> Option<RowRef> {
        self.tables.entry(table.id).or_default().insert(row.project(&table.replica_key), row)
    }

    /// Removes the row with the same replica key as `row`.
    pub fn remove(&mut self, table: &TableSpec, row: &Row) -> Option<RowRef> {
        self.tables.get_mut(&table.id)?.remove(&row.project(&table.replica_key))
    }

    /// Removes the row with a replica key.
    pub fn take(&mut self, table: TableId, key: &Key) -> Option<RowRef> {
        self.tables.get_mut(&table)?.remove(key)
    }

    /// Removes all rows of a table.
    pub fn clear(&mut self, table: TableId) {
        self.tables.remove(&table);
    }

    /// A row by its replica key.
    pub fn get(&self, table: TableId, key: &Key) -> Option<&RowRef> {
        self.tables.get(&table)?.get(key)
    }

    /// All rows of a table, in replica-key order.
    pub fn rows(&self, table: TableId) -> impl DoubleEndedIterator<Item = &RowRef> {
        self.tables.get(&table).into_iter().flat_map(BTreeMap::values)
    }

    /// Applies the net changes of a commit. A truncated table is emptied first.
    pub fn apply(&mut self, commit: &Commit) {
        for change in &commit.tables {
            if change.truncated {
                self.clear(change.table.id);
            }
            // All old rows leave before any new one enters: keys may move between rows.
            for RowChange { old, .. } in &change.rows {
                if let Some(old) = old {
                    self.remove(&change.table, old);
                }
            }
            for RowChange { new, .. } in &change.rows {
                if let Some(new) = new {
                    self.put(&change.table, new.clone());
                }
            }
        }
    }
}

/// A [`Source`] over a [`Database`]: each fetch is a scan.
#[derive(Debug, Clone, Default)]
pub struct MemorySource {
    /// The rows.
    pub db: Database,
    /// What [`Source::version`] says.
    pub version: StateVersion,
    /// Number of fetches so far: what SQL statements would have cost.
    pub fetches: u64,
}

impl MemorySource {
    /// A source of a database at a version.
    pub fn new(db: Database, version: StateVersion) -> MemorySource {
        MemorySource { db, version, fetches: 0 }
    }

    /// Moves to the version of `commit`.
    pub fn advance(&mut self, commit: &Commit) {
        self.db.apply(commit);
        self.version = commit.version.clone();
    }
}

impl Source for MemorySource {
    fn version(&self) -> &StateVersion {
        &self.version
    }

    /// Now so, now so: it must not matter.
    fn few_per_key(&mut self, _table: &TableSpec, _columns: &[usize], most: usize) -> bool {
        (self.fetches + most as u64).is_multiple_of(2)
    }

    fn fetch(
        &mut self,
        f: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError> {
        self.fetches += 1;
        let node = f.plan.node(f.node);
        // Against the order of keys: who forgets to ask for an order shall notice.
        let mut found: Vec<&RowRef> = self
            .db
            .rows(node.table.id)
            .rev()
            .filter(|r| {
                f.keys.is_none_or(|k| {
                    let key = r.project(k.columns);
                    !key.iter().any(|v| v.is_null()) && k.keys.contains(&key)
                })
            })
            .filter(|r| match f.filter {
                Filter::Whole => brute::qualifies(f.plan, f.node, f.params, &self.db, r),
                Filter::Weak => predicate::weak(node, r, f.params),
                Filter::Any => true,
            })
            .filter(|r| {
                f.from.is_none_or(|b| {
                    let at = order::compare_to_position(&node.order, r, b.position);
                    at.is_gt() || (b.inclusive && at.is_eq())
                })
            })
            .filter(|r| {
                f.before.is_none_or(|p| order::compare_to_position(&node.order, r, p).is_lt())
            })
            .collect();
        if f.ordered || f.limit.is_some() {
            found.sort_by(|a, b| order::compare_rows(&node.order, a, b));
        }
        for row in found.into_iter().take(f.limit.unwrap_or(usize::MAX)) {
            if f.delivers() {
                SourceError::check_deliverable(&node.table, row)?;
            }
            if visit(row.clone()).is_break() {
                break;
            }
        }
        Ok(())
    }
}

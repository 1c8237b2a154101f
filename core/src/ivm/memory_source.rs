//! A database of plain vectors, and a [`Source`] over it: for tests, simulation and oracles.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::brute;
use super::source::{Ended, Fetch, Filter, Part, Reach, Source, SourceError};
use crate::change::{Commit, RowChange};
use crate::row::{Key, Row, RowRef};
use crate::schema::{TableId, TableSpec};
use crate::value::Value;
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

impl MemorySource {
    fn is_wanted(&self, f: &Fetch<'_>, row: &Row) -> bool {
        let node = f.plan.node(f.node);
        let at = |position: &[Value]| order::compare_to_position(&node.order, row, position);
        let has_key = f.keys.is_none_or(|k| {
            let key = row.project(k.columns);
            !key.iter().any(Value::is_null) && k.keys.contains(&key)
        });
        has_key
            && match f.filter {
                Filter::Whole => brute::qualifies(f.plan, f.node, f.params, &self.db, row),
                Filter::Weak => predicate::weak(node, row, f.params),
                Filter::Any => true,
            }
            && f.from.is_none_or(|b| {
                let at = at(b.position);
                at.is_gt() || (b.inclusive && at.is_eq())
            })
            && f.before.is_none_or(|p| at(p).is_lt())
    }

    /// The rows of a table: against the order of keys, so that who forgets to ask for an order
    /// shall notice.
    fn rows(&self, f: &Fetch<'_>, ordered: bool) -> Vec<RowRef> {
        let node = f.plan.node(f.node);
        let mut rows: Vec<RowRef> = self.db.rows(node.table.id).rev().cloned().collect();
        if ordered {
            rows.sort_by(|a, b| order::compare_rows(&node.order, a, b));
        }
        rows
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
        self.fetch_within(f, u64::MAX, visit).map(drop)
    }

    /// A look at a row of the table is a unit.
    fn fetch_within(
        &mut self,
        f: &Fetch<'_>,
        units: u64,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<Ended, SourceError> {
        self.fetches += 1;
        let table = &f.plan.node(f.node).table;
        let rows = self.rows(f, f.ordered || f.limit.is_some());
        let (mut left, mut looked) = (f.limit.unwrap_or(usize::MAX), 0);
        // Rows before its start and behind its end are not looked at, as with an index.
        let range = Fetch { filter: Filter::Any, keys: None, ..f.clone() };
        for row in rows {
            if left == 0 {
                break;
            }
            if !self.is_wanted(&range, &row) {
                continue;
            }
            looked += 1;
            if looked > units {
                return Ok(Ended::Interrupted);
            }
            if !self.is_wanted(f, &row) {
                continue;
            }
            left -= 1;
            if f.delivers() {
                SourceError::check_deliverable(table, &row)?;
            }
            if visit(row).is_break() {
                break;
            }
        }
        Ok(Ended::Whole)
    }

    /// Now so, now so.
    fn reach(&mut self, f: &Fetch<'_>, rows: usize, _units: u64) -> Result<Reach, SourceError> {
        self.fetches += 1;
        if self.fetches.is_multiple_of(3) {
            return Ok(Reach::Unknown);
        }
        let all = Fetch { filter: Filter::Any, keys: None, ..f.clone() };
        let mut behind = self.rows(f, true);
        behind.retain(|row| self.is_wanted(&all, row));
        let order = &f.plan.node(f.node).order;
        Ok(behind
            .get(rows)
            .map_or(Reach::End, |row| Reach::At(order::position(order, row).into_iter().collect())))
    }

    fn fetch_part(
        &mut self,
        f: &Fetch<'_>,
        part: &mut Part,
        units: u64,
        visit: &mut dyn FnMut(RowRef),
    ) -> Result<(), SourceError> {
        self.fetches += 1;
        let rows = self.rows(f, false);
        if part.width.is_none() && rows.len() as u64 > units {
            part.width = Some(units.clamp(1, 3) as i64);
            return Ok(());
        }
        let width = part.width.unwrap_or(i64::MAX);
        let (first, width) = (part.next as usize, width as usize);
        let here = rows.iter().skip(first).take(width);
        here.filter(|row| self.is_wanted(f, row)).cloned().for_each(visit);
        part.next = first.saturating_add(width) as i64;
        part.done = first.saturating_add(width) >= rows.len();
        Ok(())
    }
}

//! Every row once per executor: (table, replica key, version) → one shared row.

use std::hash::{Hash, Hasher};

use hashbrown::HashMap;
use rustc_hash::{FxBuildHasher, FxHasher};

use super::engine::Budget;
use super::shards::Shards;
use crate::row::{Row, RowRef};
use crate::schema::{TableId, TableSpec};

/// Rows held by any partition of this executor. An entry is dropped as soon as the interner is
/// its last owner and notices: when a partition releases it, when its part of the table is full,
/// or when a sweep comes by.
#[derive(Debug, Default)]
pub(super) struct Interner {
    tables: HashMap<TableId, Table, FxBuildHasher>,
    /// Rows of all tables.
    len: usize,
    /// How far the current round of sweeping is: in this table, to this part.
    swept: Option<(TableId, u64)>,
}

#[derive(Debug, Default)]
struct Table {
    /// Latest version per key; an older version that is still held is merely not shared.
    rows: Shards<RowRef>,
    key: Vec<usize>,
}

fn hash(key: &[usize], row: &Row) -> u64 {
    let mut h = FxHasher::default();
    for &c in key {
        row.values[c].hash(&mut h);
    }
    h.finish()
}

fn same_key(key: &[usize], a: &Row, b: &Row) -> bool {
    key.iter().all(|&c| a.values[c] == b.values[c])
}

/// Whether anybody but the interner owns a row.
fn is_held(row: &RowRef) -> bool {
    row.owners() > 1
}

impl Interner {
    /// The shared row equal to `row`.
    pub(super) fn intern(&mut self, spec: &TableSpec, row: RowRef) -> RowRef {
        let table = self.tables.entry(spec.id).or_default();
        if table.key != spec.replica_key {
            self.len -= table.rows.len();
            table.rows = Shards::default();
            table.key.clone_from(&spec.replica_key);
        }
        let Table { rows, key } = table;
        let h = hash(key, &row);
        if let Some(known) = rows.find_mut(h, |r| same_key(key, r, &row)) {
            if known.version != row.version || known.values.len() != row.values.len() {
                *known = row;
            }
            return known.clone();
        }
        let before = rows.len();
        rows.insert_keeping(h, row.clone(), |r| hash(key, r), is_held);
        self.len = self.len + rows.len() - before;
        row
    }

    /// A partition gives its reference back.
    pub(super) fn release(&mut self, table: TableId, row: RowRef) {
        let Some(table) = self.tables.get_mut(&table) else { return };
        // The caller's and ours.
        if row.owners() > 2 {
            return;
        }
        let Table { rows, key } = table;
        let h = hash(key, &row);
        if rows.remove(h, |r| RowRef::ptr_eq(r, &row), |r| hash(key, r)).is_some() {
            self.len -= 1;
        }
    }

    /// Forgets a table whose columns changed: equal versions no longer mean equal rows.
    pub(super) fn forget(&mut self, table: TableId) {
        if let Some(table) = self.tables.remove(&table) {
            self.len -= table.rows.len();
        }
    }

    /// Drops rows that nobody else holds, until the budget is spent or all were looked at; goes
    /// on where it ended.
    pub(super) fn sweep(&mut self, budget: &mut Budget) {
        while !budget.is_spent() {
            let next = match self.swept {
                Some(at) => Some(at),
                None => self.tables.keys().min().map(|&table| (table, 0)),
            };
            let Some((id, at)) = next else { return };
            let Some(table) = self.tables.get_mut(&id) else {
                self.swept = self.after(id);
                continue;
            };
            let Table { rows, key } = table;
            let before = rows.len();
            let (seen, next) = rows.sweep(at, is_held, |r| hash(key, r));
            budget.spend(seen as u64 / 8 + 1);
            self.len -= before - rows.len();
            let is_empty = rows.len() == 0;
            if let Some(next) = next {
                self.swept = Some((id, next));
                continue;
            }
            self.swept = self.after(id);
            if is_empty {
                self.tables.remove(&id);
            }
            if self.swept.is_none() {
                return;
            }
        }
    }

    /// The start of the table behind this one.
    fn after(&self, table: TableId) -> Option<(TableId, u64)> {
        self.tables.keys().filter(|&&t| t > table).min().map(|&t| (t, 0))
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

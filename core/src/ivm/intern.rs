//! Every row once per executor: (table, replica key, version) → one shared row.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use hashbrown::{HashMap, HashTable};
use rustc_hash::{FxBuildHasher, FxHasher};

use crate::row::Row;
use crate::schema::{TableId, TableSpec};

/// Rows held by any partition of this executor. An entry is dropped as soon as the interner is
/// its last owner and notices: when a partition releases it, or at the next sweep.
#[derive(Debug, Default)]
pub(super) struct Interner {
    tables: HashMap<TableId, Table, FxBuildHasher>,
}

#[derive(Debug, Default)]
struct Table {
    /// Latest version per key; an older version that is still held is merely not shared.
    rows: HashTable<Arc<Row>>,
    key: Vec<usize>,
    /// Entries at which to look for rows that nobody else holds.
    sweep_at: usize,
}

/// Entries below which sweeping a table is not worth it.
const SWEEP_MIN: usize = 256;

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

impl Interner {
    /// The shared row equal to `row`.
    pub(super) fn intern(&mut self, spec: &TableSpec, row: Arc<Row>) -> Arc<Row> {
        let table = self.tables.entry(spec.id).or_default();
        if table.key != spec.replica_key {
            table.rows.clear();
            table.key.clone_from(&spec.replica_key);
        }
        let Table { rows, key, sweep_at } = table;
        let h = hash(key, &row);
        if let Some(known) = rows.find_mut(h, |r| same_key(key, r, &row)) {
            if known.version != row.version || known.values.len() != row.values.len() {
                *known = row;
            }
            return Arc::clone(known);
        }
        if rows.len() >= (*sweep_at).max(SWEEP_MIN) {
            rows.retain(|r| Arc::strong_count(r) > 1);
            *sweep_at = rows.len() * 2;
        }
        rows.insert_unique(h, Arc::clone(&row), |r| hash(key, r));
        row
    }

    /// A partition gives its reference back.
    pub(super) fn release(&mut self, table: TableId, row: Arc<Row>) {
        let Some(table) = self.tables.get_mut(&table) else { return };
        // The caller's and ours.
        if Arc::strong_count(&row) > 2 {
            return;
        }
        let h = hash(&table.key, &row);
        if let Ok(entry) = table.rows.find_entry(h, |r| Arc::ptr_eq(r, &row)) {
            entry.remove();
        }
    }

    /// Forgets a table whose columns changed: equal versions no longer mean equal rows.
    pub(super) fn forget(&mut self, table: TableId) {
        self.tables.remove(&table);
    }

    /// Drops rows that nobody else holds.
    pub(super) fn sweep(&mut self) {
        self.tables.retain(|_, t| {
            t.rows.retain(|r| Arc::strong_count(r) > 1);
            t.rows.shrink_to(t.rows.len() * 2, |r| hash(&t.key, r));
            t.sweep_at = t.rows.len() * 2;
            !t.rows.is_empty()
        });
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.tables.values().map(|t| t.rows.len()).sum()
    }
}

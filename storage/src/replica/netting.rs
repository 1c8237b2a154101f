//! The net effect of a transaction, row by row: what a row was before it, and what it is after.
//!
//! Rows are named by [`TableSpec::replica_key`]. However often a row changes, its first old and
//! its last new version remain; a row that was not there before nor after leaves no trace; a row
//! that moves to another key is two entries.

use std::sync::Arc;

use hashbrown::HashMap;
use zeroring_core::change::{RowChange, TableChange};
use zeroring_core::row::{Key, RowRef};
use zeroring_core::schema::{TableId, TableSpec};

/// Changed rows kept per transaction. Beyond, the tables of the transaction are marked as changed
/// as a whole (instances re-hydrate): a transaction of any size costs bounded memory.
pub(super) const MAX_NET_ROWS: usize = 1_000_000;

/// Net changes of the transaction in progress.
#[derive(Debug, Default)]
pub(super) struct Net {
    tables: Vec<NetTable>,
    by_id: HashMap<TableId, usize>,
    rows: usize,
}

#[derive(Debug)]
struct NetTable {
    spec: Arc<TableSpec>,
    index: HashMap<Key, usize>,
    rows: Vec<RowChange>,
    /// Rows are no longer recorded: truncated, unreadable, or too many.
    incomplete: bool,
}

impl Net {
    fn table(&mut self, spec: &Arc<TableSpec>) -> &mut NetTable {
        let at = *self.by_id.entry(spec.id).or_insert_with(|| {
            self.tables.push(NetTable {
                spec: spec.clone(),
                index: HashMap::new(),
                rows: Vec::new(),
                incomplete: false,
            });
            self.tables.len() - 1
        });
        &mut self.tables[at]
    }

    /// A row changed (both sides), appeared (only new) or went (only old).
    pub(super) fn change(
        &mut self,
        spec: &Arc<TableSpec>,
        old: Option<RowRef>,
        new: Option<RowRef>,
    ) {
        if self.rows >= MAX_NET_ROWS {
            return self.incomplete(spec);
        }
        let table = self.table(spec);
        if table.incomplete {
            return;
        }
        let before = table.rows.len();
        match (old, new) {
            (Some(old), Some(new)) => {
                let key = old.project(&spec.replica_key);
                if key == new.project(&spec.replica_key) {
                    table.replace(key, Some(old), Some(new));
                } else {
                    table.replace(key, Some(old), None);
                    table.replace(new.project(&spec.replica_key), None, Some(new));
                }
            }
            (old @ Some(_), None) | (None, old @ None) => {
                if let Some(row) = &old {
                    let key = row.project(&spec.replica_key);
                    table.replace(key, old, None);
                }
            }
            (None, Some(new)) => {
                table.replace(new.project(&spec.replica_key), None, Some(new));
            }
        }
        let added = table.rows.len() - before;
        self.rows += added;
    }

    /// From now on only the fact that the table changed is known.
    pub(super) fn incomplete(&mut self, spec: &Arc<TableSpec>) {
        let table = self.table(spec);
        table.incomplete = true;
        table.index = HashMap::new();
        table.rows = Vec::new();
    }

    /// The net changes, without tables that did not change.
    pub(super) fn finish(self) -> Vec<TableChange> {
        self.tables
            .into_iter()
            .filter_map(|table| {
                let mut rows = table.rows;
                rows.retain(|r| r.old.is_some() || r.new.is_some());
                let truncated = table.incomplete;
                (truncated || !rows.is_empty()).then_some(TableChange {
                    table: table.spec,
                    rows,
                    truncated,
                })
            })
            .collect()
    }
}

impl NetTable {
    /// The row named `key` was `old` (if nothing was recorded yet) and is `new`.
    fn replace(&mut self, key: Key, old: Option<RowRef>, new: Option<RowRef>) {
        let rows = &mut self.rows;
        match self.index.entry(key) {
            hashbrown::hash_map::Entry::Occupied(at) => rows[*at.get()].new = new,
            hashbrown::hash_map::Entry::Vacant(slot) => {
                slot.insert(rows.len());
                rows.push(RowChange { old, new });
            }
        }
    }
}

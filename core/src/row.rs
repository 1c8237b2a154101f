//! Immutable rows and the keys that name them.

use std::sync::{Arc, OnceLock};

use crate::schema::{TableId, TableSpec};
use crate::value::Value;
use crate::version::StateVersion;

/// A row as replicated: the visible columns of its table, in the order of
/// [`TableSpec::columns`], and the version that last wrote it. Shared by reference; never changed.
#[derive(Debug)]
pub struct Row {
    /// `_0_version` of the row, already raised to the table's `minRowVersion`.
    pub version: StateVersion,
    /// One value per visible column.
    pub values: Box<[Value]>,
    /// The row as the JSON object of a `rowsPatch` put, made at most once (see `crate::json`).
    pub wire_json: OnceLock<Box<[u8]>>,
}

impl Row {
    /// A row of the given version and values.
    pub fn new(version: StateVersion, values: impl Into<Box<[Value]>>) -> Arc<Row> {
        Arc::new(Row { version, values: values.into(), wire_json: OnceLock::new() })
    }

    /// The values of the named columns, in their order.
    pub fn project(&self, columns: &[usize]) -> Key {
        columns.iter().map(|&c| self.values[c].clone()).collect()
    }
}

/// Column values that name a row or a join partition.
pub type Key = smallvec::SmallVec<[Value; 2]>;

/// A row's identity inside one executor: the table, and the values of its identity key
/// ([`TableSpec::primary_key`]) in key order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    /// The table.
    pub table: TableId,
    /// Values of the identity key columns, in key order.
    pub key: Key,
}

impl RowId {
    /// The identity of `row` in `table`.
    pub fn of(table: &TableSpec, row: &Row) -> RowId {
        RowId { table: table.id, key: row.project(&table.primary_key) }
    }
}

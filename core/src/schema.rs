//! Tables as ZQL sees them: visible columns, candidate keys, and why a table is not syncable.
//!
//! Spec: replication §2.6, zql-ivm §5.6.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::version::StateVersion;

/// A ZQL type (spec: zql-ivm §2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueType {
    /// `true` / `false`.
    Boolean,
    /// An IEEE double; dates and times too (milliseconds).
    Number,
    /// UTF-8 text.
    String,
    /// Any JSON value; arrays too.
    Json,
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ValueType::Boolean => "boolean",
            ValueType::Number => "number",
            ValueType::String => "string",
            ValueType::Json => "json",
        })
    }
}

/// Number of a table within one [`Schema`]. Stable while the process lives: a table keeps its
/// number over schema changes, a dropped table's number is not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId(pub u32);

/// A visible column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnSpec {
    /// Server name.
    pub name: Arc<str>,
    /// ZQL type.
    pub value_type: ValueType,
    /// True unless the column is NOT NULL upstream.
    pub nullable: bool,
    /// The declared type of the replica without attributes, e.g. `int8`, `text[]`.
    pub upstream_type: Arc<str>,
}

/// A unique index over visible columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UniqueKey {
    /// Indices into [`TableSpec::columns`], in index order.
    pub columns: Vec<usize>,
    /// All columns are NOT NULL upstream: the key can identify rows.
    pub not_null: bool,
}

/// A syncable table. Column positions (`usize`) always index [`TableSpec::columns`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSpec {
    /// Number of the table.
    pub id: TableId,
    /// Replica name: `name`, or `schema.name` outside `public`.
    pub name: Arc<str>,
    /// Visible columns, without `_0_version`, in the order of the replica's table.
    pub columns: Vec<ColumnSpec>,
    /// Row identity: the candidate key with the fewest columns, ties by name — or the client
    /// schema's primary key, for plans made for a client group that names another one
    /// (see [`TableSpec::with_key`]).
    pub primary_key: Vec<usize>,
    /// The key under which the replica and its change log name rows.
    pub replica_key: Vec<usize>,
    /// All unique indexes over visible columns, in index-name order.
    pub unique_keys: Vec<UniqueKey>,
    /// Rows older than this count as written at this version (spec: replication §6.2).
    pub min_row_version: StateVersion,
    /// Leading columns of the table's indexes, for slow-query advice and plan choice.
    pub indexes: Vec<Vec<usize>>,
}

impl TableSpec {
    /// Position of a column by name.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| &*c.name == name)
    }

    /// The same table with another identity key; `None` if no unique NOT NULL index covers
    /// exactly these columns.
    pub fn with_key(&self, columns: &[usize]) -> Option<TableSpec> {
        let mut wanted = columns.to_vec();
        wanted.sort_unstable();
        let known = self.unique_keys.iter().any(|k| {
            let mut have = k.columns.clone();
            have.sort_unstable();
            k.not_null && have == wanted
        });
        known.then(|| TableSpec { primary_key: columns.to_vec(), ..self.clone() })
    }
}

/// Why a replicated table cannot be synced to clients (spec: view-syncer-cvr §5.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsyncable {
    /// No primary key and no unique index over NOT NULL columns.
    NoKey,
    /// Its primary key has columns of types that ZQL does not know: (column, upstream type).
    UnsupportedKeyColumns(Vec<(Arc<str>, Arc<str>)>),
}

/// All tables of the replica at one version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    /// Syncable tables by replica name.
    pub tables: BTreeMap<Arc<str>, Arc<TableSpec>>,
    /// Tables that are replicated but not syncable, with the reason.
    pub unsyncable: BTreeMap<Arc<str>, Unsyncable>,
    /// Columns that are replicated but invisible: (table, column) → upstream type.
    pub invisible_columns: BTreeMap<(Arc<str>, Arc<str>), Arc<str>>,
}

impl Schema {
    /// A syncable table by replica name.
    pub fn table(&self, name: &str) -> Option<&Arc<TableSpec>> {
        self.tables.get(name)
    }
}

//! The net effect of replicated transactions, as the replication core publishes it and every
//! executor reads it: `net::pg → replication → storage::replica → [Commit] → engine`.

pub mod message;
pub mod published;

use std::sync::Arc;

use crate::row::RowRef;
use crate::schema::{Schema, TableSpec};
use crate::version::StateVersion;

/// One committed replica transaction: per table and row key the old and the new row. Immutable
/// and shared by all executors.
#[derive(Debug)]
pub struct Commit {
    /// The replica version that this transaction produced.
    pub version: StateVersion,
    /// The version before it: commits form a chain.
    pub previous: StateVersion,
    /// Net changes, one entry per changed table.
    pub tables: Vec<TableChange>,
    /// The schema from this version on, if the transaction changed it; every instance that reads
    /// a table whose spec differs must be re-hydrated.
    pub schema: Option<Arc<Schema>>,
    /// Upstream commit time, milliseconds since the Unix epoch (0 if unknown).
    pub upstream_commit_ms: f64,
    /// The value of the deployed permissions changed: every transformed query must be made anew.
    pub permissions_changed: bool,
}

/// Net changes of one table in a transaction. At most one entry per replica key.
#[derive(Debug, Clone)]
pub struct TableChange {
    /// The table, as of the commit's version.
    pub table: Arc<TableSpec>,
    /// Changed rows. A changed replica key is two entries: old row without new, new without old.
    pub rows: Vec<RowChange>,
    /// The table was truncated: `rows` is incomplete, instances reading the table re-hydrate.
    pub truncated: bool,
}

/// One row before and after a transaction; at least one side is present.
#[derive(Debug, Clone)]
pub struct RowChange {
    /// The row before, absent for an insert.
    pub old: Option<RowRef>,
    /// The row after, absent for a delete.
    pub new: Option<RowRef>,
}

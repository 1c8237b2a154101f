//! What leaves the engine: the net row changes of one instance in one advance.

use std::sync::Arc;

use super::engine::InstanceId;
use super::error::EngineError;
use crate::row::{RowId, RowRef};
use crate::schema::TableSpec;
use crate::version::StateVersion;

/// The net change of one row in one instance between two versions. Counts are occurrences in
/// `Sync(Q, D)` (spec: zql-ivm §6.2): over all nodes of the table, times multiplicity.
#[derive(Debug, Clone)]
pub struct RowDelta {
    /// The table, with the identity key that names the row.
    pub table: Arc<TableSpec>,
    /// The row.
    pub id: RowId,
    /// Occurrences before.
    pub count_before: u64,
    /// Occurrences after.
    pub count_after: u64,
    /// The row at the new version, whenever `count_after > 0`.
    pub row: Option<RowRef>,
    /// The row was and is in the query, and its version changed.
    pub content_changed: bool,
}

/// What a [`RowDelta`] means for a client that holds only this query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaKind {
    /// Not in the query before: put.
    Entered,
    /// No longer in the query: del.
    Left,
    /// Contents changed (the count perhaps too): put.
    Changed,
    /// Only the count changed: nothing to send, a reference count to write.
    Recounted,
}

impl RowDelta {
    /// What happened.
    pub fn kind(&self) -> DeltaKind {
        match (self.count_before, self.count_after) {
            (0, _) => DeltaKind::Entered,
            (_, 0) => DeltaKind::Left,
            _ if self.content_changed => DeltaKind::Changed,
            _ => DeltaKind::Recounted,
        }
    }
}

/// The row deltas of one instance, to be shared by all its subscriptions.
#[derive(Debug, Clone)]
pub struct InstanceDelta {
    /// The instance.
    pub instance: InstanceId,
    /// One entry per changed row, in no particular order; never empty. A vector, not a slice: of
    /// a million, a copy takes milliseconds. [`super::engine::Engine::discard`] takes it back.
    pub rows: Arc<Vec<RowDelta>>,
}

/// A finished advance: every instance is at `version`.
#[derive(Debug, Default)]
pub struct Advanced {
    /// The new version.
    pub version: StateVersion,
    /// Instances of which rows changed. All others are unaffected.
    pub deltas: Vec<InstanceDelta>,
    /// Instances that failed on the way; tell their subscribers, then unsubscribe them.
    pub failed: Vec<(InstanceId, EngineError)>,
}

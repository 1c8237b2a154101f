//! Changes of a group at the head without reading row records: its queries' results advance,
//! queries are executed for the first time, running queries are removed.
//!
//! The engine gives, per query and row, how often the row occurred before and after. Together with
//! whether other queries of the group reference the row, that says all that the clients and the
//! CVR need: a row referenced before and after has a live record, and its patch version is known
//! by rule (see [`RowChange::Adjust`]).
//!
//! *Who else references the row?* Only asked where the queries with deltas do not reference it on
//! one of the two sides ([`AdvancedRow::needs_others`]). A query without a delta references the
//! row as often as before, so ask its instance (at B), or, if it has no instance in memory, read
//! the record ([`AdvancedRow::others_of_record`]).
//!
//! [`RowDeltas`] merges the deltas of several queries, and of several advances that were not yet
//! flushed, per row. A query that is new is a delta from 0, one that is removed a delta to 0
//! ([`RowDeltas::add_whole`]): nothing in the records mentions the one, and its instance knows all
//! that mention the other.

use std::sync::Arc;

use smallvec::SmallVec;

use super::store::RowChange;
use super::{
    MAX_SORTED_ROWS, Patch, QueryHash, QueryUpdater, RowIdentity, RowRecord, UpdateError,
    VersionedPatch,
};
use crate::ivm::shards::ShardMap;
use crate::row::RowRef;
use crate::version::StateVersion;
use crate::waste::Waste;

/// How often a row occurs in one query's result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountChange {
    /// The query.
    pub query: QueryHash,
    /// Before.
    pub before: i64,
    /// After.
    pub after: i64,
}

/// A row that changed in at least one query of the group.
#[derive(Debug, Clone)]
pub struct AdvancedRow {
    /// The row.
    pub id: Arc<RowIdentity>,
    /// Its contents after; may be absent if it only left queries.
    pub row: Option<RowRef>,
    /// Per query with a delta, each at most once. Counts may be equal: the contents changed.
    pub counts: SmallVec<[CountChange; 1]>,
    /// Some query of the group that is not in `counts` references the row. Only looked at if
    /// [`AdvancedRow::needs_others`].
    pub others: bool,
    /// Some query's result changed; otherwise only which queries there are. A row that merely
    /// lost a query keeps its patch version (checklist 32), one that left a result does not (59).
    pub by_advance: bool,
}

impl AdvancedRow {
    /// A row of which nothing is known yet.
    pub fn of(id: Arc<RowIdentity>) -> AdvancedRow {
        let counts = SmallVec::new();
        AdvancedRow { id, row: None, counts, others: false, by_advance: false }
    }

    /// `others` matters: on one side no query in `counts` references the row.
    pub fn needs_others(&self) -> bool {
        !(self.counts.iter().any(|c| c.before > 0) && self.counts.iter().any(|c| c.after > 0))
    }

    /// What a record says about `others`.
    pub fn others_of_record(&self, record: Option<&RowRecord>) -> bool {
        record.and_then(|r| r.ref_counts.as_ref()).is_some_and(|counts| {
            counts.iter().any(|(q, n)| n > 0 && !self.counts.iter().any(|c| c.query == *q))
        })
    }
}

/// Deltas of a group's queries, merged per row. There may be a million: neither list nor map is
/// ever moved as a whole.
#[derive(Debug, Default)]
pub struct RowDeltas {
    /// Each but the last is full.
    chunks: Vec<Vec<AdvancedRow>>,
    at: ShardMap<Arc<RowIdentity>, usize>,
}

/// Rows of a chunk.
const CHUNK: usize = if cfg!(test) { 3 } else { MAX_SORTED_ROWS };

/// Merged rows, in the order in which they were first added.
#[derive(Debug)]
pub struct AdvancedRows {
    chunks: std::vec::IntoIter<Vec<AdvancedRow>>,
    chunk: std::vec::IntoIter<AdvancedRow>,
    left: usize,
}

impl Iterator for AdvancedRows {
    type Item = AdvancedRow;

    fn next(&mut self) -> Option<AdvancedRow> {
        loop {
            if let Some(row) = self.chunk.next() {
                self.left -= 1;
                return Some(row);
            }
            self.chunk = self.chunks.next()?.into_iter();
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for AdvancedRows {}

impl From<Vec<AdvancedRow>> for AdvancedRows {
    fn from(rows: Vec<AdvancedRow>) -> AdvancedRows {
        let left = rows.len();
        AdvancedRows { chunks: Vec::new().into_iter(), chunk: rows.into_iter(), left }
    }
}

impl RowDeltas {
    /// Adds one query's delta. Deltas of a query must be added in the order of its advances.
    /// `row`: contents after, if the query still has the row.
    pub fn add(&mut self, id: &Arc<RowIdentity>, change: CountChange, row: Option<&RowRef>) {
        self.merge(id, change, row).by_advance = true;
    }

    /// Adds a row of a query that comes (from 0) or goes (to 0) with this update; `row` as it is
    /// now. To be called after the deltas of all advances were added.
    pub fn add_whole(&mut self, id: &Arc<RowIdentity>, change: CountChange, row: &RowRef) {
        self.merge(id, change, Some(row));
    }

    fn merge(
        &mut self,
        id: &Arc<RowIdentity>,
        change: CountChange,
        row: Option<&RowRef>,
    ) -> &mut AdvancedRow {
        let next = self.at.len();
        let at = *self.at.get_or_insert_with(id.clone(), || next);
        if at == next {
            self.push(AdvancedRow::of(id.clone()));
        }
        let merged = &mut self.chunks[at / CHUNK][at % CHUNK];
        match merged.counts.iter_mut().find(|c| c.query == change.query) {
            Some(known) => known.after = change.after,
            None => merged.counts.push(change),
        }
        if let Some(row) = row
            && merged.row.as_ref().is_none_or(|known| known.version <= row.version)
        {
            merged.row = Some(row.clone());
        }
        merged
    }

    /// What was added of a row.
    pub fn get(&self, id: &RowIdentity) -> Option<&AdvancedRow> {
        self.at.get(id).map(|at| &self.chunks[at / CHUNK][at % CHUNK])
    }

    /// Takes everything of a query back. It looks at all rows.
    pub fn forget(&mut self, query: &QueryHash) {
        for mut row in std::mem::take(self).into_rows() {
            row.counts.retain(|c| c.query != *query);
            if row.counts.is_empty() {
                continue;
            }
            self.at.insert(row.id.clone(), self.at.len());
            self.push(row);
        }
    }

    fn push(&mut self, row: AdvancedRow) {
        match self.chunks.last_mut().filter(|chunk| chunk.len() < CHUNK) {
            Some(chunk) => chunk.push(row),
            None => self.chunks.push(vec![row]),
        }
    }

    /// How many rows were added.
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// Nothing was added.
    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    /// The rows in the order in which they were first added, for answering `others`.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut AdvancedRow> {
        self.chunks.iter_mut().flatten()
    }

    /// The rows.
    pub fn into_rows(self) -> AdvancedRows {
        self.into_rows_leaving(&mut Waste::default())
    }

    /// The rows; what found them is left behind.
    pub(crate) fn into_rows_leaving(self, waste: &mut Waste) -> AdvancedRows {
        let left = self.at.len();
        waste.rows(self.at);
        let chunk = Vec::new().into_iter();
        AdvancedRows { chunks: self.chunks.into_iter(), chunk, left }
    }

    /// All of it is left behind.
    pub(crate) fn discard(self, waste: &mut Waste) {
        waste.pieces(self.chunks, Vec::len);
        waste.rows(self.at);
    }
}

impl QueryUpdater {
    /// Takes the net deltas of the group's queries from `since` (the engine version up to which
    /// the group had got everything) to this update's state, and the rows of queries that
    /// [`QueryUpdater::track_queries`] named: executed for the first time, or removed. Not to be
    /// mixed with [`QueryUpdater::received`].
    ///
    /// # Errors
    /// [`UpdateError::VersionNotBumped`] if this update's state is the CVR's.
    pub fn advanced(
        &mut self,
        rows: impl IntoIterator<Item = AdvancedRow>,
        since: &StateVersion,
    ) -> Result<Vec<VersionedPatch>, UpdateError> {
        let to_version = self.new_version()?;
        let mut patches = Vec::new();
        for row in rows {
            let others = row.needs_others() && row.others;
            let before = others || row.counts.iter().any(|c| c.before > 0);
            let after = others || row.counts.iter().any(|c| c.after > 0);
            let changed = row.row.as_ref().filter(|r| r.version > *since);
            let patch = match (before, after) {
                (false, false) => None,
                (true, false) => Some(Patch::RowDel(row.id.clone())),
                (false, true) => row.row.clone().map(|r| Patch::RowPut(row.id.clone(), r)),
                (true, true) => changed.map(|r| Patch::RowPut(row.id.clone(), r.clone())),
            };
            let entered = row.counts.iter().any(|c| c.after > c.before);
            let change = match (before, after) {
                (false, false) => continue,
                (true, false) => RowChange::Tombstone {
                    row_version: row.row.as_ref().map(|r| r.version.clone()),
                    patch_version: to_version.clone(),
                },
                (false, true) => match &row.row {
                    Some(r) => RowChange::Put {
                        row_version: r.version.clone(),
                        patch_version: to_version.clone(),
                        ref_counts: counts_after(&row).filter(|(_, n)| *n != 0).collect(),
                    },
                    None => return Err(UpdateError::RowWithoutContents(row.id.to_string())),
                },
                (true, true) => RowChange::Adjust {
                    counts: counts_after(&row).collect(),
                    // A row that only left a query (a window, say) comes without contents: its
                    // record gets the new patch version, its row version stays (checklist 59).
                    row_version: row
                        .row
                        .as_ref()
                        .filter(|_| entered || changed.is_some() || !row.by_advance)
                        .map(|r| r.version.clone()),
                    patch_version: to_version.clone(),
                    keep_patch_version: changed.is_none() && (entered || !row.by_advance),
                },
            };
            self.write_unread_row(row.id, change);
            patches.extend(
                patch.map(|patch| VersionedPatch { patch, to_version: to_version.clone() }),
            );
        }
        Ok(patches)
    }
}

fn counts_after(row: &AdvancedRow) -> impl Iterator<Item = (QueryHash, i64)> {
    row.counts.iter().map(|c| (c.query.clone(), c.after))
}

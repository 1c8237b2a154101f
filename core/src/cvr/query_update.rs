//! Changes of a group's results: queries executed and removed, rows (spec: view-syncer-cvr §3.2).
//!
//! Two ways in:
//! - **queries added or removed**: [`QueryUpdater::track_queries`], then
//!   [`QueryUpdater::received`] any number of times, then
//!   [`QueryUpdater::delete_unreferenced_rows`]. It needs the records of all rows that mention a
//!   touched query, and of every row received; they are passed in as [`RowRecords`].
//! - **plain advancement** of a group at the head: `advanced` (see [`super::advance`]), which
//!   needs no record.
//!
//! Then [`QueryUpdater::finish`].

use std::collections::{BTreeMap, BTreeSet, hash_map};
use std::hash::BuildHasher;
use std::sync::Arc;

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::config_update::stamp;
use super::store::{ExecutedWrite, QueryWrite, RowChange, RowWrite};
use super::{
    Cvr, FlushTimes, GroupFlush, Patch, PreparedFlush, QueryHash, RefCounts, RowIdentity,
    RowRecord, UpdateError, VersionedPatch, merge_ref_counts,
};
use crate::row::RowRef;
use crate::version::{CvrVersion, StateVersion};
use crate::waste::Waste;

/// Row writes of an update that are put in order: a millisecond.
pub(crate) const MAX_SORTED_ROWS: usize = 2_000;

/// A query that is executed now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// The query.
    pub id: QueryHash,
    /// Hash of the AST that is executed.
    pub transformation_hash: Arc<str>,
}

/// A row as executed queries gave it: one entry per row of a batch.
#[derive(Debug, Clone)]
pub struct ReceivedRow {
    /// The row.
    pub id: Arc<RowIdentity>,
    /// Its contents; absent if it only left queries.
    pub row: Option<RowRef>,
    /// By how much its counts change; the whole counts for queries just executed.
    pub counts: RefCounts,
}

/// Live row records fetched from the store for an update. Several small tables: one that has to
/// hash a million records anew would take long.
#[derive(Debug, Clone, Default)]
pub struct RowRecords(Vec<RecordTable>);

type RecordTable = FxHashMap<Arc<RowIdentity>, RowRecord>;

const TABLE_BITS: u32 = 7;

fn table_of(id: &RowIdentity) -> usize {
    let mixed = FxBuildHasher.hash_one(id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (u64::BITS - TABLE_BITS)) as usize
}

impl RowRecords {
    /// The records; tombstones are left out, a row that returns counts as new.
    pub fn new(records: impl IntoIterator<Item = RowRecord>) -> RowRecords {
        let mut found = RowRecords::default();
        found.extend(records);
        found
    }

    /// Adds records.
    pub fn extend(&mut self, records: impl IntoIterator<Item = RowRecord>) {
        for record in records.into_iter().filter(|r| r.ref_counts.is_some()) {
            if self.0.is_empty() {
                self.0.resize_with(1 << TABLE_BITS, RecordTable::default);
            }
            self.0[table_of(&record.id)].insert(record.id.clone(), record);
        }
    }

    /// The live record of a row.
    pub fn get(&self, id: &RowIdentity) -> Option<&RowRecord> {
        let table = if self.0.is_empty() { None } else { self.0.get(table_of(id)) };
        table?.get(id)
    }

    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &RowRecord> {
        self.0.iter().flat_map(RecordTable::values)
    }

    /// All of them, to be taken slice by slice.
    pub fn into_slices(self) -> RecordSlices {
        RecordSlices(self.0)
    }
}

/// Records that are looked through slice by slice.
#[derive(Debug)]
pub struct RecordSlices(Vec<RecordTable>);

impl RecordSlices {
    /// About `count` records, at least one unless there are none left.
    pub fn take(&mut self, count: usize) -> Vec<RowRecord> {
        let mut taken = Vec::new();
        while taken.len() < count.max(1)
            && let Some(table) = self.0.pop()
        {
            taken.extend(table.into_values());
        }
        taken
    }

    /// None are left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those that are left are left behind.
    pub fn discard(self, waste: &mut Waste) {
        waste.pieces(self.0, RecordTable::len);
    }
}

impl<'r> IntoIterator for &'r RowRecords {
    type Item = &'r RowRecord;
    type IntoIter = Box<dyn Iterator<Item = &'r RowRecord> + 'r>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

/// Row changes of an update, to be handed back slice by slice.
pub type RowChanges = hash_map::IntoIter<Arc<RowIdentity>, Option<RowChange>>;

/// What was last sent about a row in this update.
#[derive(Debug)]
struct Sent {
    /// `None`: a `del`.
    row_version: Option<StateVersion>,
    to_version: CvrVersion,
}

/// Collects one change of results. Drop it to undo everything.
#[derive(Debug)]
pub struct QueryUpdater {
    orig: CvrVersion,
    orig_stored: bool,
    pub(super) cvr: Cvr,
    queries: BTreeMap<QueryHash, QueryWrite>,
    touched: BTreeSet<QueryHash>,
    received: FxHashMap<Arc<RowIdentity>, Option<RefCounts>>,
    sent: FxHashMap<Arc<RowIdentity>, Sent>,
    /// Pending writes; `None` for a row whose record stays as it is.
    rows: FxHashMap<Arc<RowIdentity>, Option<RowChange>>,
    /// Settled writes, of records that were not read among them; other rows than those in `rows`.
    settled: Vec<RowWrite>,
}

impl QueryUpdater {
    /// Starts an update of `cvr` by results at `state` of a replica of `replica_version`.
    ///
    /// # Errors
    /// [`UpdateError::OlderReplica`], [`UpdateError::ReplicaBehind`].
    pub fn new(
        cvr: &Cvr,
        state: &StateVersion,
        replica_version: &StateVersion,
    ) -> Result<QueryUpdater, UpdateError> {
        if let Some(known) = cvr.replica_version.as_ref().filter(|known| *known > replica_version) {
            return Err(UpdateError::OlderReplica {
                cvr: known.to_string(),
                replica: replica_version.to_string(),
            });
        }
        if *state < cvr.version.state {
            return Err(UpdateError::ReplicaBehind {
                cvr: cvr.version.cookie(),
                state: state.to_string(),
            });
        }
        let orig = cvr.version.clone();
        let mut cvr = cvr.clone();
        let orig_stored = cvr.stored;
        if *state > orig.state {
            cvr.version = CvrVersion { state: state.clone(), config: 0 };
        }
        cvr.replica_version = Some(replica_version.clone());
        Ok(QueryUpdater {
            orig,
            orig_stored,
            cvr,
            queries: BTreeMap::new(),
            touched: BTreeSet::new(),
            received: FxHashMap::default(),
            sent: FxHashMap::default(),
            rows: FxHashMap::default(),
            settled: Vec::new(),
        })
    }

    /// Makes room for so many rows, so that nothing has to be moved on the way.
    pub fn reserve(&mut self, received: usize, advanced: usize) {
        self.received.reserve(received);
        self.sent.reserve(received);
        self.rows.reserve(received);
        self.settled.reserve(advanced);
    }

    /// The snapshot as changed so far.
    pub fn cvr(&self) -> &Cvr {
        &self.cvr
    }

    /// The version of this update. Final after [`QueryUpdater::track_queries`]: a poke may start.
    pub fn version(&self) -> &CvrVersion {
        &self.cvr.version
    }

    /// Makes sure that the version is a new one. To be called before
    /// [`QueryUpdater::track_queries`] if an already got query is executed again with the same
    /// hash and nothing else bumps the version (spec §5.6).
    pub fn ensure_new_version(&mut self) -> CvrVersion {
        if self.cvr.version == self.orig {
            self.cvr.version = self.orig.one_after();
        }
        self.cvr.version.clone()
    }

    /// The version, which must be new.
    pub(super) fn new_version(&self) -> Result<CvrVersion, UpdateError> {
        if self.cvr.version > self.orig {
            return Ok(self.cvr.version.clone());
        }
        Err(UpdateError::VersionNotBumped {
            orig: self.orig.cookie(),
            current: self.cvr.version.cookie(),
        })
    }

    /// Declares which queries are executed and which are removed, each at most once over both
    /// lists. The patches go to the got set.
    ///
    /// # Errors
    /// [`UpdateError::UnknownQuery`] for a query that the CVR does not hold or that is named
    /// twice; [`UpdateError::ReservedQuery`] for the removal of an internal one.
    pub fn track_queries(
        &mut self,
        executed: &[Executed],
        removed: &[QueryHash],
    ) -> Result<Vec<VersionedPatch>, UpdateError> {
        let mut patches = Vec::new();
        for query in executed {
            self.touch(&query.id)?;
            patches.extend(self.track_executed(query)?);
        }
        for id in removed {
            self.touch(id)?;
            if self.cvr.query(id).is_some_and(|q| q.is_internal()) {
                return Err(UpdateError::ReservedQuery(id.clone()));
            }
            let version = self.ensure_new_version();
            Arc::make_mut(&mut self.cvr.queries).remove(id);
            let write = QueryWrite::Removed { id: id.clone(), patch_version: version };
            self.queries.insert(id.clone(), write);
            patches.push(Patch::GotDel(id.clone()));
        }
        let to_version = self.cvr.version.clone();
        Ok(patches
            .into_iter()
            .map(|patch| VersionedPatch { patch, to_version: to_version.clone() })
            .collect())
    }

    fn touch(&mut self, id: &QueryHash) -> Result<(), UpdateError> {
        if self.cvr.queries.contains_key(id) && self.touched.insert(id.clone()) {
            Ok(())
        } else {
            Err(UpdateError::UnknownQuery(id.clone()))
        }
    }

    fn track_executed(&mut self, executed: &Executed) -> Result<Option<Patch>, UpdateError> {
        let unknown = || UpdateError::UnknownQuery(executed.id.clone());
        let query = self.cvr.query(&executed.id).ok_or_else(unknown)?;
        if query.transformation_hash.as_ref() == Some(&executed.transformation_hash) {
            return Ok(None);
        }
        let version = self.ensure_new_version();
        let query = self.cvr.query_mut(&executed.id).ok_or_else(unknown)?;
        let mut patch = None;
        if !query.is_internal() && query.patch_version.is_none() {
            query.patch_version = Some(version.clone());
            patch = Some(Patch::GotPut(query.id.clone()));
        }
        query.transformation_hash = Some(executed.transformation_hash.clone());
        query.transformation_version = Some(version.clone());
        let write = QueryWrite::Partial {
            id: query.id.clone(),
            executed: Some(ExecutedWrite {
                patch_version: query.patch_version.clone(),
                transformation_hash: executed.transformation_hash.clone(),
                transformation_version: version,
            }),
            signature: None,
        };
        self.queries.insert(executed.id.clone(), write);
        Ok(patch)
    }

    /// The queries declared by [`QueryUpdater::track_queries`]: the records of all rows that
    /// mention one of them are needed, unless the CVR [has none](Cvr::may_have_rows).
    pub fn touched(&self) -> &BTreeSet<QueryHash> {
        &self.touched
    }

    /// Takes rows of executed queries. `records` holds what the store has of these rows and never
    /// sees this update's own writes.
    ///
    /// Puts of rows that the group had already carry their old version: clients at the head skip
    /// them, late clients need them (spec trap T5).
    ///
    /// # Errors
    /// [`UpdateError::VersionNotBumped`].
    pub fn received(
        &mut self,
        rows: impl IntoIterator<Item = ReceivedRow>,
        records: &RowRecords,
    ) -> Result<Vec<VersionedPatch>, UpdateError> {
        let mut patches = Vec::new();
        for row in rows {
            patches.extend(self.receive(row, records)?);
        }
        Ok(patches)
    }

    fn receive(
        &mut self,
        update: ReceivedRow,
        records: &RowRecords,
    ) -> Result<Option<VersionedPatch>, UpdateError> {
        let existing = records.get(&update.id);
        let previous = self.received.get(&update.id);
        let merged = match previous {
            Some(previous) => merge_ref_counts(previous.as_ref(), Some(&update.counts), |_| false),
            None => {
                let known = existing.and_then(|r| r.ref_counts.as_ref());
                merge_ref_counts(known, Some(&update.counts), |q| self.touched.contains(q))
            }
        };
        let was_there = existing.is_some() || matches!(previous, Some(Some(_)));
        self.received.insert(update.id.clone(), merged.clone());

        let version = update.row.as_ref().map(|r| &r.version);
        let unchanged = existing
            .filter(|e| merged.is_some() && version == Some(&e.row_version))
            .map(|e| e.patch_version.clone());
        let patch_version = match unchanged {
            Some(version) => version,
            None => self.new_version()?,
        };
        let row_version = version.or(existing.map(|e| &e.row_version)).cloned();
        self.write_row(&update.id, existing, row_version, &patch_version, merged.as_ref());

        let sent = self.sent.get(&update.id);
        let to_version =
            sent.map_or(patch_version.clone(), |s| s.to_version.clone().max(patch_version));
        let patch = if merged.is_none() {
            let deleted = sent.is_some_and(|s| s.row_version.is_none());
            if !was_there || deleted {
                return Ok(None);
            }
            let sent = Sent { row_version: None, to_version: to_version.clone() };
            self.sent.insert(update.id.clone(), sent);
            Patch::RowDel(update.id)
        } else {
            let Some(row) = update.row else { return Ok(None) };
            if sent.is_some_and(|s| s.row_version.as_ref().is_some_and(|v| *v >= row.version)) {
                return Ok(None);
            }
            let sent =
                Sent { row_version: Some(row.version.clone()), to_version: to_version.clone() };
            self.sent.insert(update.id.clone(), sent);
            Patch::RowPut(update.id, row)
        };
        Ok(Some(VersionedPatch { patch, to_version }))
    }

    /// Queues what becomes of a row's record, unless that is what it is already. Without a row
    /// version the row came and went within this update.
    fn write_row(
        &mut self,
        id: &Arc<RowIdentity>,
        existing: Option<&RowRecord>,
        row_version: Option<StateVersion>,
        patch_version: &CvrVersion,
        ref_counts: Option<&RefCounts>,
    ) {
        let patch_version = patch_version.clone();
        let change = match (row_version, ref_counts, existing) {
            (None, ..) | (_, None, None) => None,
            (row_version, None, Some(_)) => {
                Some(RowChange::Tombstone { row_version, patch_version })
            }
            (Some(row_version), Some(counts), existing) => {
                let same = existing.is_some_and(|e| {
                    e.row_version == row_version
                        && e.patch_version == patch_version
                        && e.ref_counts.as_ref() == Some(counts)
                });
                let ref_counts = counts.clone();
                (!same).then_some(RowChange::Put { row_version, patch_version, ref_counts })
            }
        };
        self.rows.insert(id.clone(), change);
    }

    /// Queues a change of a record that was not read; at most one per row.
    pub(super) fn write_unread_row(&mut self, id: Arc<RowIdentity>, change: RowChange) {
        self.settled.push(RowWrite { id, change });
    }

    /// After everything was received: the touched queries' references of rows that did not come
    /// again are gone, and with them rows that nothing else references. `records` must be every
    /// live row that mentions a touched query, at once or in several calls.
    ///
    /// # Errors
    /// [`UpdateError::VersionNotBumped`].
    pub fn delete_unreferenced_rows<'r>(
        &mut self,
        records: impl IntoIterator<Item = &'r RowRecord>,
    ) -> Result<Vec<VersionedPatch>, UpdateError> {
        let mut patches = Vec::new();
        if self.touched.is_empty() {
            return Ok(patches);
        }
        for record in records {
            let Some(counts) = &record.ref_counts else { continue };
            // What was received is final: it took all references of the record into account.
            let came_again = self.received.contains_key(&record.id);
            if came_again || !counts.iter().any(|(q, _)| self.touched.contains(q)) {
                continue;
            }
            let left = merge_ref_counts(Some(counts), None, |q| self.touched.contains(q));
            let row_version = Some(record.row_version.clone());
            if left.is_some() {
                let patch_version = &record.patch_version;
                self.write_row(&record.id, Some(record), row_version, patch_version, left.as_ref());
                continue;
            }
            let version = self.new_version()?;
            self.write_row(&record.id, Some(record), row_version, &version, None);
            let sent = self.sent.get(&record.id);
            if sent.is_some_and(|s| s.row_version.is_none()) {
                continue;
            }
            let to_version = sent.map_or(version.clone(), |s| s.to_version.clone().max(version));
            let patch = Patch::RowDel(record.id.clone());
            patches.push(VersionedPatch { patch, to_version });
        }
        Ok(patches)
    }

    /// The flush of what was collected; `None` if that is nothing, and the old snapshot (with the
    /// old version) stays.
    ///
    /// `signature_of` gives the row-set signature of a query that runs (0 for an empty result),
    /// `None` for one that does not.
    pub fn finish(
        self,
        times: FlushTimes,
        signature_of: impl Fn(&QueryHash) -> Option<u64>,
    ) -> Option<PreparedFlush> {
        self.finish_leaving(times, signature_of, &mut Waste::default())
    }

    /// The changes of rows that were received: a large update gives them back slice by slice
    /// ([`QueryUpdater::put_row_changes`]) before it is finished.
    pub fn take_row_changes(&mut self) -> RowChanges {
        std::mem::take(&mut self.rows).into_iter()
    }

    /// Takes some of [`QueryUpdater::take_row_changes`] back.
    pub fn put_row_changes(
        &mut self,
        changes: impl IntoIterator<Item = (Arc<RowIdentity>, Option<RowChange>)>,
    ) {
        let writes = changes.into_iter();
        self.settled
            .extend(writes.filter_map(|(id, change)| Some(RowWrite { id, change: change? })));
    }

    /// As [`QueryUpdater::finish`]; what the update had to remember is left behind.
    pub fn finish_leaving(
        mut self,
        times: FlushTimes,
        signature_of: impl Fn(&QueryHash) -> Option<u64>,
        waste: &mut Waste,
    ) -> Option<PreparedFlush> {
        self.write_signatures(signature_of);
        let changes = self.take_row_changes();
        self.put_row_changes(changes);
        waste.rows(std::mem::take(&mut self.received));
        waste.rows(std::mem::take(&mut self.sent));
        self.prepared(times)
    }

    /// The update is undone, and left behind.
    pub fn discard(self, waste: &mut Waste) {
        waste.rows(self.received);
        waste.rows(self.sent);
        waste.rows(self.rows);
        waste.rows(self.settled);
    }

    fn prepared(mut self, times: FlushTimes) -> Option<PreparedFlush> {
        let mut rows = std::mem::take(&mut self.settled);
        if self.orig_stored && self.queries.is_empty() && rows.is_empty() {
            return None;
        }
        // Neighbours in an index are written together. Not for many rows, it would take long.
        // (No two servers wait for each other's rows: whoever writes rows of a group has locked
        // its `rowsVersion` before.)
        if rows.len() <= MAX_SORTED_ROWS {
            rows.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        }
        let instance = stamp(&mut self.cvr, times);
        let flush = GroupFlush {
            group: self.cvr.id.clone(),
            expected: self.orig,
            connect_ms: times.connect_ms,
            instance,
            clients: Vec::new(),
            queries: self.queries.into_values().collect(),
            desires: Vec::new(),
            rows,
        };
        Some(PreparedFlush { flush, cvr: self.cvr })
    }

    /// Queues the signatures that changed (absent counts as 0). A query executed in this update
    /// gets one in any case, so that a later server can attach to it without executing it again.
    fn write_signatures(&mut self, signature_of: impl Fn(&QueryHash) -> Option<u64>) {
        let changed: Vec<_> = self
            .cvr
            .queries
            .values()
            .filter_map(|q| {
                let new = signature_of(&q.id)?;
                let written = self.queries.contains_key(&q.id);
                let keep = q.signature == Some(new) || (q.signature.is_none() && new == 0);
                (!keep || (written && q.signature.is_none())).then(|| (q.id.clone(), new))
            })
            .collect();
        for (id, new) in changed {
            if let Some(query) = self.cvr.query_mut(&id) {
                query.signature = Some(new);
            }
            let write = self.queries.entry(id.clone()).or_insert(QueryWrite::Partial {
                id,
                executed: None,
                signature: None,
            });
            if let QueryWrite::Partial { signature, .. } = write {
                *signature = Some(new);
            }
        }
    }
}

//! What a CVR store is asked, and what it answers. The stores themselves live in
//! `zeroring-storage`; the group state machine speaks these types only.

use std::sync::Arc;

use super::{
    ClientGroupId, ClientId, ClientSchema, Cvr, Query, QueryHash, RefCounts, RowIdentity,
    RowRecord, TtlClock,
};
use crate::version::{CvrVersion, StateVersion};

/// Wall and group time of a flush.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlushTimes {
    /// Latest connection to the group on this server, ms since the Unix epoch: who has the later
    /// one owns the group.
    pub connect_ms: f64,
    /// Wall time now, ms since the Unix epoch.
    pub now_ms: f64,
    /// The group's clock now.
    pub ttl_clock: TtlClock,
}

/// An update that is not yet durable: send `flush` to the store; when it has committed, adopt
/// `cvr` as the group's snapshot. On any other verdict drop both.
#[derive(Debug, Clone)]
pub struct PreparedFlush {
    /// For the store.
    pub flush: GroupFlush,
    /// The snapshot after it.
    pub cvr: Cvr,
}

/// All writes of one group's update. All or nothing; at most one per group in a batch.
#[derive(Debug, Clone)]
pub struct GroupFlush {
    /// The group.
    pub group: ClientGroupId,
    /// Version of the snapshot that the update started from; `00` for a group never flushed.
    pub expected: CvrVersion,
    /// Ours, see [`FlushTimes::connect_ms`].
    pub connect_ms: f64,
    /// The group's own record; always written.
    pub instance: InstanceWrite,
    /// Clients that came and went, in this order.
    pub clients: Vec<ClientWrite>,
    /// At most one per query.
    pub queries: Vec<QueryWrite>,
    /// At most one per client and query.
    pub desires: Vec<DesireWrite>,
    /// At most one per row.
    pub rows: Vec<RowWrite>,
}

/// The group's record.
#[derive(Debug, Clone, PartialEq)]
pub struct InstanceWrite {
    /// The new version (equal to the expected one if only unversioned fields changed).
    pub version: CvrVersion,
    /// Wall time, ms since the Unix epoch.
    pub last_active_ms: f64,
    /// The group's clock.
    pub ttl_clock: TtlClock,
    /// See [`Cvr::replica_version`].
    pub replica_version: Option<StateVersion>,
    /// See [`Cvr::client_schema`].
    pub client_schema: Option<Arc<ClientSchema>>,
    /// See [`Cvr::profile_id`].
    pub profile_id: Option<Arc<str>>,
}

/// A client joined or left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientWrite {
    /// Joined; it was not there.
    Insert(ClientId),
    /// Left. Its desires stay.
    Delete(ClientId),
}

/// A query's record.
#[derive(Debug, Clone, PartialEq)]
pub enum QueryWrite {
    /// Replaces the whole record (not deleted). Client states are written as desires.
    Full(Arc<Query>),
    /// The query was executed with another transformation, and/or has another signature.
    Partial {
        /// The query.
        id: QueryHash,
        /// The execution, if it is new.
        executed: Option<ExecutedWrite>,
        /// The signature, if it changed.
        signature: Option<u64>,
    },
    /// The query left the got set: marked deleted, its transformation is cleared, the signature
    /// stays.
    Removed {
        /// The query.
        id: QueryHash,
        /// Version of the removal.
        patch_version: CvrVersion,
    },
}

/// A query's execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutedWrite {
    /// When it entered the got set; `None` for internal queries.
    pub patch_version: Option<CvrVersion>,
    /// Hash of the executed AST.
    pub transformation_hash: Arc<str>,
    /// Version of this update.
    pub transformation_version: CvrVersion,
}

/// A client's interest in a query (spec §2.5 has the four combinations).
#[derive(Debug, Clone, PartialEq)]
pub struct DesireWrite {
    /// Who.
    pub client: ClientId,
    /// What.
    pub query: QueryHash,
    /// Version of the change.
    pub patch_version: CvrVersion,
    /// No longer desired.
    pub deleted: bool,
    /// Clamped, ms.
    pub ttl_ms: f64,
    /// When the client let go of it, if its TTL runs.
    pub inactivated_at: Option<TtlClock>,
}

/// A row record.
#[derive(Debug, Clone, PartialEq)]
pub struct RowWrite {
    /// The row.
    pub id: Arc<RowIdentity>,
    /// What becomes of its record.
    pub change: RowChange,
}

/// What becomes of a row record. "Live" = has reference counts, i.e. is no tombstone.
#[derive(Debug, Clone, PartialEq)]
pub enum RowChange {
    /// The record is exactly this.
    Put {
        /// Version of the row.
        row_version: StateVersion,
        /// Version of the change.
        patch_version: CvrVersion,
        /// All references.
        ref_counts: RefCounts,
    },
    /// The record becomes a tombstone.
    Tombstone {
        /// Version of the row; `None` leaves the stored one alone.
        row_version: Option<StateVersion>,
        /// Version of the removal.
        patch_version: CvrVersion,
    },
    /// No record is left.
    Delete,
    /// The live record is adjusted without having been read: the plain advancement of a group at
    /// the head. Other queries' references stay. (If there is no live record, the store makes one
    /// of what it got and counts an anomaly.)
    Adjust {
        /// New counts of these queries; 0 removes the entry.
        counts: RefCounts,
        /// Version of the row; `None` leaves the stored one alone.
        row_version: Option<StateVersion>,
        /// Version of this update.
        patch_version: CvrVersion,
        /// Leave the stored patch version alone if the stored row version is this `row_version`:
        /// one more query references a row that the clients have already.
        keep_patch_version: bool,
    },
}

/// A loaded group.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Its snapshot; [`Cvr::stored`] is false if the store does not know the group.
    pub cvr: Cvr,
    /// The server that owned it before, if another did.
    pub taken_over_from: Option<Arc<str>>,
    /// This server owned it already.
    pub own: bool,
}

impl Loaded {
    /// A group that no other server has had.
    pub fn new(cvr: Cvr) -> Loaded {
        Loaded { cvr, taken_over_from: None, own: true }
    }
}

/// What the store did for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flushed {
    /// Row records written.
    pub rows: usize,
    /// Adjusted rows that had no live record: 0 unless CVR and engine disagree. (Not known of rows
    /// that follow.)
    pub anomalies: usize,
    /// Everything but the rows is durable; they are being written. Until they are, reads of the
    /// group's rows wait, and if this server dies the group is lost: its clients start afresh.
    pub rows_follow: bool,
}

/// Which patches a late client misses: `after < patch version ≤ up_to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatchupRange {
    /// The group.
    pub group: ClientGroupId,
    /// Lowest base version of its clients; `None` from the beginning.
    pub after: Option<CvrVersion>,
    /// Version of the snapshot before the update that the poke belongs to.
    pub up_to: CvrVersion,
    /// The group's version now; anything else in the store is a concurrent modification.
    pub current: CvrVersion,
}

impl CatchupRange {
    /// Nobody is late: the store need not be asked.
    pub fn is_empty(&self) -> bool {
        self.after.as_ref().is_some_and(|after| *after >= self.up_to)
    }

    /// A patch of this version is missing. Structural: text order differs (spec trap T3).
    pub fn contains(&self, version: &CvrVersion) -> bool {
        self.after.as_ref().is_none_or(|after| version > after) && *version <= self.up_to
    }
}

/// One page of a lookup of row records.
#[derive(Debug, Clone, Default)]
pub struct RowPage {
    /// Records.
    pub rows: Vec<RowRecord>,
    /// Where to go on; `None` at the end.
    pub next: Option<RowCursor>,
}

/// One page of what late clients missed.
#[derive(Debug, Clone, Default)]
pub struct CatchupPage {
    /// All configuration changes in the range, queries before desires; on the first page only.
    pub config: Vec<ConfigChange>,
    /// Row records in the range, tombstones included.
    pub rows: Vec<RowRecord>,
    /// Where to go on; `None` at the end.
    pub next: Option<RowCursor>,
}

/// Where a row scan goes on: the last row of the page before, in the store's own order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowCursor(pub String);

/// A configuration change that a late client missed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigChange {
    /// A query entered or left the got set.
    Got {
        /// The query.
        query: QueryHash,
        /// It left.
        deleted: bool,
        /// When.
        patch_version: CvrVersion,
    },
    /// A client's interest changed.
    Desire {
        /// Who.
        client: ClientId,
        /// What.
        query: QueryHash,
        /// It ended.
        deleted: bool,
        /// When.
        patch_version: CvrVersion,
    },
}

/// One line of the inspector's list of queries (spec §2.9).
#[derive(Debug, Clone, PartialEq)]
pub struct InspectedQuery {
    /// Who.
    pub client: ClientId,
    /// What.
    pub query: QueryHash,
    /// TTL, ms.
    pub ttl_ms: f64,
    /// When the client let go of it.
    pub inactivated_at: Option<TtlClock>,
    /// Rows that the query references.
    pub rows: u64,
    /// Stored AST (client and internal queries).
    pub ast: Option<super::Ast>,
    /// In the got set.
    pub got: bool,
    /// The desire is marked deleted.
    pub deleted: bool,
    /// Name of a custom query.
    pub name: Option<Arc<str>>,
    /// Its arguments, JSON text.
    pub args: Option<Arc<str>>,
}

/// What a purge round found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Purged {
    /// Groups that became tombstones.
    pub groups: usize,
    /// Tombstones forgotten.
    pub tombstones: usize,
    /// Inactive groups that are left.
    pub remaining: usize,
}

/// Why a store refuses or fails (spec §2.12). Every variant but `Storage`, `Overloaded` and
/// `Closed` concerns one group only; after any of them its snapshot must be dropped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CvrStoreError {
    /// The group is unknown to us for good; its clients start afresh (wire: `ClientNotFound`).
    #[error("{0}")]
    ClientNotFound(String),
    /// Another server has a later connection (wire: `Rehome`, `maxBackoffMs: 0`).
    #[error("CVR ownership was transferred to {owner} at {} (last connect time: {})",
        iso_time(*granted_ms), iso_time(*connect_ms))]
    Ownership {
        /// The other server's task id.
        owner: Arc<str>,
        /// Its connection, ms since the Unix epoch.
        granted_ms: f64,
        /// Ours.
        connect_ms: f64,
    },
    /// Somebody else changed the group (wire: `Rehome`).
    #[error("CVR has been concurrently modified. Expected {expected}, got {actual}")]
    ConcurrentModification {
        /// Cookie of our snapshot.
        expected: String,
        /// Cookie in the store.
        actual: String,
    },
    /// The stored client schema is unusable (wire: `SchemaVersionNotSupported`).
    #[error("Could not parse clientSchema stored in CVR: {0}")]
    InvalidClientSchema(String),
    /// A stored record is unusable (wire: `Internal`).
    #[error("CVR of group {group} is damaged: {what}. Delete the group, its clients will resync.")]
    Damaged {
        /// The group.
        group: ClientGroupId,
        /// What and why.
        what: String,
    },
    /// The store failed; nothing was written (wire: `Internal`).
    #[error("CVR store failed: {0}")]
    Storage(String),
    /// Too many requests wait (wire: `Rehome`).
    #[error("CVR store is overloaded: {0} requests wait")]
    Overloaded(usize),
    /// The store has stopped (wire: `Rehome`).
    #[error("CVR store is shut down")]
    Closed,
}

/// `YYYY-MM-DDTHH:MM:SS.mmmZ`, as JavaScript prints it.
fn iso_time(ms: f64) -> String {
    let ms = ms as i64;
    let (days, in_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    // Civil date from days since 1970-01-01: years begin in March, so the leap day comes last.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (s, milli) = (in_day / 1_000, in_day % 1_000);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{milli:03}Z",
        s / 3_600,
        s / 60 % 60,
        s % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_print_as_javascript_prints_them() {
        for (ms, text) in [
            (0.0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_123.0, "2000-02-29T00:00:00.123Z"),
            (1_794_000_000_000.9, "2026-11-06T21:20:00.000Z"),
            (-1.0, "1969-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(iso_time(ms), text);
        }
    }

    #[test]
    fn ranges_compare_structurally() {
        let v = |s| CvrVersion::parse(s).unwrap();
        let range = CatchupRange {
            group: "g".into(),
            after: Some(v("3abc0:01")),
            up_to: v("3abc0.01"),
            current: v("3abc0.01"),
        };
        assert!(range.contains(&v("3abc0.01")), "as text it is below 3abc0:01");
        assert!(!range.contains(&v("3abc0:01")));
        assert!(!range.is_empty());
        assert!(CatchupRange { after: Some(v("3abc0.01")), ..range.clone() }.is_empty());
        assert!(CatchupRange { after: None, ..range }.contains(&v("00")));
    }
}

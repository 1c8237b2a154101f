//! Where client view records live: durable, shared by all executors of a server.
//!
//! A store is asked by message: every method returns at once, the answer is handed to a
//! [`Reply`] on a thread of the store. The reply must not block; an executor gives one that pushes
//! into its ring. A group has at most one request in flight, so the store orders nothing beyond
//! what it is asked: whatever was answered is visible to later requests.
//!
//! Requests and answers are the types of [`zeroring_core::cvr::store`]. Invariants of every
//! implementation (spec: view-syncer-cvr §2.11):
//! - a flush is all or nothing per group, and durable before its verdict; groups of one batch do
//!   not depend on each other;
//! - it is applied only if nobody with a later connection owns the group, and its stored version
//!   is the expected one (ownership is looked at first);
//! - reads of rows answer only if the group is at the version that the asker believes in.
//!
//! [`embedded`] is one local SQLite file; [`postgres`] the database that originals use too.

mod decode;
pub mod embedded;
pub mod postgres;

use std::sync::Arc;

use zeroring_core::cvr::store::{
    CatchupRange, ConfigChange, CvrStoreError, Flushed, InspectedQuery, Loaded, Purged, RowCursor,
    RowPage,
};
use zeroring_core::cvr::{
    ClientGroupId, ClientId, GroupFlush, QueryHash, RowIdentity, RowRecord, TtlClock,
};
use zeroring_core::version::CvrVersion;

/// Where an answer goes: called once, on a thread of the store. Must not block.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// An answer that may be a refusal or a failure.
pub type Answer<T> = Result<T, CvrStoreError>;

/// What became of one group's flush.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The group.
    pub group: ClientGroupId,
    /// Committed and durable, or nothing was written.
    pub result: Answer<Flushed>,
}

/// One page of a scan for rows that a late client misses.
#[derive(Debug, Clone)]
pub struct RowScan {
    /// Which patches.
    pub range: CatchupRange,
    /// Leave out rows that these queries reference: they were just sent.
    pub without: Vec<QueryHash>,
    /// Go on after this row; `None` from the beginning.
    pub from: Option<RowCursor>,
    /// At most so many records.
    pub limit: usize,
}

/// Which live row records an updater wants.
#[derive(Debug, Clone)]
pub struct RowLookup {
    /// The group.
    pub group: ClientGroupId,
    /// Its version as the asker knows it.
    pub current: CvrVersion,
    /// All rows that mention one of these queries…
    pub queries: Vec<QueryHash>,
    /// …and these rows.
    pub ids: Vec<Arc<RowIdentity>>,
}

/// Limits of a purge round (spec §2.10).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PurgeLimits {
    /// Wall time now, ms since the Unix epoch.
    pub now_ms: f64,
    /// Groups that were not active for so long become tombstones.
    pub inactive_ms: f64,
    /// At most so many groups in this round, the longest inactive first.
    pub batch: usize,
}

impl PurgeLimits {
    /// Tombstones are kept for 31 days, and never shorter than groups.
    pub fn tombstone_ms(&self) -> f64 {
        const MIN_TOMBSTONE_MS: f64 = 31.0 * 24.0 * 3_600_000.0;
        self.inactive_ms.max(MIN_TOMBSTONE_MS)
    }
}

/// A store of client view records. Shared by all executors.
pub trait CvrStore: Send + Sync {
    /// Loads a group; one that is unknown comes back empty. If another server owned it, and its
    /// connection is not later than `connect_ms`, it is ours from now on.
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>);

    /// Writes the updates of several groups, each at most once; one verdict per group, in order.
    fn flush(&self, batch: Vec<GroupFlush>, reply: Reply<Vec<Verdict>>);

    /// Reads live row records (no tombstones), each once, in no particular order.
    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<Vec<RowRecord>>>);

    /// Reads rows that a late client misses, tombstones included.
    fn catchup_rows(&self, scan: RowScan, reply: Reply<Answer<RowPage>>);

    /// Reads changes of queries and desires that a late client misses; those of all clients.
    fn catchup_config(&self, range: CatchupRange, reply: Reply<Answer<Vec<ConfigChange>>>);

    /// Notes the group's clock and that it is alive. No check, no answer; failures are logged.
    fn write_ttl_clock(&self, group: ClientGroupId, clock: TtlClock, now_ms: f64);

    /// Lists the desired queries of a group, or of one of its clients, for the inspector.
    fn inspect(
        &self,
        group: ClientGroupId,
        client: Option<ClientId>,
        clock: TtlClock,
        reply: Reply<Answer<Vec<InspectedQuery>>>,
    );

    /// Makes tombstones of inactive groups and forgets old tombstones.
    fn purge(&self, limits: PurgeLimits, reply: Reply<Answer<Purged>>);
}

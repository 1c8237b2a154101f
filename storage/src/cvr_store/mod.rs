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
//! - reads of rows answer only if the group is at the version that the asker believes in, and its
//!   rows are of that version.
//!
//! *Rows may follow.* The rows of a flush of more than [`MAX_SYNC_ROWS`] are written after its
//! verdict, beside everything else (spec §2.7): the group's clients need not wait for them. So are
//! those of the group's later flushes until none is owed, in order; and those of smaller flushes if
//! many come together ([`MAX_BATCH_SYNC_ROWS`]). Who asks this store for the group or its rows
//! meanwhile waits ([`owed`]); another server sees that the rows are of an older version than the
//! group, and tries again for a while. If this server dies first (within some two seconds,
//! [`RowPace`]), the group is lost, which is safe: its clients start afresh.
//!
//! [`embedded`] is one local SQLite file; [`postgres`] the database that originals use too.

mod coalesce;
mod decode;
pub mod embedded;
mod owed;
pub mod postgres;

use std::sync::Arc;
use std::time::Duration;

use zeroring_core::cvr::store::{
    CatchupPage, CatchupRange, CvrStoreError, Flushed, InspectedQuery, Loaded, Purged, RowCursor,
    RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, QueryHash, RowIdentity, TtlClock};
use zeroring_core::version::CvrVersion;

/// Where an answer goes: called once, on a thread of the store. Must not block.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// Where the verdicts of a batch go: called with all that did not have to wait for somebody else,
/// and again with the rest as it is settled; each group once. Must not block.
pub type Verdicts = Box<dyn FnMut(Vec<Verdict>) + Send>;

/// Rows of a flush that are written with its metadata; of larger ones they follow (spec §2.7).
pub const MAX_SYNC_ROWS: usize = 100;

/// Rows of flushes that are committed together and are written with their metadata; if there are
/// more in all, those of each of the flushes follow, however few. ([`postgres`] only: to the
/// embedded store a row costs a fifth of that, and rows that follow would have the same thread
/// write them.)
pub const MAX_BATCH_SYNC_ROWS: usize = 1_000;

/// Records that are looked at for one page of a lookup or scan. A page may have fewer, and none.
pub const PAGE_ROWS: usize = 2_000;

/// How a store treats rows that follow their metadata. Servers of one database need not agree; the
/// defaults are the original's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowOptions {
    /// Rows of a flush that are written with its metadata: [`MAX_SYNC_ROWS`].
    pub sync_rows: usize,
    /// The same of all flushes of a transaction: [`MAX_BATCH_SYNC_ROWS`].
    pub batch_sync_rows: usize,
    /// When those that follow are written.
    pub pace: RowPace,
    /// Attempts to load a group whose rows another server has still to write (spec §2.5): 10.
    pub load_attempts: usize,
    /// The time between them: 500 ms.
    pub load_delay: Duration,
}

impl Default for RowOptions {
    fn default() -> RowOptions {
        RowOptions {
            sync_rows: MAX_SYNC_ROWS,
            batch_sync_rows: MAX_BATCH_SYNC_ROWS,
            pace: RowPace::default(),
            load_attempts: 10,
            load_delay: Duration::from_millis(500),
        }
    }
}

/// When rows that follow are written, if nobody waits for them: then it is at once. They give way
/// to flushes and reads, and the longer they wait, the more of them coalesce. ([`postgres`] only:
/// the embedded store writes them between its batches.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPace {
    /// If nothing else was asked of the store for so long: 100 ms.
    pub quiet: Duration,
    /// Otherwise when they are so old, with pauses in between: 1 s.
    pub delay: Duration,
    /// When they are so old, without pauses: 2 s. A server that takes the group over waits for
    /// five.
    pub limit: Duration,
}

impl Default for RowPace {
    fn default() -> RowPace {
        RowPace {
            quiet: Duration::from_millis(100),
            delay: Duration::from_secs(1),
            limit: Duration::from_secs(2),
        }
    }
}

/// Another server owes the rows of a group for too long.
fn rows_behind(version: &str, rows: &str) -> CvrStoreError {
    CvrStoreError::ClientNotFound(format!(
        "max attempts exceeded waiting for CVR@{version} to catch up from {rows}"
    ))
}

/// An answer that may be a refusal or a failure.
pub type Answer<T> = Result<T, CvrStoreError>;

/// What became of one group's flush.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Its place in the batch.
    pub at: usize,
    /// The group.
    pub group: ClientGroupId,
    /// Committed and durable, or nothing was written.
    pub result: Answer<Flushed>,
}

/// One page of a scan for what late clients miss.
#[derive(Debug, Clone)]
pub struct CatchupScan {
    /// Which patches.
    pub range: CatchupRange,
    /// Leave out rows that these queries reference: they were just sent.
    pub without: Vec<QueryHash>,
    /// Go on after this row; `None` from the beginning, with the changes of configuration.
    pub from: Option<RowCursor>,
    /// Look at so many records, at most [`PAGE_ROWS`].
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
    /// …and these rows; without queries they come on one page.
    pub ids: Vec<Arc<RowIdentity>>,
    /// Go on after this row; `None` from the beginning.
    pub from: Option<RowCursor>,
    /// Look at so many records, at most [`PAGE_ROWS`].
    pub limit: usize,
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

    /// Writes the updates of several groups, each at most once.
    fn flush(&self, batch: Vec<GroupFlush>, reply: Verdicts);

    /// Answers when no rows of the group are owed any more, or what kept them from being written:
    /// then they never will be.
    fn await_rows(&self, group: ClientGroupId, reply: Reply<Answer<()>>);

    /// From now on rows that follow are written at once: this server is about to hand its groups
    /// over.
    fn hurry(&self) {}

    /// Reads live row records (no tombstones), each once, in the store's order.
    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<RowPage>>);

    /// Reads rows that a late client misses, tombstones included, and changes of queries and
    /// desires, those of all clients.
    fn catch_up(&self, scan: CatchupScan, reply: Reply<Answer<CatchupPage>>);

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

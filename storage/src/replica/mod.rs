//! The SQLite replica: an ordinary SQLite file (plain WAL) with a copy of the published tables.
//!
//! What lives here:
//! - [`schema`]: the internal tables (replica schema version 13 of the original), names and types
//!   of columns, and the file read back as `core::schema::Schema`;
//! - [`types`]: values into and out of SQLite, by column type;
//! - [`initial`]: builds a new file, in a temporary file that is renamed when it is complete;
//! - [`writer`]: the only writer: applies change messages, returns the net [`Commit`]s;
//! - [`reader`], [`snapshot`]: one read-only connection per executor, always on one version;
//! - [`source`], [`sql`]: what the engine reads, as SQL; [`estimate`]: with which side of an EXISTS
//!   it begins; [`scans`]: which indexes are missing;
//! - `patience`, `parts`: how a statement that takes long is given up, and read part by part;
//! - [`analyze`]: keeps SQLite's statistics true while tables grow;
//! - [`checkpoint`]: keeps the WAL small although readers always hold a snapshot;
//! - [`startup`]: is there a usable replica, and if not, why not.
//!
//! Invariants: one writer per file; nobody but the writer checkpoints; a row's `_0_version` is
//! the version of the transaction that last wrote it; a commit's net change equals the difference
//! of the tables before and after it; a file under its final name is complete.
//!
//! Data enters as [`initial::RowBatch`]es and `ChangeMessage`s, and leaves as `Arc<Commit>`s (to
//! the commit bus) and `RowRef`s (to executors).
//!
//! Spec: replication §2, §6.
//!
//! [`Commit`]: zeroring_core::change::Commit

pub mod analyze;
mod apply;
pub mod checkpoint;
mod column;
pub mod error;
pub mod estimate;
pub mod initial;
mod mutant;
mod netting;
mod parts;
mod patience;
mod plan;
pub mod reader;
pub mod scans;
pub mod schema;
pub mod snapshot;
pub mod source;
pub mod sql;
pub mod startup;
pub mod types;
pub mod writer;

pub use error::{ReplicaError, ResetReason};

/// Version of the replica's internal tables that this server writes: that of 1.9.0.
pub const REPLICA_SCHEMA_VERSION: i64 = 13;

/// `minSafeVersion` that is written: 1.9.0 can always take the file back.
pub const MIN_SAFE_VERSION: i64 = 1;

/// Oldest replica schema version that start-up migrates; older files are synced anew.
pub const OLDEST_MIGRATED_VERSION: i64 = 12;

/// Page size of the file (backups expect it).
pub const PAGE_SIZE_BYTES: u32 = 4096;

/// What SQLite appends to the replica's name; removed together with it. `-wal2` is the
/// original's.
pub const FILE_SUFFIXES: [&str; 5] = ["", "-wal", "-wal2", "-shm", "-journal"];

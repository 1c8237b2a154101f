//! Keeps the WAL small although readers always hold a snapshot.
//!
//! SQLite starts its WAL over only at a moment when no reader uses it, and executors always read
//! some snapshot. So the replication core, the only one who checkpoints (autocheckpoint is off on
//! every connection), acts between commits, by the size of the WAL file ([`WalLimits`]):
//!
//! 1. every [`WalLimits::passive_bytes`] of growth, a PASSIVE checkpoint copies what the oldest
//!    snapshot allows into the database file; nobody waits;
//! 2. from [`WalLimits::barrier_bytes`] on, executors are asked ([`ReaderBarrier`]) to give up
//!    their snapshots between two advances; when all have, a TRUNCATE checkpoint empties the WAL,
//!    and they go on. If one does not within [`WalLimits::release_timeout`], the others go on at
//!    once, and it is tried again after some more growth;
//! 3. at [`WalLimits::stop_bytes`] the core must not apply anything ([`WalState::Full`]) until
//!    step 2 succeeds: a stuck reader then costs replication lag (which is visible, and which
//!    Postgres keeps the changes for), never the disk. The WAL therefore stays below this limit
//!    plus one transaction.
//!
//! A reader in another process (somebody's `sqlite3`) is not asked; it only delays step 2 while
//! its transaction is open.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::ReplicaError;
use super::writer::ReplicaWriter;

/// When the WAL is checkpointed.
#[derive(Debug, Clone)]
pub struct WalLimits {
    /// Growth between two PASSIVE checkpoints.
    pub passive_bytes: u64,
    /// Size from which on readers are asked to let go.
    pub barrier_bytes: u64,
    /// Size at which applying stops.
    pub stop_bytes: u64,
    /// How long readers are waited for. Commits wait as long.
    pub release_timeout: Duration,
}

impl Default for WalLimits {
    fn default() -> Self {
        WalLimits {
            passive_bytes: 16 << 20,
            barrier_bytes: 64 << 20,
            stop_bytes: 1 << 30,
            release_timeout: Duration::from_millis(50),
        }
    }
}

/// Everybody who reads the replica.
pub trait ReaderBarrier {
    /// Asks all readers to give up their snapshots and to stay without until
    /// [`ReaderBarrier::resume`]; true if all have in time. `resume` follows in any case.
    fn release_all(&mut self, timeout: Duration) -> bool;

    /// Readers may open snapshots again.
    fn resume(&mut self);
}

/// Nobody reads.
#[derive(Debug)]
pub struct NoReaders;

impl ReaderBarrier for NoReaders {
    fn release_all(&mut self, _timeout: Duration) -> bool {
        true
    }
    fn resume(&mut self) {}
}

/// What [`Checkpointer::maintain`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalState {
    /// Go on.
    Fine,
    /// The WAL is at its limit and a reader does not let go: apply nothing, call again soon.
    Full,
}

/// Decides when to checkpoint. One per writer.
#[derive(Debug, Default)]
pub struct Checkpointer {
    limits: WalLimits,
    /// Size at the last attempt.
    last_bytes: u64,
    counters: CheckpointCounters,
}

/// What was done so far, for `/statz`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckpointCounters {
    /// PASSIVE checkpoints.
    pub passive: u64,
    /// Barriers that emptied the WAL.
    pub truncated: u64,
    /// Barriers that a reader missed.
    pub missed: u64,
}

impl Checkpointer {
    /// A checkpointer with these limits.
    pub fn new(limits: WalLimits) -> Checkpointer {
        Checkpointer { limits, ..Checkpointer::default() }
    }

    /// What was done so far.
    pub fn counters(&self) -> CheckpointCounters {
        self.counters
    }

    /// Looks at the WAL between two transactions; costs one `stat` most of the time.
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite fails.
    pub fn maintain(
        &mut self,
        writer: &ReplicaWriter,
        readers: &mut dyn ReaderBarrier,
    ) -> Result<WalState, ReplicaError> {
        if writer.in_transaction() {
            return Ok(WalState::Fine);
        }
        let bytes = writer.wal_bytes()?;
        if bytes < self.last_bytes {
            self.last_bytes = bytes;
        }
        let full = bytes >= self.limits.stop_bytes;
        if !full && bytes < self.last_bytes + self.limits.passive_bytes {
            return Ok(WalState::Fine);
        }
        self.last_bytes = bytes;
        checkpoint(writer.connection(), writer.path(), "PASSIVE")?;
        self.counters.passive += 1;
        if bytes < self.limits.barrier_bytes {
            return Ok(WalState::Fine);
        }
        let emptied = readers.release_all(self.limits.release_timeout)
            && self.truncate(writer.connection(), writer.path())?;
        readers.resume();
        if emptied {
            self.counters.truncated += 1;
            self.last_bytes = 0;
            return Ok(WalState::Fine);
        }
        self.counters.missed += 1;
        tracing::warn!(
            wal_bytes = bytes,
            stop_bytes = self.limits.stop_bytes,
            "a reader did not let go of its snapshot: the replica's WAL cannot be emptied yet"
        );
        Ok(if full { WalState::Full } else { WalState::Fine })
    }

    /// True if the WAL is empty afterwards.
    fn truncate(&self, connection: &Connection, path: &Path) -> Result<bool, ReplicaError> {
        // Readers of this process are gone; one of another process is not waited for.
        connection
            .busy_timeout(Duration::ZERO)
            .map_err(ReplicaError::sqlite(path, "setting the lock timeout"))?;
        let result = checkpoint(connection, path, "TRUNCATE");
        connection
            .busy_timeout(super::writer::BUSY_TIMEOUT)
            .map_err(ReplicaError::sqlite(path, "setting the lock timeout"))?;
        result
    }
}

/// True unless a reader or another checkpoint was in the way.
fn checkpoint(connection: &Connection, path: &Path, mode: &str) -> Result<bool, ReplicaError> {
    connection
        .query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |r| r.get::<_, i64>(0))
        .map(|busy| busy == 0)
        .map_err(ReplicaError::sqlite(path, format!("a {mode} checkpoint")))
}

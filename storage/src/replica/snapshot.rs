//! Safe wrappers of `sqlite3_snapshot_get` and `sqlite3_snapshot_open`: several connections on
//! exactly one version.
//!
//! Measured (foundations §6.2): opening a snapshot costs 3–5 µs. A snapshot can be opened as long
//! as some connection reads it, or no checkpoint has copied all frames of the WAL; afterwards
//! SQLite answers `SQLITE_ERROR_SNAPSHOT` ([`OpenSnapshot::Gone`]): re-hydrate.
//!
//! Executors do not need this to agree on a version (they read it from the snapshot they got); it
//! is for catching up through a pinned older version.

use std::path::Path;
use std::ptr::NonNull;

use rusqlite::{Connection, ffi};

use super::ReplicaError;

/// `SQLITE_ERROR_SNAPSHOT`.
const ERROR_SNAPSHOT: std::ffi::c_int = ffi::SQLITE_ERROR | (3 << 8);

/// A point in the history of a WAL file.
#[derive(Debug)]
pub struct Snapshot(NonNull<ffi::sqlite3_snapshot>);

// SAFETY: a snapshot is a plain block of memory (a copy of the WAL index header); SQLite only
// reads it after sqlite3_snapshot_get.
unsafe impl Send for Snapshot {}
// SAFETY: as above: nobody writes to it.
unsafe impl Sync for Snapshot {}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // SAFETY: made by sqlite3_snapshot_get, freed once.
        unsafe { ffi::sqlite3_snapshot_free(self.0.as_ptr()) }
    }
}

/// How an attempt to open a snapshot ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenSnapshot {
    /// The connection's transaction sees the snapshot.
    Opened,
    /// A checkpoint has overtaken it.
    Gone,
}

/// The snapshot of the connection's open read transaction, which has read something.
///
/// # Errors
/// [`ReplicaError::Sqlite`] outside a read transaction of a WAL database.
pub fn current(connection: &Connection, path: &Path) -> Result<Snapshot, ReplicaError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the handle is open and used by this thread only; `out` is valid for the write.
    let code =
        unsafe { ffi::sqlite3_snapshot_get(connection.handle(), c"main".as_ptr(), &mut out) };
    match (code, NonNull::new(out)) {
        (ffi::SQLITE_OK, Some(snapshot)) => Ok(Snapshot(snapshot)),
        _ => Err(failure(path, "taking a snapshot", code)),
    }
}

/// Opens `snapshot` in the connection's transaction, which has been begun and has read nothing.
///
/// # Errors
/// [`ReplicaError::Sqlite`] for anything but success and [`OpenSnapshot::Gone`].
pub fn open(
    connection: &Connection,
    path: &Path,
    snapshot: &Snapshot,
) -> Result<OpenSnapshot, ReplicaError> {
    // SAFETY: the handle is open and used by this thread only; the snapshot is alive.
    let code = unsafe {
        ffi::sqlite3_snapshot_open(connection.handle(), c"main".as_ptr(), snapshot.0.as_ptr())
    };
    match code {
        ffi::SQLITE_OK => Ok(OpenSnapshot::Opened),
        ERROR_SNAPSHOT => Ok(OpenSnapshot::Gone),
        _ => Err(failure(path, "opening a snapshot", code)),
    }
}

fn failure(path: &Path, doing: &str, code: std::ffi::c_int) -> ReplicaError {
    ReplicaError::sqlite(path, doing)(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None))
}

/// Refuses a build of SQLite without snapshots.
///
/// # Errors
/// [`ReplicaError::MissingFeature`], [`ReplicaError::Sqlite`].
pub fn require_support(connection: &Connection, path: &Path) -> Result<(), ReplicaError> {
    let known: bool = connection
        .query_row("SELECT sqlite_compileoption_used('ENABLE_SNAPSHOT')", [], |r| r.get(0))
        .map_err(ReplicaError::sqlite(path, "reading SQLite's compile options"))?;
    if known { Ok(()) } else { Err(ReplicaError::MissingFeature("SQLITE_ENABLE_SNAPSHOT")) }
}

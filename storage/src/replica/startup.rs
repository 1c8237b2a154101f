//! Is there a usable replica, and if not, why not.
//!
//! Spec: replication §1.3 (migration rules), §1.8 #11, §2.1, §6.1, §6.3.

use std::io::Read;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, params};
use zeroring_core::version::StateVersion;

use super::error::is_corruption;
use super::initial::{remove_files, temporary_path};
use super::{
    OLDEST_MIGRATED_VERSION, PAGE_SIZE_BYTES, REPLICA_SCHEMA_VERSION, ReplicaError, ResetReason,
};

/// What was found under the replica's name.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// No file: an initial sync is needed.
    Nothing,
    /// A replica that can be opened.
    Replica(ReplicaInfo),
    /// A file that must be deleted ([`super::initial::delete_replica`]) and synced anew.
    Unusable(ResetReason),
}

/// What a replica says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaInfo {
    /// The file.
    pub path: PathBuf,
    /// Version of its initial sync: names the lineage.
    pub replica_version: StateVersion,
    /// Version of its last transaction.
    pub state_version: StateVersion,
    /// Publications that it was made of, sorted.
    pub publications: Vec<String>,
}

/// Looks at the file, cleans up after a killed initial sync, and migrates the internal tables.
///
/// # Errors
/// [`ReplicaError`] only where a new sync would not help (permissions, disk, a lock held by
/// another process); everything else is [`Found::Unusable`].
pub fn find(path: &Path) -> Result<Found, ReplicaError> {
    remove_files(&temporary_path(path))?;
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // An orphaned WAL would be played into the next file of this name.
            remove_files(path)?;
            return Ok(Found::Nothing);
        }
        Err(e) => return Err(ReplicaError::io(path, "looking for it")(e)),
        Ok(m) if m.len() == 0 => return Ok(Found::Unusable(ResetReason::Unfinished)),
        Ok(_) => {}
    }
    if let Some(reason) = check_header(path)? {
        return Ok(Found::Unusable(reason));
    }
    match inspect(path) {
        Ok(info) => Ok(Found::Replica(info)),
        Err(ReplicaError::Unusable { reason, .. }) => Ok(Found::Unusable(reason)),
        Err(ReplicaError::BadVersion { source, .. }) => {
            Ok(Found::Unusable(ResetReason::Malformed(source.to_string())))
        }
        Err(ReplicaError::Sqlite { source, .. }) if is_corruption(&source) => {
            Ok(Found::Unusable(ResetReason::Corrupt(source.to_string())))
        }
        Err(error) => Err(error),
    }
}

/// What the first bytes of the file say.
fn check_header(path: &Path) -> Result<Option<ResetReason>, ReplicaError> {
    let mut header = [0u8; 20];
    let mut file = std::fs::File::open(path).map_err(ReplicaError::io(path, "opening the file"))?;
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(Some(ResetReason::NotADatabase));
        }
        Err(e) => return Err(ReplicaError::io(path, "reading the file")(e)),
    }
    Ok(if !header.starts_with(b"SQLite format 3\0") {
        Some(ResetReason::NotADatabase)
    } else if header[18] == 3 || header[19] == 3 {
        Some(ResetReason::Wal2)
    } else {
        None
    })
}

fn inspect(path: &Path) -> Result<ReplicaInfo, ReplicaError> {
    let sqlite = |doing: &'static str| ReplicaError::sqlite(path, doing);
    let connection = Connection::open(path).map_err(sqlite("opening it"))?;
    connection
        .execute_batch("PRAGMA busy_timeout = 5000; PRAGMA wal_autocheckpoint = 0;")
        .map_err(sqlite("setting up a connection"))?;
    check_version(&connection, path)?;
    let page_size: u32 = connection
        .query_row("PRAGMA page_size", [], |r| r.get(0))
        .map_err(sqlite("reading the page size"))?;
    if page_size != PAGE_SIZE_BYTES {
        tracing::warn!(page_size, "the replica has an unusual page size; backups expect 4096");
    }
    connection
        .query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))
        .map_err(sqlite("switching it to WAL"))?;
    read_info(&connection, path)
}

/// Applies the migration rules to the internal tables.
fn check_version(connection: &Connection, path: &Path) -> Result<(), ReplicaError> {
    let unusable = |reason| ReplicaError::Unusable { path: path.to_owned(), reason };
    let sqlite = |doing: &'static str| ReplicaError::sqlite(path, doing);
    if !table_exists(connection, "_zero.versionHistory").map_err(sqlite("reading its tables"))? {
        return Err(unusable(ResetReason::Unfinished));
    }
    let history: Option<(i64, i64)> = connection
        .query_row(r#"SELECT dataVersion, minSafeVersion FROM "_zero.versionHistory""#, [], |r| {
            Ok((r.get(0)?, r.get(1)?))
        })
        .optional()
        .map_err(sqlite("reading its schema version"))?;
    let (data_version, min_safe) = match history {
        None | Some((0, _)) => return Err(unusable(ResetReason::Unfinished)),
        Some(history) => history,
    };
    if min_safe > REPLICA_SCHEMA_VERSION {
        return Err(unusable(ResetReason::TooNew(min_safe)));
    }
    if data_version < OLDEST_MIGRATED_VERSION {
        return Err(unusable(ResetReason::TooOld(data_version)));
    }
    if data_version != REPLICA_SCHEMA_VERSION {
        migrate(connection, data_version).map_err(sqlite("migrating its internal tables"))?;
    }
    Ok(())
}

/// 12 → 13 adds `writeTimeMs`; a newer file only has its data version set back.
fn migrate(connection: &Connection, from: i64) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN EXCLUSIVE")?;
    let result = (|| {
        if from < 13 && !column_exists(connection, "_zero.replicationState", "writeTimeMs")? {
            connection.execute_batch(
                r#"ALTER TABLE "_zero.replicationState" ADD COLUMN writeTimeMs INTEGER"#,
            )?;
        }
        if from < 13 {
            connection.execute(
                r#"UPDATE "_zero.replicationState"
                   SET writeTimeMs = CAST(unixepoch('subsec') * 1000 AS INTEGER)"#,
                [],
            )?;
            connection
                .execute(r#"INSERT INTO "_zero.runtimeEvents" (event) VALUES ('upgrade')"#, [])?;
        }
        connection.execute(
            r#"UPDATE "_zero.versionHistory"
               SET dataVersion = ?1, schemaVersion = max(schemaVersion, ?1)"#,
            params![REPLICA_SCHEMA_VERSION],
        )?;
        connection.execute_batch("COMMIT")
    })();
    if result.is_err() && !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK")?;
    }
    result
}

fn read_info(connection: &Connection, path: &Path) -> Result<ReplicaInfo, ReplicaError> {
    let malformed = |what: &str| ReplicaError::Unusable {
        path: path.to_owned(),
        reason: ResetReason::Malformed(what.to_owned()),
    };
    for table in [
        "_zero.replicationConfig",
        "_zero.replicationState",
        "_zero.changeLog2",
        "_zero.column_metadata",
        "_zero.tableMetadata",
    ] {
        let there = table_exists(connection, table)
            .map_err(ReplicaError::sqlite(path, "reading its tables"))?;
        if !there {
            return Err(malformed(&format!("the internal table \"{table}\" is missing")));
        }
    }
    let row: Option<(String, String, String)> = connection
        .query_row(
            r#"SELECT replicaVersion, publications, stateVersion
               FROM "_zero.replicationConfig", "_zero.replicationState""#,
            [],
            |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)),
        )
        .optional()
        .map_err(ReplicaError::sqlite(path, "reading its replication state"))?;
    let (replica_version, publications, state_version) =
        row.ok_or_else(|| malformed("its replication state is missing"))?;
    Ok(ReplicaInfo {
        path: path.to_owned(),
        replica_version: ReplicaError::version(path, &replica_version)?,
        state_version: ReplicaError::version(path, &state_version)?,
        publications: serde_json::from_str(&publications)
            .map_err(|e| malformed(&format!("its list of publications is malformed: {e}")))?,
    })
}

fn table_exists(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?)",
        [table],
        |r| r.get(0),
    )
}

fn column_exists(connection: &Connection, table: &str, column: &str) -> rusqlite::Result<bool> {
    connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM pragma_table_info(?) WHERE name = ?)",
        [table, column],
        |r| r.get(0),
    )
}

//! The file: tables, format version, connections. Described in `docs/cvr-embedded-format.md`.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::OpenError;

/// Version of the file format, in `PRAGMA user_version`.
pub const FORMAT_VERSION: i64 = 2;

/// `zrCV`, in `PRAGMA application_id`.
const APPLICATION_ID: i64 = 0x7a72_4356;

/// How long to wait for another process that writes to the file, ms.
const BUSY_TIMEOUT_MS: u64 = 10_000;

/// Prepared statements kept per connection: more than there are.
const STATEMENTS: usize = 64;

/// A connection's page cache, KiB.
const CACHE_KIB: i64 = 16 * 1_024;

const TABLES: &str = "
CREATE TABLE groups (
  num INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  version TEXT NOT NULL,
  last_active REAL NOT NULL,
  ttl_clock REAL NOT NULL,
  replica_version TEXT,
  owner TEXT,
  granted REAL,
  client_schema INTEGER,
  profile TEXT,
  next_query INTEGER NOT NULL DEFAULT 0,
  deleted INTEGER NOT NULL DEFAULT 0,
  active_hour INTEGER NOT NULL DEFAULT 0,
  rows_version TEXT
) STRICT;
CREATE INDEX groups_by_activity ON groups (deleted, active_hour);
CREATE TABLE schemas (num INTEGER PRIMARY KEY, json TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE clients (
  grp INTEGER NOT NULL,
  id TEXT NOT NULL,
  PRIMARY KEY (grp, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE queries (
  grp INTEGER NOT NULL,
  hash TEXT NOT NULL,
  num INTEGER NOT NULL,
  kind INTEGER NOT NULL,
  body TEXT NOT NULL,
  args TEXT,
  patch TEXT,
  transformation_hash TEXT,
  transformation_version TEXT,
  signature INTEGER,
  deleted INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (grp, hash)
) STRICT, WITHOUT ROWID;
CREATE TABLE desires (
  grp INTEGER NOT NULL,
  client TEXT NOT NULL,
  query TEXT NOT NULL,
  patch TEXT NOT NULL,
  deleted INTEGER NOT NULL,
  ttl REAL,
  inactivated REAL,
  PRIMARY KEY (grp, client, query)
) STRICT, WITHOUT ROWID;
CREATE TABLE rows (
  grp INTEGER NOT NULL,
  id TEXT NOT NULL,
  row_version TEXT NOT NULL,
  patch TEXT NOT NULL,
  refs BLOB,
  PRIMARY KEY (grp, id)
) STRICT, WITHOUT ROWID;
";

/// From version 1: rows may be behind their group, and the index of activity is only written when
/// the hour changes.
const TO_2: &str = "
DROP INDEX groups_by_activity;
ALTER TABLE groups ADD COLUMN active_hour INTEGER NOT NULL DEFAULT 0;
ALTER TABLE groups ADD COLUMN rows_version TEXT;
UPDATE groups SET active_hour = CAST(last_active / 3600000 AS INTEGER);
CREATE INDEX groups_by_activity ON groups (deleted, active_hour);
";

/// The hour since 1970 of a wall time, as `groups.active_hour` has it.
pub(super) fn hour(ms: f64) -> i64 {
    (ms / 3_600_000.0) as i64
}

/// Opens the file for writing; makes or checks its tables.
pub(super) fn open_writer(path: &Path) -> Result<Connection, OpenError> {
    let failed = |source| OpenError::Sqlite { path: path.to_owned(), source };
    let mut connection = Connection::open(path).map_err(failed)?;
    set_up(&connection).map_err(failed)?;
    migrate(&mut connection, path)?;
    // A failed sync must not be mistaken for a commit, hence FULL; checkpoints are ours.
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;",
        )
        .map_err(failed)?;
    Ok(connection)
}

/// Opens the file for reading. The writer must have been opened before.
pub(super) fn open_reader(path: &Path) -> Result<Connection, OpenError> {
    let failed = |source| OpenError::Sqlite { path: path.to_owned(), source };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    set_up(&connection).map_err(failed)?;
    connection
        .execute_batch("PRAGMA query_only = 1; PRAGMA wal_autocheckpoint = 0;")
        .map_err(failed)?;
    Ok(connection)
}

/// Gives the connection's page cache back; it fills again with use.
pub(super) fn release_memory(connection: &Connection) {
    if let Err(error) = connection.execute_batch("PRAGMA shrink_memory") {
        tracing::debug!(%error, "the page cache of the CVR file was not given back");
    }
}

fn set_up(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(std::time::Duration::from_millis(BUSY_TIMEOUT_MS))?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.execute_batch(&format!("PRAGMA cache_size = -{CACHE_KIB}"))
}

/// Makes the tables of an empty file; refuses files that are not ours or newer.
fn migrate(connection: &mut Connection, path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Sqlite { path: path.to_owned(), source };
    // Immediate: two servers that start at once make the tables once.
    let tx =
        connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    let number = |sql: &str| tx.query_row(sql, [], |r| r.get::<_, i64>(0)).map_err(failed);
    let application_id = number("PRAGMA application_id")?;
    let found = number("PRAGMA user_version")?;
    if application_id == 0 && found == 0 && number("SELECT count(*) FROM sqlite_schema")? == 0 {
        tx.execute_batch(TABLES).map_err(failed)?;
        tx.execute_batch(&format!(
            "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION};"
        ))
        .map_err(failed)?;
        return tx.commit().map_err(failed);
    }
    if application_id != APPLICATION_ID {
        return Err(OpenError::NotOurs { path: path.to_owned() });
    }
    if found > FORMAT_VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), found, known: FORMAT_VERSION });
    }
    if found < 2 {
        tracing::info!(path = %path.display(), from = found, to = FORMAT_VERSION,
            "migrating the CVR file");
        tx.execute_batch(TO_2).map_err(failed)?;
        tx.execute_batch(&format!("PRAGMA user_version = {FORMAT_VERSION}")).map_err(failed)?;
        return tx.commit().map_err(failed);
    }
    Ok(())
}

/// Copies what it can from the WAL into the file, without stopping anybody. Returns how many
/// frames the WAL holds (copied or not: SQLite starts it over at the next write after all were).
pub(super) fn checkpoint(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_and_newer_files_are_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = dir.path().join("foreign.db");
        Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        let error = open_writer(&foreign).unwrap_err();
        assert!(matches!(error, OpenError::NotOurs { .. }), "{error}");
        let tables: i64 = Connection::open(&foreign)
            .unwrap()
            .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))
            .unwrap();
        assert_eq!(tables, 1);
        let mode: String = Connection::open(&foreign)
            .unwrap()
            .query_row("PRAGMA journal_mode", [], |r| r.get(0))
            .unwrap();
        assert_eq!(mode, "delete");

        let ours = dir.path().join("ours.db");
        drop(open_writer(&ours).unwrap());
        drop(open_writer(&ours).unwrap());
        let bump = format!("PRAGMA user_version = {}", FORMAT_VERSION + 1);
        Connection::open(&ours).unwrap().execute_batch(&bump).unwrap();
        let error = open_writer(&ours).unwrap_err();
        assert!(matches!(error, OpenError::Newer { found: 3, known: 2, .. }), "{error}");
    }

    #[test]
    fn files_of_version_1_are_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["old.db", "new.db"].map(|name| dir.path().join(name));
        let first = include_str!("v1.sql");
        Connection::open(&old).unwrap().execute_batch(first).unwrap();
        let described = |path: &Path| -> Vec<String> {
            drop(open_writer(path).unwrap());
            let db = Connection::open(path).unwrap();
            let sql = "SELECT m.name || ' ' || c.name || ' ' || c.type || ' ' || c.\"notnull\" FROM
                sqlite_schema m JOIN pragma_table_info(m.name) c ORDER BY 1";
            let mut lines = db.prepare(sql).unwrap();
            let lines = lines.query_map([], |r| r.get(0)).unwrap();
            lines.collect::<Result<_, _>>().unwrap()
        };
        assert_eq!(described(&old), described(&new));
        let (hour, rows): (i64, Option<String>) = Connection::open(&old)
            .unwrap()
            .query_row("SELECT active_hour, rows_version FROM groups", [], |r| {
                Ok((r.get(0)?, r.get(1)?))
            })
            .unwrap();
        assert_eq!((hour, rows), (498_333, None));
    }

    #[test]
    fn commits_are_synced() {
        let dir = tempfile::tempdir().unwrap();
        let writer = open_writer(&dir.path().join("cvr.db")).unwrap();
        let mode: String = writer.query_row("PRAGMA journal_mode", [], |r| r.get(0)).unwrap();
        let sync: i64 = writer.query_row("PRAGMA synchronous", [], |r| r.get(0)).unwrap();
        assert_eq!((mode.as_str(), sync), ("wal", 2), "FULL: what is answered is on disk");
    }
}

//! One read-only connection per executor, always on one version.
//!
//! A reader is in no snapshot, or in the one that [`ReplicaReader::refresh`] opened last; every
//! statement in between sees that version. Only [`ReplicaReader::release`] lets the WAL shrink
//! (see [`super::checkpoint`]). The connection is not shared between threads, so it has no mutex.
//!
//! Rows are decoded by a [`RowDecoder`] from statements that select [`select_list`]: the version
//! and all visible columns of a table. `replica::source` builds its statements on these.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{CachedStatement, Connection, OpenFlags};
use zeroring_core::ivm::source::SourceError;
use zeroring_core::row::{Row, RowRef};
use zeroring_core::schema::{Schema, TableSpec};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;

use super::ReplicaError;
use super::schema::{StoredSchema, TableIds, VERSION_COLUMN, quote_ident, read_schema};
use super::types::{ValueParam, VersionCache, value_from_sql};

/// How a reader's connection is set up.
#[derive(Debug, Clone)]
pub struct ReaderOptions {
    /// Idle prepared statements kept per reader (the original keeps 1000).
    pub cached_statements: usize,
    /// Page cache. Pages come from the mapped file, so this only holds what is in the WAL.
    pub cache_kib: u32,
    /// How much of the file is mapped: all of it, up to this.
    pub mmap_bytes: u64,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        ReaderOptions { cached_statements: 1000, cache_kib: 16 * 1024, mmap_bytes: 1 << 40 }
    }
}

/// A read-only connection to the replica.
#[derive(Debug)]
pub struct ReplicaReader {
    connection: Connection,
    path: PathBuf,
    version: Option<StateVersion>,
}

impl ReplicaReader {
    /// Opens the replica; no snapshot is open yet.
    ///
    /// # Errors
    /// [`ReplicaError`] if the file is not there or not readable.
    pub fn open(path: &Path, options: &ReaderOptions) -> Result<ReplicaReader, ReplicaError> {
        let connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(ReplicaError::sqlite(path, "opening it for reading"))?;
        connection
            .execute_batch(&format!(
                "PRAGMA query_only = ON;
                 PRAGMA case_sensitive_like = ON;
                 PRAGMA mmap_size = {};
                 PRAGMA cache_size = -{};
                 PRAGMA temp_store = MEMORY;
                 PRAGMA busy_timeout = 5000;",
                options.mmap_bytes, options.cache_kib
            ))
            .map_err(ReplicaError::sqlite(path, "setting up a reader"))?;
        connection.set_prepared_statement_cache_capacity(options.cached_statements);
        Ok(ReplicaReader { connection, path: path.to_owned(), version: None })
    }

    /// Moves to the newest version: the old snapshot is given up, a new one opened. No statement
    /// of this reader may be in use.
    ///
    /// # Errors
    /// [`ReplicaError`]; then no snapshot is open.
    pub fn refresh(&mut self) -> Result<&StateVersion, ReplicaError> {
        self.release()?;
        self.execute("BEGIN", "opening a snapshot")?;
        match read_version(&self.connection, &self.path) {
            Ok(version) => Ok(self.version.insert(version)),
            Err(error) => {
                // The error that matters is the first one.
                let _ = self.execute("ROLLBACK", "giving up a snapshot");
                Err(error)
            }
        }
    }

    /// Gives the snapshot up, so that a checkpoint can pass. No effect without a snapshot.
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite refuses, which it does while a statement is in use.
    pub fn release(&mut self) -> Result<(), ReplicaError> {
        self.version = None;
        if self.connection.is_autocommit() {
            return Ok(());
        }
        self.execute("COMMIT", "giving up a snapshot")
    }

    /// The version of the open snapshot.
    pub fn version(&self) -> Option<&StateVersion> {
        self.version.as_ref()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connection, for statements that are not worth caching. It must not be moved to another
    /// version.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Interrupts statements: asks every so many of their instructions.
    ///
    /// # Errors
    /// [`ReplicaError`] if SQLite refuses.
    pub(crate) fn interrupt_if(
        &mut self,
        instructions: i32,
        ends: impl FnMut() -> bool + Send + 'static,
    ) -> Result<(), ReplicaError> {
        self.connection
            .progress_handler(instructions, Some(ends))
            .map_err(ReplicaError::sqlite(&self.path, "limiting statements"))
    }

    /// A prepared statement from the bounded cache. A statement in use is out of the cache, so
    /// nested fetches of the same SQL are safe.
    ///
    /// # Errors
    /// [`SourceError::Store`] if the SQL is wrong.
    pub fn prepare(&self, sql: &str) -> Result<CachedStatement<'_>, SourceError> {
        self.connection.prepare_cached(sql).map_err(store_error)
    }

    /// The schema at the snapshot. While it runs, an executor takes the schema from the replica's
    /// writer and its commits; this is for tools and tests.
    ///
    /// # Errors
    /// [`ReplicaError`] if the file cannot be read.
    pub fn schema(&self, ids: &TableIds) -> Result<StoredSchema, ReplicaError> {
        read_schema(&self.connection, &self.path, ids)
    }

    /// The row whose `columns` equal `key` (no null among them), if there is one. `columns` should
    /// be a unique key of the table.
    ///
    /// # Errors
    /// [`SourceError`] naming the value that cannot be read, or the table if it is gone.
    pub fn get(
        &self,
        table: &TableSpec,
        columns: &[usize],
        key: &[Value],
    ) -> Result<Option<RowRef>, SourceError> {
        let condition: Vec<String> = columns
            .iter()
            .map(|&c| format!("{} = ?", quote_ident(&table.columns[c].name)))
            .collect();
        let sql = format!(
            "SELECT {} FROM {} WHERE {}",
            select_list(table),
            quote_ident(&table.name),
            condition.join(" AND ")
        );
        let mut statement = self.prepare(&sql)?;
        for (i, value) in key.iter().enumerate() {
            statement.raw_bind_parameter(i + 1, ValueParam(value)).map_err(store_error)?;
        }
        let mut rows = statement.raw_query();
        match rows.next().map_err(store_error)? {
            Some(row) => RowDecoder::new(table).decode(row).map(Some),
            None => Ok(None),
        }
    }

    /// Visits all rows of a table, in no particular order, until `visit` breaks.
    ///
    /// # Errors
    /// As [`ReplicaReader::get`].
    pub fn scan(
        &self,
        table: &TableSpec,
        visit: &mut dyn FnMut(RowRef) -> ControlFlow<()>,
    ) -> Result<(), SourceError> {
        let sql = format!("SELECT {} FROM {}", select_list(table), quote_ident(&table.name));
        let mut statement = self.prepare(&sql)?;
        let mut rows = statement.query([]).map_err(store_error)?;
        let mut decoder = RowDecoder::new(table);
        while let Some(row) = rows.next().map_err(store_error)? {
            if visit(decoder.decode(row)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn execute(&self, sql: &str, doing: &'static str) -> Result<(), ReplicaError> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut s| s.raw_execute())
            .map(drop)
            .map_err(ReplicaError::sqlite(&self.path, doing))
    }
}

/// Reads the replica's version at the connection's snapshot (and thereby takes the snapshot).
pub(crate) fn read_version(
    connection: &Connection,
    path: &Path,
) -> Result<StateVersion, ReplicaError> {
    let text: String = connection
        .prepare_cached(r#"SELECT stateVersion FROM "_zero.replicationState""#)
        .and_then(|mut s| s.query_row([], |r| r.get(0)))
        .map_err(ReplicaError::sqlite(path, "reading its version"))?;
    ReplicaError::version(path, &text)
}

/// The columns that a [`RowDecoder`] reads: `_0_version`, then all visible columns.
pub fn select_list(table: &TableSpec) -> String {
    let mut list = quote_ident(VERSION_COLUMN);
    for column in &table.columns {
        list.push(',');
        list.push_str(&quote_ident(&column.name));
    }
    list
}

/// Turns result rows of a statement that selects [`select_list`] of a table into [`Row`]s.
#[derive(Debug)]
pub struct RowDecoder<'t> {
    table: &'t TableSpec,
    versions: VersionCache,
}

impl<'t> RowDecoder<'t> {
    /// A decoder for one table.
    pub fn new(table: &'t TableSpec) -> RowDecoder<'t> {
        RowDecoder { table, versions: VersionCache::default() }
    }

    /// Decodes the current row.
    ///
    /// # Errors
    /// [`SourceError::UnsupportedValue`] naming table and column.
    pub fn decode(&mut self, row: &rusqlite::Row<'_>) -> Result<RowRef, SourceError> {
        decode_row(self.table, &mut self.versions, row, 0).map_err(source_error)
    }
}

/// Decodes a row of [`select_list`] that starts at column `first` of the result.
pub(crate) fn decode_row(
    table: &TableSpec,
    versions: &mut VersionCache,
    row: &rusqlite::Row<'_>,
    first: usize,
) -> Result<RowRef, ReplicaError> {
    let get = |i: usize| {
        row.get_ref(first + i).map_err(|e| ReplicaError::UnsupportedValue(e.to_string()))
    };
    let mut version = versions.get(get(0)?, &table.name)?;
    if version < table.min_row_version {
        version = table.min_row_version.clone();
    }
    Row::try_new(version, table.columns.len(), |i| {
        let column = &table.columns[i];
        value_from_sql(get(i + 1)?, column.value_type, &table.name, &column.name)
    })
}

/// What SQLite says of a statement beyond its limits, whatever table it reads.
const TOO_COMPLEX: [&str; 4] = [
    "Expression tree is too large",
    "too many SQL variables",
    "parser stack overflow",
    "statement too long",
];

/// An SQLite error as a failed read.
pub fn store_error(error: rusqlite::Error) -> SourceError {
    if error.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) {
        return SourceError::Interrupted;
    }
    let text = error.to_string();
    // The statement follows the message.
    let message = text.split(" in SELECT ").next().unwrap_or_default();
    if TOO_COMPLEX.iter().any(|limit| message.contains(limit)) {
        return SourceError::TooComplex(message.to_owned());
    }
    match message.strip_prefix("no such table: ") {
        Some(table) => SourceError::NoTable(table.to_owned()),
        None => SourceError::Store(text),
    }
}

/// A replica error as a failed read.
pub fn source_error(error: ReplicaError) -> SourceError {
    match error {
        ReplicaError::UnsupportedValue(text) => SourceError::UnsupportedValue(text),
        other => SourceError::Store(other.to_string()),
    }
}

/// The visible schema of a freshly opened reader, for tools.
///
/// # Errors
/// [`ReplicaError`] if the file cannot be read.
pub fn visible_schema(reader: &ReplicaReader, ids: &TableIds) -> Result<Arc<Schema>, ReplicaError> {
    Ok(reader.schema(ids)?.visible)
}

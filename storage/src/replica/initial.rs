//! Builds a new replica file.
//!
//! The file grows under a temporary name in the same directory, without a journal and without
//! fsyncs, and is renamed when it is complete and on disk. Killed at any moment, the next start
//! finds either no replica or a whole one.
//!
//! Order of use: [`InitialSync::create`] → [`InitialSync::insert`] for every batch of every table
//! (tables in any order, interleaved as they come) → [`InitialSync::create_indexes`] →
//! [`InitialSync::finish`].
//!
//! Spec: replication §2.1, §2.2 steps 6–12, §2.5.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, params};
use zeroring_core::change::message::{LiteValue, lite_name};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::version::StateVersion;

use super::schema::{
    self, INTERNAL_TABLES, VERSION_HISTORY, create_index_sql, create_table_sql,
    insert_column_metadata, quote_ident, replica_columns,
};
use super::{
    FILE_SUFFIXES, MIN_SAFE_VERSION, PAGE_SIZE_BYTES, REPLICA_SCHEMA_VERSION, ReplicaError,
};

/// Page cache while a file is built: index builds sort in it.
const BUILD_CACHE_KIB: u32 = 256 * 1024;

/// What a new replica is made of.
#[derive(Debug, Clone)]
pub struct InitialSpec<'a> {
    /// Published tables and indexes.
    pub schema: &'a PublishedSchema,
    /// The version of all rows: that of the slot's consistent point.
    pub version: &'a StateVersion,
    /// All publications, sorted.
    pub publications: &'a [String],
    /// The server's context as a JSON object (`{}` if there is none).
    pub context_json: &'a str,
}

/// Rows of one table, in one allocation each for cells and bytes: what a COPY worker fills and
/// the writer drains. Reuse with [`RowBatch::clear`].
#[derive(Debug, Default)]
pub struct RowBatch {
    cells: Vec<Cell>,
    bytes: Vec<u8>,
}

/// A value; text and blob bytes lie in [`RowBatch::bytes`], one after the other.
#[derive(Debug, Clone, Copy)]
enum Cell {
    Null,
    Integer(i64),
    Real(f64),
    Text(u32),
    Blob(u32),
}

impl RowBatch {
    /// Bytes of text in a batch from which on it should be handed over.
    pub const FULL_BYTES: usize = 1 << 20;
    /// Values in a batch from which on it should be handed over.
    pub const FULL_CELLS: usize = 1 << 16;

    /// An empty batch.
    pub fn new() -> RowBatch {
        RowBatch::default()
    }

    /// Appends NULL.
    pub fn null(&mut self) {
        self.cells.push(Cell::Null);
    }

    /// Appends an INTEGER.
    pub fn integer(&mut self, n: i64) {
        self.cells.push(Cell::Integer(n));
    }

    /// Appends a REAL.
    pub fn real(&mut self, n: f64) {
        self.cells.push(Cell::Real(n));
    }

    /// Appends a TEXT (below 4 GiB; Postgres ends at 1 GiB).
    pub fn text(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
        self.cells.push(Cell::Text(text.len() as u32));
    }

    /// Appends a BLOB (below 4 GiB).
    pub fn blob(&mut self, blob: &[u8]) {
        self.bytes.extend_from_slice(blob);
        self.cells.push(Cell::Blob(blob.len() as u32));
    }

    /// Appends any value.
    pub fn push(&mut self, value: &LiteValue) {
        match value {
            LiteValue::Null => self.null(),
            LiteValue::Integer(n) => self.integer(*n),
            LiteValue::Real(n) => self.real(*n),
            LiteValue::Text(s) => self.text(s),
            LiteValue::Blob(b) => self.blob(b),
        }
    }

    /// Number of values.
    pub fn cells(&self) -> usize {
        self.cells.len()
    }

    /// Bytes of text and blobs.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Worth handing over.
    pub fn is_full(&self) -> bool {
        self.cells.len() >= Self::FULL_CELLS || self.bytes.len() >= Self::FULL_BYTES
    }

    /// Forgets the rows, keeps the memory.
    pub fn clear(&mut self) {
        self.cells.clear();
        self.bytes.clear();
    }
}

/// A replica file in the making. Dropped unfinished, it removes its temporary file.
#[derive(Debug)]
pub struct InitialSync {
    /// `None` once finished.
    connection: Option<Connection>,
    path: PathBuf,
    temporary: PathBuf,
    tables: Vec<TablePlan>,
    index_sql: Vec<(String, String)>,
}

#[derive(Debug)]
struct TablePlan {
    name: String,
    columns: usize,
    insert_sql: String,
}

impl InitialSync {
    /// Starts a new file for `path` (which is not touched before [`InitialSync::finish`]).
    ///
    /// # Errors
    /// [`ReplicaError`] if the directory is not writable or a table cannot be created.
    pub fn create(path: &Path, spec: &InitialSpec<'_>) -> Result<InitialSync, ReplicaError> {
        let temporary = temporary_path(path);
        remove_files(&temporary)?;
        let connection = Connection::open(&temporary)
            .map_err(ReplicaError::sqlite(&temporary, "creating the file"))?;
        let mut sync = InitialSync {
            connection: None,
            path: path.to_owned(),
            temporary,
            tables: table_plans(spec.schema),
            index_sql: spec
                .schema
                .indexes
                .iter()
                .map(|i| (lite_name(&i.schema, &i.name), create_index_sql(i)))
                .collect(),
        };
        create_tables(&connection, spec)
            .map_err(ReplicaError::sqlite(&sync.temporary, "creating the tables"))?;
        connection.set_prepared_statement_cache_capacity(sync.tables.len().max(16));
        sync.connection = Some(connection);
        Ok(sync)
    }

    /// Inserts rows of the table `table` (its position in [`PublishedSchema::tables`]); columns
    /// in the order of [`replica_columns`].
    ///
    /// # Errors
    /// [`ReplicaError`] if the table is unknown, the batch is not made of whole rows, or SQLite
    /// fails.
    pub fn insert(&mut self, table: usize, rows: &RowBatch) -> Result<(), ReplicaError> {
        let mismatch = |table: &str, problem: String| ReplicaError::SchemaMismatch {
            table: table.to_owned(),
            problem,
        };
        let plan = self
            .tables
            .get(table)
            .ok_or_else(|| mismatch(&format!("#{table}"), "it is not published".to_owned()))?;
        if plan.columns == 0 {
            return Ok(());
        }
        if !rows.cells.len().is_multiple_of(plan.columns) {
            let problem = format!("{} values for {} columns", rows.cells.len(), plan.columns);
            return Err(mismatch(&plan.name, problem));
        }
        insert_rows(self.connection()?, plan, rows).map_err(ReplicaError::sqlite(
            &self.temporary,
            format!("copying rows of table \"{}\"", plan.name),
        ))
    }

    /// Creates all published indexes; `progress` gets the name of each before it is built.
    ///
    /// # Errors
    /// [`ReplicaError`] if an index cannot be built, e.g. a unique one because affinity made two
    /// values equal.
    pub fn create_indexes(&mut self, progress: &mut dyn FnMut(&str)) -> Result<(), ReplicaError> {
        for (name, sql) in &self.index_sql {
            progress(name);
            self.connection()?.execute_batch(sql).map_err(ReplicaError::sqlite(
                &self.temporary,
                format!("creating index \"{name}\""),
            ))?;
        }
        Ok(())
    }

    /// Completes the file, makes it durable and gives it its name. A replica that was there is
    /// replaced.
    ///
    /// # Errors
    /// [`ReplicaError`]; then there is no replica under the name, or still the old one.
    pub fn finish(mut self) -> Result<(), ReplicaError> {
        complete(self.connection()?)
            .map_err(ReplicaError::sqlite(&self.temporary, "completing the file"))?;
        if let Some(connection) = self.connection.take() {
            connection
                .close()
                .map_err(|(_, e)| ReplicaError::sqlite(&self.temporary, "closing the file")(e))?;
        }
        sync_file(&self.temporary)?;
        // The old file goes first, then its WAL: an orphaned WAL is removed at the next start,
        // but a WAL next to a foreign database would be played into it.
        delete_replica(&self.path)?;
        std::fs::rename(&self.temporary, &self.path)
            .map_err(ReplicaError::io(&self.path, "renaming the finished file"))?;
        sync_directory(&self.path)
    }

    fn connection(&self) -> Result<&Connection, ReplicaError> {
        self.connection.as_ref().ok_or_else(|| {
            ReplicaError::sqlite(&self.temporary, "using the file")(rusqlite::Error::InvalidQuery)
        })
    }
}

impl Drop for InitialSync {
    fn drop(&mut self) {
        drop(self.connection.take());
        if let Err(error) = remove_files(&self.temporary) {
            tracing::warn!(%error, "an unfinished initial sync left its temporary file");
        }
    }
}

/// Where the file for `path` is built.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push("-initial-sync.tmp");
    PathBuf::from(name)
}

/// Deletes a replica with everything that SQLite (or the original's) keeps beside it.
///
/// # Errors
/// [`ReplicaError::Io`] if a file is there and cannot be removed.
pub fn delete_replica(path: &Path) -> Result<(), ReplicaError> {
    remove_files(path)?;
    sync_directory(path)
}

/// Removes a database file and its companions, the file itself first.
pub(crate) fn remove_files(path: &Path) -> Result<(), ReplicaError> {
    for suffix in FILE_SUFFIXES {
        let mut name = OsString::from(path);
        name.push(suffix);
        match std::fs::remove_file(&name) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ReplicaError::io(Path::new(&name), "removing the file")(e)),
        }
    }
    Ok(())
}

fn sync_file(path: &Path) -> Result<(), ReplicaError> {
    std::fs::File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(ReplicaError::io(path, "making the file durable"))
}

/// Makes names in the directory of `path` durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), ReplicaError> {
    let directory = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    sync_file(directory)
}

fn table_plans(schema: &PublishedSchema) -> Vec<TablePlan> {
    schema
        .tables
        .iter()
        .map(|table| {
            let name = lite_name(&table.schema, &table.name);
            let columns: Vec<String> =
                replica_columns(table).iter().map(|(c, _)| quote_ident(c)).collect();
            TablePlan {
                insert_sql: format!(
                    "INSERT INTO {} ({}) VALUES ({})",
                    quote_ident(&name),
                    columns.join(","),
                    vec!["?"; columns.len()].join(",")
                ),
                columns: columns.len(),
                name,
            }
        })
        .collect()
}

fn create_tables(connection: &Connection, spec: &InitialSpec<'_>) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "PRAGMA page_size = {PAGE_SIZE_BYTES};
         PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA foreign_keys = OFF;
         PRAGMA journal_mode = OFF;
         PRAGMA synchronous = OFF;
         PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -{BUILD_CACHE_KIB};
         BEGIN EXCLUSIVE;"
    ))?;
    connection.execute_batch(VERSION_HISTORY)?;
    for ddl in INTERNAL_TABLES {
        connection.execute_batch(ddl)?;
    }
    connection.execute(
        r#"INSERT INTO "_zero.replicationConfig" (replicaVersion, publications,
           initialSyncContext) VALUES (?,?,?)"#,
        params![
            spec.version.as_str(),
            serde_json::Value::from(spec.publications).to_string(),
            spec.context_json
        ],
    )?;
    connection.execute(
        r#"INSERT INTO "_zero.replicationState" (stateVersion, writeTimeMs)
           VALUES (?, CAST(unixepoch('subsec') * 1000 AS INTEGER))"#,
        params![spec.version.as_str()],
    )?;
    connection.execute(r#"INSERT INTO "_zero.runtimeEvents" (event) VALUES ('sync')"#, [])?;
    for table in &spec.schema.tables {
        connection.execute_batch(&create_table_sql(table, Some(spec.version)))?;
        insert_column_metadata(connection, table)?;
    }
    Ok(())
}

fn insert_rows(connection: &Connection, plan: &TablePlan, rows: &RowBatch) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(&plan.insert_sql)?;
    let mut rest: &[u8] = &rows.bytes;
    let mut take = |n: u32| {
        let (head, tail) = rest.split_at(n as usize);
        rest = tail;
        head
    };
    for row in rows.cells.chunks_exact(plan.columns) {
        for (i, cell) in row.iter().enumerate() {
            let value = match *cell {
                Cell::Null => ValueRef::Null,
                Cell::Integer(n) => ValueRef::Integer(n),
                Cell::Real(n) => ValueRef::Real(n),
                Cell::Text(n) => ValueRef::Text(take(n)),
                Cell::Blob(n) => ValueRef::Blob(take(n)),
            };
            insert.raw_bind_parameter(i + 1, rusqlite::types::ToSqlOutput::Borrowed(value))?;
        }
        insert.raw_execute()?;
    }
    Ok(())
}

/// Statistics, the version that makes the file a replica, and WAL mode; leaves no journal behind
/// when the connection closes.
fn complete(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch("COMMIT; ANALYZE main;")?;
    connection.execute(
        r#"INSERT INTO "_zero.versionHistory" (dataVersion, schemaVersion, minSafeVersion)
           VALUES (?,?,?)"#,
        params![REPLICA_SCHEMA_VERSION, REPLICA_SCHEMA_VERSION, MIN_SAFE_VERSION],
    )?;
    connection.execute_batch("PRAGMA locking_mode = NORMAL; PRAGMA journal_mode = WAL;")?;
    // Any read gives the exclusive lock back.
    connection.query_row("SELECT count(*) FROM sqlite_master", [], |_| Ok(()))
}

/// Names of a published table's columns in the order of [`InitialSync::insert`].
pub fn copy_columns(table: &zeroring_core::change::published::PublishedTable) -> Vec<&str> {
    schema::replica_columns(table).into_iter().map(|(name, _)| name).collect()
}

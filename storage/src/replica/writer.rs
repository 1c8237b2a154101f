//! The replica's only writer.
//!
//! One SQLite transaction per stream transaction. Old rows are read by key before they change, and
//! the net effect per row leaves as an `Arc<Commit>`: it equals the difference of the tables
//! before and after. The change log (`_zero.changeLog2`) is written as the original's serving
//! replicator writes it.
//!
//! A writer that is behind may end several stream transactions in one of SQLite
//! ([`ReplicaWriter::hold`]): each is still a `Commit` of its own.
//!
//! Order of use, by the replication core's thread: [`ReplicaWriter::open`], then
//! [`ReplicaWriter::apply`] for every message of the stream. A transaction at or below the
//! replica's version (the upstream repeats some after a reconnect) is skipped.
//!
//! Spec: replication §6.4, traps 6–15.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use zeroring_core::change::message::{ChangeMessage, Relation};
use zeroring_core::change::{Commit, TableChange};
use zeroring_core::schema::Schema;
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;

use super::ReplicaError;
use super::apply::{Apply, ApplyCaches, ApplyError, Transaction};
use super::plan::{Plans, RelationPlan};
use super::reader::read_version;
use super::schema::{StoredSchema, TableIds, read_schema};

/// Prepared statements kept: a handful per table that is written.
const CACHED_STATEMENTS: usize = 1024;

/// How long a lock of another process (a backup, somebody's `sqlite3`) is waited for.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(30);

/// How the writer works.
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// `ZERO_APP_ID`: a change of `{app}.permissions` is flagged in the commit.
    pub app_id: String,
    /// Numbers of tables; hand the same one to every writer of the process.
    pub table_ids: TableIds,
    /// Page cache.
    pub cache_kib: u32,
}

impl WriterOptions {
    /// Defaults for an app.
    pub fn new(app_id: impl Into<String>, table_ids: TableIds) -> WriterOptions {
        WriterOptions { app_id: app_id.into(), table_ids, cache_kib: 64 * 1024 }
    }
}

/// What became of a message.
#[derive(Debug, Clone)]
pub enum Applied {
    /// The transaction goes on.
    Pending,
    /// The transaction was known already: nothing of it is applied.
    Skipped,
    /// The transaction is committed to the replica: publish it.
    Committed(Arc<Commit>),
    /// The transaction in progress was given up.
    RolledBack,
}

/// The replica's only writer.
#[derive(Debug)]
pub struct ReplicaWriter {
    path: PathBuf,
    connection: Connection,
    version: StateVersion,
    schema: StoredSchema,
    permissions_table: String,
    plans: Plans,
    caches: ApplyCaches,
    state: State,
    /// Ended, but the transaction of SQLite that they are in is still open.
    held: Vec<Arc<Commit>>,
    /// Were held, and are in the file now.
    earlier: Vec<Arc<Commit>>,
    /// The WAL, for [`ReplicaWriter::sync`]; opened when first needed.
    wal: Option<File>,
    synced: bool,
}

/// Between transactions, in one, or in one that is already applied.
#[derive(Debug)]
enum State {
    Idle,
    In(Box<Transaction>),
    Skipping(StateVersion),
}

impl ReplicaWriter {
    /// Opens a replica that [`super::startup::find`] found usable.
    ///
    /// # Errors
    /// [`ReplicaError`] if the file cannot be opened or read.
    pub fn open(path: &Path, options: &WriterOptions) -> Result<ReplicaWriter, ReplicaError> {
        let connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(ReplicaError::sqlite(path, "opening it for writing"))?;
        // NORMAL: a commit is atomic but not yet durable; `sync` makes many durable at once.
        connection
            .execute_batch(&format!(
                "PRAGMA busy_timeout = {};
                 PRAGMA journal_mode = WAL;
                 PRAGMA synchronous = NORMAL;
                 PRAGMA wal_autocheckpoint = 0;
                 PRAGMA foreign_keys = OFF;
                 PRAGMA case_sensitive_like = ON;
                 PRAGMA temp_store = MEMORY;
                 PRAGMA analysis_limit = 1000;
                 PRAGMA cache_size = -{};",
                BUSY_TIMEOUT.as_millis(),
                options.cache_kib
            ))
            .map_err(ReplicaError::sqlite(path, "setting up the writer"))?;
        connection.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
        let version = read_version(&connection, path)?;
        let schema = read_schema(&connection, path, &options.table_ids)?;
        Ok(ReplicaWriter {
            path: path.to_owned(),
            connection,
            version,
            schema,
            permissions_table: format!("{}.permissions", options.app_id),
            plans: Plans::default(),
            caches: ApplyCaches::default(),
            state: State::Idle,
            held: Vec::new(),
            earlier: Vec::new(),
            wal: None,
            synced: false,
        })
    }

    /// Applies one message of the stream.
    ///
    /// # Errors
    /// [`ReplicaError`]; the transaction in progress is then rolled back, and the replica is at
    /// [`ReplicaWriter::version`]. [`ReplicaError::needs_resync`] tells the cure.
    pub fn apply(&mut self, message: &ChangeMessage) -> Result<Applied, ReplicaError> {
        let result = self.apply_message(message);
        if result.is_err() {
            // The error that matters is the first one; a failed rollback shows at the next begin.
            let _ = self.rollback();
        }
        result
    }

    fn apply_message(&mut self, message: &ChangeMessage) -> Result<Applied, ReplicaError> {
        match message {
            ChangeMessage::Begin { watermark, commit_time_ms } => {
                self.begin(watermark, *commit_time_ms)
            }
            ChangeMessage::Commit { watermark } => self.commit(watermark),
            ChangeMessage::Rollback => {
                self.rollback()?;
                Ok(Applied::RolledBack)
            }
            ChangeMessage::Insert { relation, new } => {
                self.change(relation, |apply, plan| apply.insert(plan, new))
            }
            ChangeMessage::Update { relation, old, new } => {
                self.change(relation, |apply, plan| apply.update(plan, old.as_ref(), new))
            }
            ChangeMessage::Delete { relation, old } => {
                self.change(relation, |apply, plan| apply.delete(plan, old))
            }
            ChangeMessage::Truncate { relations } => {
                let mut applied = Applied::Pending;
                for relation in relations {
                    applied = self.change(relation, |apply, plan| apply.truncate(plan))?;
                }
                Ok(applied)
            }
        }
    }

    fn begin(
        &mut self,
        watermark: &StateVersion,
        commit_time_ms: f64,
    ) -> Result<Applied, ReplicaError> {
        if !matches!(self.state, State::Idle) {
            return Err(ReplicaError::OutOfOrder(format!(
                "transaction {watermark} begins inside another"
            )));
        }
        if watermark <= self.applied_version() {
            self.state = State::Skipping(watermark.clone());
            return Ok(Applied::Skipped);
        }
        if self.held.is_empty() {
            self.connection
                .prepare_cached("BEGIN IMMEDIATE")
                .and_then(|mut s| s.raw_execute())
                .map_err(ReplicaError::sqlite(&self.path, "beginning a transaction"))?;
        }
        self.state = State::In(Box::new(Transaction::new(watermark.clone(), commit_time_ms)));
        Ok(Applied::Pending)
    }

    fn change(
        &mut self,
        relation: &Arc<Relation>,
        change: impl FnOnce(&mut Apply<'_>, &RelationPlan) -> Result<(), ApplyError>,
    ) -> Result<Applied, ReplicaError> {
        let tx = match &mut self.state {
            State::In(tx) => tx,
            State::Skipping(_) => return Ok(Applied::Skipped),
            State::Idle => {
                return Err(ReplicaError::OutOfOrder("a change outside a transaction".to_owned()));
            }
        };
        let plan = self.plans.relation(relation, &self.schema)?;
        let mut apply = Apply { connection: &self.connection, tx, caches: &mut self.caches };
        change(&mut apply, &plan).map(|()| Applied::Pending).map_err(|error| match error {
            ApplyError::Replica(error) => error,
            ApplyError::Sqlite(error) => ReplicaError::sqlite(
                &self.path,
                format!("changing a row of table \"{}\"", plan.table.name),
            )(error),
        })
    }

    fn commit(&mut self, watermark: &StateVersion) -> Result<Applied, ReplicaError> {
        let commit = self.end(watermark)?;
        let Some(last) = commit.as_ref().or(self.held.last()) else { return Ok(Applied::Skipped) };
        let version = last.version.clone();
        self.commit_sqlite(&version)
            .map_err(ReplicaError::sqlite(&self.path, "committing a transaction"))?;
        self.synced = false;
        self.version = version;
        self.earlier.append(&mut self.held);
        Ok(commit.map_or(Applied::Skipped, Applied::Committed))
    }

    /// Ends the transaction in hand as [`ChangeMessage::Commit`] does, but leaves it to the next
    /// commit to write it to the file, together with its own. Nobody can see it before that, so
    /// this is for a caller that has the next transaction at hand.
    ///
    /// # Errors
    /// As [`ReplicaWriter::apply`]; what was held is lost too, and comes from the upstream again.
    pub fn hold(&mut self, watermark: &StateVersion) -> Result<(), ReplicaError> {
        match self.end(watermark) {
            Ok(commit) => {
                self.held.extend(commit);
                Ok(())
            }
            Err(error) => {
                // The error that matters is the first one.
                let _ = self.rollback();
                Err(error)
            }
        }
    }

    /// How many commits are held.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// The commits that were held and reached the file with the last commit, in order; they come
    /// before it. Each once.
    pub fn take_earlier(&mut self) -> Vec<Arc<Commit>> {
        std::mem::take(&mut self.earlier)
    }

    /// Version of the last transaction that was applied, held or not.
    fn applied_version(&self) -> &StateVersion {
        self.held.last().map_or(&self.version, |commit| &commit.version)
    }

    /// Completes the transaction in hand; `None` if it was known already.
    fn end(&mut self, watermark: &StateVersion) -> Result<Option<Arc<Commit>>, ReplicaError> {
        let mut tx = match std::mem::replace(&mut self.state, State::Idle) {
            State::In(tx) => tx,
            State::Skipping(begun) if begun == *watermark => return Ok(None),
            State::Skipping(begun) => return Err(commit_mismatch(&begun, watermark)),
            State::Idle => {
                return Err(ReplicaError::OutOfOrder(format!("commit {watermark} without begin")));
            }
        };
        if tx.version != *watermark {
            return Err(commit_mismatch(&tx.version, watermark));
        }
        let mut apply =
            Apply { connection: &self.connection, tx: &mut tx, caches: &mut self.caches };
        apply.finish().map_err(|error| match error {
            ApplyError::Replica(error) => error,
            ApplyError::Sqlite(error) => {
                ReplicaError::sqlite(&self.path, "completing the change log")(error)
            }
        })?;
        let tables = tx.net.finish();
        let permissions_changed = tables.iter().any(|t| self.permissions_differ(t));
        Ok(Some(Arc::new(Commit {
            version: watermark.clone(),
            previous: self.applied_version().clone(),
            tables,
            schema: None,
            upstream_commit_ms: tx.commit_time_ms,
            permissions_changed,
        })))
    }

    fn commit_sqlite(&self, watermark: &StateVersion) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached(
                r#"UPDATE "_zero.replicationState" SET stateVersion = ?,
                   writeTimeMs = CAST(unixepoch('subsec') * 1000 AS INTEGER)"#,
            )?
            .execute([watermark.as_str()])?;
        self.connection.prepare_cached("COMMIT")?.raw_execute().map(drop)
    }

    fn permissions_differ(&self, change: &TableChange) -> bool {
        if *change.table.name != *self.permissions_table {
            return false;
        }
        let Some(column) = change.table.column("permissions") else { return true };
        let value = |row: &Option<zeroring_core::row::RowRef>| {
            row.as_ref().map_or(Value::Null, |r| r.values[column].clone())
        };
        change.truncated || change.rows.iter().any(|r| value(&r.old) != value(&r.new))
    }

    /// Gives up the transaction in progress and what is held, if there is any (the stream was lost).
    ///
    /// # Errors
    /// [`ReplicaError::Sqlite`].
    pub fn rollback(&mut self) -> Result<(), ReplicaError> {
        self.state = State::Idle;
        self.held.clear();
        if self.connection.is_autocommit() {
            return Ok(());
        }
        self.connection
            .execute_batch("ROLLBACK")
            .map_err(ReplicaError::sqlite(&self.path, "rolling a transaction back"))
    }

    /// Makes all commits so far survive a power loss; returns the version up to which they do.
    /// One call for many commits, before they are acknowledged upstream.
    ///
    /// # Errors
    /// [`ReplicaError::Io`]: nothing may be acknowledged.
    pub fn sync(&mut self) -> Result<StateVersion, ReplicaError> {
        if !self.synced {
            // The WAL is no database file: opening and closing it drops none of SQLite's locks.
            if self.wal.is_none() {
                self.wal = match File::open(wal_path(&self.path)) {
                    Ok(file) => Some(file),
                    // Nothing was written since the last checkpoint, which is durable.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                    Err(e) => return Err(ReplicaError::io(&self.path, "opening its WAL")(e)),
                };
            }
            if let Some(wal) = &self.wal {
                wal.sync_data().map_err(ReplicaError::io(&self.path, "syncing its WAL"))?;
            }
            self.synced = true;
        }
        Ok(self.version.clone())
    }

    /// Version of the last committed transaction.
    pub fn version(&self) -> &StateVersion {
        &self.version
    }

    /// The tables as of [`ReplicaWriter::version`].
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema.visible
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the WAL file.
    ///
    /// # Errors
    /// [`ReplicaError::Io`].
    pub fn wal_bytes(&self) -> Result<u64, ReplicaError> {
        match std::fs::metadata(wal_path(&self.path)) {
            Ok(metadata) => Ok(metadata.len()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(ReplicaError::io(&self.path, "looking at its WAL")(e)),
        }
    }

    /// The connection, for checkpoints and statistics between transactions.
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Whether a transaction is in progress, or one is held.
    pub fn in_transaction(&self) -> bool {
        matches!(self.state, State::In(_)) || !self.held.is_empty()
    }
}

/// The WAL of a database file.
pub(super) fn wal_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push("-wal");
    PathBuf::from(name)
}

fn commit_mismatch(begun: &StateVersion, committed: &StateVersion) -> ReplicaError {
    ReplicaError::OutOfOrder(format!(
        "transaction {begun} commits as {committed}: the change source is broken"
    ))
}

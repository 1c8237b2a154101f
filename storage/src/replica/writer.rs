//! The replica's only writer.
//!
//! One SQLite transaction per stream transaction. Old rows are read by key before they change, and
//! the net effect per row leaves as an `Arc<Commit>`: it equals the difference of the tables
//! before and after. The change log (`_zero.changeLog2`) is written as the original's serving
//! replicator writes it.
//!
//! Order of use, by the replication core's thread: [`ReplicaWriter::open`], then
//! [`ReplicaWriter::apply`] for every message of the stream. A transaction at or below the
//! replica's version (the upstream repeats some after a reconnect) is skipped.
//!
//! Spec: replication §6.4, traps 6–15.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroring_core::change::Commit;
use zeroring_core::change::message::ChangeMessage;
use zeroring_core::schema::Schema;
use zeroring_core::version::StateVersion;

use super::ReplicaError;
use super::schema::TableIds;

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
    version: StateVersion,
    schema: Arc<Schema>,
}

impl ReplicaWriter {
    /// Opens a replica that [`super::startup::find`] found usable.
    ///
    /// # Errors
    /// [`ReplicaError`] if the file cannot be opened or read.
    pub fn open(path: &Path, _options: &WriterOptions) -> Result<ReplicaWriter, ReplicaError> {
        Err(ReplicaError::OutOfOrder(format!("{}: the writer is not built yet", path.display())))
    }

    /// Applies one message of the stream.
    ///
    /// # Errors
    /// [`ReplicaError`]; the transaction in progress is then rolled back, and the replica is at
    /// [`ReplicaWriter::version`]. [`ReplicaError::needs_resync`] tells the cure.
    pub fn apply(&mut self, _message: &ChangeMessage) -> Result<Applied, ReplicaError> {
        Err(ReplicaError::OutOfOrder(format!(
            "{}: the writer is not built yet",
            self.path.display()
        )))
    }

    /// Gives up the transaction in progress, if there is one (the stream was lost).
    ///
    /// # Errors
    /// [`ReplicaError::Sqlite`].
    pub fn rollback(&mut self) -> Result<(), ReplicaError> {
        Ok(())
    }

    /// Makes all commits so far survive a power loss; returns the version up to which they do.
    /// One call for many commits, before they are acknowledged upstream.
    ///
    /// # Errors
    /// [`ReplicaError::Io`]: nothing may be acknowledged.
    pub fn sync(&mut self) -> Result<StateVersion, ReplicaError> {
        Ok(self.version.clone())
    }

    /// Version of the last committed transaction.
    pub fn version(&self) -> &StateVersion {
        &self.version
    }

    /// The tables as of [`ReplicaWriter::version`].
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }
}

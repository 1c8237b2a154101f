//! Replication: Postgres → replica file → [`zeroring_core::change::Commit`]s.
//!
//! One plain (blocking) thread, the *replication core*, is the only writer of the replica. It
//! prepares upstream ([`config::ShardId`] names the objects), copies all tables once, then follows the
//! logical-replication stream: every transaction is applied to SQLite in one transaction,
//! then published to the executors, and acknowledged upstream when it is also durable.
//!
//! Invariants: nothing is acknowledged that is not durable; commits are published in order and
//! form a chain; a replica file appears under its name only when it is complete.
//!
//! Data comes in from `zeroring_net::pg`; it leaves through a [`CommitSink`] (the commit bus) and
//! through the replica file.

pub mod commit_bus;
pub mod config;
mod core;
pub mod decode;
pub mod error;
pub mod initial_sync;
pub mod published;
pub mod status;
pub mod stream;
pub mod types;
pub mod upstream;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use zeroring_core::change::Commit;
use zeroring_storage::replica::checkpoint::ReaderBarrier;
use zeroring_storage::replica::schema::TableIds;

pub use config::{ReplicationConfig, ShardId};
pub use error::{Remedy, ReplicationError};
pub use status::{Phase, ReplicaInfo, ReplicationStatus, SharedStatus, StatusSnapshot};

/// Where the core's results go: the commit bus, or a test.
pub trait CommitSink: ReaderBarrier + Send {
    /// A transaction is durable in the replica. Called in commit order, never blocks for long.
    fn commit(&mut self, commit: Arc<Commit>);

    /// The file at `path` is another replica from now on (initial sync, automatic resync).
    /// Executors must close what they have open, tell their clients to start anew, and open it
    /// again. Commits that follow continue from its initial version.
    fn replica_replaced(&mut self, path: &Path, replica: &ReplicaInfo);
}

/// The replication core.
#[derive(Debug)]
pub struct ReplicationCore;

/// A running core.
#[derive(Debug)]
pub struct ReplicationHandle {
    status: SharedStatus,
    table_ids: TableIds,
    thread: Option<JoinHandle<Result<(), ReplicationError>>>,
}

impl ReplicationCore {
    /// Starts the core's thread. It prepares upstream, makes or opens the replica, and follows
    /// the stream until stopped; its progress is in the handle's status.
    ///
    /// # Errors
    /// [`ReplicationError::Thread`]; everything later is told by [`ReplicationHandle::join`].
    pub fn start(
        config: ReplicationConfig,
        sink: Box<dyn CommitSink>,
    ) -> Result<ReplicationHandle, ReplicationError> {
        let status = SharedStatus::default();
        status.make_bell().map_err(ReplicationError::Thread)?;
        let (for_thread, table_ids) = (status.clone(), config.table_ids.clone());
        let thread = std::thread::Builder::new()
            .name("replication".into())
            .spawn(move || {
                let core = || core::Core::new(&config, &for_thread, sink).run();
                // Whoever waits for the core must hear of a panic too.
                let result =
                    catch_unwind(AssertUnwindSafe(core)).unwrap_or(Err(ReplicationError::Panicked));
                for_thread.finish(result.as_ref().err().map(ToString::to_string));
                result
            })
            .map_err(ReplicationError::Thread)?;
        Ok(ReplicationHandle { status, table_ids, thread: Some(thread) })
    }
}

impl ReplicationHandle {
    /// The live status.
    pub fn status(&self) -> &SharedStatus {
        &self.status
    }

    /// The numbers of tables in commits: readers of the replica must have the same.
    pub fn table_ids(&self) -> &TableIds {
        &self.table_ids
    }

    /// Waits until there is a replica to open; `None` if the core ended first or time is up.
    pub fn wait_ready(&self, timeout: Duration) -> Option<ReplicaInfo> {
        self.status.wait_ready(timeout)
    }

    /// Asks the core to stop after the transaction in hand. Does not wait.
    pub fn stop(&self) {
        self.status.request_stop();
    }

    /// The core has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end. `Ok` after [`ReplicationHandle::stop`] and after another server took
    /// the slot over.
    ///
    /// # Errors
    /// Why the core gave up.
    pub fn join(mut self) -> Result<(), ReplicationError> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(ReplicationError::Panicked),
            None => Ok(()),
        }
    }
}

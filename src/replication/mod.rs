//! Replication: Postgres → replica file → [`zeroring_core::change::Commit`]s.
//!
//! One plain (blocking) thread, the *replication core*, is the only writer of the replica. It
//! prepares upstream ([`config::ShardId`] names the objects), copies all tables once, then follows the
//! logical-replication stream: every transaction is applied to SQLite in one transaction, and
//! only after that is durable it is published to the executors and acknowledged upstream.
//!
//! Invariants: nothing is acknowledged that is not durable; commits are published in order and
//! form a chain; a replica file appears under its name only when it is complete.
//!
//! Data comes in from `zeroring_net::pg`; it leaves through a [`CommitSink`] (the commit bus) and
//! through the replica file.

pub mod commit_bus;
pub mod config;
pub mod published;
pub mod status;
pub mod types;
pub mod upstream;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use zeroring_core::change::Commit;

pub use config::{ReplicationConfig, ShardId};
pub use status::{Phase, ReplicaInfo, ReplicationStatus, SharedStatus, StatusSnapshot};

/// Where the core's results go: the commit bus, or a test.
pub trait CommitSink: Send {
    /// A transaction is durable in the replica. Called in commit order, never blocks for long.
    fn commit(&mut self, commit: Arc<Commit>);

    /// The file at `path` is another replica from now on (initial sync, automatic resync).
    /// Executors must close what they have open, tell their clients to start anew, and open it
    /// again. Commits that follow continue from its initial version.
    fn replica_replaced(&mut self, path: &Path, replica: &ReplicaInfo);
}

/// Why the core gave up.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// The thread could not be started.
    #[error("the replication thread could not be started: {0}")]
    Thread(std::io::Error),
    /// Talking to upstream failed in a way that trying again will not mend.
    #[error("replication from upstream cannot go on: {0}")]
    Upstream(String),
    /// The core panicked: a bug.
    #[error("the replication thread panicked; this is a bug")]
    Panicked,
}

/// The replication core.
#[derive(Debug)]
pub struct ReplicationCore;

/// A running core.
#[derive(Debug)]
pub struct ReplicationHandle {
    status: SharedStatus,
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
        let for_thread = status.clone();
        let thread = std::thread::Builder::new()
            .name("replication".into())
            .spawn(move || {
                let result = run(&config, sink, &for_thread);
                for_thread.finish(result.as_ref().err().map(ToString::to_string));
                result
            })
            .map_err(ReplicationError::Thread)?;
        Ok(ReplicationHandle { status, thread: Some(thread) })
    }
}

fn run(
    config: &ReplicationConfig,
    _sink: Box<dyn CommitSink>,
    _status: &ReplicationStatus,
) -> Result<(), ReplicationError> {
    Err(ReplicationError::Upstream(format!(
        "replicating {:?} is not built yet",
        config.shard.schema()
    )))
}

impl ReplicationHandle {
    /// The live status.
    pub fn status(&self) -> &SharedStatus {
        &self.status
    }

    /// Waits until there is a replica to open; `None` if the core ended first or time is up.
    pub fn wait_ready(&self, timeout: Duration) -> Option<ReplicaInfo> {
        self.status.wait_ready(timeout)
    }

    /// Asks the core to stop after the transaction in hand. Does not wait.
    pub fn stop(&self) {
        self.status.stop.store(true, Ordering::Release);
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

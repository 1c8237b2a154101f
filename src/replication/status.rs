//! What the replication core is doing, for readiness, `/statz` and logs. Written by the core's
//! thread, read by anybody.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use zeroring_core::version::StateVersion;

use crate::stages::StageClocks;

/// What the core is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Checking upstream and the replica file.
    #[default]
    Starting,
    /// Copying all tables.
    InitialSync,
    /// Creating the replica's indexes.
    Indexing,
    /// Following the stream.
    Streaming,
    /// The stream broke; waiting to connect again.
    Reconnecting,
    /// Stopped on request, or another server took the slot over.
    Stopped,
    /// Gave up.
    Failed,
}

/// The replica that executors may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaInfo {
    /// Version of its initial sync: names the lineage.
    #[serde(serialize_with = "as_text")]
    pub replica_version: StateVersion,
    /// Counts the replicas made by this process: rises with every automatic resync.
    pub generation: u64,
}

fn as_text<S: serde::Serializer>(v: &StateVersion, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(v.as_str())
}

#[derive(Debug, Default)]
struct Guarded {
    phase: Phase,
    replica: Option<ReplicaInfo>,
    watermark: StateVersion,
    failure: Option<String>,
    last_error: Option<String>,
}

/// Live counters of the core. Cheap to read.
#[derive(Debug, Default)]
pub struct ReplicationStatus {
    guarded: Mutex<Guarded>,
    changed: Condvar,
    stop: AtomicBool,
    /// Readable once the core is to stop.
    bell: OnceLock<OwnedFd>,
    pub(crate) transactions: AtomicU64,
    pub(crate) changes: AtomicU64,
    pub(crate) stream_bytes: AtomicU64,
    pub(crate) reconnects: AtomicU64,
    pub(crate) initial_syncs: AtomicU64,
    pub(crate) copied_rows: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    pub(crate) acked_lsn: AtomicU64,
    /// Where the core's time goes.
    pub(crate) stages: StageClocks,
    /// `f64` bits: upstream commit time of the last commit.
    pub(crate) last_commit_ms: AtomicU64,
}

/// A copy of the counters.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusSnapshot {
    /// What the core is doing.
    pub phase: Phase,
    /// The replica, once there is one.
    pub replica: Option<ReplicaInfo>,
    /// Version of the last commit.
    pub watermark: String,
    /// Why it gave up.
    pub failure: Option<String>,
    /// The last error that it recovered from.
    pub last_error: Option<String>,
    /// Transactions applied.
    pub transactions: u64,
    /// Row changes applied.
    pub changes: u64,
    /// Bytes of the stream.
    pub stream_bytes: u64,
    /// Reconnections.
    pub reconnects: u64,
    /// Initial syncs by this process.
    pub initial_syncs: u64,
    /// Rows copied by initial syncs.
    pub copied_rows: u64,
    /// Bytes received by initial syncs.
    pub copied_bytes: u64,
    /// Last LSN acknowledged, as Postgres prints it.
    pub acked_lsn: String,
    /// Upstream commit time of the last commit, ms since the Unix epoch; 0 before the first.
    pub last_commit_ms: f64,
}

impl ReplicationStatus {
    fn with<R>(&self, f: impl FnOnce(&mut Guarded) -> R) -> R {
        // A panic elsewhere cannot leave these plain values half-written in a harmful way.
        let mut guarded = self.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut guarded);
        self.changed.notify_all();
        result
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.with(|g| g.phase = phase);
    }

    pub(crate) fn set_replica(&self, replica: ReplicaInfo, watermark: StateVersion) {
        self.with(|g| {
            g.replica = Some(replica);
            g.watermark = watermark;
        });
    }

    pub(crate) fn set_watermark(&self, watermark: StateVersion) {
        self.with(|g| g.watermark = watermark);
    }

    pub(crate) fn set_last_error(&self, error: String) {
        self.with(|g| g.last_error = Some(error));
    }

    pub(crate) fn finish(&self, failure: Option<String>) {
        self.with(|g| {
            g.phase = if failure.is_some() { Phase::Failed } else { Phase::Stopped };
            g.failure = failure;
        });
    }

    /// Makes the bell that [`ReplicationStatus::request_stop`] rings.
    pub(crate) fn make_bell(&self) -> std::io::Result<()> {
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        // Only set once: the core is started once.
        let _ = self.bell.set(bell);
        Ok(())
    }

    /// Readable once the core is to stop.
    pub(crate) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.bell.get().map(AsFd::as_fd)
    }

    /// Asks the core to stop.
    pub(crate) fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Some(bell) = self.bell.get()
            && let Err(error) = rustix::io::write(bell, &1u64.to_ne_bytes())
        {
            // It notices anyway, at its next duty.
            tracing::warn!(%error, "the replication core could not be woken");
        }
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// What the core is doing now.
    pub fn phase(&self) -> Phase {
        self.with(|g| g.phase)
    }

    /// The replica that executors may open, if there is one already.
    pub fn replica(&self) -> Option<ReplicaInfo> {
        self.with(|g| g.replica.clone())
    }

    /// Waits until there is a replica to open. `None` if the core ended first or time is up
    /// (then see [`ReplicationStatus::snapshot`]).
    pub fn wait_ready(&self, timeout: Duration) -> Option<ReplicaInfo> {
        let deadline = Instant::now() + timeout;
        let mut guarded = self.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if guarded.replica.is_some() {
                return guarded.replica.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || matches!(guarded.phase, Phase::Stopped | Phase::Failed) {
                return None;
            }
            guarded =
                self.changed.wait_timeout(guarded, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A copy of all counters.
    pub fn snapshot(&self) -> StatusSnapshot {
        let load = |a: &AtomicU64| a.load(Ordering::Relaxed);
        self.with(|g| StatusSnapshot {
            phase: g.phase,
            replica: g.replica.clone(),
            watermark: g.watermark.to_string(),
            failure: g.failure.clone(),
            last_error: g.last_error.clone(),
            transactions: load(&self.transactions),
            changes: load(&self.changes),
            stream_bytes: load(&self.stream_bytes),
            reconnects: load(&self.reconnects),
            initial_syncs: load(&self.initial_syncs),
            copied_rows: load(&self.copied_rows),
            copied_bytes: load(&self.copied_bytes),
            acked_lsn: format_lsn(load(&self.acked_lsn)),
            last_commit_ms: f64::from_bits(load(&self.last_commit_ms)),
        })
    }
}

/// An LSN as Postgres prints it.
pub fn format_lsn(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff)
}

/// Shared status.
pub type SharedStatus = Arc<ReplicationStatus>;

//! The replication core's thread: find or make a replica, follow the stream, recover.
//!
//! ```text
//!   look at the file ──▶ fits upstream? ──no──▶ initial sync ─┐
//!                             │yes                            │
//!                             └──────▶ stream ◀───────────────┘
//!        connection lost: again, after a while   schema change, lost slot, …: initial sync
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use zeroring_core::version::StateVersion;
use zeroring_net::pg::{Backoff, Client};
use zeroring_storage::replica::analyze::Analyzer;
use zeroring_storage::replica::checkpoint::Checkpointer;
use zeroring_storage::replica::initial::delete_replica;
use zeroring_storage::replica::startup::{self, Found};
use zeroring_storage::replica::writer::{ReplicaWriter, WriterOptions};

use super::config::ReplicationConfig;
use super::error::{Remedy, ReplicationError};
use super::status::{Phase, ReplicaInfo, SharedStatus};
use super::stream::{self, Ended, SessionParts};
use super::upstream::shard::{self, Occasion, ShardConfig};
use super::upstream::slots::{self, SlotHealth};
use super::upstream::{UpstreamError, connect_checked, wal_sender_timeout};
use super::{CommitSink, initial_sync};

/// New initial syncs in a row that did not even lead to a stream. More would not help.
const MAX_FRUITLESS_RESYNCS: u32 = 1;

/// How often slots of servers that are being replaced are looked at.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(30);

/// How soon a stop is noticed while waiting.
const STOP_POLL: Duration = Duration::from_millis(50);

/// A replica that is open.
struct Replica {
    version: StateVersion,
    writer: ReplicaWriter,
    checkpointer: Checkpointer,
    analyzer: Analyzer,
}

/// The core.
pub(super) struct Core<'c> {
    config: &'c ReplicationConfig,
    status: &'c SharedStatus,
    sink: Box<dyn CommitSink>,
    replica: Option<Replica>,
    backoff: Backoff,
    fruitless_resyncs: u32,
    /// The stream was started since the last initial sync.
    streamed: bool,
    cleaner: Arc<Cleaner>,
}

impl<'c> Core<'c> {
    pub(super) fn new(
        config: &'c ReplicationConfig,
        status: &'c SharedStatus,
        sink: Box<dyn CommitSink>,
    ) -> Core<'c> {
        Core {
            config,
            status,
            sink,
            replica: None,
            backoff: Backoff::replication(),
            fruitless_resyncs: 0,
            streamed: false,
            cleaner: Arc::default(),
        }
    }

    /// Works until stopped, taken over, or beyond help.
    pub(super) fn run(mut self) -> Result<(), ReplicationError> {
        match self.work() {
            Err(end @ ReplicationError::Superseded) => {
                info!("{end}: it takes over");
                Ok(())
            }
            other => other,
        }
    }

    fn work(&mut self) -> Result<(), ReplicationError> {
        loop {
            let error = match self.cycle() {
                Ok(Ended::Stopped | Ended::TakenOver) => return Ok(()),
                Err(error) => error,
            };
            if self.status.stopping() {
                return Ok(());
            }
            match error.remedy() {
                Remedy::GiveUp => return Err(error),
                Remedy::Retry => {
                    let delay = self.backoff.delay();
                    warn!(%error, ?delay, "replication was interrupted; connecting again");
                    self.status.set_last_error(error.to_string());
                    self.status.set_phase(Phase::Reconnecting);
                    self.status.reconnects.fetch_add(1, Ordering::Relaxed);
                    self.pause(delay);
                }
                Remedy::Resync => self.resync(error)?,
            }
            if self.status.stopping() {
                return Ok(());
            }
        }
    }

    /// One connection's life.
    fn cycle(&mut self) -> Result<Ended, ReplicationError> {
        if self.replica.is_none() {
            self.open_or_sync()?;
        }
        self.follow()
    }

    fn pause(&self, delay: Duration) {
        let until = Instant::now() + delay;
        while !self.status.stopping() && Instant::now() < until {
            std::thread::sleep(STOP_POLL.min(until.saturating_duration_since(Instant::now())));
        }
    }

    /// Answers an error by a new initial sync.
    fn resync(&mut self, cause: ReplicationError) -> Result<(), ReplicationError> {
        if self.streamed {
            if !self.config.auto_reset {
                error!(error = %cause,
                    "replication needs a new initial sync, and ZERO_AUTO_RESET is off");
                return Err(cause);
            }
            // What stopped the stream lies before the new replica: it cannot stop it again. But
            // the next one may follow at once, as the steps of a migration do: let it finish.
            self.fruitless_resyncs = 0;
            let delay = self.backoff.delay();
            self.pause(delay);
        } else {
            self.fruitless_resyncs += 1;
            if self.fruitless_resyncs > MAX_FRUITLESS_RESYNCS {
                return Err(cause);
            }
        }
        self.streamed = false;
        warn!(error = %cause, "making a new replica");
        self.status.set_last_error(cause.to_string());
        match self.sync() {
            Err(error) if error.remedy() == Remedy::Retry => {
                // Asked for again by the next look at the file and upstream.
                self.replica = None;
                let delay = self.backoff.delay();
                warn!(%error, ?delay, "the initial sync failed; trying again");
                self.status.set_last_error(error.to_string());
                delete_replica(&self.config.replica_path)?;
                self.pause(delay);
                Ok(())
            }
            other => other,
        }
    }

    /// Opens the replica file if it is of use, else makes one.
    fn open_or_sync(&mut self) -> Result<(), ReplicationError> {
        match startup::find(&self.config.replica_path)? {
            Found::Nothing => self.sync(),
            Found::Unusable(reason) => {
                warn!(%reason, path = %self.config.replica_path.display(),
                    "the replica cannot be used; making a new one");
                delete_replica(&self.config.replica_path)?;
                self.sync()
            }
            Found::Replica(found) => {
                self.check(&found)?;
                self.open(found.replica_version, false)
            }
        }
    }

    /// Runs the initial sync and opens its result.
    fn sync(&mut self) -> Result<(), ReplicationError> {
        let had_one = self.status.replica().is_some();
        let version = initial_sync::run(self.config, self.status)?;
        self.open(version, had_one)
    }

    fn open(&mut self, version: StateVersion, replaced: bool) -> Result<(), ReplicationError> {
        // The old writer goes first: its file is gone already.
        self.replica = None;
        let path = &self.config.replica_path;
        // Brings a fresh file into WAL mode.
        if let Found::Unusable(reason) = startup::find(path)? {
            return Err(UpstreamError::AutoReset(format!("the replica: {reason}")).into());
        }
        let options =
            WriterOptions::new(self.config.shard.app.clone(), self.config.table_ids.clone());
        let writer = ReplicaWriter::open(path, &options)?;
        let generation = self.status.replica().map_or(1, |r| r.generation + 1);
        let info = ReplicaInfo { replica_version: version.clone(), generation };
        if replaced {
            self.sink.replica_replaced(path, &info);
        }
        self.status.set_replica(info, writer.version().clone());
        self.replica = Some(Replica {
            version,
            writer,
            checkpointer: Checkpointer::default(),
            analyzer: Analyzer::default(),
        });
        Ok(())
    }

    /// Whether an existing replica still fits upstream (spec: replication §1.8).
    fn check(&mut self, found: &startup::ReplicaInfo) -> Result<(), ReplicationError> {
        let config = self.config;
        let reset = |reason: String| Err(UpstreamError::AutoReset(reason).into());
        let (mut client, server_version) = connect_checked(config, "zero-replication-setup")?;
        let client = &mut client;
        let requested = &config.publications;
        shard::ensure_shard(client, &config.shard, requested, server_version, Occasion::Resume)?;
        let shard_config = shard::read_config(client, &config.shard)?;
        if !shard::publications_match(&config.shard, &shard_config, requested, Occasion::Resume) {
            shard::drop_shard(client, &config.shard)?;
            return reset(format!(
                "the requested publications {requested:?} are not those that are replicated ({:?})",
                shard_config.publications
            ));
        }
        if shard_config.publications != found.publications {
            return reset(format!(
                "the replica was made of publications {:?}, upstream has {:?}",
                found.publications, shard_config.publications
            ));
        }
        let missing = shard::missing_publications(client, &found.publications)?;
        if !missing.is_empty() {
            return reset(format!("publications {missing:?} do not exist any more"));
        }
        let version = &found.replica_version;
        let Some(row) = slots::find_replica(client, &config.shard, version)? else {
            return reset(format!("upstream does not know a replica of version {version}"));
        };
        match slots::slot_health(client, &row.slot)? {
            SlotHealth::Missing => reset(format!("its replication slot {} is gone", row.slot)),
            SlotHealth::Lost => reset(format!("its replication slot {} was invalidated", row.slot)),
            SlotHealth::Ok | SlotHealth::Unreserved => Ok(()),
        }
    }

    /// Takes the slot over and follows the stream.
    fn follow(&mut self) -> Result<Ended, ReplicationError> {
        let Some(replica) = &mut self.replica else { return Ok(Ended::Stopped) };
        let config = self.config;
        let (mut client, server_version) = connect_checked(config, "zero-replication-setup")?;
        let Some(row) = slots::find_replica(&mut client, &config.shard, &replica.version)? else {
            info!("upstream does not know this replica any more: another server took over");
            return Ok(Ended::TakenOver);
        };
        let slot_is_gone = || {
            info!(slot = row.slot, "the replication slot is gone: another server took over");
            Ok(Ended::TakenOver)
        };
        if !slots::take_over(&mut client, config, &row)? {
            return slot_is_gone();
        }
        let shard_config: ShardConfig = shard::read_config(&mut client, &config.shard)?;
        let sender_timeout = wal_sender_timeout(&mut client)?;
        drop(client);
        let started = stream::start(SessionParts {
            config,
            status: self.status,
            writer: &mut replica.writer,
            checkpointer: &mut replica.checkpointer,
            analyzer: &mut replica.analyzer,
            sink: &mut *self.sink,
            replica: &row,
            shard: &shard_config,
            sender_timeout,
            server_version,
        })?;
        // It may go between the two looks.
        let Some(mut session) = started else { return slot_is_gone() };
        self.streamed = true;
        self.status.set_phase(Phase::Streaming);
        self.cleaner.clean(config, row.rank, self.status);
        let ended = session.run();
        if session.progress() > 0 {
            // Not before: a message that cannot be handled must not be retried without rest.
            self.backoff.reset();
        }
        ended
    }
}

/// Removes what older replicas left behind, on a thread beside the stream that ends by itself.
#[derive(Debug, Default)]
struct Cleaner {
    at_work: AtomicBool,
    /// Replicas of a lower rank are to go.
    rank: AtomicI64,
}

impl Cleaner {
    fn clean(self: &Arc<Self>, config: &ReplicationConfig, rank: i64, status: &SharedStatus) {
        self.rank.store(rank, Ordering::SeqCst);
        if self.at_work.swap(true, Ordering::SeqCst) {
            return;
        }
        let (cleaner, config, status) = (self.clone(), config.clone(), status.clone());
        let work = move || {
            loop {
                let rank = cleaner.work(&config, &status);
                cleaner.at_work.store(false, Ordering::SeqCst);
                // A newer replica may have asked in vain just now.
                let done = cleaner.rank.load(Ordering::SeqCst) == rank || status.stopping();
                if done || cleaner.at_work.swap(true, Ordering::SeqCst) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("replica-cleanup".into());
        if let Err(error) = thread.spawn(work) {
            self.at_work.store(false, Ordering::SeqCst);
            warn!(%error, "older replicas cannot be cleaned up");
        }
    }

    /// Works until no older replica is left; returns the rank below which.
    fn work(&self, config: &ReplicationConfig, status: &SharedStatus) -> i64 {
        loop {
            let rank = self.rank.load(Ordering::SeqCst);
            let left = connect_checked(config, "zero-replica-cleanup").and_then(
                |(mut client, _): (Client, u32)| {
                    slots::drop_old_replicas(&mut client, &config.shard, rank)
                },
            );
            match left {
                Ok(0) => return rank,
                Ok(draining) => info!(draining, "slots of older replicas are still in use"),
                Err(error) => warn!(%error, "older replicas could not be cleaned up"),
            }
            let until = Instant::now() + CLEAN_UP_INTERVAL;
            while Instant::now() < until {
                // The weakest of all duties: it ends with the core.
                if status.stopping() || Arc::strong_count(status) == 1 {
                    return rank;
                }
                std::thread::sleep(STOP_POLL);
            }
        }
    }
}

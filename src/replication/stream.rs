//! One session of the replication stream: messages into the replica, commits to the executors,
//! acknowledgements back (spec: replication §3).
//!
//! A commit is published as soon as the replica has it, and acknowledged when it would also
//! survive a power loss. Many commits share one sync of the disk ([`ACK_INTERVAL`]). While the next
//! transaction has arrived already, a commit waits for it, and both are one transaction of SQLite
//! ([`MAX_HELD`]): behind, the core gets faster; up to date, nothing waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, info};
use zeroring_core::change::Commit;
use zeroring_core::change::message::{ChangeMessage, Relation};
use zeroring_core::change::published::PublishedSchema;
use zeroring_net::pg::replication::format_lsn;
use zeroring_net::pg::{Client, PgError, ReplicationStream, SqlState, StreamEvent, quote_ident};
use zeroring_storage::replica::analyze::Analyzer;
use zeroring_storage::replica::checkpoint::{Checkpointer, WalState};
use zeroring_storage::replica::writer::{Applied, ReplicaWriter};

use super::CommitSink;
use super::config::ReplicationConfig;
use super::decode::{Decoded, Decoder};
use super::error::ReplicationError;
use super::published::{first_difference, parse, read_published_schema};
use super::status::ReplicationStatus;
use super::types::TypeCatalog;
use super::upstream::shard::ShardConfig;
use super::upstream::slots::ReplicaRow;
use super::upstream::{UpstreamError, connect_checked, session_config};
use crate::stages::Stage;

/// Commits are made durable and acknowledged at most this much later. It bounds how often the
/// disk is synced, and what Postgres sends again after a crash.
const ACK_INTERVAL: Duration = Duration::from_millis(250);

/// Commits that wait for the one after them. Each waits only for one that is short and here, so
/// this bounds the wait to a few milliseconds.
const MAX_HELD: usize = 32;

/// Attempts to start while the slot's former user is still being thrown out.
const START_ATTEMPTS: u32 = 6;
const START_RETRY: Duration = Duration::from_millis(10);

/// How often a full WAL is looked at again.
const WAL_FULL_RETRY: Duration = Duration::from_millis(20);

/// How long a session waits at most before it looks around, without time-outs of its own.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// How a session ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// As asked.
    Stopped,
    /// Another server streams from the slot now, or has moved on to a new one.
    TakenOver,
}

/// What a session works with.
pub struct SessionParts<'c> {
    /// Configuration.
    pub config: &'c ReplicationConfig,
    /// Status.
    pub status: &'c ReplicationStatus,
    /// The replica.
    pub writer: &'c mut ReplicaWriter,
    /// Its checkpoints.
    pub checkpointer: &'c mut Checkpointer,
    /// Its statistics.
    pub analyzer: &'c mut Analyzer,
    /// Where commits go.
    pub sink: &'c mut dyn CommitSink,
    /// The replica's row upstream.
    pub replica: &'c ReplicaRow,
    /// What the shard replicates.
    pub shard: &'c ShardConfig,
    /// The server's `wal_sender_timeout`.
    pub sender_timeout: Option<Duration>,
    /// `server_version_num`.
    pub server_version: u32,
}

/// A running session.
pub struct Session<'c> {
    parts: SessionParts<'c>,
    stream: ReplicationStream,
    decoder: Decoder,
    catalog: TypeCatalog,
    /// LSN of the transaction in hand, or of the last one.
    lsn: u64,
    /// When the commits not yet acknowledged are to be.
    ack_due: Option<Instant>,
    acked: u64,
    sent_at: Instant,
    received_at: Instant,
    /// Transactions applied by this session.
    progress: u64,
}

/// Starts streaming behind the replica's last transaction. `None` if the slot is gone: the server
/// of a newer replica has removed it.
///
/// # Errors
/// [`UpstreamError::AutoReset`] if the slot was invalidated.
pub fn start(parts: SessionParts<'_>) -> Result<Option<Session<'_>>, ReplicationError> {
    let from = parts.writer.version().lsn()? + 1;
    // Identifiers in a string: unquoted, they would be folded to lower case.
    let quoted: Vec<String> = parts.shard.publications.iter().map(|p| quote_ident(p)).collect();
    let publications = quoted.join(",").replace('\'', "''");
    let command = format!(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names '{publications}', \
         messages 'true')",
        quote_ident(&parts.replica.slot),
        format_lsn(from),
    );
    let mut settings = session_config(parts.config, "zero-replicator");
    settings.read_timeout = parts.config.socket_inactivity;
    let mut attempt = 1;
    let stream = loop {
        let client = Client::connect_replication(&settings)?;
        match client.start_replication(&command) {
            Ok(stream) => break stream,
            Err(e) if e.is(SqlState::OBJECT_IN_USE) && attempt < START_ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(START_RETRY);
            }
            Err(e) if e.is(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => {
                return Err(UpstreamError::AutoReset(e.to_string()).into());
            }
            // Of publications that are missing it speaks later, in the stream.
            Err(e) if e.is(SqlState::UNDEFINED_OBJECT) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    };
    info!(slot = parts.replica.slot, from = format_lsn(from), "replication stream started");
    let now = Instant::now();
    Ok(Some(Session {
        decoder: Decoder::new(&parts.config.shard),
        catalog: TypeCatalog::default(),
        stream,
        lsn: 0,
        ack_due: None,
        acked: 0,
        sent_at: now,
        received_at: now,
        progress: 0,
        parts,
    }))
}

impl Session<'_> {
    /// Transactions applied so far.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Follows the stream until it ends. The transaction in hand is rolled back then.
    ///
    /// # Errors
    /// Why the stream ended, if it was not asked to.
    pub fn run(&mut self) -> Result<Ended, ReplicationError> {
        let ended = self.follow();
        if self.parts.writer.in_transaction() {
            self.parts.writer.apply(&ChangeMessage::Rollback)?;
        }
        match ended {
            Err(ReplicationError::Upstream(UpstreamError::Pg(e)))
                if e.is(SqlState::ADMIN_SHUTDOWN) =>
            {
                info!("another server took the replication slot over");
                Ok(Ended::TakenOver)
            }
            other => other,
        }
    }

    fn follow(&mut self) -> Result<Ended, ReplicationError> {
        loop {
            if self.parts.status.stopping() {
                self.acknowledge(None)?;
                return Ok(Ended::Stopped);
            }
            let deadline = self.next_duty()?;
            let bell = self.parts.status.bell();
            let before = self.stream.received_bytes();
            let event = self.stream.next(Some(deadline), bell)?;
            match event {
                StreamEvent::Data { payload, .. } => {
                    let decoded = self.decoder.decode(payload)?;
                    self.heard(before);
                    self.on_message(decoded)?;
                }
                StreamEvent::KeepAlive { wal_end, reply_requested } => {
                    self.heard(before);
                    self.on_keepalive(wal_end, reply_requested)?;
                }
                StreamEvent::Idle | StreamEvent::Woken => self.analyze(true)?,
            }
        }
    }

    fn heard(&mut self, before: u64) {
        self.received_at = Instant::now();
        let bytes = self.stream.received_bytes() - before;
        self.parts.status.stream_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Does what is due, and says when something will be next.
    fn next_duty(&mut self) -> Result<Instant, ReplicationError> {
        let now = Instant::now();
        if self.ack_due.is_some_and(|due| due <= now) && !self.in_transaction() {
            self.acknowledge(None)?;
        }
        let mut next = now + MAX_WAIT;
        if let Some(timeout) = self.parts.sender_timeout {
            let keepalive = self.sent_at + timeout * 3 / 4;
            if keepalive <= now {
                // Zero says nothing but that we are alive.
                self.send(0)?;
            }
            next = next.min(self.sent_at + timeout * 3 / 4);
            let limit = self.parts.config.stream_inbound_timeout.unwrap_or(timeout * 2);
            // Messages that wait here to be handled are signs of life too.
            let silent = self.received_at + limit;
            if silent <= now && !self.stream.has_buffered()? {
                return Err(PgError::Timeout(limit).into());
            }
            next = next.min(silent.max(now + START_RETRY));
        }
        if let Some(due) = self.ack_due {
            next = next.min(due.max(now + START_RETRY));
        }
        Ok(next)
    }

    /// Something that was received is not in the replica yet.
    fn in_transaction(&self) -> bool {
        self.decoder.in_transaction() || self.parts.writer.in_transaction()
    }

    fn send(&mut self, lsn: u64) -> Result<(), ReplicationError> {
        self.stream.send_status(lsn)?;
        self.sent_at = Instant::now();
        Ok(())
    }

    /// Makes all commits durable and reports them; with `position`, also that nothing of ours lies
    /// before it.
    fn acknowledge(&mut self, position: Option<u64>) -> Result<(), ReplicationError> {
        if self.ack_due.take().is_some() {
            self.acked = self.acked.max(self.parts.writer.sync()?.lsn()?);
        }
        self.acked = self.acked.max(position.unwrap_or(0));
        self.send(self.acked)?;
        self.parts.status.acked_lsn.store(self.acked, Ordering::Relaxed);
        Ok(())
    }

    fn on_keepalive(&mut self, wal_end: u64, reply: bool) -> Result<(), ReplicationError> {
        if self.in_transaction() {
            // What has been sent is not applied yet.
            return if reply { self.send(self.acked) } else { Ok(()) };
        }
        if reply || self.ack_due.is_none() {
            self.acknowledge(Some(wal_end))?;
        }
        Ok(())
    }

    fn on_message(&mut self, decoded: Decoded) -> Result<(), ReplicationError> {
        match decoded {
            Decoded::Change(message) => self.apply(&message),
            Decoded::Relation(relation) => self.on_relation(relation),
            Decoded::SchemaChange(reason) => Err(self.reset_required(reason)),
            Decoded::LagReport | Decoded::Nothing => Ok(()),
        }
    }

    fn reset_required(&self, reason: String) -> ReplicationError {
        ReplicationError::ResetRequired { lsn: format_lsn(self.lsn), reason }
    }

    fn apply(&mut self, message: &ChangeMessage) -> Result<(), ReplicationError> {
        if let ChangeMessage::Begin { watermark, .. } = message {
            self.lsn = watermark.lsn()?;
        }
        let writer = &mut *self.parts.writer;
        if let ChangeMessage::Commit { watermark } = message
            && writer.held() < MAX_HELD
            && self.stream.commit_is_ahead()
        {
            return Ok(writer.hold(watermark)?);
        }
        let begin = Instant::now();
        let applied = writer.apply(message)?;
        self.parts.status.stages.add(Stage::Apply, begin.elapsed());
        for commit in writer.take_earlier() {
            self.publish(commit);
        }
        match applied {
            Applied::Pending | Applied::RolledBack => return Ok(()),
            Applied::Skipped => debug!(lsn = self.lsn, "a transaction was known already"),
            Applied::Committed(commit) => self.publish(commit),
        }
        // Also a known transaction is acknowledged again.
        self.ack_due.get_or_insert_with(|| Instant::now() + ACK_INTERVAL);
        self.analyze(false)?;
        self.checkpoint()
    }

    /// Gathers statistics if they are due. `quiet`: nothing was received for a while.
    fn analyze(&mut self, quiet: bool) -> Result<(), ReplicationError> {
        if !self.in_transaction() {
            self.parts.analyzer.maintain(self.parts.writer, quiet)?;
        }
        Ok(())
    }

    fn publish(&mut self, commit: Arc<Commit>) {
        let status = self.parts.status;
        let changes: usize = commit.tables.iter().map(|t| t.rows.len()).sum();
        status.transactions.fetch_add(1, Ordering::Relaxed);
        status.changes.fetch_add(changes as u64, Ordering::Relaxed);
        let ms = commit.upstream_commit_ms.to_bits();
        status.last_commit_ms.store(ms, Ordering::Relaxed);
        status.set_watermark(commit.version.clone());
        let begin = Instant::now();
        self.parts.sink.commit(commit.clone());
        status.stages.add(Stage::Publish, begin.elapsed());
        self.parts.analyzer.note(&commit, self.parts.writer);
        self.progress += 1;
    }

    /// Keeps the replica's WAL small. Nothing is applied while it is at its limit.
    fn checkpoint(&mut self) -> Result<(), ReplicationError> {
        loop {
            let state =
                self.parts.checkpointer.maintain(self.parts.writer, &mut *self.parts.sink)?;
            if state == WalState::Fine || self.parts.status.stopping() {
                return Ok(());
            }
            std::thread::sleep(WAL_FULL_RETRY);
            self.next_duty()?;
        }
    }

    fn on_relation(&mut self, relation: Relation) -> Result<(), ReplicationError> {
        let degraded = !self.parts.shard.ddl_detection;
        let unknown = Decoder::unknown_types(&relation, &self.catalog);
        if degraded || !unknown.is_empty() {
            let (mut client, _) = connect_checked(self.parts.config, "zero-schema-check")?;
            self.catalog.load(&mut client, unknown)?;
            if degraded && let Some(reason) = self.degraded_difference(&mut client, &relation)? {
                return Err(self.reset_required(reason));
            }
        }
        self.decoder.add_relation(relation, &self.catalog);
        Ok(())
    }

    /// Without event triggers, every description of a relation is a reason to look whether the
    /// schema is still that of the initial sync (spec: replication §3.8).
    fn degraded_difference(
        &mut self,
        client: &mut Client,
        relation: &Relation,
    ) -> Result<Option<String>, ReplicationError> {
        let Some(json) = &self.parts.replica.initial_schema else { return Ok(None) };
        let mut initial = parse(json)?;
        let types = initial.tables.iter().flat_map(|t| t.columns.values().map(|c| c.type_oid));
        self.catalog.load(client, types.collect::<Vec<_>>())?;
        for column in initial.tables.iter_mut().flat_map(|t| t.columns.values_mut()) {
            self.catalog.normalise(column);
        }
        let current = read_published_schema(
            client,
            &mut self.catalog,
            &self.parts.shard.publications,
            self.parts.server_version,
        )?;
        Ok(first_difference(&initial, &current, true)
            .or_else(|| relation_difference(&initial, relation)))
    }
}

/// How a relation of the stream differs from the schema of the initial sync.
fn relation_difference(initial: &PublishedSchema, relation: &Relation) -> Option<String> {
    let name = format!("{}.{}", relation.schema, relation.name);
    let Some(table) = initial.tables.iter().find(|t| t.oid == relation.oid) else {
        return Some(format!("table {name} was added"));
    };
    if (&table.schema, &table.name) != (&relation.schema, &relation.name) {
        return Some(format!("table {}.{} was renamed to {name}", table.schema, table.name));
    }
    for column in &relation.columns {
        if table.columns.get(&column.name).is_none_or(|c| c.type_oid != column.type_oid) {
            return Some(format!("column {} of table {name} is not as it was", column.name));
        }
    }
    let sent = |c: &String| relation.columns.iter().any(|r| &r.name == c);
    let gone = table.columns.keys().find(|c| !sent(c));
    gone.map(|c| format!("column {c} of table {name} was removed"))
}

//! The embedded CVR store: one local SQLite file for a single node.
//!
//! ```text
//! executors ──flush, ttl, purge──▶ writer thread ──(one transaction, one fsync)──▶ WAL
//!     │                               │ every CHECKPOINT_EVERY records
//!     │                               └──▶ checkpoint thread (PASSIVE: never stops the writer)
//!     └──load, rows, catch-up──────▶ reader thread
//! ```
//!
//! *Group commit.* The writer takes everything that waits, applies each group's flush under its
//! own savepoint (a refused or failing group leaves the others alone), commits once, and then
//! gives all verdicts. While it commits, the next batch gathers.
//!
//! *Durability.* WAL with `synchronous=FULL`: a verdict is given after the WAL was synced, so what
//! was acknowledged survives a power cut, and a `kill -9` at any moment leaves the last committed
//! state. Metadata and rows of a flush are one transaction: there are no rows behind their
//! version here.
//!
//! *File format*: `docs/cvr-embedded-format.md`. [`FORMAT_VERSION`] is checked at opening.

mod codec;
mod read;
mod schema;
mod write;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::Connection;
use zeroring_core::cvr::store::{
    CatchupRange, ConfigChange, CvrStoreError, InspectedQuery, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, RowRecord, TtlClock};

use self::read::Reader;
pub use self::schema::FORMAT_VERSION;
use self::write::Writer;
use super::{Answer, CvrStore, PurgeLimits, Reply, RowLookup, RowScan, Verdict};

/// Requests that may wait for the writer, and for the reader. A group has at most one in flight,
/// so this is also the number of groups that can be busy at once; beyond it they are refused.
const MAX_WAITING: usize = 65_536;

/// Requests that one transaction takes at most: bounds the time to the first verdict.
const MAX_BATCH: usize = 1_024;

/// Written records after which the WAL is checkpointed: some 16 MB of it.
const CHECKPOINT_EVERY: usize = 16_384;

/// WAL frames that may be left after a checkpoint beside the writer. A writer that never pauses
/// would otherwise never let SQLite start the WAL over; above this the writer itself checkpoints
/// the (small) rest between two batches.
const MAX_WAL_FRAMES: i64 = 16_384;

/// A connection that was not used for so long gives its page cache back.
const QUIET: Duration = Duration::from_secs(2);

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// SQLite refuses.
    #[error("CVR file {path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// Its error.
        source: rusqlite::Error,
    },
    /// Another kind of file.
    #[error("{path} is no CVR file of zeroring: name another file, or move this one away")]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// Written by a newer release.
    #[error(
        "CVR file {path} has format {found}, this release knows up to {known}: run the newer \
         release, or move the file away (clients will then resync)"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// No thread.
    #[error("CVR store: no thread could be started: {0}")]
    Thread(std::io::Error),
}

/// The store. Dropping it finishes what waits and closes the file.
#[derive(Debug)]
pub struct EmbeddedCvrStore {
    // Boxed: a bounded channel takes the memory of all its places at once.
    writer: SyncSender<Box<WriterMessage>>,
    reader: SyncSender<Box<ReaderMessage>>,
    threads: Vec<JoinHandle<()>>,
}

enum WriterMessage {
    Flush(Vec<GroupFlush>, Reply<Vec<Verdict>>),
    TtlClock(ClientGroupId, TtlClock, f64),
    /// This server took the group over at its connection of that time.
    Claim(ClientGroupId, f64),
    Purge(PurgeLimits, Reply<Answer<Purged>>),
    /// The WAL did not become short enough beside the writer.
    Checkpoint,
    Stop,
}

enum ReaderMessage {
    Load(ClientGroupId, f64, Reply<Answer<Loaded>>),
    Rows(RowLookup, Reply<Answer<Vec<RowRecord>>>),
    CatchupRows(RowScan, Reply<Answer<RowPage>>),
    CatchupConfig(CatchupRange, Reply<Answer<Vec<ConfigChange>>>),
    Inspect(ClientGroupId, Option<ClientId>, TtlClock, Reply<Answer<Vec<InspectedQuery>>>),
    Stop,
}

impl EmbeddedCvrStore {
    /// Opens the file, or makes it. `task_id` names this server among those that may use the file.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, task_id: &str) -> Result<EmbeddedCvrStore, OpenError> {
        let task_id: Arc<str> = task_id.into();
        let (writer, to_write) = sync_channel(MAX_WAITING);
        let (reader, to_read) = sync_channel(MAX_WAITING);
        // One waiting checkpoint is enough.
        let (checkpoint, to_checkpoint) = sync_channel(1);
        let writing = Writer::new(schema::open_writer(path)?, task_id.clone());
        let reading = Reader::new(schema::open_reader(path)?, task_id);
        let checkpointing = schema::open_writer(path)?;
        let (claims, rest) = (writer.clone(), writer.clone());
        let threads = vec![
            spawn("cvr-writer", move || write_loop(writing, &to_write, &checkpoint))?,
            spawn("cvr-reader", move || read_loop(reading, &to_read, &claims))?,
            spawn("cvr-checkpoint", move || {
                checkpoint_loop(&checkpointing, &to_checkpoint, &rest);
            })?,
        ];
        Ok(EmbeddedCvrStore { writer, reader, threads })
    }

    fn write<T>(
        &self,
        message: WriterMessage,
        fail: impl FnOnce(WriterMessage, CvrStoreError) -> T,
    ) {
        if let Err(e) = self.writer.try_send(Box::new(message)) {
            let (message, error) = refused(e);
            fail(*message, error);
        }
    }

    fn read(&self, message: ReaderMessage) {
        let Err(e) = self.reader.try_send(Box::new(message)) else { return };
        let (message, error) = refused(e);
        match *message {
            ReaderMessage::Load(.., reply) => answer(reply, Err(error)),
            ReaderMessage::Rows(_, reply) => answer(reply, Err(error)),
            ReaderMessage::CatchupRows(_, reply) => answer(reply, Err(error)),
            ReaderMessage::CatchupConfig(_, reply) => answer(reply, Err(error)),
            ReaderMessage::Inspect(.., reply) => answer(reply, Err(error)),
            ReaderMessage::Stop => {}
        }
    }
}

fn refused<T>(e: TrySendError<T>) -> (T, CvrStoreError) {
    match e {
        TrySendError::Full(message) => (message, CvrStoreError::Overloaded(MAX_WAITING)),
        TrySendError::Disconnected(message) => (message, CvrStoreError::Closed),
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, OpenError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(OpenError::Thread)
}

/// Gives an answer. A reply that panics is a bug of its owner and must not stop the store.
fn answer<T>(reply: Reply<T>, value: T) {
    if catch_unwind(AssertUnwindSafe(|| reply(value))).is_err() {
        tracing::error!("the receiver of a CVR answer panicked");
    }
}

fn refuse_all(batch: Vec<GroupFlush>, error: &CvrStoreError) -> Vec<Verdict> {
    batch
        .into_iter()
        .map(|flush| Verdict { group: flush.group, result: Err(error.clone()) })
        .collect()
}

impl CvrStore for EmbeddedCvrStore {
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>) {
        self.read(ReaderMessage::Load(group, connect_ms, reply));
    }

    fn flush(&self, batch: Vec<GroupFlush>, reply: Reply<Vec<Verdict>>) {
        self.write(WriterMessage::Flush(batch, reply), |message, error| {
            if let WriterMessage::Flush(batch, reply) = message {
                answer(reply, refuse_all(batch, &error));
            }
        });
    }

    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<Vec<RowRecord>>>) {
        self.read(ReaderMessage::Rows(lookup, reply));
    }

    fn catchup_rows(&self, scan: RowScan, reply: Reply<Answer<RowPage>>) {
        if scan.range.is_empty() {
            return answer(reply, Ok(RowPage::default()));
        }
        self.read(ReaderMessage::CatchupRows(scan, reply));
    }

    fn catchup_config(&self, range: CatchupRange, reply: Reply<Answer<Vec<ConfigChange>>>) {
        if range.is_empty() {
            return answer(reply, Ok(Vec::new()));
        }
        self.read(ReaderMessage::CatchupConfig(range, reply));
    }

    fn write_ttl_clock(&self, group: ClientGroupId, clock: TtlClock, now_ms: f64) {
        self.write(WriterMessage::TtlClock(group, clock, now_ms), |_, error| {
            tracing::warn!(%error, "a TTL clock was not written");
        });
    }

    fn inspect(
        &self,
        group: ClientGroupId,
        client: Option<ClientId>,
        clock: TtlClock,
        reply: Reply<Answer<Vec<InspectedQuery>>>,
    ) {
        self.read(ReaderMessage::Inspect(group, client, clock, reply));
    }

    fn purge(&self, limits: PurgeLimits, reply: Reply<Answer<Purged>>) {
        self.write(WriterMessage::Purge(limits, reply), |message, error| {
            if let WriterMessage::Purge(_, reply) = message {
                answer(reply, Err(error));
            }
        });
    }
}

impl Drop for EmbeddedCvrStore {
    fn drop(&mut self) {
        // Blocks if a queue is full; the threads take from it until they meet this.
        let _ = self.reader.send(Box::new(ReaderMessage::Stop));
        let _ = self.writer.send(Box::new(WriterMessage::Stop));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the CVR store panicked");
            }
        }
    }
}

/// The next request; `None` if nobody can send one any more. Calls `release` once if none comes for
/// [`QUIET`] after the last one.
fn next<T>(requests: &Receiver<T>, used: &mut bool, release: impl FnOnce()) -> Option<T> {
    if *used {
        match requests.recv_timeout(QUIET) {
            Ok(request) => return Some(request),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => release(),
        }
    }
    *used = true;
    requests.recv().ok()
}

/// Answers that wait for the commit.
enum Waiting {
    Flush(Vec<Verdict>, Reply<Vec<Verdict>>),
    Purge(Answer<Purged>, Reply<Answer<Purged>>),
}

fn write_loop(
    mut writer: Writer,
    requests: &Receiver<Box<WriterMessage>>,
    checkpoint: &SyncSender<()>,
) {
    let mut written = 0;
    let mut used = false;
    while let Some(first) = next(requests, &mut used, || writer.release_memory()) {
        let mut batch = vec![*first];
        batch.extend(requests.try_iter().take(MAX_BATCH - 1).map(|request| *request));
        let stop = batch.iter().any(|m| matches!(m, WriterMessage::Stop));
        written += write_batch(&mut writer, batch);
        if written >= CHECKPOINT_EVERY && checkpoint.try_send(()).is_ok() {
            written = 0;
        }
        if stop {
            return;
        }
    }
}

/// Applies a batch, commits it, and answers. Returns how many records were written.
fn write_batch(writer: &mut Writer, batch: Vec<WriterMessage>) -> usize {
    if batch.iter().any(|m| matches!(m, WriterMessage::Checkpoint)) {
        writer.checkpoint();
    }
    let begun = writer.begin();
    let mut waiting = Vec::with_capacity(batch.len());
    for message in batch {
        match message {
            WriterMessage::Flush(flushes, reply) => {
                let verdicts = flushes
                    .iter()
                    .map(|flush| Verdict {
                        group: flush.group.clone(),
                        result: begun.clone().and_then(|()| writer.flush(flush)),
                    })
                    .collect();
                waiting.push(Waiting::Flush(verdicts, reply));
            }
            WriterMessage::Purge(limits, reply) => {
                let purged = begun.clone().and_then(|()| writer.purge(&limits));
                waiting.push(Waiting::Purge(purged, reply));
            }
            WriterMessage::TtlClock(group, clock, now_ms) => {
                let done = begun.clone().and_then(|()| writer.ttl_clock(&group, clock, now_ms));
                log_failure(&group, done);
            }
            WriterMessage::Claim(group, connect_ms) => {
                let done = begun.clone().and_then(|()| writer.claim(&group, connect_ms));
                log_failure(&group, done);
            }
            WriterMessage::Checkpoint | WriterMessage::Stop => {}
        }
    }
    let committed = begun.and_then(|()| writer.commit());
    for waits in waiting {
        match waits {
            Waiting::Flush(mut verdicts, reply) => {
                if let Err(error) = &committed {
                    for verdict in verdicts.iter_mut().filter(|v| v.result.is_ok()) {
                        verdict.result = Err(error.clone());
                    }
                }
                answer(reply, verdicts);
            }
            Waiting::Purge(purged, reply) => {
                answer(reply, purged.and_then(|p| committed.clone().map(|()| p)));
            }
        }
    }
    writer.take_written()
}

fn log_failure(group: &ClientGroupId, done: Answer<()>) {
    if let Err(error) = done {
        tracing::warn!(%group, %error, "a CVR side note was not written");
    }
}

fn read_loop(
    mut reader: Reader,
    requests: &Receiver<Box<ReaderMessage>>,
    claims: &SyncSender<Box<WriterMessage>>,
) {
    let mut used = false;
    while let Some(request) = next(requests, &mut used, || reader.release_memory()) {
        match *request {
            ReaderMessage::Load(group, connect_ms, reply) => {
                let found = reader.load(&group, connect_ms);
                if let Ok((_, true)) = &found {
                    let claim = Box::new(WriterMessage::Claim(group.clone(), connect_ms));
                    if let Err(e) = claims.try_send(claim) {
                        // Only a hint: the first flush takes the group over anyway.
                        tracing::warn!(%group, error = %refused(e).1, "a take-over was not noted");
                    }
                }
                answer(reply, found.map(|(loaded, _)| loaded));
            }
            ReaderMessage::Rows(lookup, reply) => answer(reply, reader.rows(&lookup)),
            ReaderMessage::CatchupRows(scan, reply) => answer(reply, reader.catchup_rows(&scan)),
            ReaderMessage::CatchupConfig(range, reply) => {
                answer(reply, reader.catchup_config(&range));
            }
            ReaderMessage::Inspect(group, client, clock, reply) => {
                answer(reply, reader.inspect(&group, client.as_ref(), clock));
            }
            ReaderMessage::Stop => return,
        }
    }
}

/// Copies the WAL into the file beside the writer, as often as it is asked to. Ends with the
/// writer, which holds the other end of `requests`.
fn checkpoint_loop(
    connection: &Connection,
    requests: &Receiver<()>,
    writer: &SyncSender<Box<WriterMessage>>,
) {
    while requests.recv().is_ok() {
        match schema::checkpoint(connection) {
            Ok(frames) if frames > MAX_WAL_FRAMES => {
                // A full queue will bring the next checkpoint soon.
                let _ = writer.try_send(Box::new(WriterMessage::Checkpoint));
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the CVR file was not checkpointed"),
        }
    }
}

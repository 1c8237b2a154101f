//! The embedded CVR store: one local SQLite file for a single node.
//!
//! ```text
//! executors ──flush, ttl, purge──▶ writer thread ──(one transaction, one fsync)──▶ WAL
//!     │                               │ every CHECKPOINT_EVERY records
//!     │                               └──▶ checkpoint thread (PASSIVE: never stops the writer)
//!     └──load, rows, catch-up──────▶ reader thread
//! ```
//!
//! *Group commit.* The writer takes everything that waits, applies each group's flush (a refused or
//! failing group leaves the others alone), commits once, and then gives all verdicts. While it
//! commits, the next batch gathers. Rows that follow are written in slices between batches.
//!
//! *Durability.* WAL with `synchronous=FULL`: a verdict is given after the WAL was synced, so what
//! was acknowledged survives a power cut, and a `kill -9` at any moment leaves the last committed
//! state. Metadata and up to [`MAX_SYNC_ROWS`](super::MAX_SYNC_ROWS) rows of a flush are one
//! transaction; the file knows of rows that are behind their group.
//!
//! *File format*: `docs/cvr-embedded-format.md`. [`FORMAT_VERSION`] is checked at opening.

mod codec;
mod read;
mod rows;
mod schema;
mod write;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use zeroring_core::cvr::store::{
    CatchupPage, CvrStoreError, Flushed, InspectedQuery, Loaded, Purged, RowPage,
};
use zeroring_core::cvr::{ClientGroupId, ClientId, GroupFlush, TtlClock};

use self::read::{Attempt, Reader};
use self::rows::RowsToWrite;
pub use self::schema::FORMAT_VERSION;
use self::write::{Applied, Writer};
use super::owed::{Owed, Part, RowsPlan};
use super::{
    Answer, CatchupScan, CvrStore, PurgeLimits, Reply, RowLookup, RowOptions, Verdict, Verdicts,
    rows_behind,
};

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
    owed: Arc<Owed<ReaderMessage>>,
    threads: Vec<JoinHandle<()>>,
}

enum WriterMessage {
    Flush(Vec<GroupFlush>, Verdicts),
    TtlClock(ClientGroupId, TtlClock, f64),
    /// This server took the group over at its connection of that time.
    Claim(ClientGroupId, f64),
    Purge(PurgeLimits, Reply<Answer<Purged>>),
    /// The WAL did not become short enough beside the writer.
    Checkpoint,
    Stop,
}

enum ReaderMessage {
    Load(LoadRequest),
    Rows(RowLookup, Reply<Answer<RowPage>>),
    CatchUp(CatchupScan, Reply<Answer<CatchupPage>>),
    Inspect(ClientGroupId, Option<ClientId>, TtlClock, Reply<Answer<Vec<InspectedQuery>>>),
    Stop,
}

struct LoadRequest {
    group: ClientGroupId,
    connect_ms: f64,
    /// How often it was found behind its rows.
    attempts: usize,
    reply: Reply<Answer<Loaded>>,
}

impl ReaderMessage {
    fn refuse(self, error: CvrStoreError) {
        match self {
            ReaderMessage::Load(request) => answer(request.reply, Err(error)),
            ReaderMessage::Rows(_, reply) => answer(reply, Err(error)),
            ReaderMessage::CatchUp(_, reply) => answer(reply, Err(error)),
            ReaderMessage::Inspect(.., reply) => answer(reply, Err(error)),
            ReaderMessage::Stop => {}
        }
    }
}

impl EmbeddedCvrStore {
    /// Opens the file, or makes it. `task_id` names this server among those that may use the file.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, task_id: &str) -> Result<EmbeddedCvrStore, OpenError> {
        EmbeddedCvrStore::open_with(path, task_id, RowOptions::default())
    }

    /// As [`EmbeddedCvrStore::open`].
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_with(
        path: &Path,
        task_id: &str,
        options: RowOptions,
    ) -> Result<EmbeddedCvrStore, OpenError> {
        let task_id: Arc<str> = task_id.into();
        let (writer, to_write) = sync_channel(MAX_WAITING);
        let (reader, to_read) = sync_channel(MAX_WAITING);
        // One waiting checkpoint is enough.
        let (checkpoint, to_checkpoint) = sync_channel(1);
        let writing = Writer::new(schema::open_writer(path)?, task_id.clone());
        let reading = Reader::new(schema::open_reader(path)?, task_id);
        let checkpointing = schema::open_writer(path)?;
        let (claims, rest) = (writer.clone(), writer.clone());
        let owed = Arc::new(Owed::new(options));
        let (owed_rows, owed_reads, ready) = (owed.clone(), owed.clone(), reader.clone());
        let threads = vec![
            spawn("cvr-writer", move || {
                let ready = move |request: ReaderMessage| read(&ready, request);
                let rows = RowsToWrite::new(owed_rows, Box::new(ready));
                write_loop(writing, rows, &to_write, &checkpoint);
            })?,
            spawn("cvr-reader", move || read_loop(reading, &to_read, &claims, &owed_reads))?,
            spawn("cvr-checkpoint", move || {
                checkpoint_loop(&checkpointing, &to_checkpoint, &rest);
            })?,
        ];
        Ok(EmbeddedCvrStore { writer, reader, owed, threads })
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

    /// Reads what may be owed; then it waits.
    fn read(&self, group: &ClientGroupId, message: ReaderMessage) {
        if let Some(message) = self.owed.wait(group, message) {
            read(&self.reader, message);
        }
    }
}

fn read(reader: &SyncSender<Box<ReaderMessage>>, message: ReaderMessage) {
    if let Err(e) = reader.try_send(Box::new(message)) {
        let (message, error) = refused(e);
        message.refuse(error);
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

/// Gives the verdicts of a batch.
fn give(mut reply: Verdicts, verdicts: Vec<Verdict>) {
    if catch_unwind(AssertUnwindSafe(|| reply(verdicts))).is_err() {
        tracing::error!("the receiver of CVR verdicts panicked");
    }
}

fn refuse_all(batch: Vec<GroupFlush>, error: &CvrStoreError) -> Vec<Verdict> {
    let verdict = |(at, flush): (_, GroupFlush)| Verdict {
        at,
        group: flush.group,
        result: Err(error.clone()),
    };
    batch.into_iter().enumerate().map(verdict).collect()
}

impl CvrStore for EmbeddedCvrStore {
    fn load(&self, group: ClientGroupId, connect_ms: f64, reply: Reply<Answer<Loaded>>) {
        let request = LoadRequest { group: group.clone(), connect_ms, attempts: 0, reply };
        self.read(&group, ReaderMessage::Load(request));
    }

    fn flush(&self, batch: Vec<GroupFlush>, reply: Verdicts) {
        if batch.is_empty() {
            return;
        }
        self.write(WriterMessage::Flush(batch, reply), |message, error| {
            if let WriterMessage::Flush(batch, reply) = message {
                give(reply, refuse_all(batch, &error));
            }
        });
    }

    fn await_rows(&self, group: ClientGroupId, reply: Reply<Answer<()>>) {
        self.owed.tell(&group, reply);
    }

    fn rows(&self, lookup: RowLookup, reply: Reply<Answer<RowPage>>) {
        let group = lookup.group.clone();
        self.read(&group, ReaderMessage::Rows(lookup, reply));
    }

    fn catch_up(&self, scan: CatchupScan, reply: Reply<Answer<CatchupPage>>) {
        if scan.range.is_empty() {
            return answer(reply, Ok(CatchupPage::default()));
        }
        let group = scan.range.group.clone();
        self.read(&group, ReaderMessage::CatchUp(scan, reply));
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
        read(&self.reader, ReaderMessage::Inspect(group, client, clock, reply));
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
        // The writer first: it finishes rows that reads wait for.
        let _ = self.writer.send(Box::new(WriterMessage::Stop));
        if let Some(writer) = (!self.threads.is_empty()).then(|| self.threads.remove(0))
            && writer.join().is_err()
        {
            tracing::error!("the writer of the CVR store panicked");
        }
        let _ = self.reader.send(Box::new(ReaderMessage::Stop));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the CVR store panicked");
            }
        }
        self.owed.abandon().into_iter().for_each(|read| read.refuse(CvrStoreError::Closed));
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

/// What became of a request of a batch, before the commit.
enum Done {
    Flush(Vec<(RowsPlan, Answer<Flushed>)>),
    Purge(Answer<Purged>),
    Noted,
}

fn write_loop(
    mut writer: Writer,
    mut rows: RowsToWrite,
    requests: &Receiver<Box<WriterMessage>>,
    checkpoint: &SyncSender<()>,
) {
    let mut written = 0;
    let mut used = false;
    let mut stop = false;
    while !stop || !rows.is_empty() {
        let mut batch: Vec<WriterMessage> = Vec::new();
        if rows.is_empty() {
            match next(requests, &mut used, || writer.release_memory()) {
                Some(first) => batch.push(*first),
                None => stop = true,
            }
        }
        batch.extend(requests.try_iter().take(MAX_BATCH - batch.len()).map(|request| *request));
        stop |= batch.iter().any(|m| matches!(m, WriterMessage::Stop));
        if !batch.is_empty() {
            write_batch(&mut writer, &mut rows, batch);
        }
        rows.write_slice(&mut writer);
        written += writer.take_written();
        if written >= CHECKPOINT_EVERY && checkpoint.try_send(()).is_ok() {
            written = 0;
        }
    }
}

/// Applies a batch, commits it, and answers.
fn write_batch(writer: &mut Writer, rows: &mut RowsToWrite, batch: Vec<WriterMessage>) {
    if batch.iter().any(|m| matches!(m, WriterMessage::Checkpoint)) {
        writer.checkpoint();
    }
    rows.make_room(writer);
    let mut begun = writer.begin();
    let applied = apply(writer, rows, &batch, &begun, false);
    let done = match applied {
        Some(done) => done,
        None => {
            writer.roll_back();
            begun = writer.begin();
            apply(writer, rows, &batch, &begun, true).unwrap_or_default()
        }
    };
    let committed = begun.and_then(|()| writer.commit());
    for (message, done) in batch.into_iter().zip(done) {
        match (message, done) {
            (WriterMessage::Flush(flushes, reply), Done::Flush(results)) => {
                let mut verdicts = Vec::with_capacity(flushes.len());
                let settled = flushes.into_iter().zip(results).enumerate();
                for (at, (mut flush, (plan, result))) in settled {
                    let result = result.and_then(|flushed| committed.clone().map(|()| flushed));
                    if result.is_ok()
                        && let Some(part) = Part::of(plan, &mut flush)
                    {
                        rows.add(&flush.group, part);
                    }
                    let group = flush.group;
                    verdicts.push(Verdict { at, group, result });
                }
                give(reply, verdicts);
            }
            (WriterMessage::Purge(_, reply), Done::Purge(purged)) => {
                answer(reply, purged.and_then(|p| committed.clone().map(|()| p)));
            }
            _ => {}
        }
    }
}

/// Applies a batch inside the transaction; `None`: it has to be done again, carefully.
fn apply(
    writer: &mut Writer,
    rows: &RowsToWrite,
    batch: &[WriterMessage],
    begun: &Answer<()>,
    carefully: bool,
) -> Option<Vec<Done>> {
    let mut all = Vec::with_capacity(batch.len());
    for message in batch {
        let begun = begun.clone();
        all.push(match message {
            WriterMessage::Flush(flushes, _) => {
                let mut results = Vec::with_capacity(flushes.len());
                for flush in flushes {
                    let plan = rows.plan(flush);
                    let result = match (&begun, carefully) {
                        (Err(error), _) => Err(error.clone()),
                        (Ok(()), true) => writer.flush_carefully(flush, plan),
                        (Ok(()), false) => match writer.flush(flush, plan) {
                            Applied::Verdict(result) => result,
                            Applied::Spoiled => return None,
                        },
                    };
                    results.push((plan, result));
                }
                Done::Flush(results)
            }
            WriterMessage::Purge(limits, _) => {
                Done::Purge(begun.and_then(|()| writer.purge(limits)))
            }
            WriterMessage::TtlClock(group, clock, now_ms) => {
                log_failure(group, begun.and_then(|()| writer.ttl_clock(group, *clock, *now_ms)));
                Done::Noted
            }
            WriterMessage::Claim(group, connect_ms) => {
                log_failure(group, begun.and_then(|()| writer.claim(group, *connect_ms)));
                Done::Noted
            }
            WriterMessage::Checkpoint | WriterMessage::Stop => Done::Noted,
        });
    }
    Some(all)
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
    owed: &Owed<ReaderMessage>,
) {
    let mut used = false;
    // Loads that try again when it is time.
    let mut later: Vec<(Instant, LoadRequest)> = Vec::new();
    loop {
        let request = match later.iter().map(|(at, _)| *at).min() {
            None => match next(requests, &mut used, || reader.release_memory()) {
                Some(request) => Some(request),
                None => return,
            },
            Some(at) => match requests.recv_timeout(at.saturating_duration_since(Instant::now())) {
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            },
        };
        let now = Instant::now();
        let due: Vec<_> = later.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, request) in due {
            later.extend(load(&mut reader, request, claims, owed));
        }
        match request.map(|request| *request) {
            None => {}
            Some(ReaderMessage::Load(request)) => {
                later.extend(load(&mut reader, request, claims, owed));
            }
            Some(ReaderMessage::Rows(lookup, reply)) => answer(reply, reader.rows(&lookup)),
            Some(ReaderMessage::CatchUp(scan, reply)) => answer(reply, reader.catch_up(&scan)),
            Some(ReaderMessage::Inspect(group, client, clock, reply)) => {
                answer(reply, reader.inspect(&group, client.as_ref(), clock));
            }
            Some(ReaderMessage::Stop) => break,
        }
    }
    for (_, request) in later {
        answer(request.reply, Err(CvrStoreError::Closed));
    }
}

/// Loads a group, or gives the request back for later.
fn load(
    reader: &mut Reader,
    mut request: LoadRequest,
    claims: &SyncSender<Box<WriterMessage>>,
    owed: &Owed<ReaderMessage>,
) -> Option<(Instant, LoadRequest)> {
    let group = request.group.clone();
    match reader.load(&group, request.connect_ms) {
        Ok(Attempt::Done(loaded, foreign)) => {
            if foreign {
                let claim = Box::new(WriterMessage::Claim(group, request.connect_ms));
                if let Err(e) = claims.try_send(claim) {
                    // Only a hint: the first flush takes the group over anyway.
                    tracing::warn!(error = %refused(e).1, "a take-over was not noted");
                }
            }
            answer(request.reply, Ok(loaded));
        }
        Ok(Attempt::RowsBehind { version, rows }) => {
            request.attempts += 1;
            if request.attempts >= owed.options.load_attempts {
                answer(request.reply, Err(rows_behind(&version, &rows)));
                return None;
            }
            // They may be our own by now.
            if let Some(ReaderMessage::Load(request)) =
                owed.wait(&group, ReaderMessage::Load(request))
            {
                return Some((Instant::now() + owed.options.load_delay, request));
            }
        }
        Err(error) => answer(request.reply, Err(error)),
    }
    None
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

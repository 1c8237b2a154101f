//! The initial sync: everything published, as of one snapshot, into a new replica file
//! (spec: replication §2).
//!
//! ```text
//!   slot session ── holds the exported snapshot until all others have imported it
//!   copy worker 1 … n ── COPY ── decode ──▶ bounded queue of row batches ──▶ this thread: SQLite
//! ```
//!
//! Postgres and SQLite are both kept busy; the queue bounds the memory. The file appears under
//! its name only when it is whole. Killed at any moment, the next start finds no file, and drops
//! the slot that was left over.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};
use zeroring_core::change::published::{PublishedSchema, PublishedTable};
use zeroring_core::version::StateVersion;
use zeroring_net::pg::client::Interrupter;
use zeroring_net::pg::copy::{BinaryRows, Fields, text_fields};
use zeroring_net::pg::{Client, PgError, quote_ident, quote_literal};
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch};
use zeroring_storage::replica::schema::replica_columns;

use super::config::ReplicationConfig;
use super::error::ReplicationError;
use super::published::{initial_schema_json, read_published_schema};
use super::status::{Phase, ReplicationStatus};
use super::types::{BadValue, Codec, TypeCatalog};
use super::upstream::shard::{self, Occasion, ShardConfig};
use super::upstream::slots::{self, NewReplica};
use super::upstream::{UpstreamError, connect_checked, session_config, validate};

/// Row batches between the workers and the writer, per worker: about a megabyte each.
const QUEUED_BATCHES_PER_WORKER: usize = 4;

/// How often progress is logged, and at most how long a stop goes unnoticed while waiting.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
const STOP_POLL: Duration = Duration::from_millis(100);

/// Most connections for the copy.
const MAX_COPY_WORKERS: usize = 64;

/// Makes a new replica under the configured path; returns its version.
///
/// # Errors
/// [`ReplicationError`]; then there is no new replica, and the slot is dropped if possible.
pub fn run(
    config: &ReplicationConfig,
    status: &ReplicationStatus,
) -> Result<StateVersion, ReplicationError> {
    status.set_phase(Phase::InitialSync);
    status.initial_syncs.fetch_add(1, Ordering::Relaxed);
    status.copied_rows.store(0, Ordering::Relaxed);
    status.copied_bytes.store(0, Ordering::Relaxed);
    let started = Instant::now();
    let (mut client, server_version) = connect_checked(config, "zero-initial-sync")?;
    let shard_config = prepare_shard(&mut client, config, server_version)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let id = now.as_millis().to_string();
    let replica = slots::create_replica(&mut client, config, server_version, &id)?;
    info!(slot = replica.slot, version = %replica.version, "initial sync started");
    let (slot, version) = (replica.slot.clone(), replica.version.clone());
    let result = copy(config, status, &mut client, replica, &shard_config, server_version);
    if let Err(error) = result {
        // The row of `replicas` goes with the next replica that takes over; the slot now, since
        // it holds WAL back.
        match connect_checked(config, "zero-initial-sync-cleanup") {
            Ok((mut client, _)) => slots::drop_slot(&mut client, &config.shard, &slot, &id),
            Err(cause) => warn!(%cause, slot, "a replication slot is left over"),
        }
        return Err(error);
    }
    let rows = status.copied_rows.load(Ordering::Relaxed);
    info!(%version, rows, seconds = started.elapsed().as_secs_f64(), "initial sync is complete");
    Ok(version)
}

/// The shard as requested; made anew if it was made for other publications.
fn prepare_shard(
    client: &mut Client,
    config: &ReplicationConfig,
    server_version: u32,
) -> Result<ShardConfig, ReplicationError> {
    let (shard_id, requested) = (&config.shard, &config.publications);
    let ensure = |client: &mut Client| {
        shard::ensure_shard(client, shard_id, requested, server_version, Occasion::InitialSync)
    };
    match ensure(client) {
        Err(UpstreamError::AutoReset(reason)) => {
            warn!(reason, "setting the upstream shard up anew");
            shard::drop_shard(client, shard_id)?;
            ensure(client)?;
        }
        other => other?,
    }
    let mut found = shard::read_config(client, shard_id)?;
    let fits = shard::publications_match(shard_id, &found, requested, Occasion::InitialSync);
    if !fits || !shard::missing_publications(client, &found.publications)?.is_empty() {
        warn!(publications = ?found.publications, ?requested, "the publications changed");
        shard::drop_shard(client, shard_id)?;
        ensure(client)?;
        found = shard::read_config(client, shard_id)?;
    }
    // Tables that came after the shard was made.
    if let Err(error) =
        validate::set_replica_identities(client, &found.publications, server_version)
    {
        warn!(%error, "a table's replica identity could not be set");
    }
    Ok(found)
}

/// A table to be copied.
struct CopyTask<'s> {
    /// Its number in the published schema.
    index: usize,
    table: &'s PublishedTable,
    sql: String,
    columns: Vec<CopyColumn<'s>>,
    binary: bool,
}

struct CopyColumn<'s> {
    name: &'s str,
    codec: Codec,
    /// The field is in the type's binary form.
    binary: bool,
}

fn copy(
    config: &ReplicationConfig,
    status: &ReplicationStatus,
    client: &mut Client,
    replica: NewReplica,
    shard_config: &ShardConfig,
    server_version: u32,
) -> Result<(), ReplicationError> {
    let publications = &shard_config.publications;
    import_snapshot(client, &replica.snapshot)?;
    let mut catalog = TypeCatalog::default();
    let schema = read_published_schema(client, &mut catalog, publications, server_version)?;
    validate::check_publications(client, publications)?;
    validate::check_tables(&schema)?;
    let (tasks, expected_rows) = copy_tasks(client, &schema, &catalog, config.text_copy)?;
    client.batch_execute("COMMIT")?;

    let workers = config.copy_workers.clamp(1, MAX_COPY_WORKERS).min(tasks.len());
    let mut sessions = Vec::with_capacity(workers);
    for _ in 0..workers {
        let mut session = Client::connect(&session_config(config, "zero-initial-sync-copy"))?;
        import_snapshot(&mut session, &replica.snapshot)?;
        sessions.push(session);
    }
    // All have the snapshot: the session that exported it is not needed any more.
    drop(replica.session);

    let context_json = config.context.to_string();
    let spec = InitialSpec {
        schema: &schema,
        version: &replica.version,
        publications,
        context_json: &context_json,
    };
    let mut file = InitialSync::create(&config.replica_path, &spec)?;
    info!(tables = tasks.len(), expected_rows, workers, "copying");
    copy_tables(&mut file, sessions, tasks, expected_rows, status)?;
    status.set_phase(Phase::Indexing);
    info!(indexes = schema.indexes.len(), "creating indexes");
    let mut stopped = false;
    file.create_indexes(&mut |name| {
        tracing::debug!(name, "creating an index");
        stopped |= status.stopping();
    })?;
    if stopped || status.stopping() {
        return Err(ReplicationError::Stopped);
    }
    // This first: a row of `replicas` without a file is cleaned up, a file without a row would
    // have to be thrown away.
    let json = initial_schema_json(&schema)?;
    if !slots::complete_replica(client, &config.shard, &replica.id, &json, &config.context)? {
        return Err(ReplicationError::Superseded);
    }
    file.finish()?;
    Ok(())
}

fn import_snapshot(client: &mut Client, snapshot: &str) -> Result<(), PgError> {
    client.batch_execute(&format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        quote_literal(snapshot)
    ))
}

/// What to copy, the largest tables first so that the last worker does not end long after the
/// others; and how many rows to expect.
fn copy_tasks<'s>(
    client: &mut Client,
    schema: &'s PublishedSchema,
    catalog: &TypeCatalog,
    text_copy: bool,
) -> Result<(VecDeque<CopyTask<'s>>, u64), ReplicationError> {
    let oids: Vec<String> = schema.tables.iter().map(|t| t.oid.to_string()).collect();
    let rows = client.query(
        "SELECT oid::int8, relkind = 'p', GREATEST(reltuples, 0)::int8, pg_table_size(oid)
         FROM pg_catalog.pg_class WHERE oid = ANY($1::text[]::oid[])",
        &[oids.as_slice().into()],
    )?;
    let mut tasks = vec![];
    let mut expected_rows = 0;
    for (index, table) in schema.tables.iter().enumerate() {
        let (mut partitioned, mut bytes) = (false, 0);
        for row in &rows {
            if row.get::<u32>(0)? == table.oid {
                partitioned = row.get(1)?;
                expected_rows += row.get::<u64>(2)?;
                bytes = row.get::<u64>(3)?;
            }
        }
        let columns: Vec<CopyColumn<'_>> = replica_columns(table)
            .into_iter()
            .map(|(name, column)| {
                let codec = catalog.codec(column.type_oid);
                let codec = codec.unwrap_or(Codec::Scalar(super::types::Scalar::Other));
                CopyColumn { name, codec, binary: !text_copy && codec.has_binary() }
            })
            .collect();
        if !columns.is_empty() {
            let sql = copy_sql(table, &columns, partitioned, !text_copy);
            tasks.push((bytes, CopyTask { index, table, sql, columns, binary: !text_copy }));
        }
    }
    tasks.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    Ok((tasks.into_iter().map(|(_, task)| task).collect(), expected_rows))
}

/// Row filters are OR-ed; a publication without a filter publishes all rows. Rows of tables that
/// inherit belong to those, rows of partitions to the root.
fn copy_sql(
    table: &PublishedTable,
    columns: &[CopyColumn<'_>],
    partitioned: bool,
    binary: bool,
) -> String {
    let expressions: Vec<String> = columns
        .iter()
        .map(|c| if binary { c.codec.select_expression(c.name, true) } else { quote_ident(c.name) })
        .collect();
    let filters: Option<Vec<&str>> =
        table.publications.values().map(|p| p.row_filter.as_deref()).collect();
    let filter = filters
        .filter(|f| !f.is_empty())
        .map(|f| format!(" WHERE ({})", f.join(") OR (")))
        .unwrap_or_default();
    format!(
        "COPY (SELECT {} FROM {}{}.{}{filter}) TO STDOUT{}",
        expressions.join(", "),
        if partitioned { "" } else { "ONLY " },
        quote_ident(&table.schema),
        quote_ident(&table.name),
        if binary { " WITH (FORMAT binary)" } else { "" },
    )
}

/// What the workers share.
struct Shared<'s> {
    tasks: Mutex<VecDeque<CopyTask<'s>>>,
    /// Emptied batches, to be filled again.
    pool: Mutex<Vec<RowBatch>>,
    bytes: AtomicU64,
    /// Somebody failed, or the core is to stop.
    abort: AtomicBool,
}

type Batch = (usize, RowBatch);

fn copy_tables(
    file: &mut InitialSync,
    sessions: Vec<Client>,
    tasks: VecDeque<CopyTask<'_>>,
    expected_rows: u64,
    status: &ReplicationStatus,
) -> Result<(), ReplicationError> {
    let columns: Vec<(usize, usize)> = tasks.iter().map(|t| (t.index, t.columns.len())).collect();
    let interrupters: Vec<Interrupter> =
        sessions.iter().map(Client::interrupter).collect::<Result<_, _>>()?;
    let (sender, receiver) = sync_channel::<Batch>(QUEUED_BATCHES_PER_WORKER * sessions.len());
    let shared = Shared {
        tasks: Mutex::new(tasks),
        pool: Mutex::default(),
        bytes: AtomicU64::new(0),
        abort: AtomicBool::new(false),
    };
    let shared = &shared;
    std::thread::scope(|scope| {
        let workers: Vec<_> = sessions
            .into_iter()
            .map(|session| {
                let sender = sender.clone();
                scope.spawn(move || work(session, shared, &sender))
            })
            .collect();
        drop(sender);
        let written = write_batches(file, receiver, shared, &columns, expected_rows, status);
        if written.is_err() {
            shared.abort.store(true, Ordering::Release);
            interrupters.iter().for_each(Interrupter::interrupt);
        }
        let mut first = written.err();
        for worker in workers {
            let result = worker.join().unwrap_or(Err(ReplicationError::Panicked));
            if let Err(error) = result
                && !matches!(error, ReplicationError::Stopped)
            {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    })
}

/// Takes batches until all workers are done. A worker that fails stops the others, which closes
/// the queue.
fn write_batches(
    file: &mut InitialSync,
    receiver: Receiver<Batch>,
    shared: &Shared<'_>,
    columns: &[(usize, usize)],
    expected_rows: u64,
    status: &ReplicationStatus,
) -> Result<(), ReplicationError> {
    let mut progress = Instant::now();
    let mut rows = 0u64;
    loop {
        match receiver.recv_timeout(STOP_POLL) {
            Ok((table, mut batch)) => {
                file.insert(table, &batch)?;
                let width = columns.iter().find(|(t, _)| *t == table).map_or(1, |(_, n)| *n);
                rows += (batch.cells() / width.max(1)) as u64;
                status.copied_rows.store(rows, Ordering::Relaxed);
                status.copied_bytes.store(shared.bytes.load(Ordering::Relaxed), Ordering::Relaxed);
                batch.clear();
                shared.pool.lock().unwrap_or_else(PoisonError::into_inner).push(batch);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if status.stopping() {
            return Err(ReplicationError::Stopped);
        }
        if progress.elapsed() >= PROGRESS_INTERVAL {
            progress = Instant::now();
            let mib = shared.bytes.load(Ordering::Relaxed) >> 20;
            info!(rows, expected_rows, mib, "initial sync");
        }
    }
}

/// One connection: copies table after table.
fn work(
    mut session: Client,
    shared: &Shared<'_>,
    sender: &SyncSender<Batch>,
) -> Result<(), ReplicationError> {
    let result = (|| {
        loop {
            let task = shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(task) = task else { return Ok(()) };
            copy_table(&mut session, &task, shared, sender)?;
        }
    })();
    if result.is_err() {
        shared.abort.store(true, Ordering::Release);
    }
    result
}

fn copy_table(
    session: &mut Client,
    task: &CopyTask<'_>,
    shared: &Shared<'_>,
    sender: &SyncSender<Batch>,
) -> Result<(), ReplicationError> {
    let take = || shared.pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut batch: RowBatch = take().unwrap_or_default();
    let mut binary = BinaryRows::default();
    let mut scratch = vec![];
    let mut copy = session.copy_out(&task.sql)?;
    while let Some(chunk) = copy.next_chunk()? {
        shared.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        if task.binary {
            binary.feed(chunk, |fields| binary_row(task, fields, &mut batch))?;
        } else {
            text_row(task, chunk, &mut scratch, &mut batch)?;
        }
        if batch.is_full() {
            if shared.abort.load(Ordering::Acquire) {
                return Err(ReplicationError::Stopped);
            }
            let full = std::mem::replace(&mut batch, take().unwrap_or_default());
            // Blocks while the writer is behind; fails when it has given up.
            sender.send((task.index, full)).map_err(|_| ReplicationError::Stopped)?;
        }
    }
    if task.binary {
        binary.finish()?;
    }
    if batch.cells() > 0 {
        sender.send((task.index, batch)).map_err(|_| ReplicationError::Stopped)?;
    }
    Ok(())
}

fn bad_value(task: &CopyTask<'_>, column: &str, cause: BadValue) -> ReplicationError {
    let table = format!("{}.{}", task.table.schema, task.table.name);
    ReplicationError::Value { table, column: column.to_owned(), cause }
}

fn wrong_width(task: &CopyTask<'_>, got: usize) -> ReplicationError {
    let expected = task.columns.len();
    PgError::Protocol(format!(
        "a COPY row of table {} has {got} fields instead of {expected}",
        task.table.name
    ))
    .into()
}

fn binary_row(
    task: &CopyTask<'_>,
    fields: Fields<'_>,
    batch: &mut RowBatch,
) -> Result<(), ReplicationError> {
    if fields.len() != task.columns.len() {
        return Err(wrong_width(task, fields.len()));
    }
    for (i, column) in task.columns.iter().enumerate() {
        let decoded = match fields.get(i) {
            None => {
                batch.null();
                continue;
            }
            Some(raw) if column.binary => column.codec.decode_binary(raw, batch),
            Some(raw) => column.codec.decode_text(raw, batch),
        };
        decoded.map_err(|cause| bad_value(task, column.name, cause))?;
    }
    Ok(())
}

fn text_row(
    task: &CopyTask<'_>,
    line: &[u8],
    scratch: &mut Vec<u8>,
    batch: &mut RowBatch,
) -> Result<(), ReplicationError> {
    let mut columns = task.columns.iter();
    let mut got = 0;
    text_fields(line, scratch, |field| {
        got += 1;
        let column = columns.next().ok_or_else(|| wrong_width(task, got))?;
        match field {
            None => batch.null(),
            Some(raw) => column
                .codec
                .decode_text(raw, batch)
                .map_err(|cause| bad_value(task, column.name, cause))?,
        }
        Ok::<_, ReplicationError>(())
    })?;
    if columns.next().is_some() { Err(wrong_width(task, got)) } else { Ok(()) }
}

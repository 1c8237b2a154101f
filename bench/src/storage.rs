//! The replica's writer and the embedded CVR store, on files of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use tempfile::TempDir;
use zeroring_core::change::message::{
    ChangeMessage, Relation, RelationColumn, ReplicaIdentity, TupleValue,
};
use zeroring_core::change::published::PublishedSchema;
use zeroring_core::cvr::store::{InstanceWrite, QueryWrite, RowChange, RowWrite};
use zeroring_core::cvr::{GroupFlush, Query, QueryBody, RefCounts, RowIdentity};
use zeroring_core::value::Value;
use zeroring_core::version::{CvrVersion, StateVersion};
use zeroring_net::pg::PgConfig;
use zeroring_net::pg::local_server::LocalServer;
use zeroring_storage::cvr_store::CvrStore;
use zeroring_storage::cvr_store::embedded::EmbeddedCvrStore;
use zeroring_storage::cvr_store::postgres::{PostgresCvrConfig, PostgresCvrStore};
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::writer::{Applied, ReplicaWriter, WriterOptions};

use crate::fixture::{self, COLUMNS};
use crate::{Batch, Failure};

const ROWS: usize = 10_000;
/// Of a new replica.
pub(crate) const FIRST_LSN: u64 = 22_020_400_000;

/// A new replica with so many items, and the directory that it goes away with.
pub(crate) fn replica(
    rows: usize,
    schema: &PublishedSchema,
) -> Result<(TempDir, PathBuf), Failure> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("replica.db");
    write_replica(&path, rows, schema)?;
    Ok((dir, path))
}

/// A new replica at `path` with so many items.
pub(crate) fn write_replica(
    path: &Path,
    rows: usize,
    schema: &PublishedSchema,
) -> Result<(), Failure> {
    let version = StateVersion::from_lsn(FIRST_LSN);
    let publications = ["_zero_metadata_0".to_owned(), "_zero_public_0".to_owned()];
    let spec =
        InitialSpec { schema, version: &version, publications: &publications, context_json: "{}" };
    let mut sync = InitialSync::create(path, &spec)?;
    let mut batch = RowBatch::new();
    for n in 0..rows {
        fixture::cells(n, n as i32).iter().for_each(|cell| batch.push(cell));
    }
    sync.insert(0, &batch)?;
    sync.create_indexes(&mut |_| {})?;
    sync.finish()?;
    Ok(())
}

/// What the stream says of the table.
pub(crate) fn relation() -> Arc<Relation> {
    Arc::new(Relation {
        oid: 16_384,
        schema: "public".to_owned(),
        name: "item".to_owned(),
        identity: ReplicaIdentity::Default,
        columns: COLUMNS
            .iter()
            .map(|(name, ..)| RelationColumn {
                name: (*name).to_owned(),
                is_key: *name == "id",
                type_oid: 0,
            })
            .collect(),
    })
}

fn open(path: &Path) -> Result<ReplicaWriter, Failure> {
    Ok(ReplicaWriter::open(path, &WriterOptions::new("zero", TableIds::default()))?)
}

/// Transactions of `size` updates; units are transactions or rows.
fn apply(size: usize, per_row: bool) -> Result<Batch, Failure> {
    let (dir, path) = replica(ROWS, &fixture::published())?;
    let mut writer = open(&path)?;
    let relation = relation();
    let mut lsn = FIRST_LSN;
    let mut n = 0_usize;
    Ok(Box::new(move || {
        let _keep = &dir;
        lsn += 1;
        let watermark = StateVersion::from_lsn(lsn);
        let begin = ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 0.0 };
        writer.apply(&begin)?;
        for _ in 0..size {
            n += 1;
            let new = fixture::cells(n * 61 % ROWS, (n % 100_000) as i32);
            let new = new.into_iter().map(TupleValue::Value).collect();
            writer.apply(&ChangeMessage::Update { relation: relation.clone(), old: None, new })?;
        }
        let Applied::Committed(commit) = writer.apply(&ChangeMessage::Commit { watermark })? else {
            return Err("the transaction was not committed".into());
        };
        let rows: usize = commit.tables.iter().map(|t| t.rows.len()).sum();
        Ok(if per_row { rows as u64 } else { u64::from(rows == size) })
    }))
}

/// A transaction of one update: decoded message to published commit.
pub(crate) fn apply_single() -> Result<Batch, Failure> {
    apply(1, false)
}

/// A transaction of 1,000 updates.
pub(crate) fn apply_bulk() -> Result<Batch, Failure> {
    apply(1000, true)
}

/// One flush of 200 groups, one row each: durable (synced to disk) when it is answered.
pub(crate) fn cvr_flush() -> Result<Batch, Failure> {
    let dir = tempfile::tempdir()?;
    let store = EmbeddedCvrStore::open(&dir.path().join("cvr.db"), "bench")?;
    Ok(flushes(store, dir))
}

/// The same into a private Postgres, with its usual durability.
pub(crate) fn cvr_flush_postgres() -> Result<Batch, Failure> {
    let server = LocalServer::start(&[])?;
    let connection = PgConfig::parse(&server.url("postgres"))?;
    let store = PostgresCvrStore::connect(&PostgresCvrConfig::new(connection), "bench")?;
    Ok(flushes(store, server))
}

/// Flushes to `store`; `keep` lives as long.
fn flushes(store: impl CvrStore + 'static, keep: impl Sized + 'static) -> Batch {
    const GROUPS: usize = 200;
    let mut version = CvrVersion::empty();
    let mut lsn = FIRST_LSN;
    Box::new(move || {
        let _keep = &keep;
        lsn += 1;
        let next = CvrVersion { state: StateVersion::from_lsn(lsn), config: 0 };
        let batch = (0..GROUPS).map(|g| flush(g, &version, &next)).collect();
        version = next;
        let (send, receive) = channel();
        store.flush(batch, Box::new(move |verdicts| drop(send.send(verdicts))));
        let verdicts = receive.recv()?;
        for verdict in &verdicts {
            if let Err(error) = &verdict.result {
                return Err(error.to_string().into());
            }
        }
        Ok(verdicts.len() as u64)
    })
}

fn flush(group: usize, expected: &CvrVersion, next: &CvrVersion) -> GroupFlush {
    let key = vec![("id".into(), Value::string(format!("item-{group}")))];
    let row = RowWrite {
        id: Arc::new(RowIdentity::new("item".into(), key)),
        change: RowChange::Put {
            row_version: next.state.clone(),
            patch_version: next.clone(),
            ref_counts: RefCounts::of("query".into(), 1),
        },
    };
    GroupFlush {
        group: format!("group-{group}").as_str().into(),
        expected: expected.clone(),
        connect_ms: 1.0,
        instance: InstanceWrite {
            version: next.clone(),
            last_active_ms: 1.0,
            ttl_clock: Default::default(),
            replica_version: None,
            client_schema: None,
            profile_id: None,
        },
        clients: vec![],
        queries: if *expected == CvrVersion::empty() { vec![query(next)] } else { vec![] },
        desires: vec![],
        rows: vec![row],
    }
}

/// What the rows are of: written with the first flush.
fn query(version: &CvrVersion) -> QueryWrite {
    QueryWrite::Full(Arc::new(Query {
        id: "query".into(),
        body: QueryBody::Custom { name: "items".into(), args: "[]".into() },
        client_state: Default::default(),
        patch_version: Some(version.clone()),
        transformation_hash: Some("1gf0lvvybqrwj".into()),
        transformation_version: Some(version.clone()),
        signature: None,
    }))
}

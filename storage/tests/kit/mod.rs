//! What the replica's tests share: a published schema, a fresh file of it, and stream messages.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;
use zeroring_core::change::Commit;
use zeroring_core::change::message::{
    ChangeMessage, LiteValue, Relation, RelationColumn, ReplicaIdentity, Tuple, TupleValue,
};
use zeroring_core::change::published::{
    PublishedColumn, PublishedIndex, PublishedSchema, PublishedTable,
};
use zeroring_core::version::StateVersion;
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::writer::{Applied, ReplicaWriter, WriterOptions};

/// Version of the initial sync in all tests.
pub const INITIAL: &str = "4dhwg0";

pub fn version(n: u64) -> StateVersion {
    StateVersion::from_lsn(22_020_400_000 + n)
}

/// A column: name and declared type; `!` at the end is NOT NULL, a leading `~` an enum.
pub fn column(pos: i32, data_type: &str) -> PublishedColumn {
    let not_null = data_type.ends_with('!');
    let data_type = data_type.trim_end_matches('!');
    let is_enum = data_type.starts_with('~');
    let data_type = data_type.trim_start_matches('~').to_owned();
    let array = data_type.ends_with("[]");
    let class = |e: bool| Some(if e { "e" } else { "b" }.to_owned());
    PublishedColumn {
        pos,
        pg_type_class: class(is_enum && !array),
        elem_pg_type_class: if array { class(is_enum) } else { None },
        type_oid: 0,
        character_maximum_length: None,
        not_null: Some(not_null),
        dflt: None,
        data_type,
    }
}

pub fn table(schema: &str, name: &str, columns: &[(&str, &str)]) -> PublishedTable {
    PublishedTable {
        oid: name.bytes().fold(16384, |h, b| (h * 31 + u32::from(b)) % 1_000_003),
        schema: schema.into(),
        schema_oid: 2200,
        name: name.into(),
        replica_identity: "d".into(),
        columns: columns
            .iter()
            .enumerate()
            .map(|(i, (n, t))| ((*n).to_owned(), column(i as i32 + 1, t)))
            .collect(),
        primary_key: Vec::new(),
        publications: Default::default(),
    }
}

pub fn index(
    schema: &str,
    table: &str,
    name: &str,
    unique: bool,
    columns: &[&str],
) -> PublishedIndex {
    PublishedIndex {
        schema: schema.into(),
        table_name: table.into(),
        name: name.into(),
        unique,
        is_primary_key: None,
        is_replica_identity: None,
        is_immediate: None,
        columns: columns
            .iter()
            .map(|c| match c.strip_suffix(" DESC") {
                Some(c) => (c.to_owned(), "DESC".into()),
                None => ((*c).to_owned(), "ASC".into()),
            })
            .collect(),
    }
}

/// A new replica of `schema` with `rows` per table.
pub fn create(path: &Path, schema: &PublishedSchema, rows: &[Vec<Vec<LiteValue>>]) {
    let version = StateVersion::parse(INITIAL).unwrap();
    let publications = ["_zero_metadata_0".to_owned(), "_zero_public_0".to_owned()];
    let spec =
        InitialSpec { schema, version: &version, publications: &publications, context_json: "{}" };
    let mut sync = InitialSync::create(path, &spec).unwrap();
    for (t, rows) in rows.iter().enumerate() {
        let mut batch = RowBatch::new();
        rows.iter().flatten().for_each(|v| batch.push(v));
        sync.insert(t, &batch).unwrap();
    }
    sync.create_indexes(&mut |_| {}).unwrap();
    sync.finish().unwrap();
}

/// A directory that goes away, with the name of a replica in it.
pub fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("replica.db");
    (dir, path)
}

pub fn writer(path: &Path) -> ReplicaWriter {
    ReplicaWriter::open(path, &WriterOptions::new("zero", TableIds::default())).unwrap()
}

/// The relation of a published table; `keys` are its identity columns.
pub fn relation(table: &PublishedTable, identity: ReplicaIdentity, keys: &[&str]) -> Arc<Relation> {
    let mut columns: Vec<_> = table.columns.iter().collect();
    columns.sort_by_key(|(_, c)| c.pos);
    Arc::new(Relation {
        oid: table.oid,
        schema: table.schema.clone(),
        name: table.name.clone(),
        identity,
        columns: columns
            .iter()
            .map(|(n, _)| RelationColumn {
                name: (*n).clone(),
                is_key: identity == ReplicaIdentity::Full || keys.contains(&n.as_str()),
                type_oid: 0,
            })
            .collect(),
    })
}

pub fn int(n: i64) -> LiteValue {
    LiteValue::Integer(n)
}
pub fn text(s: &str) -> LiteValue {
    LiteValue::Text(s.into())
}
pub fn some(v: LiteValue) -> TupleValue {
    TupleValue::Value(v)
}
pub fn tuple(values: impl IntoIterator<Item = LiteValue>) -> Tuple {
    values.into_iter().map(TupleValue::Value).collect()
}

/// Applies a transaction of `changes` at `version(n)`.
pub fn transact(w: &mut ReplicaWriter, n: u64, changes: Vec<ChangeMessage>) -> Arc<Commit> {
    let watermark = version(n);
    w.apply(&ChangeMessage::Begin { watermark: watermark.clone(), commit_time_ms: 1.5 }).unwrap();
    for change in &changes {
        assert!(matches!(w.apply(change).unwrap(), Applied::Pending));
    }
    match w.apply(&ChangeMessage::Commit { watermark }).unwrap() {
        Applied::Committed(commit) => commit,
        other => panic!("not committed: {other:?}"),
    }
}

/// A query's rows, every value printed with its storage class.
pub fn dump(path: &Path, sql: &str) -> Vec<String> {
    let c = Connection::open(path).unwrap();
    let mut s = c.prepare(sql).unwrap();
    let n = s.column_count();
    s.query_map([], |r| {
        Ok((0..n)
            .map(|i| match r.get_ref(i).unwrap() {
                rusqlite::types::ValueRef::Null => "null".to_owned(),
                rusqlite::types::ValueRef::Integer(n) => format!("{n}"),
                rusqlite::types::ValueRef::Real(n) => format!("{n:?}r"),
                rusqlite::types::ValueRef::Text(t) => String::from_utf8_lossy(t).into_owned(),
                rusqlite::types::ValueRef::Blob(b) => format!("x{b:?}"),
            })
            .collect::<Vec<_>>()
            .join("|"))
    })
    .unwrap()
    .collect::<Result<_, _>>()
    .unwrap()
}

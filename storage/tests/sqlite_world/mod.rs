//! A replica file made of a database of vectors, and kept up with its commits by plain SQL: the
//! engine's second source, without the replication in front of it.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use rusqlite::Connection;
use rusqlite::types::{ToSql, Value as SqlValue};
use zeroring_core::change::Commit;
use zeroring_core::ivm::memory_source::Database;
use zeroring_core::ivm::proof::runner::Replayed;
use zeroring_core::ivm::source::{Ended, Fetch, Part, Reach, Source, SourceError};
use zeroring_core::row::{Key, Row, RowRef};
use zeroring_core::schema::{Schema, TableSpec};
use zeroring_core::value::Value;
use zeroring_core::version::StateVersion;
use zeroring_storage::replica::estimate::ExistsSide;
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader};
use zeroring_storage::replica::source::ReplicaSource;
use zeroring_storage::replica::types::ValueParam;

/// A source over a replica file that follows commits.
pub struct SqliteWorld {
    pub source: ReplicaSource,
    writer: Connection,
    /// Goes away last.
    _dir: tempfile::TempDir,
}

/// A replica file with the rows of `db`.
pub fn sqlite(schema: &Schema, db: &Database, version: &StateVersion) -> SqliteWorld {
    let dir = tempfile::tempdir().unwrap();
    let (source, writer) = replica(&dir, schema, db, version);
    SqliteWorld { source, writer, _dir: dir }
}

/// A source over a replica file in `dir`, and a connection that may write to it.
pub fn replica(
    dir: &tempfile::TempDir,
    schema: &Schema,
    db: &Database,
    version: &StateVersion,
) -> (ReplicaSource, Connection) {
    let path = dir.path().join("replica.db");
    let writer = Connection::open(&path).unwrap();
    writer
        .execute_batch(
            r#"PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; BEGIN;
               CREATE TABLE "_zero.replicationState" (stateVersion TEXT);
               INSERT INTO "_zero.replicationState" VALUES ('');"#,
        )
        .unwrap();
    schema.tables.values().for_each(|t| create(&writer, t, db));
    finish(&writer, version);
    let reader = ReplicaReader::open(&path, &ReaderOptions::default()).unwrap();
    // Tests have few rows, and shall interrupt statements all the same.
    let mut source = ReplicaSource::new(reader).unwrap().look_at_work_every(20).unwrap();
    source.refresh().unwrap();
    (source, writer)
}

/// The same, every EXISTS begun with its child where that is possible.
pub fn child_first(schema: &Schema, db: &Database, version: &StateVersion) -> SqliteWorld {
    let mut world = sqlite(schema, db, version);
    world.source.always_begin_with(ExistsSide::Child);
    world
}

/// Ends the transaction at a version.
fn finish(c: &Connection, version: &StateVersion) {
    c.prepare_cached(r#"UPDATE "_zero.replicationState" SET stateVersion = ?"#)
        .unwrap()
        .execute([version.as_str()])
        .unwrap();
    c.execute_batch("COMMIT").unwrap();
}

fn create(c: &Connection, t: &TableSpec, db: &Database) {
    let columns: Vec<String> = t
        .columns
        .iter()
        .map(|c| {
            let not_null = if c.nullable { "" } else { "|NOT_NULL" };
            format!("\"{}\" \"{}{not_null}\"", c.name, c.upstream_type)
        })
        .collect();
    c.execute_batch(&format!(
        "CREATE TABLE \"{}\" ({}, \"_0_version\" \"text\")",
        t.name,
        columns.join(",")
    ))
    .unwrap();
    let all = t.indexes.iter().chain(t.unique_keys.iter().map(|k| &k.columns));
    for (i, k) in all.enumerate() {
        let names: Vec<String> = k.iter().map(|&c| format!("\"{}\"", t.columns[c].name)).collect();
        c.execute_batch(&format!(
            "CREATE INDEX \"{}_{i}\" ON \"{}\" ({})",
            t.name,
            t.name,
            names.join(",")
        ))
        .unwrap();
    }
    db.rows(t.id).for_each(|row| insert(c, t, row));
}

fn insert(c: &Connection, t: &TableSpec, row: &Row) {
    let holes = vec!["?"; t.columns.len() + 1].join(",");
    let sql = format!("INSERT INTO \"{}\" VALUES ({holes})", t.name);
    let mut params: Vec<Box<dyn ToSql + '_>> = Vec::new();
    for (v, column) in row.values.iter().zip(&t.columns) {
        match v {
            Value::Number(n) if &*column.upstream_type == "float8" => {
                params.push(Box::new(SqlValue::Real(*n)));
            }
            v => params.push(Box::new(ValueParam(v))),
        }
    }
    params.push(Box::new(row.version.as_str().to_owned()));
    let mut statement = c.prepare_cached(&sql).unwrap();
    statement.execute(rusqlite::params_from_iter(params.iter())).unwrap();
}

fn delete(c: &Connection, t: &TableSpec, key: &Key) {
    let by: Vec<String> =
        t.replica_key.iter().map(|&c| format!("\"{}\" = ?", t.columns[c].name)).collect();
    let sql = format!("DELETE FROM \"{}\" WHERE {}", t.name, by.join(" AND "));
    let mut statement = c.prepare_cached(&sql).unwrap();
    let gone = statement.execute(rusqlite::params_from_iter(key.iter().map(ValueParam))).unwrap();
    assert_eq!(gone, 1, "a row to delete is not there");
}

impl Replayed for SqliteWorld {
    fn follow(&mut self, commit: &Commit, after: &Database) -> Result<(), String> {
        self.writer.execute_batch("BEGIN").unwrap();
        if let Some(schema) = &commit.schema {
            for t in schema.tables.values() {
                self.writer.execute_batch(&format!("DROP TABLE \"{}\"", t.name)).unwrap();
                create(&self.writer, t, after);
            }
        }
        for change in &commit.tables {
            let t = &change.table;
            if change.truncated {
                self.writer.execute_batch(&format!("DELETE FROM \"{}\"", t.name)).unwrap();
            }
            for old in change.rows.iter().filter_map(|r| r.old.as_ref()) {
                delete(&self.writer, t, &old.project(&t.replica_key));
            }
            for new in change.rows.iter().filter_map(|r| r.new.as_ref()) {
                insert(&self.writer, t, new);
            }
        }
        finish(&self.writer, &commit.version);
        self.source.refresh().map(drop).map_err(|e| e.to_string())
    }
}

impl SqliteWorld {
    /// A limit is so low that statements over a few rows are interrupted: one now, another then.
    fn patience(&self, units: u64) -> u64 {
        match units {
            u64::MAX => units,
            _ => units.min(1 + self.source.statements() % 8),
        }
    }
}

impl Source for SqliteWorld {
    fn version(&self) -> &StateVersion {
        self.source.version()
    }

    fn fetch(
        &mut self,
        fetch: &Fetch<'_>,
        visit: &mut dyn FnMut(RowRef) -> std::ops::ControlFlow<()>,
    ) -> Result<(), SourceError> {
        self.source.fetch(fetch, visit)
    }

    fn fetch_within(
        &mut self,
        fetch: &Fetch<'_>,
        units: u64,
        visit: &mut dyn FnMut(RowRef) -> std::ops::ControlFlow<()>,
    ) -> Result<Ended, SourceError> {
        self.source.fetch_within(fetch, self.patience(units), visit)
    }

    fn reach(&mut self, fetch: &Fetch<'_>, rows: usize, units: u64) -> Result<Reach, SourceError> {
        self.source.reach(fetch, rows, self.patience(units))
    }

    fn fetch_part(
        &mut self,
        fetch: &Fetch<'_>,
        part: &mut Part,
        units: u64,
        visit: &mut dyn FnMut(RowRef),
    ) -> Result<(), SourceError> {
        self.source.fetch_part(fetch, part, self.patience(units), visit)
    }

    fn few_per_key(&mut self, table: &TableSpec, columns: &[usize], most: usize) -> bool {
        self.source.few_per_key(table, columns, most)
    }

    fn exists(&mut self, fetch: &Fetch<'_>) -> Result<bool, SourceError> {
        self.source.exists(fetch)
    }
}

//! Hydration: a query of three levels over a replica file, and a second subscriber of it.
//!
//! 100 projects with 9 items each, 10 comments per item: 10,000 rows in 1,001 partitions. And what
//! each parent costs of which only some children are read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use zeroring_core::change::message::LiteValue;
use zeroring_core::change::published::{
    PublishedColumn, PublishedIndex, PublishedSchema, PublishedTable,
};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::source::Source;
use zeroring_core::schema::Schema;
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_storage::replica::initial::{InitialSpec, InitialSync, RowBatch};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader, visible_schema};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::source::ReplicaSource;

use crate::engine::read;
use crate::{Batch, Failure};

const PROJECTS: usize = 100;
const ITEMS: usize = 900;
const COMMENTS: usize = 9_000;
/// Rows of the query; the replica holds as many again that it does not reach.
const ROWS: u64 = (PROJECTS + ITEMS + COMMENTS) as u64;

/// Table, number of rows that queries reach (it has as many others), column that names the parent.
type Table = (&'static str, usize, &'static str);

/// Of the query of three levels.
pub(crate) const TREE: [Table; 3] =
    [("project", PROJECTS, "org"), ("item", ITEMS, "project"), ("comment", COMMENTS, "item")];

/// Parents with 30 children each.
pub(crate) const FAMILIES: [Table; 2] =
    [("item", PARENTS, "project"), ("comment", PARENTS * 30, "item")];
const PARENTS: usize = 1_000;

/// (name, Postgres type); the second column names the parent.
const COLUMNS: [(&str, &str); 7] = [
    ("id", "text"),
    ("", "text"),
    ("title", "text"),
    ("rank", "int4"),
    ("open", "bool"),
    ("created", "timestamptz"),
    ("body", "text"),
];

fn published(tables: &[Table]) -> PublishedSchema {
    let mut schema = PublishedSchema { tables: vec![], indexes: vec![] };
    for (i, (name, _, parent)) in tables.iter().enumerate() {
        let columns = COLUMNS.iter().enumerate().map(|(pos, (column, data_type))| {
            let spec = PublishedColumn {
                pos: pos as i32 + 1,
                pg_type_class: Some("b".to_owned()),
                elem_pg_type_class: None,
                type_oid: 0,
                character_maximum_length: None,
                not_null: Some(true),
                dflt: None,
                data_type: (*data_type).to_owned(),
            };
            (if column.is_empty() { *parent } else { *column }.to_owned(), spec)
        });
        schema.tables.push(PublishedTable {
            oid: 16_384 + i as u32,
            schema: "public".to_owned(),
            schema_oid: 2200,
            name: (*name).to_owned(),
            replica_identity: "d".to_owned(),
            columns: columns.collect(),
            primary_key: vec!["id".to_owned()],
            publications: Default::default(),
        });
        for (column, unique) in [("id", true), (*parent, false)] {
            schema.indexes.push(PublishedIndex {
                schema: "public".to_owned(),
                table_name: (*name).to_owned(),
                name: format!("{name}_{column}"),
                unique,
                is_primary_key: Some(unique),
                is_replica_identity: None,
                is_immediate: Some(true),
                columns: [(column.to_owned(), json!("ASC"))].into_iter().collect(),
            });
        }
    }
    schema
}

/// Every other row belongs to nothing that the query reaches.
fn cells(table: &str, n: usize, parents: usize) -> [LiteValue; COLUMNS.len()] {
    let text = |text: String| LiteValue::Text(text.into());
    let parent = if n.is_multiple_of(2) { "" } else { "x" };
    let parent = format!("{parent}{}", n / 2 % parents);
    [
        text(format!("{table}-{n:08}-{:012x}", n * 2_654_435_761)),
        text(parent),
        text(format!("The {n}th \"{table}\"")),
        LiteValue::Integer((n * 7_919 % 100_000) as i64),
        LiteValue::Integer(n.is_multiple_of(3).into()),
        LiteValue::Integer(1_700_000_000_000 + n as i64 * 1_000),
        text("some text of a row, as long as such texts are on the average of them".to_owned()),
    ]
}

fn replica(tables: &[Table]) -> Result<(TempDir, PathBuf), Failure> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("replica.db");
    write_replica(&path, tables)?;
    Ok((dir, path))
}

/// A new replica with these tables.
pub(crate) fn write_replica(path: &Path, tables: &[Table]) -> Result<(), Failure> {
    let schema = published(tables);
    let version = StateVersion::from_lsn(22_020_400_000);
    let publications = ["_zero_metadata_0".to_owned(), "_zero_public_0".to_owned()];
    let spec = InitialSpec {
        schema: &schema,
        version: &version,
        publications: &publications,
        context_json: "{}",
    };
    let mut sync = InitialSync::create(path, &spec)?;
    let mut above: Vec<LiteValue> = vec![];
    for (i, (table, reached, _)) in tables.iter().enumerate() {
        let mut batch = RowBatch::new();
        let mut ids = Vec::new();
        for n in 0..reached * 2 {
            let mut row = cells(table, n, above.len().max(1));
            if n % 2 == 0 {
                ids.push(row[0].clone());
                if let Some(parent) = above.get(n / 2 % above.len().max(1)) {
                    row[1] = parent.clone();
                }
            }
            row.iter().for_each(|cell| batch.push(cell));
        }
        sync.insert(i, &batch)?;
        above = ids;
    }
    sync.create_indexes(&mut |_| {})?;
    sync.finish()?;
    Ok(())
}

fn query() -> Json {
    let related = |field: &str, subquery: Json| {
        json!([{"correlation": {"parentField": ["id"], "childField": [field]},
            "subquery": subquery}])
    };
    let comments =
        json!({"table": "comment", "alias": "comments", "orderBy": [["created", "asc"]]});
    let items = json!({"table": "item", "alias": "items", "orderBy": [["rank", "desc"]],
        "related": related("item", comments)});
    json!({"table": "project", "orderBy": [["id", "asc"]], "related": related("project", items),
        "where": {"type": "simple", "op": "=", "left": {"type": "column", "name": "org"},
            "right": {"type": "literal", "value": "0"}}})
}

fn subscribe(
    engine: &mut Engine,
    source: &mut ReplicaSource,
    schema: &Schema,
    query: &Json,
) -> Result<InstanceId, Failure> {
    let ast = serde_json::from_value(query.clone())?;
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default())?;
    let id = engine.subscribe(&Arc::new(plan), params.into())?;
    // In slices, as an executor does it.
    while engine.hydrate_step(id, source, &mut Budget::units(1_000))? == Progress::More {}
    Ok(id)
}

struct World {
    engine: Engine,
    source: ReplicaSource,
    schema: Arc<Schema>,
}

fn open(path: &Path, ids: &TableIds) -> Result<World, Failure> {
    let mut source = ReplicaSource::new(ReplicaReader::open(path, &ReaderOptions::default())?)?;
    source.refresh()?;
    let schema = visible_schema(source.reader(), ids)?;
    let engine = Engine::new(EngineConfig::default(), source.version().clone(), schema.clone());
    Ok(World { engine, source, schema })
}

fn check(rows: usize) -> Result<u64, Failure> {
    if rows as u64 == ROWS { Ok(ROWS) } else { Err(format!("{rows} rows, not {ROWS}").into()) }
}

/// With a connection, statements and an engine of its own each time. (The file is in the page
/// cache of the operating system.)
pub(crate) fn cold() -> Result<Batch, Failure> {
    let (dir, path) = replica(&TREE)?;
    let ids = TableIds::default();
    Ok(Box::new(move || {
        let _keep = &dir;
        let World { mut engine, mut source, schema } = open(&path, &ids)?;
        let id = subscribe(&mut engine, &mut source, &schema, &query())?;
        check(engine.stats().resident_rows).inspect(|_| engine.unsubscribe(id))
    }))
}

/// The rows of an instance that is there already: no statement is run.
pub(crate) fn second() -> Result<Batch, Failure> {
    let (dir, path) = replica(&TREE)?;
    let World { mut engine, mut source, schema } = open(&path, &TableIds::default())?;
    subscribe(&mut engine, &mut source, &schema, &query())?;
    let statements = source.statements();
    Ok(Box::new(move || {
        let _keep = &dir;
        let id = subscribe(&mut engine, &mut source, &schema, &query())?;
        let rows = read(&mut engine, &mut source, id)? as usize;
        engine.unsubscribe(id);
        if source.statements() != statements {
            return Err("a second subscriber ran a statement".into());
        }
        check(rows)
    }))
}

fn comments(limit: Option<u32>) -> Json {
    let mut query = json!({"table": "comment", "alias": "comments"});
    if let Some(limit) = limit {
        query["limit"] = limit.into();
        query["orderBy"] = json!([["created", "desc"]]);
    }
    json!({"correlation": {"parentField": ["id"], "childField": ["item"]}, "subquery": query})
}

/// 1,000 parents, of each the newest 3 of 30 children; with the statements of a connection that
/// has run the query before.
pub(crate) fn limited() -> Result<Batch, Failure> {
    parents(json!({"related": [comments(Some(3))]}))
}

/// 1,000 parents for which a child exists, with up to three rows of evidence each.
pub(crate) fn evidence() -> Result<Batch, Failure> {
    parents(json!({"where": {"type": "and", "conditions": [project(), {
        "type": "correlatedSubquery", "op": "EXISTS", "related": comments(None)}]}}))
}

/// Every parent that has children.
fn project() -> Json {
    json!({"type": "simple", "op": "=", "left": {"type": "column", "name": "project"},
        "right": {"type": "literal", "value": "0"}})
}

fn parents(of: Json) -> Result<Batch, Failure> {
    let (dir, path) = replica(&FAMILIES)?;
    let World { mut engine, mut source, schema } = open(&path, &TableIds::default())?;
    let mut query = json!({"table": "item", "orderBy": [["id", "asc"]], "where": project()});
    for (name, value) in of.as_object().into_iter().flatten() {
        query[name] = value.clone();
    }
    Ok(Box::new(move || {
        let _keep = &dir;
        let id = subscribe(&mut engine, &mut source, &schema, &query)?;
        let rows = engine.rows(id)?.filter(|held| held.count == 1).count();
        engine.unsubscribe(id);
        match rows == PARENTS * 4 {
            true => Ok(PARENTS as u64),
            false => Err(format!("{rows} rows of {PARENTS} parents").into()),
        }
    }))
}

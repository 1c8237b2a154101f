//! The engine: what a commit costs, by what the queries are; what hydrating a row costs.

use std::sync::Arc;

use serde_json::{Value as Json, json};
use zeroring_core::change::{Commit, RowChange, TableChange};
use zeroring_core::ivm::engine::{Budget, Engine, EngineConfig, InstanceId, Progress};
use zeroring_core::ivm::memory_source::{Database, MemorySource};
use zeroring_core::ivm::source::Source;
use zeroring_core::schema::{Schema, TableSpec};
use zeroring_core::version::StateVersion;
use zeroring_core::zql::compile::{IdentityKeys, compile};
use zeroring_storage::replica::reader::{ReaderOptions, ReplicaReader, visible_schema};
use zeroring_storage::replica::schema::TableIds;
use zeroring_storage::replica::source::ReplicaSource;

use crate::fixture::{self, ITEMS};
use crate::{Batch, Failure, storage};

/// Queries of the routing bench, each of another project.
const PROJECTS: usize = 200;

fn of_project(project: usize) -> Json {
    json!({"table": "item", "orderBy": [["id", "asc"]], "where": {
        "type": "simple", "op": "=", "left": {"type": "column", "name": "project_id"},
        "right": {"type": "literal", "value": format!("p{project}")}}})
}

fn subscribe(
    engine: &mut Engine,
    source: &mut dyn Source,
    schema: &Schema,
    query: &Json,
) -> Result<InstanceId, Failure> {
    let ast = serde_json::from_value(query.clone())?;
    let (plan, params) = compile(&ast, schema, &IdentityKeys::default())?;
    let id = engine.subscribe(&Arc::new(plan), params.into())?;
    while engine.hydrate_step(id, source, &mut Budget::unlimited())? == Progress::More {}
    Ok(id)
}

/// An engine over rows in memory, with commits made one after the other.
struct World {
    engine: Engine,
    source: MemorySource,
    table: Arc<TableSpec>,
    lsn: u64,
}

impl World {
    fn new(rows: usize, queries: &[Json]) -> Result<World, Failure> {
        let table = fixture::table();
        let schema = fixture::schema(&table);
        let version = StateVersion::from_lsn(1);
        let mut db = Database::default();
        for n in 0..rows {
            db.put(&table, fixture::row(n, n as i32, &version));
        }
        let mut source = MemorySource::new(db, version.clone());
        let mut engine = Engine::new(EngineConfig::default(), version, schema.clone());
        for query in queries {
            subscribe(&mut engine, &mut source, &schema, query)?;
        }
        Ok(World { engine, source, table, lsn: 1 })
    }

    /// Gives item `n` another rank and advances; the number of row deltas.
    fn write(&mut self, n: usize, rank: i32) -> Result<u64, Failure> {
        self.lsn += 1;
        let version = StateVersion::from_lsn(self.lsn);
        let new = fixture::row(n, rank, &version);
        let old = self.source.db.get(self.table.id, &new.project(&[0])).cloned();
        let rows = vec![RowChange { old, new: Some(new) }];
        let change = TableChange { table: self.table.clone(), rows, truncated: false };
        let commit = Arc::new(Commit {
            previous: self.source.version.clone(),
            version,
            tables: vec![change],
            schema: None,
            upstream_commit_ms: 0.0,
            permissions_changed: false,
        });
        self.source.advance(&commit);
        self.engine.begin_advance(&[commit])?;
        loop {
            let mut budget = Budget::unlimited();
            if let Some(advanced) = self.engine.advance_step(&mut self.source, &mut budget)? {
                return Ok(advanced.deltas.iter().map(|d| d.rows.len() as u64).sum());
            }
        }
    }
}

/// Commits of one row each, in turn over items spread by `stride`; each must reach a query.
fn commits(mut world: World, rows: usize, stride: usize) -> Batch {
    let mut n = 0_usize;
    Box::new(move || {
        let mut reached = 0;
        for _ in 0..100 {
            n += 1;
            reached += world.write(n * stride % rows, (n * 7919 % 100_000) as i32)?;
        }
        if reached == 0 {
            return Err("no commit reached a query".into());
        }
        Ok(100)
    })
}

/// Many queries that differ in one literal; a commit concerns one of them.
pub(crate) fn route() -> Result<Batch, Failure> {
    let queries: Vec<Json> = (0..PROJECTS).map(of_project).collect();
    let rows = PROJECTS * ITEMS;
    Ok(commits(World::new(rows, &queries)?, rows, 61))
}

/// One query, which every commit concerns.
pub(crate) fn shared() -> Result<Batch, Failure> {
    Ok(commits(World::new(ITEMS, &[of_project(0)])?, ITEMS, 1))
}

/// A window of 50 of 2,000 rows, ordered by what changes: rows enter, leave, and move.
pub(crate) fn window() -> Result<Batch, Failure> {
    let query = json!({"table": "item", "orderBy": [["rank", "desc"], ["id", "asc"]], "limit": 50});
    Ok(commits(World::new(2000, &[query])?, 2000, 61))
}

/// A query over 50 rows of a replica of 10,000, hydrated and given up again.
pub(crate) fn hydrate() -> Result<Batch, Failure> {
    let (dir, path) = storage::replica(PROJECTS * ITEMS)?;
    let ids = TableIds::default();
    let reader = ReplicaReader::open(&path, &ReaderOptions::default())?;
    let mut source = ReplicaSource::new(reader)?;
    source.refresh()?;
    let schema = visible_schema(source.reader(), &ids)?;
    let version = source.version().clone();
    let mut engine = Engine::new(EngineConfig::default(), version, schema.clone());
    let mut project = 0;
    Ok(Box::new(move || {
        let _keep = &dir;
        project = (project + 1) % PROJECTS;
        let id = subscribe(&mut engine, &mut source, &schema, &of_project(project))?;
        let rows = engine.rows(id)?.count() as u64;
        engine.unsubscribe(id);
        Ok(rows)
    }))
}
